"""Problems for the fused kernels, and what plain PyTorch in float64 makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from numerics import relative_error
from torch import Tensor

from longseq.cce import fused
from longseq.cce.head import IGNORED, Gradients, Head, Needs, Statistics, Tokens
from longseq.cce.kernels.tuning import TILE

NAN = float("nan")
ALL = Needs(True, True, True, True, True)


class Problem(NamedTuple):
    """Tokens, the head that scores them, and each token's weight."""

    tokens: Tokens
    head: Head
    token_weights: Tensor  # (N,) float32; NaN for ignored tokens


def make(
    num_tokens: int = 200,
    vocab_size: int = 300,
    width: int = 72,
    *,
    rank: int = 0,
    bias: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignored: float = 0.35,
    spread: float = 2.0,
    ignored_hold: float = NAN,
    device: str = "cpu",
) -> Problem:
    """A random problem; ignored tokens are scattered, and hold what nobody may look at.

    float32 on the CPU, where Triton's interpreter cuts bfloat16 off, and bfloat16 on a GPU. The numbers are
    bfloat16's on both.

    Args:
        num_tokens: Rows of the hidden states.
        vocab_size: Words.
        width: Of the hidden states.
        rank: Of the low-rank pair; 0 for none.
        bias: There is one.
        softcap: See `Head`.
        logit_scale: See `Head`.
        ignored: Share of tokens that do not count.
        spread: Standard deviation of the logits.
        ignored_hold: What the hidden states of ignored tokens are.
        device: "cpu" or "cuda".
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size) * scale).bfloat16().to(device, dtype)

    labels = torch.randint(0, vocab_size, (num_tokens,))
    labels[torch.rand(num_tokens) < ignored] = IGNORED
    labels = labels.to(device)
    hidden = random(num_tokens, width)
    inner = random(num_tokens, rank) if rank else None
    for part in (hidden, inner):
        if part is not None:
            part[labels == IGNORED] = ignored_hold
    weights = torch.rand(num_tokens, device=device)
    weights[::7] = 0.0
    weights[labels == IGNORED] = NAN
    head = Head(
        random(vocab_size, width, scale=spread / width**0.5),
        random(vocab_size) if bias else None,
        random(vocab_size, rank, scale=spread / (2 * rank**0.5)) if rank else None,
        softcap,
        logit_scale,
    )
    return Problem(Tokens(hidden, labels, inner), head, weights)


def fill_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN from now on: what is read before it is written shows."""

    def filled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def fill(*args: object, **kwargs: object) -> Tensor:
            tensor = function(*args, **kwargs)
            return tensor.fill_(NAN if tensor.is_floating_point() else 1)

        return fill

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


def skip_without_kernels(device: str) -> None:
    """These kernels run in the interpreter, and on GPUs that have what they are made of."""
    if device == "cuda" and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("these kernels need a GPU of compute capability 9 or 10")


def needs_of(problem: Problem) -> Needs:
    """Every gradient that there can be."""
    has_bias, has_outer = problem.head.bias is not None, problem.head.outer is not None
    return Needs(True, True, has_bias, has_outer, has_outer)


def in_float64(problem: Problem, kept: Tensor | None = None) -> Problem:
    """The problem in float64, of the tokens `kept` alone."""

    def wide(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.double()

    (hidden, labels, inner), head, weights = problem
    if kept is not None:
        hidden, labels, weights = hidden[kept], labels[kept], weights[kept]
        inner = None if inner is None else inner[kept]
    head = head._replace(weight=wide(head.weight), bias=wide(head.bias), outer=wide(head.outer))
    return Problem(Tokens(wide(hidden), labels, wide(inner)), head, wide(weights))


def capped_logits(tokens: Tokens, head: Head) -> Tensor:
    """All logits `(N, V)`, in the dtype of the problem."""
    logits = tokens.hidden @ head.weight.T
    if tokens.inner is not None:
        logits = logits + tokens.inner @ head.outer.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def statistics_of(logits: Tensor, labels: Tensor) -> Statistics:
    """What `Statistics` holds, from capped logits."""
    target = logits.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    return Statistics(logits.logsumexp(1), target * (labels >= 0), logits.mean(1))


def losses_of(logits: Tensor, labels: Tensor, token_weights: Tensor, z_loss: float) -> Tensor:
    """Each token's weighted loss."""
    lse, target, _ = statistics_of(logits, labels)
    return (lse - target + z_loss * lse.square()) * token_weights


def truth_of(problem: Problem, total: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Tensor, Gradients]:
    """A scalar of the problem and its gradients, in float64.

    Args:
        problem: Of any dtype.
        total: Makes the scalar from the logits and labels of the tokens that count, and from where they are.
    """
    (hidden, labels, inner), head, _ = in_float64(problem)
    leaves = (hidden, head.weight, head.bias, inner, head.outer)
    for leaf in leaves:
        if leaf is not None:
            leaf.requires_grad_()
    kept = (labels != IGNORED).nonzero().squeeze(1)
    # Picked before any product: 0 * NaN of an ignored token must not reach the truth.
    tokens = Tokens(hidden[kept], labels[kept], None if inner is None else inner[kept])
    value = total(capped_logits(tokens, head), tokens.labels, kept)
    value.backward()
    return value.detach(), Gradients(*(None if leaf is None else leaf.grad for leaf in leaves))


def exact(
    problem: Problem,
    *,
    chunk: int = TILE,
    needs: Needs | None = None,
    z_loss: float = 0.0,
    defer: bool = False,
    keep: bool = False,
    filter_eps: float = 0.0,
) -> fused.ExactResult:
    return fused.exact_loss(
        *problem,
        z_loss=z_loss,
        needs=needs_of(problem) if needs is None else needs,
        chunks=fused.Chunks(chunk, defer, keep=keep),
        filter_eps=filter_eps,
        report_dropped=filter_eps > 0,
    )


def exact_truth(
    problem: Problem, z_loss: float = 0.0, mask: Tensor | None = None
) -> tuple[Tensor, Gradients]:
    """With a mask `(tokens that count, V)`, gradients of the logits are 0 where it is False."""

    def total(logits: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        if mask is not None:
            logits = torch.where(mask, logits, logits.detach())
        return losses_of(logits, labels, problem.token_weights[kept].double(), z_loss).sum()

    return truth_of(problem, total)


def assert_gradients(
    ours: Gradients, truth: Gradients, needs: Needs, *, label: str = "", slack: float = 1.0
) -> None:
    """Gradients near the truth as a whole and row by row; None where none is wanted; 0 where it is 0.

    Float32 has to be good to some of its roundings. In bfloat16 each element of the logits' gradient is
    rounded, which a sum over many of them averages out, and one of a few does not.
    """
    for name in Needs._fields:
        mine, true = getattr(ours, name), getattr(truth, name)
        if not getattr(needs, name):
            assert mine is None, f"{label} {name}: nobody asked for it"
            continue
        narrow = mine.is_cuda
        whole, one = (0.01, 0.04) if narrow else (3e-6, 1e-4)
        error = relative_error(mine, true)
        assert error <= slack * whole, f"{label} {name}: relative error {error:.2e}"
        if mine.dim() == 2:
            size = true.norm(dim=1)
            assert not mine[size == 0].any(), f"{label} {name}: rows that nothing reaches"
            errors = (mine.double() - true).norm(dim=1) / size.clamp(min=1e-3 * size.mean().item() + 1e-30)
            assert errors.max() <= slack * one, (
                f"{label} {name}[{int(errors.argmax())}]: relative error of the row {errors.max():.2e}"
            )
