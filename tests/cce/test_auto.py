"""Method `auto`: which method runs for which options, what it says, and when it stops to filter."""

from __future__ import annotations

import logging
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from head_problems import D, V
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from longseq.cce import FilterReport, choice, linear_cross_entropy

N = 300


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods that were chosen, in order; nothing is known or said before."""
    found: list[str] = []

    def watched(*args, **kwargs) -> str:
        found.append(chosen(*args, **kwargs))
        return found[-1]

    chosen = choice.choose_method
    # By name, the package has a function where this module is.
    module = import_module("longseq.cce.linear_cross_entropy")
    monkeypatch.setattr(module, "choose_method", watched)
    monkeypatch.setattr(choice, "_said", set())
    monkeypatch.setattr(choice, "_watched", WeakIdKeyDictionary())
    return found


def problem(*, peaked: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a head that is trained, labels; peaked: half of the tiles are under 1e-3."""
    hidden, weight = torch.randn(N, D), torch.randn(2 * V, D)
    labels = torch.randint(0, 128, (N,))
    if peaked:
        hidden[:, 0] = 1.0
        weight *= 0.3
        weight[128:, 0] = -30.0
    return hidden, weight.requires_grad_(), labels


@pytest.mark.parametrize(
    ("options", "method", "why"),
    [
        ({}, "exact", "gradients in forward"),
        ({"label_smoothing": 0.1}, "exact", "gradients in forward"),
        ({"softcap": 3.0, "z_loss": 0.1, "logit_scale": 2.0, "reduction": "sum"}, "exact", "in forward"),
        ({"filter_eps": "auto"}, "exact", "nothing left out"),
        ({"filter_eps": 1e-3}, "filtered", "filter_eps=0.001 allows"),
        ({"filter_eps": 1e-3, "label_smoothing": 0.1}, "exact", "nothing left out"),
        ({"reduction": "none"}, "recompute", "reduction='none': gradients must wait"),
        ({"return_lse": True, "reduction": "none"}, "recompute", "reduction='none', return_lse=True: grad"),
        ({"return_lse": True, "filter_eps": 1e-3}, "recompute", "return_lse=True: gradients must wait"),
    ],
)
def test_the_choice_and_its_reason(
    options: dict, method: str, why: str, ran: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="longseq.cce.choice")
    for _ in range(3):
        linear_cross_entropy(*problem(), **options)
    assert ran == [method] * 3
    (said,) = [record.getMessage() for record in caplog.records]
    assert f"method '{method}'" in said
    assert why in said


def test_without_a_gradient_nothing_is_stored(ran: list[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="longseq.cce.choice")
    hidden, weight, labels = problem()
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, labels, filter_eps=1e-3)
    linear_cross_entropy(hidden, weight.detach(), labels)
    assert ran == ["recompute", "recompute"]
    assert "no gradient is wanted" in caplog.text
    # A gradient of any part is a gradient.
    bias = torch.zeros(2 * V, requires_grad=True)
    linear_cross_entropy(hidden, weight.detach(), labels, bias=bias)
    adapter = torch.zeros(3, D, requires_grad=True), torch.zeros(2 * V, 3), 1.0
    linear_cross_entropy(hidden, weight.detach(), labels, lora=adapter)
    assert ran[2:] == ["exact", "exact"]


def test_a_filter_is_not_taken_unasked(ran: list[str]) -> None:
    """Whatever the data: leaving part of the gradient out is the user's decision."""
    for peaked in (True, True, False):
        report = FilterReport()
        linear_cross_entropy(*problem(peaked=peaked), filter_report=report)
        assert report.tiles == 0
    assert set(ran) == {"exact"}


def test_a_filter_that_keeps_nearly_all_is_given_up(ran: list[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="longseq.cce.choice")
    hidden, weight, labels = problem()
    report = FilterReport()
    for _ in range(3):
        linear_cross_entropy(hidden, weight, labels, filter_eps=1e-12, filter_report=report)
    assert report.living_share > choice.FULL_ENOUGH
    assert ran == ["filtered", "exact", "exact"]
    assert "a filter last kept too many of the tiles to pay (100%)" in caplog.text
    # Of this head: another has not been seen yet.
    linear_cross_entropy(hidden, weight.detach().clone().requires_grad_(), labels, filter_eps=1e-12)
    assert ran[-1] == "filtered"


def test_a_filter_that_was_given_up_is_tried_again(ran: list[str]) -> None:
    hidden, weight, labels = problem()
    _, other, _ = problem()
    period = choice.LOOK_AGAIN_EVERY
    for _ in range(2 * period):
        linear_cross_entropy(hidden, weight, labels, filter_eps=1e-12)
    assert [index for index, method in enumerate(ran) if method == "filtered"] == [0, period]
    # Each head counts for itself.
    ran.clear()
    for _ in range(3):
        linear_cross_entropy(hidden, other, labels, filter_eps=1e-12)
    assert ran == ["filtered", "exact", "exact"]


def test_a_head_that_gets_surer_is_filtered_again(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "LOOK_AGAIN_EVERY", 4)
    hidden, weight, labels = problem()
    surer_hidden, surer, _ = problem(peaked=True)
    for step in range(10):
        if step == 2:
            weight.data.copy_(surer)
            hidden.copy_(surer_hidden)
        linear_cross_entropy(hidden, weight, labels, filter_eps=1e-3 if step > 1 else 1e-12)
    assert ran == ["filtered"] + ["exact"] * 3 + ["filtered"] * 6


def test_a_filter_that_pays_goes_on(ran: list[str]) -> None:
    hidden, weight, labels = problem(peaked=True)
    report = FilterReport()
    for _ in range(3):
        linear_cross_entropy(hidden, weight, labels, filter_eps=1e-3, filter_report=report)
    assert report.living_share < choice.FULL_ENOUGH
    assert ran == ["filtered"] * 3


def test_the_share_at_the_edge(ran: list[str]) -> None:
    hidden, weight, labels = problem()
    for share, method in ((0.9, "filtered"), (0.91, "exact"), (0.5, "filtered"), (1.0, "exact")):
        choice.watch(weight, torch.tensor([share * 1000, 1000.0, 0.0, 1.0]))
        linear_cross_entropy(hidden, weight, labels, filter_eps=1e-3)
        assert ran[-1] == method
    choice.watch(weight, torch.zeros(4))  # a call without a token that counts
    linear_cross_entropy(hidden, weight, labels, filter_eps=1e-3)
    assert ran[-1] == "filtered"


def test_a_method_that_was_asked_for_is_not_changed(ran: list[str]) -> None:
    hidden, weight, labels = problem()
    for _ in range(2):
        linear_cross_entropy(hidden, weight, labels, method="filtered", filter_eps=1e-12)
    linear_cross_entropy(hidden, weight, labels, filter_eps=1e-3)
    assert ran == ["filtered"] * 3


def test_a_head_that_is_gone_is_forgotten(ran: list[str]) -> None:
    hidden, weight, labels = problem()
    linear_cross_entropy(hidden, weight, labels, filter_eps=1e-12)
    assert len(choice._watched) == 1
    del weight
    assert len(choice._watched) == 0


def test_sums_on_their_way_leave_the_last_ones_known(ran: list[str]) -> None:
    hidden, weight, labels = problem()
    linear_cross_entropy(hidden, weight, labels, filter_eps=1e-12)
    seen = choice._watched[weight]
    arrived = SimpleNamespace(query=lambda: False)
    seen.coming, seen.arrived = torch.tensor([1.0, 1000.0, 0.0, 1.0]), arrived
    assert choice.last_living_share(weight) == 1.0
    arrived.query = lambda: True
    assert choice.last_living_share(weight) == 0.001


def test_a_filter_is_given_up_under_autocast_too(ran: list[str]) -> None:
    hidden, weight, labels = problem()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            linear_cross_entropy(hidden, weight, labels, filter_eps=1e-12)
    assert ran == ["filtered", "exact"]


def test_a_choice_is_said_once_whatever_the_share(ran: list[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="longseq.cce.choice")
    hidden, weight, labels = problem()
    for share in (0.91, 0.93, 0.99):
        choice.watch(weight, torch.tensor([share * 1000, 1000.0, 0.0, 1.0]))
        linear_cross_entropy(hidden, weight, labels, filter_eps=1e-3)
    assert len(caplog.records) == 1
