"""The random projection: any part of it, from integers alone, and never stored.

A projection has entries of +-1 over the root of its rank. For what APOLLO needs of it, norms kept up to a
small error, it is as good as a normal one (Achlioptas, "Database-friendly random projections", 2003), and its
entries are exact in every dtype and equal on every device, which those of a normal one are not.
"""

from __future__ import annotations

import hashlib
from functools import cache

import torch
from torch import Tensor

from .dispatch import has_triton

WORD, MASK_64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
ROWS_A_BLOCK = 128
"""Rows of the projection that one block of four words has the signs of."""


@cache
def parameter_key(seed: int, name: str) -> int:
    """64 bits that are a parameter's own: of equal shapes, no two may be projected alike."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def mixed(key: int, number: int) -> int:
    """64 bits of a key and a number, such as a step (SplitMix64, Steele et al. 2014)."""
    state = (key + (number + 1) * 0x9E3779B97F4A7C15) & MASK_64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK_64
    return state ^ (state >> 31)


def signs(
    key: int, rank: int, start: int, stop: int, *, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Columns `start` to `stop` of the signs of a projection, `(rank, stop - start)`.

    Args:
        key: 64 bits; another one for each matrix and each `update_gap` steps.
        rank: Rows of the projection.
        start: First column.
        stop: After the last one.
        dtype: Of the result, whose entries are 1 and -1.
        device: Where it is made; the entries are the same everywhere.
    """
    device = torch.device(device)
    if device.type == "cuda" and has_triton():
        from .kernels.projection import signs_of

        return signs_of(key, rank, stop, device)[:, start:].to(dtype)
    num_blocks = -(-rank // ROWS_A_BLOCK)
    column = torch.arange(start, stop, dtype=torch.int64, device=device)
    block = torch.arange(num_blocks, dtype=torch.int64, device=device)
    words = torch.stack(philox(key, column.expand(num_blocks, -1), block.unsqueeze(1)), dim=1)
    bit = torch.arange(32, dtype=torch.int64, device=device).view(1, 1, 32, 1)
    bits = (words.unsqueeze(2) >> bit) & 1
    return (1 - 2 * bits.flatten(0, 2)[:rank]).to(dtype)


def philox(key: int, low: Tensor, high: Tensor) -> list[Tensor]:
    """Four 32-bit words for each counter `(low, high, 0, 0)`, by Philox-4x32-10.

    Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", 2011.

    Args:
        key: 64 bits.
        low: First word of the counters, int64.
        high: Second word of the counters, int64, of a shape that broadcasts with it.
    """
    low, high = torch.broadcast_tensors(low, high)
    words = [low, high, torch.zeros_like(low), torch.zeros_like(low)]
    key_0, key_1 = key & WORD, key >> 32
    for _ in range(10):
        first, second = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57  # int64 wraps: all 64 bits are right
        words = [
            ((second >> 32) & WORD) ^ words[1] ^ key_0,
            second & WORD,
            ((first >> 32) & WORD) ^ words[3] ^ key_1,
            first & WORD,
        ]
        key_0, key_1 = (key_0 + 0x9E3779B9) & WORD, (key_1 + 0xBB67AE85) & WORD
    return words
