"""The gradient filter of the fused kernels: what it keeps is exact, what it drops is what the rule says."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from numerics import relative_error
from torch import Tensor

pytest.importorskip("triton")

from cce_problems import (
    Problem,
    assert_gradients,
    capped_logits,
    exact,
    exact_truth,
    fill_fresh_memory,
    in_float64,
    make,
    needs_of,
    skip_without_kernels,
)

from longseq.cce import FilterReport, fused, portable
from longseq.cce.head import IGNORED
from longseq.cce.kernels.tuning import TILE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
Z_LOSS = 0.02
EPS = 1e-4
GROUPS = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 1]])
"""Which tiles of words (columns) each tile of tokens (rows) gives a probability."""


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_fresh_memory(monkeypatch)


@pytest.fixture
def device(kernel_device: str) -> str:
    skip_without_kernels(kernel_device)
    return kernel_device


def grouped(device: str, **options: float) -> Problem:
    """Tokens that look at some tiles of words alone; one of the second tile at a word of the fifth too."""
    problem = make(num_tokens=360, vocab_size=700, ignored=0.16, spread=0.5, device=device, **options)
    tokens, head, _ = problem
    kept = (tokens.labels != IGNORED).nonzero().squeeze(1)
    assert 2 * TILE < len(kept) < 3 * TILE
    groups = GROUPS.to(tokens.hidden)
    tokens.hidden[:, :6] = 0.0
    tokens.hidden[kept, :6] = 14.0 * groups[torch.arange(len(kept), device=device) // TILE]
    tokens.hidden[kept[TILE + 9], 4] = 14.0
    head.weight[:, :6] = torch.eye(6, device=device)[torch.arange(700, device=device) // TILE]
    tokens.labels[kept[::2]] %= 2 * TILE  # some of the labels are in tiles that nobody looks at
    return problem


def mask_of(problem: Problem, words: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """By the rule: living tiles, what is kept of the gradient `(tokens that count, V)`, dropped probability.

    `words` is the order of the words that tiles are cut from.
    """
    kept = problem.tokens.labels != IGNORED
    labels = problem.tokens.labels[kept].unsqueeze(1)
    # A label's element is made on its own: it keeps no tile alive, and is never dropped.
    p = capped_logits(*in_float64(problem, kept)[:2]).softmax(1).scatter_(1, labels, 0.0)
    order = torch.arange(p.shape[1], device=p.device) if words is None else words
    rows, columns = -(-p.shape[0] // TILE), -(-p.shape[1] // TILE)
    padded = p.new_zeros(rows * TILE, columns * TILE)
    padded[: p.shape[0], : p.shape[1]] = p[:, order]
    tiles = padded.view(rows, TILE, columns, TILE)
    largest = tiles.amax((1, 3))
    assert ((largest / EPS).log().abs() > 0.01).all(), "a tile is too near the threshold for this test"
    alive = largest >= EPS
    dropped = float(tiles.sum((1, 3))[~alive].sum())
    of_word = torch.empty_like(p, dtype=torch.bool)
    of_word[:, order] = alive.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)[
        : p.shape[0], : p.shape[1]
    ]
    return alive, of_word.scatter_(1, labels, True), dropped


def check_report(report: Tensor, alive: Tensor, dropped: float, problem: Problem) -> None:
    assert report[:2].tolist() == [alive.sum(), alive.numel()]
    assert abs(float(report[2]) / dropped - 1) < (1e-5 if not alive.is_cuda else 1e-2)
    assert report[3] == (problem.tokens.labels != IGNORED).sum()


OPTIONS = {"plain": {}, "all": {"bias": True, "rank": 8, "softcap": 30.0}}


@functools.cache
def filtered(kind: str, device: str) -> tuple[Problem, Any]:
    """A problem and what the kernels make of it: once for all tests, for the interpreter is slow."""
    problem = grouped(device, **OPTIONS[kind])
    return problem, exact(problem, chunk=2 * TILE, z_loss=Z_LOSS, filter_eps=EPS)


@pytest.mark.parametrize("kind", OPTIONS)
def test_filter(kind: str, device: str) -> None:
    """Exactly the tiles without a probability of `eps` are left out; labels and the rest are exact."""
    problem, found = filtered(kind, device)
    alive, mask, dropped = mask_of(problem)
    expected = GROUPS.to(device, torch.bool)
    expected[1, 4] = True
    assert torch.equal(alive, expected)
    check_report(found.report, alive, dropped, problem)
    loss, whole = exact_truth(problem, Z_LOSS)
    _, truth = exact_truth(problem, Z_LOSS, mask)
    assert relative_error(found.loss, loss) < 1e-5
    # A bias' gradient is a sum that needs no product: nothing of it is left out.
    assert_gradients(found.gradients, truth._replace(bias=whole.bias), needs_of(problem))


def test_filter_with_words_in_order(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words that few tokens look at are brought together, whatever their places in the vocabulary."""
    monkeypatch.setattr(fused, "SORT_FROM_TOKENS", 1)
    problem = grouped(device, bias=True, rank=8)
    finite = problem.tokens._replace(
        hidden=problem.tokens.hidden.nan_to_num(0.0), inner=problem.tokens.inner.nan_to_num(0.0)
    )
    shuffled = torch.randperm(700, device=device)
    head = problem.head._replace(
        weight=problem.head.weight[shuffled],
        bias=problem.head.bias[shuffled],
        outer=problem.head.outer[shuffled],
    )
    problem = Problem(finite, head, problem.token_weights)
    alive_unsorted = mask_of(problem)[0]
    found = exact(problem, chunk=2 * TILE, filter_eps=EPS)
    alive, mask, dropped = mask_of(problem, found.words)
    assert alive.sum() < alive_unsorted.sum()
    check_report(found.report, alive, dropped, problem)
    loss, whole = exact_truth(problem)
    _, truth = exact_truth(problem, mask=mask)
    truth = truth._replace(bias=whole.bias)
    of_words = {name: getattr(truth, name)[found.words] for name in ("weight", "bias", "outer")}
    assert relative_error(found.loss, loss) < 1e-5
    assert_gradients(found.gradients, truth._replace(**of_words), needs_of(problem))


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_portable_filter_tells_and_keeps_the_same(kind: str, device: str) -> None:
    """A FilterReport and its threshold mean the same wherever a call runs, while words are in id order."""
    problem, ours = filtered(kind, device)
    needs = needs_of(problem)
    assert len(problem.tokens.labels) < fused.SORT_FROM_TOKENS
    assert ours.words is None
    loss, gradients, sums = portable.exact_loss(
        *problem, label_smoothing=0.0, z_loss=Z_LOSS, needs=needs, memory_mib=None, filter_eps=EPS
    )
    reports = FilterReport(), FilterReport()
    for report, found in zip(reports, (ours.report, sums), strict=True):
        report.add(found)
    assert reports[0].tiles == reports[1].tiles == GROUPS.numel()
    assert reports[0].living_share == reports[1].living_share == (GROUPS.sum() + 1) / GROUPS.numel()
    rel = 1e-5 if device == "cpu" else 2e-2  # there, one of the two rounds its logits to bfloat16
    assert reports[0].dropped_probability == pytest.approx(reports[1].dropped_probability, rel=rel)
    assert ours.report[3] == sums[3]
    assert relative_error(ours.loss, loss) < rel
    if device == "cpu":
        _, truth = exact_truth(problem, Z_LOSS, mask_of(problem)[1])
        assert_gradients(gradients, truth, needs)
