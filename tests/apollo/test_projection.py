"""The random projection: the integers that it is made of, any part of it, and what a projection must keep."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from longseq.apollo.projection import WORD, mixed, parameter_key, philox, signs

KEY = 0x9F3C_0AD1_5577_00E2


def philox_words(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """Philox-4x32-10 as its paper has it, in Python's integers."""
    a, b, c, d = counter
    k, l = key  # noqa: E741
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (second >> 32) ^ b ^ k, second & WORD, (first >> 32) ^ d ^ l, first & WORD
        k, l = (k + 0x9E3779B9) & WORD, (l + 0xBB67AE85) & WORD  # noqa: E741
    return [a, b, c, d]


def sign_at(key: int, row: int, column: int) -> int:
    words = philox_words((column, row // 128, 0, 0), (key & WORD, key >> 32))
    return -1 if words[row // 32 % 4] >> row % 32 & 1 else 1


def made(rank: int, start: int, stop: int, *, key: int = KEY) -> torch.Tensor:
    return signs(key, rank, start, stop, dtype=torch.float64, device="cpu")


# -- the generator ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "wanted"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([WORD] * 4, [WORD] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_reference_has_the_known_answers(counter: list[int], key: list[int], wanted: str) -> None:
    """Those of Random123."""
    assert [f"{word:08x}" for word in philox_words(tuple(counter), tuple(key))] == wanted.split()


def test_philox_is_the_reference() -> None:
    zero = torch.zeros(1, dtype=torch.int64)
    known = "6627e8d5 e169c58d bc57ac4c 9b00dbd8"
    assert [f"{int(word):08x}" for word in philox(0, zero, zero)] == known.split()
    low = torch.tensor([0, 1, 77, 2**31, WORD])
    high = torch.tensor([[0], [3], [WORD]])
    for key in (1, KEY, 2**64 - 1):
        words = philox(key, low, high)
        for (i, b), (j, a) in itertools.product(enumerate(high.flatten()), enumerate(low)):
            wanted = philox_words((int(a), int(b), 0, 0), (key & WORD, key >> 32))
            assert [int(word[i, j]) for word in words] == wanted


def test_signs_are_bits_of_their_words() -> None:
    rank, start, stop = 300, 5, 12
    wanted = [[sign_at(KEY, row, column) for column in range(start, stop)] for row in range(rank)]
    assert made(rank, start, stop).tolist() == wanted


def test_keys_are_as_written_down() -> None:
    """They are part of every checkpoint: an optimizer goes on from its moments only with the same ones."""
    assert parameter_key(0, "model.layers.0.mlp.up_proj.weight") == 0xA4AAE684330CF450
    assert parameter_key(7, "") == 0xC67D0B613DD68992
    # SplitMix64 from 0, its first three outputs.
    assert [mixed(0, number) for number in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]
    assert mixed(2**64 - 1, 2**40) < 2**64


# -- any part of it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 7, 32, 33, 128, 129, 257])
def test_any_slice_alone_is_that_of_the_whole(rank: int) -> None:
    whole = made(rank, 0, 41)
    for start, stop in ((0, 41), (0, 1), (13, 29), (40, 41), (7, 7)):
        assert made(rank, start, stop).equal(whole[:, start:stop])
    assert made(300, 0, 41)[:rank].equal(whole), "a larger rank has more rows of the same"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_dtype_has_the_same_exact_entries(dtype: torch.dtype) -> None:
    found = signs(KEY, 5, 2, 9, dtype=dtype, device="cpu")
    assert found.dtype == dtype
    assert found.double().equal(made(5, 2, 9))


# -- what a projection must keep ----------------------------------------------------------------------------


def test_it_is_balanced_and_nearly_orthogonal() -> None:
    rank, size = 257, 1023
    z = made(rank, 0, size)
    assert z.abs().eq(1).all()
    # Sums of n independent signs have a standard deviation of sqrt(n); 5 of them for the largest of many.
    assert abs(z.sum()) < 4 * math.sqrt(z.numel())
    assert z.sum(0).abs().max() < 5 * math.sqrt(rank)
    assert z.sum(1).abs().max() < 5 * math.sqrt(size)
    for gram, terms in ((z @ z.T, size), (z.T @ z, rank)):
        others = gram - torch.diag(gram.diagonal())
        assert gram.diagonal().eq(terms).all()
        assert others.abs().max() < 6 * math.sqrt(terms)
        count = len(others) * (len(others) - 1)
        assert others.square().sum() / (count * terms) == pytest.approx(1, abs=0.05)


def test_norms_are_kept() -> None:
    rank = 64
    x = torch.randn(200, 500, dtype=torch.float64)
    ratio = (x @ made(rank, 0, 500).T / math.sqrt(rank)).norm(dim=1) / x.norm(dim=1)
    assert ratio.mean() == pytest.approx(1, abs=0.03)
    assert ratio.std() == pytest.approx(1 / math.sqrt(2 * rank), rel=0.25)


# -- whose it is --------------------------------------------------------------------------------------------


def test_other_names_seeds_matrices_and_epochs_have_other_projections() -> None:
    layer = "model.layers.{}.mlp.experts.down_proj"
    names = [layer.format(index) for index in range(20)]
    names += [f"{name}[{matrix}]" for name in names for matrix in range(5)]
    keys = [
        mixed(parameter_key(seed, name), epoch)
        for seed, name, epoch in itertools.product((0, 1, 10), names, range(4))
    ]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**64 for key in keys)
    found = torch.stack([made(3, 0, 300, key=key).flatten() for key in keys[:200]])
    alike = (found @ found.T / found.shape[1]).fill_diagonal_(0).abs()
    assert alike.max() < 6 / math.sqrt(found.shape[1]), "as far apart as independent ones"
