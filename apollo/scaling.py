"""Gradients times a number that the host does not know."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import TRITON_DTYPES, has_triton


@torch.no_grad()
def scale_(values: Tensor, factor: Tensor) -> None:
    """Multiply in place, in at least float32 and rounded once; by 0, NaN and infinity become 0.

    PyTorch's own product with a tensor of no dimensions rounds that to the dtype of `values`, and takes its
    elements one by one.

    Args:
        values: Of any shape and floating dtype.
        factor: Of no dimensions, on the same device, float32 or wider.
    """
    if values.is_cuda and values.dtype in TRITON_DTYPES and values.is_contiguous() and has_triton():
        from .kernels.scaling import scale_ as by_kernel

        by_kernel(values, factor.float())
        return
    wide = values.to(torch.promote_types(values.dtype, torch.float32))  # float32 and wider: `values` itself
    wide.mul_(factor).masked_fill_(factor == 0, 0)
    if wide is not values:
        values.copy_(wide)
