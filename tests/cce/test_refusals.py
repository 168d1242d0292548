"""What `linear_cross_entropy` refuses, and how it says so: the key, the value, the way out."""

from __future__ import annotations

import pytest
import torch
from head_problems import METHODS, D, V, can, make, ours
from torch import Tensor

from longseq.cce import FilterReport, linear_cross_entropy


def small() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(4, D), torch.randn(V, D, requires_grad=True), torch.randint(0, V, (4,))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("label", [V, -1, -99, 2**40])
@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_a_label_outside_the_vocabulary_raises(method: str, label: int, reduction: str) -> None:
    if not can(method, {"reduction": reduction}):
        return
    problem = make(shape=(3, 9), ignored="none", reduction=reduction)
    problem.labels[1, 2] = problem.labels[2, 2] = label
    with pytest.raises(ValueError, match=rf"labels\[11\]={label} \(flattened; 2 such\).*{V} words.*-100"):
        ours(problem, method=method)


def test_a_scale_that_is_trained_is_refused_rather_than_forgotten() -> None:
    with pytest.raises(NotImplementedError, match="logit_scale as a tensor"):
        linear_cross_entropy(*small(), logit_scale=torch.tensor(2.0, requires_grad=True))


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_label_outside_the_vocabulary_is_nan_on_a_gpu(method: str) -> None:
    hidden, weight = torch.randn(8, 16, device="cuda"), torch.randn(32, 16, device="cuda")
    labels = torch.arange(8, device="cuda")
    labels[3] = 32
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, method=method)
    assert loss.isnan()
    with torch.autograd.detect_anomaly(), pytest.raises(ValueError, match=r"labels\[3\]=32"):
        linear_cross_entropy(hidden, weight, labels, method=method)


def test_all_problems_with_the_arguments_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"labels \(3,\).*must be integers.*cast one"):
        linear_cross_entropy(torch.randn(4, D), torch.randn(V, D).double(), torch.zeros(3))
    with pytest.raises(
        ValueError, match=r"bias \(5,\) must be \(V,\).*token_weights \(4, 1\).*lora A \(2, 9\)"
    ):
        linear_cross_entropy(
            *small(),
            bias=torch.zeros(5),
            token_weights=torch.ones(4, 1),
            lora=(torch.zeros(2, 9), torch.zeros(V, 3), 1.0),
        )
    with pytest.raises(
        ValueError, match=r"weight \(131, 0\) must have a word and a column.*shift=True needs rows.*2 parts"
    ):
        linear_cross_entropy(
            *(torch.zeros(0), torch.zeros(V, 0), torch.tensor(1)),
            shift=True,
            lora=(torch.zeros(2, 0), torch.zeros(V, 2)),
        )
    with pytest.raises(ValueError, match=r"weight \(0, 29\) must have a word and a column.*torch.float32"):
        linear_cross_entropy(torch.zeros(4, D), torch.zeros(0, D), torch.zeros(4))
    wrong = {"softcap": -1.0, "label_smoothing": 1.0, "z_loss": -1.0, "reduction": "avg"}
    with pytest.raises(
        ValueError,
        match=r"softcap=-1.0.*label_smoothing=1.0.*z_loss=-1.0.*reduction='avg' must be one of mean",
    ):
        linear_cross_entropy(*small(), **wrong)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "fast"}, r"method='fast' must be one of auto, exact"),
        (
            {"method": "exact", "reduction": "none"},
            r"method='exact'.*reduction='none' needs method='recompute'",
        ),
        (
            {"method": "exact", "return_lse": True},
            r"method='exact'.*return_lse=True needs method='recompute'",
        ),
        ({"method": "exact", "group": object()}, r"method='exact'.*group= needs method='recompute'"),
        (
            {"method": "filtered", "reduction": "none"},
            r"method='filtered'.*needs method='recompute' or 'auto'",
        ),
        ({"method": "filtered", "label_smoothing": 0.1}, r"label_smoothing=0.1.*take method='exact'"),
        ({"method": "reference", "group": object()}, r"group= needs method='recompute' or 'auto'"),
        ({"method": "exact", "filter_eps": 0.01}, r"filter_eps=0.01 has no effect.*take 'filtered'"),
        ({"method": "recompute", "filter_eps": None}, r"filter_eps=None has no effect.*take 'filtered'"),
        ({"method": "filtered", "filter_eps": 0.0}, r"filter_eps=0.0 must be 'auto'.*method='exact'"),
        ({"method": "filtered", "filter_eps": 1}, r"filter_eps=1 must be 'auto'"),
        ({"method": "filtered", "filter_eps": "high"}, r"filter_eps='high' must be 'auto'"),
        ({"method": "filtered", "filter_eps": float("nan")}, r"filter_eps=nan must be 'auto'"),
        ({"method": "auto", "filter_eps": -1.0}, r"filter_eps=-1.0 must be 'auto'"),
        ({"memory_mib": 0}, r"memory_mib=0 must be a whole number from 1, or None"),
        ({"memory_mib": -5}, r"memory_mib=-5 must be a whole number"),
        ({"memory_mib": 2.5}, r"memory_mib=2.5 must be a whole number"),
        ({"softcap": float("inf")}, r"softcap=inf must be positive and finite; None"),
        ({"z_loss": float("inf")}, r"z_loss=inf must be 0 or more, and finite"),
        ({"logit_scale": float("nan")}, r"logit_scale=nan must be finite"),
        ({"method": "exact", "filter_report": FilterReport()}, r"filter_report has nothing to tell of"),
    ],
)
def test_an_option_that_cannot_be_names_key_value_and_way_out(options: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        linear_cross_entropy(*small(), **options)


def test_methods_tell_all_their_problems_at_once() -> None:
    with pytest.raises(
        ValueError, match=r"reduction='none', return_lse=True, group= needs.*label_smoothing=0.1: smoothing"
    ):
        linear_cross_entropy(
            *small(),
            method="filtered",
            reduction="none",
            return_lse=True,
            group=object(),
            label_smoothing=0.1,
        )
    with pytest.raises(ValueError, match=r"group= needs.*filter_eps=0.5 has no effect"):
        linear_cross_entropy(*small(), method="reference", group=object(), filter_eps=0.5)


@pytest.mark.parametrize("more", [{}, {"reduction": "none"}, {"label_smoothing": 0.1}])
@pytest.mark.parametrize("eps", ["high", 2, 0.0, None])
def test_auto_refuses_a_threshold_that_is_none(eps: float | str | None, more: dict) -> None:
    """Also where it would take a method without a filter."""
    with pytest.raises(ValueError, match=rf"filter_eps={eps!r} must be 'auto'"):
        linear_cross_entropy(*small(), filter_eps=eps, **more)


def test_token_weights_get_no_gradient() -> None:
    with pytest.raises(NotImplementedError, match=r"token_weights\.detach\(\)"):
        linear_cross_entropy(*small(), token_weights=torch.ones(4, requires_grad=True))


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("method", ["exact", "recompute", "filtered"])
def test_a_gradient_of_the_gradient_is_refused(method: str, squared: bool) -> None:
    """It is not there; what must not happen is that its share is left out and nothing is said."""
    problem = make().to(torch.float32)
    weight = problem.parts["weight"]
    loss = ours(problem, method=method)[0]
    if squared:
        loss = loss.square()  # what arrives from above has a gradient too
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    penalty = gradient.square().sum() + weight.sum()
    with pytest.raises(RuntimeError, match=r"backward|twice"):
        penalty.backward()
