"""Rotary position embeddings in Triton: each pair of elements is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import ELEMENTS, whole_rows


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, out: Tensor) -> None:
    """See `rope.rotate_`; the last dimension of every tensor is contiguous."""
    batch, length, heads, _ = x.shape
    half, num_rows = cos.shape[2] // 2, batch * length * heads
    if num_rows == 0:
        return
    if num_rows >= 2**31 - 2**16:
        raise ValueError(f"rotate_: {num_rows} rows are more than 32 bits count; pass fewer tokens.")
    if out is not x and 2 * half < x.shape[3]:
        out[..., 2 * half :] = x[..., 2 * half :]
    tile = whole_rows(half, ELEMENTS // 2)  # of the first halves, with the second beside it
    one = cos.shape[0] == 1
    with torch.cuda.device_of(x):
        _rotate_kernel[(triton.cdiv(num_rows, tile.rows),)](
            x,
            out,
            cos,
            sin,
            num_rows,
            length,
            heads,
            *x.stride()[:3],
            *out.stride()[:3],
            0 if one else cos.stride(0),
            cos.stride(1),
            0 if one else sin.stride(0),
            sin.stride(1),
            INVERSE=inverse,
            HALF=half,
            ROWS=tile.rows,
            BLOCK=tile.columns,
            num_warps=tile.num_warps,
        )


@triton.jit(do_not_specialize=["num_rows", "S"])
def _rotate_kernel(
    x_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    num_rows,
    S,
    heads,
    x_batch_stride,
    x_stride,
    x_head_stride,
    out_batch_stride,
    out_stride,
    out_head_stride,
    cos_batch_stride,
    cos_stride,
    sin_batch_stride,
    sin_stride,
    INVERSE: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A row is one head of one token. A token's angles are loaded for each of its heads, from the near cache.
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (columns < HALF)[None, :]
    head, token = (rows % heads).to(tl.int64), rows // heads
    # 64 bits: tokens times stride passes 2^31.
    sample, position = (token // S).to(tl.int64), (token % S).to(tl.int64)
    x_row = sample * x_batch_stride + position * x_stride + head * x_head_stride
    first = x_ptr + x_row[:, None] + columns[None, :]
    x1 = tl.load(first, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(first + HALF, mask=mask, other=0.0).to(tl.float32)
    at = cos_ptr + (sample * cos_batch_stride + position * cos_stride)[:, None] + columns[None, :]
    cos1 = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    cos2 = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    at = sin_ptr + (sample * sin_batch_stride + position * sin_stride)[:, None] + columns[None, :]
    sin1 = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    sin2 = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        y1 = x1 * cos1 + x2 * sin2
        y2 = x2 * cos2 - x1 * sin1
    else:
        y1 = x1 * cos1 - x2 * sin1
        y2 = x2 * cos2 + x1 * sin2
    out_row = sample * out_batch_stride + position * out_stride + head * out_head_stride
    first = out_ptr + out_row[:, None] + columns[None, :]
    tl.store(first, y1.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(first + HALF, y2.to(out_ptr.dtype.element_ty), mask=mask)
