"""What goes into a head and what comes back: the terms that every method shares."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -2
"""Label of a token that does not count."""
ELSEWHERE = -1
"""Label of a token that counts, but whose word is not among this head's rows."""


class Tokens(NamedTuple):
    """What is scored: `N` tokens, flat."""

    hidden: Tensor  # (N, D)
    labels: Tensor  # (N,) int64: a row of the head, ELSEWHERE or IGNORED
    inner: Tensor | None = None  # (N, R): a low-rank adapter's activations, already scaled


class Head(NamedTuple):
    """`logits = cap(logit_scale * (hidden @ weight.T + inner @ outer.T + bias))`, `V` words."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    outer: Tensor | None = None  # (V, R)
    softcap: float | None = None
    logit_scale: float = 1.0


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    inner: bool = False
    outer: bool = False


class Gradients(NamedTuple):
    """Gradients, None where none was wanted."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    inner: Tensor | None = None
    outer: Tensor | None = None


class Statistics(NamedTuple):
    """What a loss is made of, per token `(N,)`, float32 (float64 for float64): 0 for IGNORED tokens.

    Every loss here is a function of these three; with upstream gradients `g` of each, the gradient of the
    capped logit of word v is `g.lse * p[v] + g.target * (v == label) + g.mean / V`.
    """

    lse: Tensor
    target: Tensor  # capped logit of the label; 0 for ELSEWHERE
    mean: Tensor | None = None  # of the capped logits; only label smoothing asks for it


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in."""
    return torch.promote_types(dtype, torch.float32)


def refuse_second_order(backward: Callable) -> Callable:
    """A backward whose result is not differentiated again: asked to, it raises.

    `once_differentiable` alone refuses only where the upstream gradient wants a gradient itself; a penalty on
    the gradient of a plain loss would be dropped without a word.
    """
    refusing = once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx, *upstream):
        if torch.is_grad_enabled():
            upstream = [None if g is None else g.detach().requires_grad_() for g in upstream]
        return refusing(ctx, *upstream)

    return wrapper
