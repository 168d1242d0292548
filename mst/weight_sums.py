"""Gradients of weights, summed over tiles and handed out once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class WeightSums:
    """One sum a weight, in at least float32: sums of many tiles in bf16 would lose the small ones.

    Weights that need no gradient, and all others than those given, are passed over.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._params = {id(param): param for param in params if param.requires_grad}
        self._sums: dict[int, Tensor] = {}
        self._finished: dict[int, Tensor] = {}

    def wants(self, param: Tensor | None) -> bool:
        """Whether a gradient of this weight is asked for."""
        return param is not None and id(param) in self._params

    def buffer(self, param: Tensor) -> Tensor:
        """The sum itself, zero at first, for a kernel that adds to it."""
        total = self._sums.get(id(param))
        if total is None:
            wide = torch.promote_types(param.dtype, torch.float32)
            total = self._sums[id(param)] = torch.zeros_like(
                param, dtype=wide, memory_format=torch.contiguous_format
            )
        return total

    def add(self, param: Tensor | None, grad: Tensor | None) -> None:
        """Add a tile's gradient."""
        if grad is not None and self.wants(param):
            self.buffer(param).add_(grad)

    def add_product(self, param: Tensor, left: Tensor, right: Tensor, rows: slice | None = None) -> None:
        """Add `left.T @ right` to (rows of) the gradient of a `(out, in)` weight: `(T, out)`, `(T, in)`."""
        if not self.wants(param):
            return
        if rows is not None and (rows.start, rows.stop) == (0, param.shape[0]):
            rows = None
        if rows is None and id(param) not in self._sums:
            self._sums[id(param)] = wide_product(left.t(), right, param.dtype)
            return
        total = self.buffer(param)
        add_product(total if rows is None else total[rows], left.t(), right)

    def finish(self) -> None:
        """Round what is there to its weights' dtypes: half the memory, once nothing more is added to it."""
        for key in list(self._sums):
            total = self._sums.pop(key).to(self._params[key].dtype)
            earlier = self._finished.get(key)
            self._finished[key] = total if earlier is None else earlier + total

    def totals(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients in their weights' dtypes; None where nothing was added."""
        self.finish()
        return [self._finished.pop(id(param), None) for param in params]


def wide_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`left @ right` in the precision of a sum for weights of `dtype`: what need not be zeroed first."""
    wide = torch.promote_types(dtype, torch.float32)
    if left.dtype == wide:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=wide)
    return left.to(wide) @ right.to(wide)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right` in the precision of `total`, in place."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        # The product adds in its last step. As a product of its own it would be written and read again.
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
