"""Block sizes of the kernels, and why (benchmarks/results/lm_head_tuning.md).

Measured on an H200 with random data, bf16, 8,192 tokens, in units G of cuBLAS's bare logits product (heads of
128,256 x 4,096 and 256,000 x 2,304): 128 x 256 x 64 tiles with 8 warps and 3 stages give the logits and their
exponentials in 0.93-1.10 G; 256 x 128 tiles take 1.00-1.24 G, 128 x 128 tiles 1.05-1.20 G, steps of 128 over
the inner dimension 1.22-1.29 G. A fourth stage gains nothing, and does not fit beside a stored tile.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Blocks(NamedTuple):
    """A tile of a product: rows and columns of the result, and the step over what is summed."""

    rows: int = 128
    columns: int = 256
    inner: int = 64
    num_warps: int = 8
    num_stages: int = 3


LOGITS = Blocks()
PRODUCT = Blocks()
NARROW_PRODUCT = Blocks(columns=64, num_warps=4)
"""For a low-rank factor, whose few columns would leave most of a wide tile empty."""

TILE = LOGITS.rows
"""Tokens of a row tile, and words of the tiles that a filter keeps or drops: those of the paper's rule."""

CACHED_BYTES = 24e6
"""Hidden states that programs may work on at once: more, and they leave the cache (of 50 MB) between two
tiles of words. At 65,536 tokens x 4,096, 33 row tiles at once take 1.08 G and 22 take 1.02 G."""

MAX_STRIPS = 64


def strips_for(row_tiles: int, word_tiles: int, width: int, processors: int) -> int:
    """Into how many strips a row tile's words are cut: the fewest that keep programs about as busy as any."""
    cached_tiles = CACHED_BYTES / (LOGITS.rows * width * 2)
    fewest = max(1, min(MAX_STRIPS, word_tiles, math.ceil(processors / cached_tiles)))
    if not row_tiles:
        return fewest
    candidates = range(fewest, max(fewest, min(MAX_STRIPS, word_tiles)) + 1)
    times = {strips: logits_time(row_tiles, word_tiles, strips, processors) for strips in candidates}
    return min(strips for strips in candidates if times[strips] <= 1.05 * min(times.values()))


def logits_time(row_tiles: int, word_tiles: int, strips: int, processors: int) -> int:
    """Tiles that the busiest program does."""
    return _waves(row_tiles * strips, processors) * -(-word_tiles // strips)


def chunk_tiles(row_tiles: int, most: int, vocab_size: int, width: int, processors: int) -> int:
    """Row tiles of a chunk, at most `most`, for the least time over all chunks.

    A chunk costs its logits, as long as the busiest program takes; two products, taken as evenly spread; and
    a share (0.1) of the time to read and write the float32 sum of the weight's gradient (8 V D bytes at
    4.3 TB/s), in units of a tile's time (128 x 256 x D at 6 TFLOP/s a processor).
    """
    word_tiles = -(-vocab_size // LOGITS.columns)
    fewest = -(-row_tiles // most)

    def time(num_chunks: int) -> float:
        tiles = -(-row_tiles // num_chunks)
        strips = strips_for(tiles, word_tiles, width, processors)
        products = 2 * tiles * word_tiles / processors
        return num_chunks * (
            logits_time(tiles, word_tiles, strips, processors) + products + 2e-5 * vocab_size
        )

    num_chunks = min(range(fewest, min(2 * fewest, fewest + 32) + 1), key=time)
    return -(-row_tiles // num_chunks)


def max_splits(row_tiles: int, vocab_size: int, width: int) -> int:
    """Parts that a sum over words may be cut into: a few, while they are small beside the logits."""
    if row_tiles <= 8:
        return 4
    return max(2, int(0.06 * vocab_size * 2 / (width * 4)))


def splits_for(tiles: int, processors: int, most: int) -> int:
    """Into how many parts a sum is cut; a part costs a write and a read of the result: 3 % of the time."""

    def time(splits: int) -> float:
        return _waves(tiles * splits, processors) / splits * (1 + 0.03 * (splits - 1))

    return min(range(1, min(most, 4) + 1), key=time)


def _waves(items: int, processors: int) -> int:
    return -(-items // processors)
