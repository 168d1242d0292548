"""The update of the weights: the last read of gradients, and the only read and write of weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .table import FIRST, GRAD, ROUNDING_KEY, TRITON_DTYPES, WEIGHT, Table, entry, pointer
from .tuning import Tiles


class Change(NamedTuple):
    """What all matrices of a call are multiplied with, as the kernel is given it."""

    kept: float  # 1 - lr weight_decay
    rate: float  # learning rate, bias corrections and alpha in one


def update_weights(
    table: Table, factors: Tensor, scales: Tensor | None, change: Change, *, stochastic: bool, tiles: Tiles
) -> None:
    """`W <- kept W - rate factor scale G`, rounded once.

    Args:
        table: Its weights are written.
        factors: `(count,)`.
        scales: `(count, channels)`, or None where a matrix has but one.
        change: The same for all.
        stochastic: Whether bfloat16 weights are rounded at random (see `rounding.py`), or to nearest.
        tiles: Block sizes.
    """
    columns = min(tiles.update_columns, triton.next_power_of_2(table.columns))
    rows = max(1, tiles.update_elements // columns)
    row_tiles, column_tiles = triton.cdiv(table.rows, rows), triton.cdiv(table.columns, columns)
    _update_kernel[(row_tiles * column_tiles, table.count)](
        table.entries,
        factors,
        scales,
        table.rows,
        table.columns,
        column_tiles,
        *change,
        TALL=table.tall,
        EVEN=table.rows % rows == 0 and table.columns % columns == 0,
        ALIGNED=table.aligned,
        WEIGHT_DTYPE=TRITON_DTYPES[table.weight],
        GRAD_DTYPE=TRITON_DTYPES[table.grad],
        STOCHASTIC=stochastic and table.weight == torch.bfloat16,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=tiles.update_warps,
    )


@triton.jit
def stochastically_rounded(value, index, key):
    """float32 as bfloat16, rounded up as often as it is near to it; `rounding.stochastically_rounded`.

    Args:
        value: float32.
        index: uint32; of each element in its parameter.
        key: uint32.
    """
    noise = index * 0x9E3779B1 + key
    noise = (noise ^ (noise >> 16)) * 0x7FEB352D
    noise = (noise ^ (noise >> 15)) * 0x846CA68B
    noise = noise ^ (noise >> 16)
    bits = value.to(tl.uint32, bitcast=True)
    is_finite = (bits & 0x7F800000) != 0x7F800000
    # A NaN whose high bits are those of infinity must stay one.
    bits = tl.where(is_finite, bits + (noise >> 16), tl.where(value == value, bits, 0x7FC00000))
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _update_kernel(
    table_ptr,
    factors_ptr,
    scales_ptr,
    rows,
    columns,
    column_tiles,
    kept,
    rate,
    TALL: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGNED: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # From the end: what the statistics read last is what the cache still holds.
    matrix = tl.num_programs(1) - 1 - tl.program_id(1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row, column = tile // column_tiles * ROWS, tile % column_tiles * COLUMNS
    across, down = tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    corner = row.to(tl.int64) * columns + column
    at = down[:, None] * columns + across[None, :]
    mask = (row + down < rows)[:, None] & (column + across < columns)[None, :]
    grad_ptr = pointer(table_ptr, matrix, GRAD, GRAD_DTYPE, ALIGNED) + corner + at
    weight_ptr = pointer(table_ptr, matrix, WEIGHT, WEIGHT_DTYPE, ALIGNED) + corner + at
    if EVEN:
        grad = tl.load(grad_ptr, eviction_policy="evict_first")
        weight = tl.load(weight_ptr, eviction_policy="evict_first")
    else:
        grad = tl.load(grad_ptr, mask=mask, other=0.0, eviction_policy="evict_first")
        weight = tl.load(weight_ptr, mask=mask, other=0.0, eviction_policy="evict_first")
    scale = rate * tl.load(factors_ptr + matrix)
    if scales_ptr is not None:
        if TALL:
            scales_ptr += matrix.to(tl.int64) * rows + row
            scale *= tl.load(scales_ptr + down, mask=row + down < rows, other=0.0)[:, None]
        else:
            scales_ptr += matrix.to(tl.int64) * columns + column
            scale *= tl.load(scales_ptr + across, mask=column + across < columns, other=0.0)[None, :]
    value = weight.to(tl.float32) * kept - scale * grad.to(tl.float32)
    if STOCHASTIC:
        # Modulo 2^32, as the generator wants its index.
        first = (entry(table_ptr, matrix, FIRST) + corner).to(tl.uint32)
        key = entry(table_ptr, matrix, ROUNDING_KEY).to(tl.uint32)
        rounded = stochastically_rounded(value, first + at.to(tl.uint32), key)
    else:
        rounded = value.to(WEIGHT_DTYPE)
    if EVEN:
        tl.store(weight_ptr, rounded, eviction_policy="evict_first")
    else:
        tl.store(weight_ptr, rounded, mask=mask, eviction_policy="evict_first")
