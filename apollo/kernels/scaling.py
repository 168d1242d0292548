"""A gradient times a number that is on the GPU: one pass, and none where the number is 1."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, NUM_WARPS = 8192, 8


def scale_(values: Tensor, factor: Tensor) -> None:
    """See `scaling.scale_`."""
    if values.numel() == 0:
        return
    with torch.cuda.device_of(values):
        _scale_kernel[(triton.cdiv(values.numel(), BLOCK),)](
            values, factor, values.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    torch.autograd.graph.increment_version(values)  # autograd cannot see what a kernel writes


@triton.jit(do_not_specialize=["count"])
def _scale_kernel(values_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + at, mask=at < count, other=0.0).to(tl.float32)
        scaled = tl.where(factor == 0.0, 0.0, values * factor)  # a NaN times 0 would stay one
        tl.store(values_ptr + at, scaled.to(values_ptr.dtype.element_ty), mask=at < count)
