"""Loss, statistics and gradients of the fused kernels against plain PyTorch in float64.

On the CPU the kernels run in Triton's interpreter, in float32; on a GPU the same tests run them in bfloat16.
"""

from __future__ import annotations

import pytest
import torch
from numerics import relative_error
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from cce_problems import (
    ALL,
    NAN,
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
    statistics_of,
    truth_of,
)

from longseq.cce import fused
from longseq.cce.head import ELSEWHERE, IGNORED, Gradients, Needs, Statistics
from longseq.cce.kernels.tuning import TILE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
Z_LOSS = 0.02
HEADS = {
    "plain": {},
    "whole tiles": {"vocab_size": 512, "width": 64},
    "less than a tile": {"vocab_size": 131, "width": 24},
    "bias": {"bias": True, "logit_scale": -0.8, "softcap": 5.0},
    "low rank": {"rank": 16},
    "all": {
        "vocab_size": 777,
        "width": 136,
        "rank": 8,
        "bias": True,
        "softcap": 6.0,
        "logit_scale": -1.3,
    },
}


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_fresh_memory(monkeypatch)


@pytest.fixture
def device(kernel_device: str) -> str:
    skip_without_kernels(kernel_device)
    return kernel_device


def check_exact(problem: Problem, **options: float) -> fused.ExactResult:
    found = exact(problem, **options)
    loss, truth = exact_truth(problem, options.get("z_loss", 0.0))
    assert relative_error(found.loss, loss) < 1e-5
    assert_gradients(found.gradients, truth, needs_of(problem))
    return found


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS.keys())
def test_exact_loss(options: dict, device: str) -> None:
    """Two chunks, the last one partly full; ignored tokens between the others hold NaN, and so do weights."""
    problem = make(**options, device=device)
    assert TILE < int((problem.tokens.labels != IGNORED).sum()) < 2 * TILE
    check_exact(problem, z_loss=Z_LOSS if len(options) > 2 else 0.0)


def test_chunks_of_several_tiles(device: str) -> None:
    """The last chunk has tokens in one of its two tiles, which the products must leave out."""
    problem = make(num_tokens=400, ignored=0.2, device=device)
    assert 2 * TILE < int((problem.tokens.labels != IGNORED).sum()) < 3 * TILE
    check_exact(problem, chunk=2 * TILE)


def test_a_chunk_without_a_token_that_counts(device: str) -> None:
    problem = make(num_tokens=250, ignored=0.65, bias=True, device=device)
    assert int((problem.tokens.labels != IGNORED).sum()) < TILE
    check_exact(problem)


@pytest.mark.parametrize("filter_eps", [0.0, 1e-3])
def test_no_token_counts(filter_eps: float, device: str) -> None:
    problem = make(num_tokens=60, ignored=1.1, rank=8, bias=True, device=device)
    found = exact(problem, filter_eps=filter_eps)
    assert found.loss == 0.0
    for gradient in found.gradients:
        assert not gradient.any()
    assert not found.report.any()


def test_a_vocabulary_of_one_word(device: str) -> None:
    problem = make(num_tokens=50, vocab_size=1, width=8, bias=True, device=device)
    found = exact(problem)
    assert abs(found.loss) < 1e-3
    for gradient in found.gradients[:3]:
        assert gradient.abs().max() < 1e-3


def test_weights_of_tokens_and_words_that_are_elsewhere(device: str) -> None:
    """A label elsewhere has a log-sum-exp and no target; its weight of NaN makes all that it reaches NaN."""
    problem = make(num_tokens=100, rank=8, bias=True, device=device)
    problem.tokens.labels[[0, 7, 50]] = ELSEWHERE
    problem.tokens.hidden[[0, 7, 50]] = 1.0
    problem.tokens.inner[[0, 7, 50]] = 1.0
    problem.token_weights[[0, 7, 50]] = torch.tensor([0.5, 0.0, 2.0], device=device)
    found = check_exact(problem, z_loss=Z_LOSS)
    assert not found.gradients.hidden[7].any()

    problem.token_weights[50] = NAN
    found = exact(problem, z_loss=Z_LOSS)
    assert found.loss.isnan()
    assert found.gradients.hidden[50].isnan().all()
    assert found.gradients.inner[50].isnan().all()
    others = torch.arange(100, device=device) != 50
    assert found.gradients.hidden[others].isfinite().all()
    for gradient in (found.gradients.weight, found.gradients.bias, found.gradients.outer):
        assert gradient.isnan().all()


@pytest.mark.parametrize("filter_eps", [0.0, 1e-30])
def test_losses_that_are_far_out(filter_eps: float, device: str) -> None:
    """Rows whose exponentials are, at the first guess, too large for a float, or all too small."""
    problem = make(num_tokens=100, ignored=0.2, bias=True, device=device)
    tokens, head, weights = problem
    far = (tokens.labels != IGNORED).nonzero().squeeze(1)[:4]
    weights[far] = 1.0
    head.bias.sub_(60.0)
    tokens.hidden[far[:3]] *= torch.tensor([[16.0], [64.0], [256.0]], device=device)
    logits = capped_logits(*in_float64(problem, far)[:2])
    tokens.labels[far[:3]] = logits[:3].argmin(1)
    tokens.labels[far[3]] = ELSEWHERE  # counts as a logit of 0
    lse, target, _ = statistics_of(logits, tokens.labels[far])
    assert (lse - target)[1] > 200
    assert (lse - target)[3] < -40
    check_exact(problem, z_loss=1e-4, filter_eps=filter_eps)


def test_tokens_that_the_model_is_sure_of(device: str) -> None:
    """What is left of the gradient where a probability is almost 1 keeps its digits."""
    problem = make(num_tokens=60, vocab_size=3000, ignored=0.0, spread=1.0, device=device)
    tokens, head, weights = problem
    weights.fill_(1.0)
    own = head.weight[tokens.labels]
    tokens.hidden.copy_(0.3 * tokens.hidden + 17.0 * own / own.norm(dim=1, keepdim=True).square())
    lse, target, _ = statistics_of(capped_logits(*in_float64(problem)[:2]), tokens.labels)
    losses = lse - target
    assert 1e-5 < losses.min() < losses.max() < 1e-2
    found, (_, truth) = exact(problem), exact_truth(problem)
    errors = (found.gradients.hidden.double() - truth.hidden).norm(dim=1) / truth.hidden.norm(dim=1)
    # Beside a sum that holds the label too, a rounding of its logit would be a hundred times this.
    assert errors.max() < (1e-4 if device == "cpu" else 0.02)
    assert relative_error(found.loss, losses.sum()) < 1e-4


NEEDS = [Needs(), Needs(hidden=True), Needs(weight=True), Needs(bias=True, outer=True), Needs(inner=True)]


@pytest.mark.parametrize(
    "needs", NEEDS, ids=lambda needs: "+".join(n for n in ALL._fields if getattr(needs, n))
)
def test_only_what_is_needed(needs: Needs, device: str) -> None:
    problem = make(num_tokens=60, rank=8, bias=True, device=device)
    found, (loss, truth) = exact(problem, needs=needs), exact_truth(problem)
    assert relative_error(found.loss, loss) < 1e-5
    assert_gradients(found.gradients, truth, needs)


def test_gradients_of_the_head_that_wait(device: str) -> None:
    """`defer_weight`: the log-sum-exp is given instead, for backward; with it everything is found again."""
    problem = make(rank=8, bias=True, softcap=6.0, ignored_hold=1.0, device=device)
    found, (loss, truth) = exact(problem, defer=True, z_loss=Z_LOSS), exact_truth(problem, Z_LOSS)
    assert relative_error(found.loss, loss) < 1e-5
    assert_gradients(found.gradients, truth, Needs(hidden=True, inner=True))
    counts = problem.tokens.labels != IGNORED
    lse = capped_logits(*in_float64(problem, counts)[:2]).logsumexp(1)
    assert relative_error(found.lse[counts], lse) < 1e-5
    weights = problem.token_weights
    upstream = Statistics(weights * (1.0 + 2.0 * Z_LOSS * found.lse), -weights)
    left = needs_of(problem)._replace(hidden=False, inner=False)
    late = fused.statistics_backward(problem.tokens, problem.head, found.lse, upstream, left, None)
    assert_gradients(late, truth, left)


@pytest.mark.parametrize(("num_tokens", "ignored"), [(230, 0.35), (60, 1.1)], ids=["some", "none"])
def test_exponentials_that_are_kept(num_tokens: int, ignored: float, device: str) -> None:
    """`keep`: the head's gradients are made in backward, times what reaches the loss, from exponentials."""
    problem = make(num_tokens, rank=8, bias=True, softcap=6.0, ignored=ignored, device=device)
    chunk = -(-num_tokens // TILE) * TILE
    found, (loss, truth) = exact(problem, chunk=chunk, keep=True), exact_truth(problem)
    assert relative_error(found.loss, loss) < 1e-5
    assert_gradients(found.gradients, truth, Needs(hidden=True, inner=True))
    needs = Needs(weight=True, bias=True, outer=True)
    for wanted in (needs, Needs(bias=True)):
        late = fused.head_gradients(found.kept, 300, torch.tensor(0.3, device=device), wanted)
        assert_gradients(late, Gradients(*(g * 0.3 for g in truth)), wanted)


def test_layouts(device: str) -> None:
    """By columns, with rows that begin anywhere, and not dense: where numbers lie changes nothing."""
    problem = make(num_tokens=60, rank=8, bias=True, ignored_hold=1.0, device=device)
    tokens, head, needs = problem.tokens, problem.head, needs_of(problem)
    problem = Problem(
        tokens._replace(hidden=tokens.hidden.T.contiguous().T, inner=F.pad(tokens.inner, (0, 3))[:, :-3]),
        head._replace(
            weight=F.pad(head.weight, (1, 2))[:, 1:-2],
            bias=head.bias.repeat_interleave(2)[::2],
            outer=head.outer.T.contiguous().T,
        ),
        problem.token_weights,
    )
    check_exact(problem)
    found = check_statistics(problem, need_mean=True)
    check_statistics_backward(problem, found.lse, has_mean=True, needs=needs)


def make_scattered(device: str, *, num_tokens: int, **options: float) -> Problem:
    """With labels elsewhere, and a whole tile of ignored tokens if there is more than one tile."""
    problem = make(num_tokens=num_tokens, ignored_hold=300.0, device=device, **options)
    labels = problem.tokens.labels
    labels[::9] = ELSEWHERE
    labels[TILE : 2 * TILE] = IGNORED
    return problem


def check_statistics(problem: Problem, *, need_mean: bool) -> Statistics:
    labels = problem.tokens.labels
    counts = labels != IGNORED
    found = fused.statistics(problem.tokens, problem.head, need_mean=need_mean)
    truth = statistics_of(capped_logits(*in_float64(problem, counts)[:2]), labels[counts])
    assert (found.mean is None) != need_mean
    for mine, true in zip(found, truth, strict=True):
        if mine is not None:
            assert relative_error(mine[counts], true) < 1e-5
            assert not mine[~counts].any()
    return found


def check_statistics_backward(problem: Problem, lse: Tensor, *, has_mean: bool, needs: Needs) -> None:
    labels = problem.tokens.labels
    upstream = Statistics(*torch.randn(3, len(labels), device=labels.device))
    if not has_mean:
        upstream = upstream._replace(mean=None)

    def total(logits: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        found = statistics_of(logits, labels)
        return sum((g[kept] * s).sum() for g, s in zip(upstream, found, strict=True) if g is not None)

    _, truth = truth_of(problem, total)
    # Gradients of an ignored token's statistics reach nothing, whatever they are.
    upstream = Statistics(*(None if g is None else g.masked_fill(labels == IGNORED, NAN) for g in upstream))
    found = fused.statistics_backward(problem.tokens, problem.head, lse, upstream, needs, None)
    assert_gradients(found, truth, needs)


@pytest.mark.parametrize(
    ("options", "need_mean"),
    [*((options, options.get("bias", False)) for options in HEADS.values()), (HEADS["all"], False)],
    ids=[*HEADS, "all without mean"],
)
def test_statistics_and_their_gradients(
    options: dict, need_mean: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By chunks of words, of which the last is not full, with a tile of tokens that is left out."""
    monkeypatch.setattr(fused, "words_per_chunk", lambda *args, **kwargs: 256)
    problem = make_scattered(device, num_tokens=290 if options == HEADS["all"] else 70, **options)
    found = check_statistics(problem, need_mean=need_mean)
    check_statistics_backward(problem, found.lse, has_mean=need_mean, needs=needs_of(problem))


@pytest.mark.parametrize("needs", NEEDS[1:], ids=str)
def test_statistics_only_what_is_needed(needs: Needs, device: str) -> None:
    problem = make_scattered(device, num_tokens=140, rank=8, bias=True)
    lse = torch.zeros_like(problem.token_weights)
    counts = problem.tokens.labels != IGNORED
    lse[counts] = capped_logits(*in_float64(problem, counts)[:2]).logsumexp(1).float()
    check_statistics_backward(problem, lse, has_mean=True, needs=needs)


def test_statistics_where_no_token_counts(device: str) -> None:
    problem = make(num_tokens=140, ignored=1.1, bias=True, device=device)
    found = fused.statistics(problem.tokens, problem.head, need_mean=True)
    assert not torch.stack(found).any()
    needs = needs_of(problem)
    for gradient in fused.statistics_backward(*problem[:2], found.lse, found, needs, None)[:3]:
        assert not gradient.any()
