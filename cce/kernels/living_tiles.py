"""Which tiles of the gradient are worth their products, from what the forward pass saw of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .products import LivingTiles
from .tuning import TILE

_WORD_TILES = 64


class Living(NamedTuple):
    """The tiles that are kept: as lists for both products, and in numbers."""

    of_rows: LivingTiles
    of_words: LivingTiles
    alive: Tensor  # (row tiles, word tiles) int8
    dropped: Tensor | None  # (row tiles, word tiles) float32: probability in the tiles that are not


@triton.jit
def _living_kernel(
    tile_max_ptr,  # (word tiles, N)
    tile_sum_ptr,
    sums_ptr,  # (N,)
    count_ptr,
    alive_ptr,
    dropped_ptr,
    eps,
    N,
    num_word_tiles,
    HAS_SUMS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_tile = tl.program_id(0)
    rows = row_tile * TILE + tl.arange(0, TILE)
    tiles = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    counts = rows < tl.load(count_ptr)
    total = tl.load(sums_ptr + rows, mask=counts, other=1.0)[:, None]
    at = tiles[None, :].to(tl.int64) * N + rows[:, None]
    inside = counts[:, None] & (tiles[None, :] < num_word_tiles)
    largest = tl.load(tile_max_ptr + at, mask=inside, other=0.0)
    # "not below" rather than "above": a NaN keeps its tile, and shows.
    keep = ((largest < eps * total) == 0) & inside
    alive = tl.max(keep.to(tl.int32), 0)
    out = row_tile * num_word_tiles + tiles
    tl.store(alive_ptr + out, alive.to(tl.int8), mask=tiles < num_word_tiles)
    if HAS_SUMS:
        share = tl.load(tile_sum_ptr + at, mask=inside, other=0.0) / total
        dropped = tl.where(alive > 0, 0.0, tl.sum(share, 0))
        tl.store(dropped_ptr + out, dropped, mask=tiles < num_word_tiles)


@triton.jit
def _list_kernel(alive_ptr, listed_ptr, count_ptr, length, row_stride, column_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    alive = tl.load(alive_ptr + row * row_stride + columns * column_stride, mask=columns < length, other=0)
    alive = alive.to(tl.int32)
    place = tl.cumsum(alive, 0) - 1
    tl.store(listed_ptr + row * (length + 1) + place, columns, mask=alive > 0)
    tl.store(count_ptr + row, tl.sum(alive, 0))


def find_living_tiles(
    tile_max: Tensor,  # (word tiles, N), N a multiple of a tile
    tile_sum: Tensor | None,
    sums: Tensor,  # (N,)
    count: Tensor,
    eps: float,
) -> Living:
    """A tile lives if a probability in it is `eps` or more."""
    num_word_tiles, num_rows = tile_max.shape
    num_row_tiles = num_rows // TILE
    alive = torch.empty(num_row_tiles, num_word_tiles, dtype=torch.int8, device=sums.device)
    dropped = None if tile_sum is None else torch.empty_like(alive, dtype=torch.float32)
    _living_kernel[(num_row_tiles, triton.cdiv(num_word_tiles, _WORD_TILES))](
        tile_max,
        tile_sum,
        sums,
        count,
        alive,
        dropped,
        eps,
        num_rows,
        num_word_tiles,
        HAS_SUMS=tile_sum is not None,
        TILE=TILE,
        BLOCK=_WORD_TILES,
    )
    return Living(_as_lists(alive), _as_lists(alive.T), alive, dropped)


def _as_lists(alive: Tensor) -> LivingTiles:
    num_lists, length = alive.shape
    listed = torch.zeros(num_lists, length + 1, dtype=torch.int32, device=alive.device)
    count = torch.empty(num_lists, dtype=torch.int32, device=alive.device)
    _list_kernel[(num_lists,)](
        alive, listed, count, length, alive.stride(0), alive.stride(1), BLOCK=triton.next_power_of_2(length)
    )
    return LivingTiles(listed, count)
