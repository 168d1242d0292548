"""How many tokens a mini-sequence has: pure and deterministic, so every rank of a group agrees."""

from __future__ import annotations

MIN_TILE_TOKENS = 4096
MAX_TILE_TOKENS = 32768
TILE_MEMORY_BYTES = 3 * 2**29
"""Working set that a tile aims at; small beside one layer's input at the lengths where tiles matter."""
TILE_MULTIPLE = 128
"""Rows of a matrix-product kernel's block: a tile that is no multiple leaves part of a block idle."""


def choose_tile_tokens(
    num_tokens: int, intermediate_size: int, itemsize: int, *, num_intermediates: int = 6
) -> int:
    """Tokens of a tile of a gated MLP, from 4,096 to 32,768 before the sequence is cut evenly.

    Bandwidth sets the least. Forward and backward of a tile of T tokens are 24 x D x F x T operations, its
    recomputation included. Per tile they read the three weights again, 3 x D x F x 2 bytes a pass, and the
    float32 sum of the weights' gradients is read and written, 3 x D x F x 12 bytes with the bf16 gradient
    that is added. At 600 TFLOP/s and 4 TB/s (an H200) the reading is 150 / T of a forward pass, and mostly
    hidden behind the products; the sum is 225 / T of the step: 5 % at 4,096 tokens, 3 % at 8,192, 1 % at
    16,384. Measured on an H100 (benchmarks/results/decoder_head_groups.md), tiles of 16,384 tokens run their
    products as fast as all 65,536 at once, sums in float32 included.

    Memory sets the most: backward by autograd holds about six intermediates of `(T, F)`, which are to fit in
    `TILE_MEMORY_BYTES` unless that falls under the least. It does not depend on the length, so a longer
    sequence has more tiles, never larger ones. The sequence is then cut evenly, in multiples of 128, so that
    no short tile is left over; just above one tile's length the two are a little over half as long.

    Args:
        num_tokens: Tokens that are cut.
        intermediate_size: Width F of the MLP.
        itemsize: Bytes of an element.
        num_intermediates: Tensors of `(T, F)` that are alive at once.
    """
    longest = TILE_MEMORY_BYTES // (num_intermediates * intermediate_size * itemsize)
    longest = min(max(longest, MIN_TILE_TOKENS), MAX_TILE_TOKENS) // TILE_MULTIPLE * TILE_MULTIPLE
    even = -(-num_tokens // number_of_tiles(num_tokens, longest))
    return max(1, -(-even // TILE_MULTIPLE)) * TILE_MULTIPLE


def number_of_tiles(num_tokens: int, tile_tokens: int) -> int:
    """Tiles that `mini_sequence` cuts; at least one, for no tokens are one empty tile.

    Ranks of different lengths whose function has collectives pass the largest as `min_tiles`.

    Args:
        num_tokens: Tokens that are cut.
        tile_tokens: Tokens of a tile.
    """
    return max(1, -(-num_tokens // tile_tokens))
