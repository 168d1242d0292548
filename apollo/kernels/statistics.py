"""What a step wants to know of gradients, from one read: their products with signs, and squares."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .moments import Decay, moved_moments
from .table import EXP_AVG, EXP_AVG_SQ, GRAD, TRITON_DTYPES, VECTOR_BYTES, Table, pointer
from .tuning import Tiles

PIECE = tl.constexpr(32)
"""Ranks whose moments are moved at once: those of all would not fit into registers beside the products."""


def channel_statistics(table: Table, signs: Tensor, decay: Decay, tiles: Tiles) -> Tensor:
    """Projects the gradients, moves the moments, and sums squares over channels.

    Args:
        table: Its exp_avg and exp_avg_sq are written.
        signs: `(count, rank, inner)`.
        decay: Of the moments.
        tiles: Block sizes.

    Returns:
        `(count, 2 blocks + 1, channels)`: squares of normalised moments and of products, each summed over a
        block of ranks, and of channels.
    """
    ranks = min(tiles.ranks, max(16, triton.next_power_of_2(table.rank)))
    blocks = triton.cdiv(table.rank, ranks)
    channels = tiles.channels
    inner = tiles.inner_bytes // table.grad.itemsize
    sums = table.scratch(table.count, 2 * blocks + 1, table.channels)
    _channel_statistics_kernel[(triton.cdiv(table.channels, channels) * blocks, table.count)](
        table.entries,
        signs,
        sums,
        table.channels,
        table.inner,
        table.rank,
        table.rank**-0.5,
        *decay,
        TALL=table.tall,
        EVEN=table.channels % channels == 0 and table.inner % inner == 0 and table.rank % ranks == 0,
        ALIGNED=table.aligned,
        DTYPE=TRITON_DTYPES[table.grad],
        VECTOR=VECTOR_BYTES // table.grad.itemsize,
        BLOCKS=blocks,
        BC=channels,
        BR=ranks,
        BK=inner,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return sums


def vector_statistics(table: Table, signs: Tensor, tiles: Tiles) -> Tensor:
    """The same sums at rank 1, before the moments: each gradient is read as fast as memory gives it.

    Returns:
        `(count, splits, 2, channels)`: parts of the product of each channel and of its squared norm.
    """
    channels = tiles.vector_channels if table.tall else tiles.vector_columns
    channels = min(channels, triton.next_power_of_2(table.channels))
    inner = min(tiles.vector_elements // channels, triton.next_power_of_2(table.inner))
    split = table.inner if table.tall else tiles.vector_split
    splits = triton.cdiv(table.inner, split)
    partial = table.scratch(table.count, splits, 2, table.channels)
    _vector_statistics_kernel[(triton.cdiv(table.channels, channels), splits, table.count)](
        table.entries,
        signs,
        partial,
        table.channels,
        table.inner,
        split,
        TALL=table.tall,
        EVEN=table.channels % channels == 0 and table.inner % split == 0 and split % inner == 0,
        ALIGNED=table.aligned,
        DTYPE=TRITON_DTYPES[table.grad],
        BC=channels,
        BK=inner,
        num_warps=tiles.vector_warps,
    )
    return partial


@triton.jit
def _tile(
    grad_ptr, first_channel, channels, start, inner, C, stop, K, TALL: tl.constexpr, EVEN: tl.constexpr
):
    """Of the channels from the first on, the elements from `start` on; as the matrix lies, a row as a row."""
    if TALL:
        at = grad_ptr + first_channel.to(tl.int64) * K + start
        offsets = channels[:, None] * K + inner[None, :]
        mask = (first_channel + channels < C)[:, None] & (start + inner < stop)[None, :]
    else:
        at = grad_ptr + start * tl.cast(C, tl.int64) + first_channel
        offsets = inner[:, None] * C + channels[None, :]
        mask = (start + inner < stop)[:, None] & (first_channel + channels < C)[None, :]
    return tl.load(at + offsets) if EVEN else tl.load(at + offsets, mask=mask, other=0.0)


@triton.jit
def _added_product(left, right, acc):
    """`acc + left @ right`, where right holds signs."""
    if left.dtype == tl.float32:
        # Signs are exact in TF32, so that two of its products give 22 bits of the gradient's 24.
        high = (left.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
        acc = tl.dot(high, right, acc, input_precision="tf32")
        acc = tl.dot(left - high, right, acc, input_precision="tf32")
    else:
        acc = tl.dot(left, right, acc)
    return acc


@triton.jit
def _pieces(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """The tile's columns, `WIDTH` at a time, as a tuple."""
    if COLUMNS == WIDTH:
        pieces = (tile,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        pieces = _pieces(left, ROWS, COLUMNS // 2, WIDTH) + _pieces(right, ROWS, COLUMNS // 2, WIDTH)
    return pieces


@triton.jit
def _channel_statistics_kernel(
    table_ptr,
    signs_ptr,  # (matrices, rank, K)
    sums_ptr,  # (matrices, 2 BLOCKS + 1, C)
    C,
    K,
    rank,
    inverse_root,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    TALL: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCKS: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    block, matrix = tl.program_id(0) % BLOCKS, tl.program_id(1)
    first_channel = tl.program_id(0) // BLOCKS * BC
    channels, inner = tl.arange(0, BC), tl.arange(0, BK)
    ranks = block * BR + tl.arange(0, BR)
    grad = pointer(table_ptr, matrix, GRAD, DTYPE, ALIGNED)
    signs_ptr += matrix.to(tl.int64) * rank * K
    sign_offsets = ranks[:, None] * K + inner[None, :]
    products = tl.zeros((BC, BR), tl.float32)
    # Squares are summed over what a thread holds side by side; the rest of the sum is done once, at the end.
    squares = tl.zeros((BC, BK // VECTOR) if TALL else (BK // 4, BC), tl.float32)
    for start in range(0, K, BK):
        tile = _tile(grad, first_channel, channels, start, inner, C, K, K, TALL, EVEN)
        if EVEN:
            signs = tl.load(signs_ptr + start + sign_offsets)
        else:
            mask = (ranks < rank)[:, None] & (start + inner < K)[None, :]
            signs = tl.load(signs_ptr + start + sign_offsets, mask=mask, other=0.0)
        wide = tile.to(tl.float32)
        if TALL:
            products = _added_product(tile, tl.trans(signs), products)
            squares += tl.sum(tl.reshape(wide * wide, (BC, BK // VECTOR, VECTOR)), axis=2)
        else:
            products = _added_product(tl.trans(tile), tl.trans(signs), products)
            squares += tl.sum(tl.reshape(wide * wide, (4, BK // 4, BC)), axis=0)
        # It always is, and no instruction is left of this. But Triton takes it for a use of the products, and
        # waits for them. Else Triton 3.7 would have the next tile but one written over this one while the
        # tensor cores may still read it: of a tile with a second use it keeps one copy too few.
        products = tl.where(start < K, products, 0.0)
    products *= inverse_root

    exp_avg = pointer(table_ptr, matrix, EXP_AVG, tl.float32, ALIGNED) + first_channel.to(tl.int64) * rank
    exp_avg_sq = (
        pointer(table_ptr, matrix, EXP_AVG_SQ, tl.float32, ALIGNED) + first_channel.to(tl.int64) * rank
    )
    sums_ptr += matrix.to(tl.int64) * (2 * BLOCKS + 1) * C + first_channel + channels
    living = first_channel + channels < C
    WIDTH: tl.constexpr = min(BR, PIECE)
    pieces = _pieces(products, BC, BR, WIDTH)
    moment_sums, product_sums = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    for index in tl.static_range(BR // WIDTH):
        piece = pieces[index]
        columns = block * BR + index * WIDTH + tl.arange(0, WIDTH)
        at = channels[:, None] * rank + columns[None, :]
        mask = living[:, None] & (columns < rank)[None, :]
        normalised = moved_moments(piece, exp_avg, exp_avg_sq, at, mask, beta1, rest1, beta2, rest2, eps)
        moment_sums += tl.sum(normalised * normalised, axis=1)
        product_sums += tl.sum(piece * piece, axis=1)
    tl.store(sums_ptr + block * C, moment_sums, mask=living)
    tl.store(sums_ptr + (BLOCKS + block) * C, product_sums, mask=living)
    if block == 0:
        tl.store(sums_ptr + 2 * BLOCKS * C, tl.sum(squares, axis=1 if TALL else 0), mask=living)


@triton.jit
def _vector_statistics_kernel(
    table_ptr,
    signs_ptr,  # (matrices, K)
    partial_ptr,  # (matrices, splits, 2, C)
    C,
    K,
    split,
    TALL: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    first_channel, part, matrix = tl.program_id(0) * BC, tl.program_id(1), tl.program_id(2)
    channels, inner = tl.arange(0, BC), tl.arange(0, BK)
    grad = pointer(table_ptr, matrix, GRAD, DTYPE, ALIGNED)
    signs_ptr += matrix.to(tl.int64) * K
    SHAPE: tl.constexpr = (BC, BK) if TALL else (BK, BC)
    AXIS: tl.constexpr = 1 if TALL else 0
    products, squares = tl.zeros(SHAPE, tl.float32), tl.zeros(SHAPE, tl.float32)
    stop = tl.minimum((part + 1) * split, K)
    for start in range(part * split, stop, BK):
        tile = _tile(grad, first_channel, channels, start, inner, C, stop, K, TALL, EVEN).to(tl.float32)
        if EVEN:
            signs = tl.load(signs_ptr + start + inner)
        else:
            signs = tl.load(signs_ptr + start + inner, mask=start + inner < stop, other=0.0)
        products += tile * tl.expand_dims(signs.to(tl.float32), 1 - AXIS)
        squares += tile * tile
    partial_ptr += (matrix.to(tl.int64) * tl.num_programs(1) + part) * 2 * C + first_channel + channels
    living = first_channel + channels < C
    tl.store(partial_ptr, tl.sum(products, axis=AXIS), mask=living)
    tl.store(partial_ptr + C, tl.sum(squares, axis=AXIS), mask=living)
