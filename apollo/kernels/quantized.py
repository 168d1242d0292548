"""8-bit weights in Triton: each code is read once or written once, with its group's scale in registers.

A tile is some groups by the elements of a group, so that a scale is loaded once for its group. Products and
sums are not fused into one rounding: codes are the same on every device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..projection import WORD
from ..rounding import MIX_1, MIX_2, PLACE

ELEMENTS, NUM_WARPS = 4096, 8
"""Of a program's tile: 16 elements a thread, whose codes are one load of 16 bytes."""

TYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What values are read from and written to."""

_PLACE, _MIX_1, _MIX_2 = tl.constexpr(PLACE), tl.constexpr(MIX_1), tl.constexpr(MIX_2)
_TINY, _PART = tl.constexpr(2.0**-126), tl.constexpr(1 / 255)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, group_size: int, out: Tensor) -> None:
    """See `int8.Groups.dequantize`."""
    strides = codes.stride(0), scale.stride(0), out.stride(0)
    _launch(_dequantize_kernel, codes, scale, group_size, codes, scale, zero, out, *strides)


def quantize(
    value: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, group_size: int, key32: int | None, first: int
) -> None:
    """See `int8.Groups.quantize`."""
    start = (first * PLACE + (key32 or 0)) & WORD
    # As a signed number, so that every key has the same type in the kernel.
    start -= (start >> 31) << 32
    strides = value.stride(0), codes.stride(0), scale.stride(0)
    tensors = value, codes, scale, zero
    is_random = {"STOCHASTIC": key32 is not None}
    _launch(_quantize_kernel, codes, scale, group_size, *tensors, *strides, start, **is_random)
    for written in (codes, scale, zero):  # autograd cannot see what a kernel writes
        torch.autograd.graph.increment_version(written)


def _launch(kernel, codes: Tensor, scale: Tensor, group_size: int, *arguments, **flags) -> None:
    num_rows, width = codes.shape
    groups_of_program = max(1, ELEMENTS // group_size)
    programs = triton.cdiv(num_rows * scale.shape[1], groups_of_program)
    if codes.numel() == 0:
        return
    with torch.cuda.device_of(codes):
        kernel[(programs,)](
            *arguments,
            num_rows,
            width,
            **flags,
            GROUPS=groups_of_program,
            GROUP_SIZE=group_size,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )


@triton.jit(do_not_specialize=["num_rows"])
def _dequantize_kernel(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    codes_stride,
    scale_stride,
    out_stride,
    num_rows,
    width,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    row, group, columns, mask = _place(num_rows, width, GROUPS, GROUP_SIZE)
    at = row * scale_stride + group
    scale = tl.load(scale_ptr + at, mask=row < num_rows, other=0.0)
    zero = tl.load(zero_ptr + at, mask=row < num_rows, other=0.0)
    codes = tl.load(codes_ptr + row * codes_stride + columns, mask=mask, other=0)
    value = codes.to(tl.float32) * scale + zero
    tl.store(out_ptr + row * out_stride + columns, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["start", "num_rows"])
def _quantize_kernel(
    value_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    value_stride,
    codes_stride,
    scale_stride,
    start,
    num_rows,
    width,
    STOCHASTIC: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    row, group, columns, mask = _place(num_rows, width, GROUPS, GROUP_SIZE)
    value = tl.load(value_ptr + row * value_stride + columns, mask=mask, other=0.0).to(tl.float32)
    low = tl.min(tl.where(mask, value, float("inf")), axis=1)[:, None]
    high = tl.max(tl.where(mask, value, -float("inf")), axis=1)[:, None]
    step = (high - low) * _PART
    # Reductions pass over NaN.
    is_finite = (tl.max((value != value).to(tl.int32), axis=1)[:, None] == 0) & (step < float("inf"))
    inverse = tl.where(is_finite & (step >= _TINY), tl.div_rn(1.0, step), 0.0)
    place = tl.where(inverse > 0.0, (value - low) * inverse, 0.0)
    below = tl.floor(place)
    threshold = _uniform(row * width + columns, start) if STOCHASTIC else 0.5
    code = tl.minimum(below + tl.where(place - below > threshold, 1.0, 0.0), 255.0)
    tl.store(codes_ptr + row * codes_stride + columns, code.to(tl.uint8), mask=mask)
    at = row * scale_stride + group
    tl.store(scale_ptr + at, tl.where(is_finite, step, float("nan")), mask=row < num_rows)
    tl.store(zero_ptr + at, tl.where(is_finite, low, float("nan")), mask=row < num_rows)


@triton.jit
def _place(num_rows, width, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """Rows (64 bits) and groups `(GROUPS, 1)`, columns `(GROUPS, GROUP_SIZE)`, and which are there."""
    per_row = tl.cdiv(width, GROUP_SIZE)
    index = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS))[:, None]
    row, group = (index // per_row).to(tl.int64), index % per_row
    columns = group * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]
    return row, group, columns, (row < num_rows) & (columns < width)


@triton.jit
def _uniform(place, start):
    """`int8._uniform`; `start` is the hash's at place 0."""
    word = place.to(tl.uint32) * _PLACE + start.to(tl.uint32, bitcast=True)
    word ^= word >> 16
    word *= _MIX_1
    word ^= word >> 15
    word *= _MIX_2
    return ((word >> 16).to(tl.float32) + 0.5) * 0.0000152587890625
