"""Stochastic rounding against the hash in Python's integers, and the one way weights are read and written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longseq.apollo import rounding
from longseq.apollo.projection import mixed
from longseq.apollo.rounding import cut, read, stochastically_rounded, write
from longseq.apollo.slots import Slot

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
WORD = 2**32


def random_16_bits(place: int, key32: int) -> int:
    """What is added to the bits of a value, by the definition."""
    h = (place * 0x9E3779B1 + key32) % WORD
    h ^= h >> 16
    h = h * 0x7FEB352D % WORD
    h ^= h >> 15
    h = h * 0x846CA68B % WORD
    h ^= h >> 16
    return h >> 16


def bits(value: Tensor) -> list[int]:
    return [int(x) % WORD for x in value.float().view(torch.int32).flatten()]


def some_slot(weight: Tensor, **place: int) -> Slot:
    return Slot(weight, torch.zeros_like(weight), key=mixed(3, 4), **place)


@pytest.mark.parametrize("key32", [0, 12345, WORD - 1])
@pytest.mark.parametrize("first", [0, 7, 2**31 - 5, 2**32 - 9, 2**45 + 3])
def test_the_hash_is_as_defined(first: int, key32: int) -> None:
    rows, columns, stride = 5, 13, 1001
    value = torch.randn(rows, columns)
    ours = stochastically_rounded(value, key32, first=first, row_stride=stride)
    assert ours.dtype == BF16
    places = [first + i * stride + j for i in range(rows) for j in range(columns)]
    expected = [
        (b + random_16_bits(place, key32)) & 0xFFFF0000 for b, place in zip(bits(value), places, strict=True)
    ]
    assert bits(ours) == expected


def test_a_part_rounds_as_the_whole() -> None:
    value = torch.randn(23, 37)
    whole = stochastically_rounded(value, 99, first=0, row_stride=37)
    options = {"first": 5 * 37 + 3, "row_stride": 37}
    assert torch.equal(stochastically_rounded(value[5:9, 3:20], 99, **options), whole[5:9, 3:20])
    flat = stochastically_rounded(value.flatten()[100:555], 99, first=100, row_stride=0)
    assert torch.equal(flat, whole.flatten()[100:555])
    turned = stochastically_rounded(value.T.contiguous().T, 99, first=0, row_stride=37)
    assert torch.equal(turned, whole)


def test_the_mean_over_keys_is_the_value() -> None:
    keys, tiny = 4000, 2.0**-130  # a denormal number too
    value = torch.tensor([1.0 + 2**-10, -3.0 - 2**-9 * 1.7, 0.3, -1e-20, tiny * 1.003, 7.0])
    drawn = torch.stack(
        [
            stochastically_rounded(value, mixed(5, step) % WORD, first=11, row_stride=0).double()
            for step in range(keys)
        ]
    )
    above, below = drawn.amax(0), drawn.amin(0)
    up = (value.double() - below) / (above - below).clamp_min(1e-300)
    sigma = (up * (1 - up) / keys).sqrt() * (above - below)
    assert (above > below)[:5].all()
    assert ((drawn.mean(0) - value.double()).abs() <= 4 * sigma).all()
    # Nearest neighbours only, and the rounding itself stays within one place of the last bit.
    ulp = 2.0 ** (value.double().abs().log2().floor().clamp_min(-126) - 7)
    assert ((drawn - value.double()).abs() < ulp).all()


def test_what_is_not_finite_or_exact_stays() -> None:
    value = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1.5, -(2.0**-133)])
    # NaN in a low bit, and the one that GPUs make.
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32).view(F32)
    value = torch.cat([value, nans])
    for key32 in (1, 77, WORD - 3):
        ours = stochastically_rounded(value, key32, first=3, row_stride=0).float()
        assert ours[[2, 7, 8]].isnan().all()
        assert bits(ours[[0, 1, 3, 4, 5, 6]]) == bits(value[[0, 1, 3, 4, 5, 6]])


@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_wide_weight_is_read_and_written_as_itself(dtype: torch.dtype) -> None:
    for way in ("stochastic", "nearest", "master"):
        slot = some_slot(torch.randn(7, dtype=dtype))
        assert read(slot, way) is slot.weight
        version = slot.weight._version
        write(slot, slot.weight, way, 1)
        assert slot.weight._version == version
        write(slot, torch.full((7,), 1 / 3, dtype=dtype), way, 1)
        assert (slot.weight == torch.tensor(1 / 3, dtype=dtype)).all()
        assert not slot.state


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_master_weights(dtype: torch.dtype) -> None:
    slot = some_slot(torch.randn(6, 10).to(dtype).T)
    value = read(slot, "master")
    assert value is slot.state["master"]
    assert value.dtype == F32
    assert value.is_contiguous()
    value.mul_(1 + 2**-12)
    write(slot, value, "master", 1)
    assert torch.equal(slot.weight, value.to(dtype))
    assert read(slot, "master") is value


def test_nearest_and_stochastic_of_bf16() -> None:
    slot = some_slot(torch.randn(1000).to(BF16), first=17)
    value = read(slot, "nearest")
    assert value.dtype == F32
    value += 1e-3
    write(slot, value, "nearest", 3)
    assert torch.equal(slot.weight, value.to(BF16))
    write(slot, value, "stochastic", 3)
    key32 = mixed(slot.key, 3) % WORD
    assert torch.equal(slot.weight, stochastically_rounded(value, key32, first=17, row_stride=0))
    before = slot.weight.clone()
    write(slot, value, "stochastic", 4)
    assert not torch.equal(slot.weight, before)
    assert not slot.state


@pytest.mark.parametrize(
    ("dtype", "way", "message"),
    [
        (F16, "stochastic", "float16 has too few exponents"),
        (BF16, "up", "rounding='up'"),
        (torch.float8_e5m2, "nearest", "weight.dtype=torch.float8_e5m2"),
        (torch.int32, "nearest", "weight.dtype=torch.int32"),
    ],
)
def test_refusals(dtype: torch.dtype, way: str, message: str) -> None:
    slot = Slot(torch.zeros(3).to(dtype), torch.zeros(3))
    with pytest.raises(ValueError, match=message):
        read(slot, way)
    with pytest.raises(ValueError, match=message):
        write(slot, torch.zeros(3), way, 1)


@pytest.mark.parametrize("shape", [(103,), (31, 12), (31, 1), (9, 64), (0, 5), (5, 0), (0,)], ids=str)
@pytest.mark.parametrize("multiple", [1, 8])
def test_pieces_are_the_whole(shape: tuple[int, ...], multiple: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written piece by piece, a weight is rounded as at once; and pieces begin where they should."""
    slot = some_slot(torch.randn(shape).to(BF16), first=5, row_stride=2 * shape[-1])
    slot.state = {"exp_avg": torch.randn(shape), "step": torch.ones(()), "row": torch.ones(17)}
    value = torch.randn(shape)
    stop = 0
    monkeypatch.setattr(rounding, "PIECE", 50)
    for piece, elements in cut(slot, multiple=multiple):
        assert elements.start == stop
        assert elements.start % multiple == 0
        stop = elements.stop
        assert list(piece.state) == ["exp_avg"]
        assert torch.equal(piece.state["exp_avg"].flatten(), slot.state["exp_avg"].flatten()[elements])
        if len(shape) == 1 or shape[1] < 8:
            assert piece.weight.numel() <= 50
        write(piece, value.flatten()[elements].view(piece.weight.shape), "stochastic", 2)
    assert stop == slot.weight.numel()
    by_piece = slot.weight.clone()
    monkeypatch.undo()
    write(slot, value, "stochastic", 2)
    assert torch.equal(by_piece, slot.weight)


def test_writing_in_pieces_of_a_large_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """`write` itself goes through pieces, whose places in the parameter count on."""
    value = torch.randn(31, 12)
    slot = some_slot(torch.zeros(31, 12, dtype=BF16), first=5, row_stride=20)
    monkeypatch.setattr(rounding, "PIECE", 50)
    write(slot, value, "stochastic", 2)
    key32 = mixed(slot.key, 2) % WORD
    assert torch.equal(slot.weight, stochastically_rounded(value, key32, first=5, row_stride=20))


@pytest.mark.gpu
def test_a_gpu_rounds_alike() -> None:
    value = torch.randn(101, 1013)
    options = {"first": 2**33 + 1, "row_stride": 5000}
    ours = stochastically_rounded(value.cuda(), 2**32 - 7, **options)
    assert torch.equal(ours.cpu(), stochastically_rounded(value, 2**32 - 7, **options))
