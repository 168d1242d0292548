"""The in-place softmax kernel against plain PyTorch in float64: statistics, loss and gradient of each row."""

from __future__ import annotations

import pytest
import torch
from numerics import relative_error
from torch import Tensor

pytest.importorskip("triton")

from longseq.cce.head import ELSEWHERE, IGNORED, Head, Statistics
from longseq.cce.kernels import softmax_gradient
from longseq.cce.kernels.softmax_gradient import softmax_gradient_, softmax_loss_, softmax_statistics

SMOOTHING, Z_LOSS = 0.1, 0.02
NAN = float("nan")
HEADS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "logit_scale": -1.7, "softcap": 30.0},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCK = 256
# One word; less than a block; a block; blocks only; blocks and a tail.
SIZES = [(size, torch.float32) for size in (1, 131, BLOCK, 2 * BLOCK)]
SIZES += [(2 * BLOCK + 3, dtype) for dtype in DTYPES]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch, kernel_device: str) -> str:
    """Rows of several blocks that are still short; gives the device."""
    monkeypatch.setattr(softmax_gradient, "MAX_BLOCK", BLOCK)
    return kernel_device


def check(ours: Tensor, plain: Tensor, truth: Tensor, *, name: str) -> None:
    """As near to the truth as plain PyTorch: which, of logits that are given, may by luck lose nothing."""
    assert ours.dtype == plain.dtype
    slack, tiny = 1.5, 2 * torch.finfo(torch.float32).eps
    if ours.dtype == torch.bfloat16 and not ours.is_cuda:
        slack, tiny = 3.0, 2**-8  # Triton's interpreter cuts off where a GPU rounds
    mine, theirs = relative_error(ours, truth), relative_error(plain, truth)
    assert mine <= slack * theirs + tiny, f"{name}: relative error {mine:.3e}, plain {theirs:.3e}"


def make(
    vocab_size: int, dtype: torch.dtype, device: str, *, tokens: int = 7, **options
) -> tuple[Tensor, Tensor, Head]:
    """Logits whose rows are apart, with NaN between them; labels of every kind; a head without a weight."""
    stored = torch.full((tokens, vocab_size + 5), NAN)
    stored[:, :vocab_size] = torch.randn(tokens, vocab_size) * 3
    logits = stored.to(device, dtype)[:, :vocab_size]
    labels = torch.randint(0, vocab_size, (tokens,), device=device)
    labels[1], labels[2], labels[3], labels[4] = IGNORED, ELSEWHERE, 0, vocab_size - 1
    bias = torch.randn(vocab_size, device=device).to(dtype) if options.pop("bias", False) else None
    return logits, labels, Head(torch.empty(0), bias, **options)


def plain_statistics(logits: Tensor, labels: Tensor, head: Head) -> Statistics:
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if head.bias is not None:
        z = z + head.bias
    z = z * head.logit_scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    counts = labels != IGNORED
    target = z.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return Statistics(z.logsumexp(-1) * counts, target * (labels >= 0), z.mean(-1) * counts)


def plain_losses(logits: Tensor, labels: Tensor, weights: Tensor, head: Head) -> Tensor:
    lse, target, mean = plain_statistics(logits, labels, head)
    losses = (1.0 - SMOOTHING) * (lse - target) + SMOOTHING * (lse - mean) + Z_LOSS * lse**2
    return losses * weights


def truth_and_plain(logits: Tensor, function) -> list[tuple[Tensor, Tensor]]:
    """What `function` and its sum's backward give, in float64 and in the dtype of the logits."""
    found = []
    for dtype in (torch.float64, logits.dtype):
        leaf = logits.detach().to(dtype).requires_grad_()
        values = function(leaf)
        values.sum().backward()
        found.append((values.detach(), leaf.grad))
    return found


@pytest.mark.parametrize(("vocab_size", "dtype"), SIZES)
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS.keys())
def test_loss_and_gradient(options: dict, vocab_size: int, dtype: torch.dtype, small_blocks: str) -> None:
    logits, labels, head = make(vocab_size, dtype, small_blocks, **options)
    weights = torch.rand(len(labels), device=small_blocks)
    (truth, d_truth), (plain, d_plain) = truth_and_plain(
        logits, lambda x: plain_losses(x, labels, weights, head)
    )
    between = logits.as_strided((7, 5), (vocab_size + 5, 1), vocab_size)
    untouched = logits.clone()
    options = {"label_smoothing": SMOOTHING, "z_loss": Z_LOSS}
    only = softmax_loss_(logits, labels, weights, head, **options, need_gradient=False)
    assert torch.equal(logits, untouched)
    losses = softmax_loss_(logits, labels, weights, head, **options, need_gradient=True)
    assert torch.equal(only, losses)
    check(losses, plain, truth, name="loss")
    check(logits, d_plain, d_truth, name="gradient")
    assert not logits[1].any()
    assert between.isnan().all()


@pytest.mark.parametrize(("vocab_size", "dtype"), SIZES)
@pytest.mark.parametrize("need_mean", [False, True])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS.keys())
def test_statistics_and_their_gradient(
    options: dict, need_mean: bool, vocab_size: int, dtype: torch.dtype, small_blocks: str
) -> None:
    logits, labels, head = make(vocab_size, dtype, small_blocks, **options)
    upstream = Statistics(*torch.randn(3, len(labels), device=small_blocks))
    if not need_mean:
        upstream = upstream._replace(mean=None)
    truth = plain_statistics(logits.double(), labels, head)
    plain = plain_statistics(logits, labels, head)
    ours = softmax_statistics(logits, labels, head, need_mean=need_mean)
    assert (ours.mean is None) != need_mean
    for name in ("lse", "target", "mean") if need_mean else ("lse", "target"):
        tensors = (getattr(statistics, name) for statistics in (ours, plain, truth))
        check(*tensors, name=name)

    def weighed(x: Tensor) -> Tensor:
        found = plain_statistics(x, labels, head)
        return sum(s * g for s, g in zip(found, upstream, strict=True) if g is not None)

    (_, d_truth), (_, d_plain) = truth_and_plain(logits, weighed)
    # An upstream gradient of an IGNORED row reaches nothing, whatever it is.
    upstream = Statistics(
        *(None if g is None else g.index_fill(0, torch.tensor([1], device=g.device), NAN) for g in upstream)
    )
    softmax_gradient_(logits, labels, ours.lse, upstream, head)
    check(logits, d_plain, d_truth, name="gradient")
    assert not logits[1].any()


def test_an_expanded_upstream_gradient(kernel_device: str) -> None:
    logits, labels, head = make(131, torch.float32, kernel_device)
    lse = softmax_statistics(logits, labels, head, need_mean=False).lse
    same = logits.clone()
    one = torch.tensor(0.3, device=kernel_device)
    softmax_gradient_(logits, labels, lse, Statistics(one.expand(7), (-one).expand(7)), head)
    softmax_gradient_(same, labels, lse, Statistics(one.repeat(7), (-one).repeat(7)), head)
    assert torch.equal(logits, same)


def test_nan_stays_in_its_row(kernel_device: str) -> None:
    logits, labels, head = make(300, torch.bfloat16, kernel_device)
    logits[1] = NAN  # IGNORED
    logits[5, 17] = NAN
    weights = torch.ones(7, device=kernel_device)
    weights[2] = NAN  # a label that is no word
    losses = softmax_loss_(logits, labels, weights, head, label_smoothing=0.0, z_loss=0.0, need_gradient=True)
    bad = torch.tensor([2, 5], device=kernel_device)
    rest = torch.tensor([0, 1, 3, 4, 6], device=kernel_device)
    assert losses[bad].isnan().all()
    assert logits[bad].isnan().all()
    assert losses[rest].isfinite().all()
    assert logits[rest].isfinite().all()
    assert not logits[1].any()


def test_words_that_cannot_be(kernel_device: str) -> None:
    """A vocabulary padded by -inf gives what the vocabulary alone gives, and no NaN."""
    logits, labels, head = make(4300, torch.float32, kernel_device)
    labels.clamp_(max=99)
    alone = logits[:, :100].clone()
    logits[:, 100:] = float("-inf")
    weights = torch.ones(7, device=kernel_device)
    options = {"label_smoothing": 0.0, "z_loss": 0.1, "need_gradient": True}
    losses = softmax_loss_(logits, labels, weights, head, **options)
    torch.testing.assert_close(losses, softmax_loss_(alone, labels, weights, head, **options))
    torch.testing.assert_close(logits[:, :100], alone)
    assert not logits[:, 100:].any()


def test_a_sure_token_keeps_its_digits(kernel_device: str) -> None:
    """Logits that are all large, and a label that has nearly everything."""
    logits = torch.full((1, 5000), 1000.0, device=kernel_device)
    logits[0, 7] += 20.0
    labels = torch.tensor([7], device=kernel_device)
    truth = torch.log1p(4999 * torch.tensor(-20.0, dtype=torch.float64).exp())
    options = {"label_smoothing": 0.0, "z_loss": 0.0, "need_gradient": True}
    loss = softmax_loss_(logits, labels, torch.ones(1, device=kernel_device), Head(logits), **options)
    # log(1 + x) in float32 has 1 + x rounded.
    assert abs(loss.item() - truth.item()) < 2e-7
    assert abs(logits[0, 7].item() + 1 - truth.neg().exp().item()) < 2e-7


def test_no_rows(kernel_device: str) -> None:
    logits = torch.empty(0, 131, device=kernel_device)
    labels = torch.empty(0, dtype=torch.long, device=kernel_device)
    assert softmax_statistics(logits, labels, Head(logits), need_mean=True).mean.shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [HEADS["plain"], HEADS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("vocab_size", [128256, 50257])
def test_real_sizes(vocab_size: int, options: dict, dtype: torch.dtype) -> None:
    logits, labels, head = make(vocab_size, dtype, "cuda", tokens=257, **options)
    weights = torch.rand(257, device="cuda")
    (truth, d_truth), (plain, d_plain) = truth_and_plain(
        logits, lambda x: plain_losses(x, labels, weights, head)
    )
    losses = softmax_loss_(
        logits, labels, weights, head, label_smoothing=SMOOTHING, z_loss=Z_LOSS, need_gradient=True
    )
    check(losses, plain, truth, name="loss")
    check(logits, d_plain, d_truth, name="gradient")


@pytest.mark.gpu
def test_more_than_2_to_the_31_logits() -> None:
    """The last rows of a chunk too large for 32-bit offsets are those of the rows alone."""
    num_tokens, vocab_size = 16897, 128256
    assert num_tokens * vocab_size > 2**31
    logits = torch.randn(257, vocab_size, device="cuda", dtype=torch.bfloat16).repeat(66, 1)[:num_tokens]
    labels = torch.randint(0, vocab_size, (num_tokens,), device="cuda")
    weights = torch.rand(num_tokens, device="cuda")
    last = slice(num_tokens - 5, num_tokens)
    alone = logits[last].clone()
    options = {"label_smoothing": SMOOTHING, "z_loss": Z_LOSS, "need_gradient": True}
    losses = softmax_loss_(logits, labels, weights, Head(logits), **options)
    expected = softmax_loss_(alone, labels[last].clone(), weights[last].clone(), Head(logits), **options)
    assert torch.equal(losses[last], expected)
    assert torch.equal(logits[last], alone)
