"""How many tokens a mini-sequence has: pure and deterministic, so every rank of a group agrees."""

from __future__ import annotations

MIN_TILE_TOKENS = 4096
MAX_TILE_TOKENS = 32768
TILE_MEMORY_BYTES = 2**30
"""Working set that a tile aims at; small beside one layer's input at the lengths where tiles matter."""


def choose_tile_tokens(num_tokens: int, intermediate_size: int, itemsize: int) -> int:
    """Tokens of a tile of a gated MLP.

    A tile reads the weights anew, so it must be long enough to be bound by arithmetic: from about 4,096
    tokens the re-reading costs under 4 % on an H200 (3 x D x F x 2 bytes at 4 TB/s against 6 x D x F x T
    operations at 600 TFLOP/s). It is no longer than its intermediates, about six of `(T, F)` in backward,
    take `TILE_MEMORY_BYTES`. The sequence is then cut evenly, so that no short tile is left over.

    Args:
        num_tokens: Tokens that are cut.
        intermediate_size: Width F of the MLP.
        itemsize: Bytes of an element.
    """
    longest = TILE_MEMORY_BYTES // (6 * intermediate_size * itemsize)
    longest = min(max(longest, MIN_TILE_TOKENS), MAX_TILE_TOKENS)
    num_tiles = max(1, -(-num_tokens // longest))
    even = -(-num_tokens // num_tiles)
    return max(1, min(-(-even // 128) * 128, longest))
