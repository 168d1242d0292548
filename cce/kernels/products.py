"""The two products of backward: what reaches the hidden states, and what reaches the weight.

Their left factor is a chunk of the logits' gradient (or of exponentials that row scales will turn into it).
Both can be told which of its tiles are alive, and skip the rest. Sums stay in float32 registers; where a sum
is cut, or goes on from an earlier chunk, it is added in float32 in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .logits import RowTiles, processors
from .tuning import NARROW_PRODUCT, PRODUCT, TILE, Blocks, max_splits, splits_for


class LivingTiles(NamedTuple):
    """The tiles that a filter keeps, as lists: for every row of tiles, the columns that live."""

    listed: Tensor  # (rows of tiles, columns of tiles + 1) int32, the living first; kernels look one ahead
    count: Tensor  # (rows of tiles,) int32


@triton.jit
def _write_tile(desc, row, column, tile, ADD: tl.constexpr, REDUCE: tl.constexpr):
    if ADD:
        if REDUCE:
            desc.atomic_add([row, column], tile)
        else:
            desc.store([row, column], desc.load([row, column]) + tile)
    else:
        desc.store([row, column], tile.to(desc.dtype))


@triton.jit
def _write_quarters(
    desc, row, column, acc, BM: tl.constexpr, BN: tl.constexpr, ADD: tl.constexpr, REDUCE: tl.constexpr
):
    # A whole float32 tile does not fit into shared memory beside the operands in flight, and half of one
    # takes 2-8 % longer.
    left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
    first, second = tl.split(tl.permute(tl.reshape(left, (BM, 2, BN // 4)), (0, 2, 1)))
    third, fourth = tl.split(tl.permute(tl.reshape(right, (BM, 2, BN // 4)), (0, 2, 1)))
    _write_tile(desc, row, column, first, ADD, REDUCE)
    _write_tile(desc, row, column + BN // 4, second, ADD, REDUCE)
    _write_tile(desc, row, column + BN // 2, third, ADD, REDUCE)
    _write_tile(desc, row, column + 3 * BN // 4, fourth, ADD, REDUCE)


@triton.jit
def _step_at(listed_ptr, step, TILE: tl.constexpr, BK: tl.constexpr):
    return tl.load(listed_ptr + step // (TILE // BK)) * TILE + step % (TILE // BK) * BK


@triton.jit
def _rows_item(
    item,
    per_split,
    num_columns,
    left_desc,
    right_desc,
    out_desc,
    row_tiles_ptr,
    listed_ptr,
    count_ptr,
    list_stride,
    split_rows,
    V,
    LISTED_ROWS: tl.constexpr,
    LIVING: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    ADD: tl.constexpr,
    REDUCE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    split = item // per_split
    index = item % per_split // num_columns
    column = item % num_columns * BN
    row = index * BM
    if LISTED_ROWS:
        row = tl.load(row_tiles_ptr + index) * BM
    acc = tl.zeros((BM, BN), tl.float32)
    if LIVING:
        steps = tl.load(count_ptr + index) * (TILE // BK)
        living = listed_ptr + index * list_stride
        start, stop = steps * split // SPLITS, steps * (split + 1) // SPLITS
        word = _step_at(living, start, TILE, BK)
        for step in range(start, stop):
            # Looked up a step ahead, or each load of a tile would wait for that of its place: 1.4 times the
            # time.
            next_word = _step_at(living, step + 1, TILE, BK)
            acc = tl.dot(
                left_desc.load([row, word]), right_desc.load([word, column]), acc, input_precision="ieee"
            )
            word = next_word
    else:
        steps = tl.cdiv(V, BK)
        for step in range(steps * split // SPLITS, steps * (split + 1) // SPLITS):
            word = step * BK
            acc = tl.dot(
                left_desc.load([row, word]), right_desc.load([word, column]), acc, input_precision="ieee"
            )
    _write_quarters(out_desc, split * split_rows + row, column, acc, BM, BN, ADD, REDUCE)


@triton.jit
def _rows_product_kernel(
    left_desc,  # (N, V)
    right_desc,  # (V, D)
    out_desc,  # (SPLITS * split_rows, D) float32
    row_tiles_ptr,
    num_row_tiles_ptr,
    listed_ptr,  # living word tiles of each row tile
    count_ptr,
    queue_ptr,  # (1,) 0: items taken
    list_stride,
    split_rows,  # rows of out between two splits
    V,
    D,
    LISTED_ROWS: tl.constexpr,
    LIVING: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    ADD: tl.constexpr,
    REDUCE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    num_columns = tl.cdiv(D, BN)
    per_split = tl.load(num_row_tiles_ptr) * num_columns
    # Splits outermost: programs of one wave walk the same words, and share what they read through the cache.
    items = per_split * SPLITS
    if LIVING:
        # Items differ in length: whoever is free takes the next. Who takes which changes no result.
        item = tl.atomic_add(queue_ptr, 1)
        while item < items:
            _rows_item(
                item,
                per_split,
                num_columns,
                left_desc,
                right_desc,
                out_desc,
                row_tiles_ptr,
                listed_ptr,
                count_ptr,
                list_stride,
                split_rows,
                V,
                LISTED_ROWS,
                LIVING,
                TILE,
                SPLITS,
                ADD,
                REDUCE,
                BM,
                BN,
                BK,
            )
            item = tl.atomic_add(queue_ptr, 1)
    else:
        for item in range(tl.program_id(0), items, tl.num_programs(0)):
            _rows_item(
                item,
                per_split,
                num_columns,
                left_desc,
                right_desc,
                out_desc,
                row_tiles_ptr,
                listed_ptr,
                count_ptr,
                list_stride,
                split_rows,
                V,
                LISTED_ROWS,
                LIVING,
                TILE,
                SPLITS,
                ADD,
                REDUCE,
                BM,
                BN,
                BK,
            )


@triton.jit
def _columns_product_kernel(
    left_desc,  # (N, V)
    right_desc,  # (N, D)
    out_desc,  # (V, D)
    row_tiles_ptr,
    num_row_tiles_ptr,
    listed_ptr,  # living row tiles of each word tile
    count_ptr,
    list_stride,
    V,
    D,
    LISTED_ROWS: tl.constexpr,
    LIVING: tl.constexpr,
    TILE: tl.constexpr,  # rows of a row tile
    WIDE: tl.constexpr,
    ADD: tl.constexpr,
    REDUCE: tl.constexpr,
    FLAT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    num_columns = tl.cdiv(D, BN)
    for item in tl.range(tl.program_id(0), tl.cdiv(V, BM) * num_columns, tl.num_programs(0), flatten=FLAT):
        index = item // num_columns
        word, column = index * BM, item % num_columns * BN
        acc = tl.zeros((BM, BN), tl.float32)
        write = True
        if LIVING or LISTED_ROWS:
            if LIVING:
                steps = tl.load(count_ptr + index) * (TILE // BK)
                living = listed_ptr + index * list_stride
            else:
                steps = tl.load(num_row_tiles_ptr) * (TILE // BK)
                living = row_tiles_ptr
            row = _step_at(living, 0, TILE, BK)
            for step in range(0, steps):
                next_row = _step_at(living, step + 1, TILE, BK)
                acc = tl.dot(
                    left_desc.load([row, word]).T, right_desc.load([row, column]), acc, input_precision="ieee"
                )
                row = next_row
            if ADD:
                write = steps > 0
        else:
            steps = tl.load(num_row_tiles_ptr) * (TILE // BK)
            for step in range(0, steps):
                row = step * BK
                acc = tl.dot(
                    left_desc.load([row, word]).T, right_desc.load([row, column]), acc, input_precision="ieee"
                )
        if write:
            if WIDE:
                _write_quarters(out_desc, word, column, acc, BM, BN, ADD, REDUCE)
            else:
                out_desc.store([word, column], acc.to(out_desc.dtype))


def rows_product(
    left: Tensor,  # (N, at least V)
    right: Tensor,  # (V, D)
    out: Tensor,  # (splits, N, D) float32
    tiles: RowTiles,
    *,
    living: LivingTiles | None = None,
    add: bool = False,
) -> None:
    """`out.sum(0) = left @ right` over the rows of `tiles`, or added to what `out` holds.

    Rows of other tiles are not written.
    """
    blocks = blocks_for(right.shape[1])
    splits, num_rows, width = out.shape
    programs = processors(right)
    _rows_product_kernel[(programs,)](
        TensorDescriptor.from_tensor(left, [blocks.rows, blocks.inner]),
        TensorDescriptor.from_tensor(right, [blocks.inner, blocks.columns]),
        TensorDescriptor.from_tensor(out.view(-1, width), [blocks.rows, blocks.columns // 4]),
        tiles.listed,
        tiles.count,
        None if living is None else living.listed,
        None if living is None else living.count,
        None if living is None else torch.zeros(1, dtype=torch.int32, device=left.device),
        0 if living is None else living.listed.shape[1],
        num_rows,
        right.shape[0],
        width,
        LISTED_ROWS=tiles.listed is not None,
        LIVING=living is not None,
        TILE=TILE,
        SPLITS=splits,
        ADD=add,
        REDUCE=left.is_cuda,
        BM=blocks.rows,
        BN=blocks.columns,
        BK=blocks.inner,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )


def columns_product(
    left: Tensor,  # (N, at least V)
    right: Tensor,  # (N, D)
    out: Tensor,  # (V, D)
    tiles: RowTiles,
    *,
    living: LivingTiles | None = None,
    add: bool = False,
) -> None:
    """`out = left[:, :V].T @ right` over the rows of `tiles`, or, in float32, added to `out`."""
    blocks = blocks_for(right.shape[1])
    vocab_size, width = out.shape
    programs = processors(out)
    wide = out.dtype == torch.float32
    _columns_product_kernel[(programs,)](
        TensorDescriptor.from_tensor(left, [blocks.inner, blocks.rows]),
        TensorDescriptor.from_tensor(right, [blocks.inner, blocks.columns]),
        TensorDescriptor.from_tensor(out, [blocks.rows, blocks.columns // 4 if wide else blocks.columns]),
        tiles.listed,
        tiles.count,
        None if living is None else living.listed,
        None if living is None else living.count,
        0 if living is None else living.listed.shape[1],
        vocab_size,
        width,
        LISTED_ROWS=tiles.listed is not None,
        LIVING=living is not None,
        TILE=TILE,
        WIDE=wide,
        ADD=add,
        REDUCE=left.is_cuda,
        FLAT=living is None and tiles.listed is None,
        BM=blocks.rows,
        BN=blocks.columns,
        BK=blocks.inner,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )


def blocks_for(width: int) -> Blocks:
    """Tile of a product with `width` columns."""
    return PRODUCT if width > NARROW_PRODUCT.columns else NARROW_PRODUCT


def num_splits(row_tiles: int, vocab_size: int, width: int, device_of: Tensor) -> int:
    """Parts into which `rows_product` cuts its sum, so that every program has as much to do."""
    columns = triton.cdiv(width, blocks_for(width).columns)
    return splits_for(row_tiles * columns, processors(device_of), max_splits(row_tiles, vocab_size, width))
