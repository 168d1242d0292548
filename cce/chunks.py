"""How a problem is cut for the fused kernels: pure arithmetic, the same wherever it is asked."""

from __future__ import annotations

from typing import NamedTuple

from .head import Needs
from .kernels.tuning import LOGITS, TILE, chunk_tiles, max_splits

MIB = 2**20
DEFAULT_MEMORY_MIB = 1024
ITEM_BYTES = 2
"""The fused kernels take bf16."""
MIN_WORDS = 8192
"""Words of a chunk in backward from which their products keep the GPU busy."""
SORT_FROM_TOKENS = 4096
"""Tokens from which a filter puts the words in order, and so pays for a copy of the weight."""


class Chunks(NamedTuple):
    """How a problem is cut."""

    num_tokens: int  # of a chunk
    defer_weight: bool = False  # the head's gradients wait for backward, where they need no float32 sum
    defer_hidden: bool = False  # so do those of the tokens
    keep: bool = False  # the head's gradients wait, and so do the exponentials that they are made from


def plan(
    num_tokens: int,
    vocab_size: int,
    width: int,
    needs: Needs,
    memory_mib: int | None,
    *,
    filtered: bool = False,
    processors: int = 132,
) -> Chunks:
    """Cut a problem so that it takes `memory_mib` beside the gradients that it returns.

    A weight's gradient is summed in float32, and its copy in the weight's dtype is not there before backward:
    its place serves the chunk. Where the memory is too small for the float32 sum, the weight's gradient is
    left to backward, which remakes the logits: one product more, and no sum of its size. The hidden states'
    gradient is left to it as well where its own float32 sum fits. And where all exponentials fit, they are
    kept for backward: the weight's gradient is then one sum over all tokens, and needs no memory of its own.
    """
    weight_bytes = vocab_size * width * ITEM_BYTES if needs.weight else 0
    sum_bytes = 2 * weight_bytes
    hidden_bytes = num_tokens * width * ITEM_BYTES if needs.hidden else 0
    padded = -(-vocab_size // LOGITS.columns) * LOGITS.columns
    # Exponentials; a copy of the hidden states; and, where memory is counted so closely, a filter's notes.
    token_bytes = (padded + width) * ITEM_BYTES
    token_bytes += 8 * padded // TILE if filtered and memory_mib is not None else 0
    row_tiles = -(-num_tokens // TILE)

    def tile_bytes(tiles: int) -> int:
        parts = max_splits(tiles, vocab_size, width) if needs.hidden else 0
        return TILE * (token_bytes + 4 * width * parts)

    def fits(tiles: int, budget: int) -> bool:
        return tiles * tile_bytes(tiles) <= budget

    whole = DEFAULT_MEMORY_MIB * MIB + sum_bytes if memory_mib is None else memory_mib * MIB
    # In backward a scaled copy of the hidden states, and of their gradient, stands beside the exponentials.
    if needs.weight and not filtered and fits(row_tiles, whole - 2 * hidden_bytes):
        return Chunks(row_tiles * TILE, keep=True)
    budget = (memory_mib or DEFAULT_MEMORY_MIB) * MIB + weight_bytes
    if memory_mib is not None:
        budget -= sum_bytes
        if filtered and num_tokens >= SORT_FROM_TOKENS:
            budget -= vocab_size * width * ITEM_BYTES  # the words in order
    defer = False
    if memory_mib is not None and needs.weight and not filtered:
        small = sum_bytes + hidden_bytes > memory_mib * MIB  # as they stand side by side in backward
        defer = small or not fits(min(row_tiles, 8), budget)
    if defer:
        budget = memory_mib * MIB
        if num_tokens * (width * 4 + MIN_WORDS * ITEM_BYTES) <= budget:
            return Chunks(num_tokens, defer_weight=True, defer_hidden=True)
    most = budget // tile_bytes(row_tiles)
    if most <= 8:
        most = min(8, budget // tile_bytes(1))
    most = max(1, min(most, row_tiles))
    return Chunks(chunk_tiles(row_tiles, most, vocab_size, width, processors) * TILE, defer)


def filter_memory_mib(vocab_size: int, width: int) -> int:
    """The least memory in which a filter makes sense: a float32 sum, the words in order, and a chunk."""
    return -(-vocab_size * width * (4 + ITEM_BYTES) // MIB) + DEFAULT_MEMORY_MIB // 4


def words_per_chunk(
    num_tokens: int,
    vocab_size: int,
    width: int,
    needs: Needs,
    memory_mib: int | None,
    *,
    processors: int,
) -> int:
    """Words whose gradient fits beside the hidden states' float32 sum, in tiles that fill the processors.

    One tile of words at least.
    """
    budget = (memory_mib or DEFAULT_MEMORY_MIB // 2) * MIB
    if needs.hidden and memory_mib is not None:
        budget -= num_tokens * width * 4
    tile = LOGITS.columns
    most = max(tile, budget // (num_tokens * ITEM_BYTES))
    most = min(-(-vocab_size // tile), most // tile) * tile
    columns = -(-width // LOGITS.columns)

    def waste(words: int) -> float:
        tiles = words // TILE * columns
        return -(-tiles // processors) * processors / tiles

    candidates = range(max(tile, most // 2 // tile * tile), most + 1, tile)
    return min(candidates, key=lambda words: (round(waste(words), 2), -words))
