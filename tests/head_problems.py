"""Problems for `linear_cross_entropy`, and the textbook's answer, written apart from the library."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from numerics import assert_as_accurate_as
from torch import Tensor
from torch.nn import functional as F

from longseq.cce import linear_cross_entropy

N, V, D = 67, 131, 29  # multiples of nothing
LORA_SCALE = 0.7
METHODS = ("exact", "recompute", "filtered", "reference")
NO_FILTER = 1e-30
"""A threshold for "filtered" that no probability of these problems is under."""

Answer = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Problem:
    """`parts` are the tensors that may have gradients: hidden, weight, and bias, lora_a, lora_b if there."""

    parts: dict[str, Tensor]
    labels: Tensor
    upstream: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype, frozen: Collection[str] = ()) -> Problem:
        """New leaves in `dtype`; those not in `frozen` require a gradient."""
        parts = {
            name: part.detach().to(dtype, copy=True).requires_grad_(name not in frozen)
            for name, part in self.parts.items()
        }
        options = dict(self.options)
        if "token_weights" in options:
            options["token_weights"] = options["token_weights"].to(torch.promote_types(dtype, torch.float32))
        return Problem(parts, self.labels, self.upstream, options)


def make(
    num_tokens: int = N,
    vocab_size: int = V,
    width: int = D,
    *,
    shape: tuple[int, ...] | None = None,
    ignored: str = "some",
    bias: bool = False,
    rank: int = 0,
    token_weights: bool = False,
    upstream: float = 1.0,
    **options: Any,
) -> Problem:
    """A float64 problem whose numbers are those of bfloat16, so that every dtype is given the same one."""
    generator = torch.Generator().manual_seed(1)
    shape = shape or (num_tokens,)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator).mul(scale).bfloat16().double()

    parts = {"hidden": random(*shape, width), "weight": random(vocab_size, width, scale=1.6 / width**0.5)}
    if bias:
        parts["bias"] = random(vocab_size)
    if rank:
        parts["lora_a"] = random(rank, width, scale=1.0 / width**0.5)
        parts["lora_b"] = random(vocab_size, rank, scale=0.6)
    labels = torch.randint(0, vocab_size, shape, generator=generator)
    ignore_index = options.get("ignore_index", -100)
    if ignored == "some":
        labels[torch.rand(shape, generator=generator) < 0.3] = ignore_index
        labels.view(-1)[0] = labels.view(-1)[-1] = ignore_index
    elif ignored == "all":
        labels.fill_(ignore_index)
    if token_weights:
        options["token_weights"] = torch.rand(shape, generator=generator).double()
    return Problem(parts, labels, upstream, options)


def ours(problem: Problem, **extra: Any) -> Answer:
    """The library's answer: the loss, and the log-sum-exp where it is asked for."""
    parts, options = dict(problem.parts), {**problem.options, **extra}
    if options.get("method") == "filtered":
        options.setdefault("filter_eps", NO_FILTER)
    adapters = parts.pop("lora_a", None), parts.pop("lora_b", None)
    if adapters[0] is not None:
        options["lora"] = (*adapters, LORA_SCALE)
    hidden, weight = parts.pop("hidden"), parts.pop("weight")
    found = linear_cross_entropy(hidden, weight, problem.labels, **parts, **options)
    return found if isinstance(found, tuple) else (found, None)


def plain(problem: Problem) -> Answer:
    """The textbook's answer, from all logits."""
    parts, options, labels = problem.parts, problem.options, problem.labels
    hidden, weights = parts["hidden"], options.get("token_weights")
    shift = int(options.get("shift", False))
    if shift:
        hidden, labels = hidden[..., :-1, :], labels[..., 1:]
        weights = None if weights is None else weights[..., 1:]
    shape = labels.shape
    logits = _logits(hidden.flatten(0, -2), parts)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if "bias" in parts:
        logits = logits + parts["bias"]
    logits = logits * options.get("logit_scale", 1.0)
    if options.get("softcap"):
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    ignore_index = options.get("ignore_index", -100)
    labels = labels.flatten().long()
    counts = labels != ignore_index
    losses = F.cross_entropy(
        logits,
        labels,
        reduction="none",
        ignore_index=ignore_index,
        label_smoothing=options.get("label_smoothing", 0.0),
    )
    lse = logits.logsumexp(-1) * counts
    weights = counts.to(lse) if weights is None else weights.flatten().to(lse) * counts
    losses = (losses + options.get("z_loss", 0.0) * lse**2) * weights
    lse, loss = F.pad(lse.view(shape), (0, shift)), F.pad(losses.view(shape), (0, shift))
    reduction = options.get("reduction", "mean")
    if reduction != "none":
        loss = losses.sum()
    if reduction == "mean" and counts.any():
        loss = loss / weights.sum()
    return loss, lse if options.get("return_lse") else None


def _logits(hidden: Tensor, parts: dict[str, Tensor]) -> Tensor:
    weight = parts["weight"]
    if "lora_a" not in parts:
        return F.linear(hidden, weight)
    if hidden.dtype == torch.float64:
        return F.linear(hidden, weight + LORA_SCALE * parts["lora_b"] @ parts["lora_a"])
    # In fewer bits, as PEFT does it.
    adapted = F.linear(F.linear(hidden, parts["lora_a"]), parts["lora_b"])
    return F.linear(hidden, weight) + LORA_SCALE * adapted


def objective(problem: Problem, answer: Answer) -> Tensor:
    """One number of an answer: each token's loss, and its log-sum-exp, with a factor of its own."""
    loss, lse = answer
    generator = torch.Generator().manual_seed(3)
    if loss.dim():
        loss = (loss * torch.randn(loss.shape, generator=generator).to(loss)).sum()
    if lse is not None:
        loss = loss + (lse * torch.randn(lse.shape, generator=generator).to(lse)).sum()
    return loss * problem.upstream


def results(problem: Problem, answer: Answer) -> dict[str, Tensor]:
    """Loss, log-sum-exp and every gradient, after a backward; a frozen part has none."""
    objective(problem, answer).backward()
    found = {"loss": answer[0].detach()}
    if answer[1] is not None:
        found["lse"] = answer[1].detach()
    for name, part in problem.parts.items():
        assert (part.grad is None) != part.requires_grad, name
        if part.requires_grad:
            found[name] = part.grad
    return found


def check(
    problem: Problem,
    dtype: torch.dtype = torch.float64,
    *,
    slack: float = 1.5,
    frozen: Collection[str] = (),
    but: Collection[str] = (),
    **extra: Any,
) -> dict[str, Tensor]:
    """Ours, with the options `extra`, is as near to the float64 truth as plain PyTorch in `dtype` is.

    What is named in `but` is not compared: a mean in few bits, whose errors cancel by luck.
    """
    true, low, mine = (problem.to(d, frozen) for d in (torch.float64, dtype, dtype))
    truth, theirs = results(true, plain(true)), results(low, plain(low))
    found = results(mine, ours(mine, **extra))
    assert found.keys() == truth.keys()
    for name in truth.keys() - set(but):
        assert_as_accurate_as(found[name], theirs[name], truth[name], slack=slack, name=name)
    return found


def can(method: str, options: dict[str, Any]) -> bool:
    """Whether a method takes these options."""
    late = options.get("reduction") == "none" or options.get("return_lse", False)
    if method in ("exact", "filtered") and late:
        return False
    return not (method == "filtered" and options.get("label_smoothing"))
