"""A low-rank adapter of the head: as if the weight were `weight + scale * B @ A`, which is never made."""

from __future__ import annotations

import pytest
import torch
from head_problems import LORA_SCALE, METHODS, D, N, Problem, V, can, check, make, ours, results
from torch import Tensor
from torch.nn import functional as F

from longseq.cce import linear_cross_entropy

OPTIONS = [
    {},
    {"reduction": "sum", "token_weights": True},
    {"bias": True, "softcap": 3.0, "logit_scale": 1.7, "z_loss": 0.01},
    {"bias": True, "label_smoothing": 0.1, "reduction": "none", "return_lse": True, "shift": True},
]
CASES = [(method, options) for method in METHODS for options in OPTIONS if can(method, options)]
FROZEN = [
    ("weight",),  # as an adapter is trained
    ("weight", "bias"),
    ("hidden", "weight", "bias"),
    ("weight", "lora_a"),
    ("weight", "lora_b"),
    ("lora_a", "lora_b"),
    ("hidden", "weight", "lora_a"),
    ("hidden", "weight", "bias", "lora_b"),
]


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize(("method", "options"), CASES)
def test_the_merged_weight(method: str, options: dict, rank: int) -> None:
    check(make(rank=rank, upstream=0.3, **options), method=method)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2]], ids=["plain", "options"])
@pytest.mark.parametrize("method", ["exact", "recompute", "filtered"])
def test_as_accurate_as_two_linear_layers(method: str, options: dict, dtype: torch.dtype) -> None:
    """Of PEFT's form; the reference, which rounds the merged weight, may be further away."""
    check(make(rank=8, **options), dtype, slack=2.0, method=method)


@pytest.mark.parametrize("options", [{}, {"reduction": "none", "return_lse": True}], ids=["mean", "none"])
@pytest.mark.parametrize("frozen", FROZEN, ids="+".join)
@pytest.mark.parametrize("method", METHODS)
def test_frozen_parts(method: str, frozen: tuple[str, ...], options: dict) -> None:
    if can(method, options):
        check(make(bias=True, rank=3, softcap=4.0, **options), frozen=frozen, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_a_new_adapter_changes_no_logit_and_learns(method: str) -> None:
    """B starts as zeros: the loss is the base model's, and the gradient reaches B, not yet A."""
    problem = make(rank=4)
    problem.parts["lora_b"].zero_()
    found = check(problem, frozen=("weight",), method=method)
    base = Problem({name: problem.parts[name] for name in ("hidden", "weight")}, problem.labels)
    torch.testing.assert_close(found["loss"], ours(base, method=method)[0], rtol=1e-12, atol=0)
    assert found["lora_b"].any()
    assert not found["lora_a"].any()


@pytest.mark.parametrize("method", METHODS)
def test_training_an_adapter_is_training_the_merged_head(method: str) -> None:
    """Some steps of gradient descent on A and B, in each form."""

    def train(loss_of: object) -> list[Tensor]:
        problem = make(rank=3, ignored="none").to(torch.float64, frozen=("weight",))
        for _ in range(3):
            trained = [problem.parts[name] for name in ("hidden", "lora_a", "lora_b")]
            for part, gradient in zip(trained, torch.autograd.grad(loss_of(problem), trained), strict=True):
                part.data.sub_(gradient, alpha=0.5)
        return trained

    def merged(problem: Problem) -> Tensor:
        a, b = problem.parts["lora_a"], problem.parts["lora_b"]
        logits = problem.parts["hidden"] @ (problem.parts["weight"] + LORA_SCALE * b @ a).T
        return F.cross_entropy(logits, problem.labels)

    for mine, theirs in zip(train(lambda p: ours(p, method=method)[0]), train(merged), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_ignored_tokens_reach_neither_a_nor_b(method: str) -> None:
    problem = make(rank=3).to(torch.float64)
    counts = problem.labels != -100
    few = Problem(problem.parts | {"hidden": problem.parts["hidden"][counts]}, problem.labels[counts])
    few = few.to(torch.float64)
    all_of_them, of_few = (
        results(problem, ours(problem, method=method)),
        results(few, ours(few, method=method)),
    )
    assert not all_of_them["hidden"][~counts].any()
    for name in ("loss", "weight", "lora_a", "lora_b"):
        torch.testing.assert_close(all_of_them[name], of_few[name], rtol=1e-10, atol=1e-14)


def test_low_rank_parts_that_do_not_fit_are_named() -> None:
    hidden, weight, labels = torch.randn(N, D), torch.randn(V, D), torch.randint(0, V, (N,))
    a, b = torch.zeros(3, D), torch.zeros(V, 3)
    for lora in ((b, a, 1.0), (a, b[:, :2], 1.0), (a[0], b, 1.0), (a, b[1:], 1.0), (a[:, 1:], b, 1.0)):
        with pytest.raises(ValueError, match=r"lora A .* and B .* must be \(R, D\) and \(V, R\)"):
            linear_cross_entropy(hidden, weight, labels, lora=lora)
    with pytest.raises(ValueError, match=r"lora A is torch.float32, B torch.bfloat16.*autocast"):
        linear_cross_entropy(hidden, weight, labels, lora=(a, b.bfloat16(), 1.0))
    for lora in ((a, b), (a, b, 1.0, 2.0)):
        with pytest.raises(ValueError, match=rf"lora has {len(lora)} parts; it must be \(A, B, scale\)"):
            linear_cross_entropy(hidden, weight, labels, lora=lora)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"lora has"):
            linear_cross_entropy(hidden, weight, labels, lora=lora)
    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(hidden, weight, labels, lora=(a, b.bfloat16(), 1.0))
