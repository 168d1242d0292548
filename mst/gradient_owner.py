"""Which gradients may be written over: those that one layer's backward made for the next."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class GradientOwner:
    """Tells gradients that one layer's backward made for the next, and nobody else holds.

    Such a gradient may be written over; any other must not: autograd may hand the same tensor to somebody
    else, or a hook may have kept it.
    """

    def __init__(self) -> None:
        self._made: Callable[[], Tensor | None] = lambda: None
        self._version = 0
        self._free_references = _free_references()

    @staticmethod
    def references(grad: Tensor) -> tuple[int, int]:
        """References to a gradient and to its memory; to be asked at the start of a backward, for `owns`."""
        return sys.getrefcount(grad), torch._C._storage_Use_Count(grad.untyped_storage()._cdata)

    def own(self, grad: Tensor) -> None:
        """Remember a gradient that is about to be returned to autograd."""
        self._made, self._version = weakref.ref(grad), grad._version

    def owns(self, grad: Tensor, references: tuple[int, int]) -> bool:
        """Whether `grad` is that gradient, unchanged, and held by autograd and its caller alone."""
        same = self._made() is grad and grad._version == self._version
        free = all(count <= free for count, free in zip(references, self._free_references, strict=True))
        return same and grad.is_contiguous() and free


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, found: list[tuple[int, int]]) -> Tensor:
        ctx.found = found
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        ctx.found.append(GradientOwner.references(grad))
        return grad.clone(), None


@functools.cache
def _free_references() -> tuple[int, int]:
    """References to a gradient, and its memory, that only autograd and the backward it is given to hold.

    Counted on a gradient of that kind: the number differs between versions of Python.
    """
    found: list[tuple[int, int]] = []
    with torch.enable_grad():
        x = torch.zeros(1, requires_grad=True)
        torch.autograd.grad(_Counted.apply(_Counted.apply(x, found), found).sum(), x)
    return found[-1]
