"""Moments of projected gradients, and what follows from them: each channel's scale, each matrix's limit."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .table import EXP_AVG, EXP_AVG_SQ, UPDATE_NORM, Table, pointer
from .tuning import Tiles

TINY = tl.constexpr(1e-8)
"""Added to norms that are divided by."""


class Decay(NamedTuple):
    """How moments forget, as kernels are given it."""

    beta1: float
    rest1: float  # 1 - beta1, rounded once
    beta2: float
    rest2: float
    eps: float


@triton.jit
def moved_moments(products, exp_avg_ptr, exp_avg_sq_ptr, at, mask, beta1, rest1, beta2, rest2, eps):
    """Both moments after `products`, written; returns the first over the root of the second, 0 outside."""
    # Both are on their way before the first is waited for.
    exp_avg = tl.load(exp_avg_ptr + at, mask=mask, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=mask, other=0.0)
    exp_avg = exp_avg * beta1 + products * rest1
    exp_avg_sq = exp_avg_sq * beta2 + products * products * rest2
    tl.store(exp_avg_ptr + at, exp_avg, mask=mask)
    tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=mask)
    return tl.where(mask, exp_avg / (tl.sqrt(exp_avg_sq) + eps), 0.0)


def vector_moments(table: Table, partial: Tensor, sums: Tensor, decay: Decay) -> None:
    """The moments of rank 1, from the parts of each channel's product.

    Args:
        table: Its exp_avg and exp_avg_sq are written.
        partial: `(count, splits, 2, channels)`: products, and squared norms of channels.
        sums: `(count, 3, channels)`, written: squares of normalised moment, product and channel.
        decay: Of the moments.
    """
    block = min(1024, triton.next_power_of_2(table.channels))
    _vector_moments_kernel[(triton.cdiv(table.channels, block), table.count)](
        table.entries,
        partial,
        sums,
        table.channels,
        partial.shape[1],
        *decay,
        ALIGNED=table.aligned,
        BLOCK=block,
    )


@triton.jit(do_not_specialize=["splits"])
def _vector_moments_kernel(
    table_ptr,
    partial_ptr,
    sums_ptr,
    C,
    splits,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    matrix = tl.program_id(1)
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channels < C
    partial_ptr += matrix.to(tl.int64) * splits * 2 * C + channels
    product, square = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        product += tl.load(partial_ptr + split * 2 * C, mask=mask, other=0.0)
        square += tl.load(partial_ptr + (split * 2 + 1) * C, mask=mask, other=0.0)
    exp_avg = pointer(table_ptr, matrix, EXP_AVG, tl.float32, ALIGNED)
    exp_avg_sq = pointer(table_ptr, matrix, EXP_AVG_SQ, tl.float32, ALIGNED)
    normalised = moved_moments(product, exp_avg, exp_avg_sq, channels, mask, beta1, rest1, beta2, rest2, eps)
    sums_ptr += matrix.to(tl.int64) * 3 * C + channels
    tl.store(sums_ptr, normalised * normalised, mask=mask)
    tl.store(sums_ptr + C, product * product, mask=mask)
    tl.store(sums_ptr + 2 * C, square, mask=mask)


def limited_scales(
    table: Table, sums: Tensor, *, by_channel: bool, growth_limit: float | None, tiles: Tiles
) -> tuple[Tensor, Tensor]:
    """What gradients are multiplied with, so that an update's norm grows no faster than the limit.

    Args:
        table: Its update_norm is written.
        sums: `(count, 2 blocks + 1, channels)`: squares of normalised moments and of products, both summed
            over each block of ranks, and of channels.
        by_channel: Whether each channel has a scale of its own, or the whole matrix one.
        growth_limit: Of an update's norm over the one before it; None: any.
        tiles: Block sizes.

    Returns:
        `(count,)`, and `(count, channels)` that multiply it further (by channel; else unwritten).
    """
    factors, scales = table.scratch(table.count), table.scratch(table.count, table.channels)
    _limit_kernel[(table.count,)](
        table.entries,
        sums,
        factors,
        scales,
        table.channels,
        1.0 if growth_limit is None else float(growth_limit),
        BY_CHANNEL=by_channel,
        LIMITED=growth_limit is not None,
        BLOCKS=sums.shape[1] // 2,
        BLOCK=min(tiles.sum_elements, triton.next_power_of_2(table.channels)),
        num_warps=tiles.sum_warps,
    )
    return factors, scales


@triton.jit
def _limit_kernel(
    table_ptr,
    sums_ptr,
    factors_ptr,
    scales_ptr,
    C,
    growth_limit,
    BY_CHANNEL: tl.constexpr,
    LIMITED: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    matrix = tl.program_id(0)
    sums_ptr += matrix.to(tl.int64) * (2 * BLOCKS + 1) * C
    scales_ptr += matrix.to(tl.int64) * C
    moments, products = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, C, BLOCK):
        channels = start + tl.arange(0, BLOCK)
        mask = channels < C
        moment, product = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for block in tl.static_range(BLOCKS):
            moment += tl.load(sums_ptr + block * C + channels, mask=mask, other=0.0)
            product += tl.load(sums_ptr + (BLOCKS + block) * C + channels, mask=mask, other=0.0)
        square = tl.load(sums_ptr + 2 * BLOCKS * C + channels, mask=mask, other=0.0)
        if BY_CHANNEL:
            scale = tl.sqrt(moment) / (tl.sqrt(product) + TINY)
            tl.store(scales_ptr + channels, scale, mask=mask)
            # Not scale^2 * square: where a gradient vanishes, the scale's square may pass float32.
            norm = scale * tl.sqrt(square)
            squares += norm * norm
        else:
            moments += moment
            products += product
            squares += square
    norm, factor = tl.sqrt(tl.sum(squares)), 1.0
    if not BY_CHANNEL:
        factor = tl.sqrt(tl.sum(moments)) / (tl.sqrt(tl.sum(products)) + TINY)
        norm *= factor
    norm_ptr = pointer(table_ptr, matrix, UPDATE_NORM, tl.float32, False)
    if LIMITED:
        before = tl.load(norm_ptr)
        growth = tl.maximum(norm / (before + TINY), growth_limit, propagate_nan=tl.PropagateNan.ALL)
        limit = tl.where(before > 0.0, growth / growth_limit, 1.0)
        norm /= limit
        factor /= limit
    tl.store(norm_ptr, norm)
    tl.store(factors_ptr + matrix, factor)
