"""Tile sizes are a pure function of what every rank knows; dummy tiles make ranks run equally often."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from longseq.mst import mini_sequence
from longseq.mst.tiling import (
    MAX_TILE_TOKENS,
    MIN_TILE_TOKENS,
    TILE_MEMORY_BYTES,
    choose_tile_tokens,
    number_of_tiles,
)

LENGTHS = [0, 1, 127, 4095, 4096, 4097, 6145, 131072, 131073, 1_000_001, 16_777_216]
WIDTHS = [(688, 2), (688, 4), (8192, 2), (14336, 2), (14336, 4), (14337, 2), (53248, 2), (53248, 8)]


@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize(("intermediate_size", "itemsize"), WIDTHS)
def test_tiles_are_long_enough_and_even(num_tokens: int, intermediate_size: int, itemsize: int) -> None:
    tile = choose_tile_tokens(num_tokens, intermediate_size, itemsize)
    assert 128 <= tile <= MAX_TILE_TOKENS
    assert tile % 128 == 0
    num_tiles = number_of_tiles(num_tokens, tile)
    if num_tiles > 1:
        last = num_tokens - (num_tiles - 1) * tile
        assert tile > MIN_TILE_TOKENS / 2
        assert last > tile - 128 * num_tiles  # no short tile is left over


@pytest.mark.parametrize(("intermediate_size", "itemsize"), WIDTHS)
def test_memory_does_not_grow_with_the_sequence(intermediate_size: int, itemsize: int) -> None:
    bytes_of_a_token = 6 * intermediate_size * itemsize
    limit = max(TILE_MEMORY_BYTES, MIN_TILE_TOKENS * bytes_of_a_token)
    tiles = [choose_tile_tokens(length, intermediate_size, itemsize) for length in LENGTHS]
    assert max(tiles) * bytes_of_a_token <= limit
    # Nor does it shrink: a long sequence takes what a tile may have, but for the even cut.
    longest = min(limit // bytes_of_a_token, MAX_TILE_TOKENS) // 128 * 128
    assert tiles[-1] >= 0.99 * longest


@pytest.mark.parametrize(
    ("num_tokens", "intermediate_size", "itemsize", "tile"),
    [
        (131072, 14336, 2, 8832),  # Llama-3-8B: 15 tiles of 8,738.1 tokens
        (131072, 28672, 2, 4608),  # Llama-3-70B
        (131072, 57344, 2, 4096),  # twice as wide: the least
        (131072, 1024, 2, 32768),  # a small model: the most
        (100, 14336, 2, 128),
    ],
)
def test_known_sizes(num_tokens: int, intermediate_size: int, itemsize: int, tile: int) -> None:
    assert choose_tile_tokens(num_tokens, intermediate_size, itemsize) == tile


def test_number_of_tiles() -> None:
    assert [number_of_tiles(length, 6) for length in (0, 1, 6, 7, 12, 13)] == [1, 1, 1, 2, 2, 3]


class BackwardTokens(torch.autograd.Function):
    """Notes the tokens of each tile's backward, as a collective in `fn` would."""

    @staticmethod
    def forward(ctx, out: Tensor, notes: list[int]) -> Tensor:
        ctx.notes = notes
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.notes.append(grad.shape[1])
        return grad, None


class ScaledGradient(torch.autograd.Function):
    """Stands for a mean over the tokens, whose gradient is NaN where there are none."""

    @staticmethod
    def forward(ctx, weight: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.factor, None


@pytest.mark.parametrize("length", [20, 6, 5, 0])
def test_dummy_tiles_run_as_often_as_those_of_the_longest_row(length: int) -> None:
    mlp = nn.Sequential(nn.Linear(5, 9), nn.SiLU(), nn.Linear(9, 5)).double()
    x = torch.randn(1, length, 5, dtype=torch.float64, requires_grad=True)
    leaves = [x, *mlp.parameters()]
    forwards: list[int] = []
    backwards: list[int] = []

    def fn(tile: Tensor) -> Tensor:
        forwards.append(tile.shape[1])
        return BackwardTokens.apply(mlp(tile), backwards)

    out = mini_sequence(fn, x, mlp.parameters(), tile_tokens=6, min_tiles=number_of_tiles(20, 6))
    got = torch.autograd.grad(out.square().sum(), leaves)
    tiles = {20: [6, 6, 6, 2], 6: [6, 0, 0, 0], 5: [5, 0, 0, 0], 0: [0, 0, 0, 0]}[length]
    assert forwards == 2 * tiles
    assert backwards == tiles
    expected = torch.autograd.grad(mlp(x).square().sum(), leaves)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("length", [0, 5])
def test_a_dummy_tile_gives_no_nan(length: int) -> None:
    weight, spare, x = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3)), torch.randn(1, length, 4)

    def fn(tile: Tensor) -> Tensor:
        scale = ScaledGradient.apply(weight, 1.0 if tile.shape[1] else torch.nan)
        return tile * scale

    mini_sequence(fn, x, [weight, spare], tile_tokens=6, min_tiles=3).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum((0, 1)))
    assert spare.grad is None


def test_a_weight_that_only_dummy_tiles_use_has_a_gradient_of_zero() -> None:
    weight, x = nn.Parameter(torch.ones(4)), torch.randn(1, 20, 4, requires_grad=True)

    def fn(tile: Tensor) -> Tensor:
        return tile * 2 if tile.shape[1] else tile * weight

    mini_sequence(fn, x, [weight], tile_tokens=6, min_tiles=5).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(4))
    assert torch.equal(x.grad, torch.full_like(x, 2.0))
