"""Tile sizes are a pure function of what every rank knows."""

from __future__ import annotations

import pytest

from longseq.mst.tiling import MAX_TILE_TOKENS, MIN_TILE_TOKENS, choose_tile_tokens


@pytest.mark.parametrize("num_tokens", [0, 1, 4095, 4096, 4097, 131072, 131073, 1_000_001])
@pytest.mark.parametrize("intermediate_size", [688, 14336, 53248])
def test_tiles_are_long_enough_and_even(num_tokens: int, intermediate_size: int) -> None:
    tile = choose_tile_tokens(num_tokens, intermediate_size, 2)
    assert 1 <= tile <= MAX_TILE_TOKENS
    num_tiles = -(-num_tokens // tile)
    if num_tiles > 1:
        last = num_tokens - (num_tiles - 1) * tile
        assert tile >= MIN_TILE_TOKENS / 2
        assert last > tile - 128 * num_tiles  # no short tile is left over


def test_a_tile_of_llama_3_8b_holds_its_memory() -> None:
    assert choose_tile_tokens(131072, 14336, 2) * 6 * 14336 * 2 <= 2**30
