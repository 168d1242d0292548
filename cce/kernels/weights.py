"""What is done once a word: its column's sum, and the way of its row into the weight's dtype."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _column_sums_kernel(
    left_ptr,
    scale_ptr,
    out_ptr,
    stride,
    num_row_tiles_ptr,
    V,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    words = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    at = left_ptr + words
    for row in range(0, tl.load(num_row_tiles_ptr) * ROWS):
        scale = tl.load(scale_ptr + row)
        total += tl.load(at, mask=words < V, other=0.0).to(tl.float32) * scale
        at += stride
    if ADD:
        total += tl.load(out_ptr + words, mask=words < V, other=0.0)
    tl.store(out_ptr + words, total, mask=words < V)


def column_sums(
    left: Tensor, scale: Tensor, out: Tensor, num_row_tiles: Tensor, tile_rows: int, *, add: bool
) -> None:
    """`out = scale @ left[:, :V]` in float32 over the first row tiles, or added to `out` `(V,)`."""
    vocab_size = out.shape[0]
    _column_sums_kernel[(triton.cdiv(vocab_size, 256),)](
        left, scale, out, left.stride(0), num_row_tiles, vocab_size, ADD=add, ROWS=tile_rows, BLOCK=256
    )


@triton.jit
def _scale_rows_kernel(
    in_ptr,
    factor_ptr,
    scale_ptr,
    rows_ptr,
    out_ptr,
    D,
    SCALED: tl.constexpr,
    TO_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr).to(tl.float32)
    if SCALED:
        factor *= tl.load(scale_ptr + row)
    to = row
    if TO_ROWS:
        to = tl.load(rows_ptr + row)
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(in_ptr + row * D + columns, mask=columns < D, other=0.0).to(tl.float32) * factor
        tl.store(out_ptr + to * D + columns, values.to(out_ptr.dtype.element_ty), mask=columns < D)


def scale_rows(
    gradient: Tensor,  # (V, D)
    factor: Tensor,  # ()
    out: Tensor,
    *,
    rows: Tensor | None = None,  # (V,)
    scale: Tensor | None = None,  # (V,)
) -> None:
    """`out = gradient * factor * scale`, row i going to row `rows[i]`; multiplied wide and rounded once."""
    num_rows, width = gradient.shape
    _scale_rows_kernel[(num_rows,)](
        gradient,
        factor,
        scale,
        rows,
        out,
        width,
        SCALED=scale is not None,
        TO_ROWS=rows is not None,
        BLOCK=min(2048, triton.next_power_of_2(width)),
        num_warps=4,
    )
