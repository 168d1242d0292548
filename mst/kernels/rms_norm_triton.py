"""RMS norm in Triton: a tile of whole rows a program, each row read before it is written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import persistent_programs, stages, whole_rows


def forward(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, out: Tensor) -> None:
    """See `rms_norm.rms_norm`."""
    if x.numel() == 0:
        return
    (num_rows, heads), width = _count(x), x.shape[-1]
    tile = whole_rows(width)
    with torch.cuda.device_of(x):
        _rms_norm_kernel[(triton.cdiv(num_rows, tile.rows),)](
            x,
            None if weight is None else weight.contiguous(),
            out,
            num_rows,
            heads,
            width,
            *_strides(x),
            *_strides(out),
            eps,
            weight_offset,
            HAS_WEIGHT=weight is not None,
            ROWS=tile.rows,
            BLOCK=tile.columns,
            num_warps=tile.num_warps,
        )


def backward(
    x: Tensor,
    weight: Tensor | None,
    grad_out: Tensor,
    eps: float,
    weight_offset: float,
    residual_grad: Tensor | None,
    weight_grad: Tensor | None,
    out: Tensor,
) -> None:
    """See `rms_norm.rms_norm_backward`."""
    if x.numel() == 0:
        return
    (num_rows, heads), width = _count(x), x.shape[-1]
    tile = whole_rows(width)
    programs, sums, num_stages = triton.cdiv(num_rows, tile.rows), None, 1
    if weight_grad is not None:
        # Each program sums its own rows, in an order that does not depend on when it runs: no atomics.
        programs = persistent_programs(x, programs, tile.num_warps)
        num_stages = stages(tile, x, weight, grad_out, residual_grad)
        sums = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _rms_norm_backward_kernel[(programs,)](
            x,
            None if weight is None else weight.contiguous(),
            grad_out,
            residual_grad,
            out,
            sums,
            num_rows,
            heads,
            width,
            *_strides(x),
            *_strides(grad_out),
            *_strides(x if residual_grad is None else residual_grad),
            *_strides(out),
            eps,
            weight_offset,
            HAS_WEIGHT=weight is not None,
            HAS_RESIDUAL=residual_grad is not None,
            SUM=sums is not None,
            STAGES=num_stages,
            ROWS=tile.rows,
            BLOCK=tile.columns,
            num_warps=tile.num_warps,
        )
        if sums is not None:
            add_sums(sums, weight_grad)


def add_sums(sums: Tensor, out: Tensor) -> None:
    """`out += sums.sum(0)`; sums `(programs, D)` float32, out `(D,)` float32."""
    programs, width = sums.shape
    # Few columns and many rows a program: there is little to read, and the fewer steps the better.
    _add_sums_kernel[(triton.cdiv(width, 32),)](
        sums, out, out.stride(0), programs, width, ROWS=128, BLOCK=32, num_warps=8
    )


def _count(x: Tensor) -> tuple[int, int]:
    """Rows of one norm each, and how many of them a row of x holds."""
    heads = x.shape[1] if x.dim() == 3 else 1
    num_rows = x.shape[0] * heads
    if num_rows >= 2**31 - 2**16:
        raise ValueError(f"rms_norm: {num_rows} rows are more than 32 bits count; pass them in tiles.")
    return num_rows, heads


def _strides(x: Tensor) -> tuple[int, int]:
    return x.stride(0), x.stride(1) if x.dim() == 3 else 0


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    heads,
    D,
    x_stride,
    x_head_stride,
    out_stride,
    out_head_stride,
    eps,
    weight_offset,
    HAS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (columns < D)[None, :]
    at = _offsets(rows, heads, x_stride, x_head_stride, columns)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32) + weight_offset
        y *= weight[None, :]
    to = _offsets(rows, heads, out_stride, out_head_stride, columns)
    tl.store(out_ptr + to, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_backward_kernel(
    x_ptr,
    weight_ptr,
    grad_ptr,
    residual_ptr,
    out_ptr,
    sums_ptr,
    num_rows,
    heads,
    D,
    x_stride,
    x_head_stride,
    grad_stride,
    grad_head_stride,
    residual_stride,
    residual_head_stride,
    out_stride,
    out_head_stride,
    eps,
    weight_offset,
    HAS_WEIGHT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SUM: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    # Row by row, and reduced over the rows once at the end.
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    # Rows that are fetched ahead are this program's alone, so that what it writes is not what it fetches.
    num_tiles = tl.cdiv(num_rows, ROWS)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None] & (columns < D)[None, :]
        at = _offsets(rows, heads, x_stride, x_head_stride, columns)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        at = _offsets(rows, heads, grad_stride, grad_head_stride, columns)
        gradient = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            at = _offsets(rows, heads, residual_stride, residual_head_stride, columns)
            residual = tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
        # With eps = 0 the rows past the end would be 0 * inf.
        inverse = tl.where(rows < num_rows, inverse, 0.0)
        normed = x * inverse[:, None]
        if SUM:
            total += gradient * normed
        if HAS_WEIGHT:
            # Loaded again each time: it is in the nearest cache, and registers are what runs out.
            weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32) + weight_offset
            gradient *= weight[None, :]
        mean = tl.sum(gradient * normed, axis=1) / D
        gradient = inverse[:, None] * (gradient - normed * mean[:, None])
        if HAS_RESIDUAL:
            gradient += residual
        at = _offsets(rows, heads, out_stride, out_head_stride, columns)
        tl.store(out_ptr + at, gradient.to(out_ptr.dtype.element_ty), mask=mask)
    if SUM:
        to = sums_ptr + tl.program_id(0).to(tl.int64) * D + columns
        tl.store(to, tl.sum(total, axis=0), mask=columns < D)


@triton.jit
def _offsets(rows, heads, stride, head_stride, columns):
    """Of the elements of each norm's row; 64 bits wide, since rows times stride passes 2^31."""
    row, head = (rows // heads).to(tl.int64), (rows % heads).to(tl.int64)
    return (row * stride + head * head_stride)[:, None] + columns[None, :]


@triton.jit
def _add_sums_kernel(sums_ptr, out_ptr, stride, num_sums, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, num_sums, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < num_sums)[:, None] & (columns < D)[None, :]
        total += tl.load(sums_ptr + rows[:, None] * D + columns[None, :], mask=mask, other=0.0)
    to = out_ptr + columns.to(tl.int64) * stride
    before = tl.load(to, mask=columns < D, other=0.0)
    tl.store(to, before + tl.sum(total, axis=0), mask=columns < D)
