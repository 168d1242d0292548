"""The rules for parameters that are not projected: AdamW, AdamW of 8 bits, and a factored second moment."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from numerics import assert_as_accurate_as, relative_error
from torch import Tensor

from longseq.apollo import eight_bit, elementwise, rounding
from longseq.apollo.eight_bit import BLOCK, adamw_8bit, dequantized, quantized
from longseq.apollo.elementwise import adamw
from longseq.apollo.factored import factored
from longseq.apollo.slots import Slot

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
OPTIONS = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
RULES = {"adamw": adamw, "adamw_8bit": adamw_8bit, "factored": factored}
each_rule = pytest.mark.parametrize("rule", list(RULES.values()), ids=list(RULES))
SHAPES = [(37, 19), (130,), (1,), (5, 300)]


@pytest.fixture
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "PIECE", 600)
    monkeypatch.setattr(elementwise, "PIECE", 600)


def slots_of(weights: list[Tensor]) -> list[Slot]:
    return [Slot(w, torch.zeros_like(w), key=1000 + i, row_stride=w.shape[-1]) for i, w in enumerate(weights)]


def run(
    rule: Callable[..., None], slots: list[Slot], grads: list[list[Tensor]], way: str = "nearest"
) -> None:
    for of_step in grads:
        for slot, grad in zip(slots, of_step, strict=True):
            slot.grad = grad.to(slot.grad.dtype)
        rule(slots, **OPTIONS, rounding=way)


def some_grads(shapes: list[tuple[int, ...]], steps: int = 4, dtype: torch.dtype = F64) -> list[list[Tensor]]:
    return [[torch.randn(shape, dtype=dtype) for shape in shapes] for _ in range(steps)]


def torch_adamw(weights: list[Tensor], grads: list[list[Tensor]]) -> list[Tensor]:
    weights = [w.clone().requires_grad_() for w in weights]
    optimizer = torch.optim.AdamW(weights, **OPTIONS, foreach=False)
    for of_step in grads:
        for weight, grad in zip(weights, of_step, strict=True):
            weight.grad = grad.to(weight.dtype)
        optimizer.step()
    return [w.detach() for w in weights]


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("dtype", [F64, F32])
def test_adamw_is_that_of_torch(dtype: torch.dtype) -> None:
    weights, grads = [torch.randn(shape, dtype=F64) for shape in SHAPES], some_grads(SHAPES)
    truth = torch_adamw(weights, grads)
    plain = torch_adamw([w.to(dtype) for w in weights], grads)
    slots = slots_of([w.to(dtype, copy=True) for w in weights])
    run(adamw, slots, grads)
    for slot, of_torch, true in zip(slots, plain, truth, strict=True):
        assert_as_accurate_as(slot.weight, of_torch, true)
        assert slot.state["exp_avg"].dtype == slot.state["exp_avg_sq"].dtype == dtype
        assert slot.state["exp_avg"].shape == slot.weight.shape
        assert slot.state["step"].dtype == F32
        assert slot.state["step"] == len(grads)


@pytest.mark.usefixtures("_small_pieces")
@each_rule
def test_master_weights_take_the_steps_of_float32(rule: Callable[..., None]) -> None:
    weights, grads = [torch.randn(37, 19).to(BF16)], some_grads([(37, 19)], dtype=BF16)
    ours, wide = slots_of([w.clone() for w in weights]), slots_of([w.float() for w in weights])
    run(rule, ours, grads, "master")
    run(rule, wide, grads, "master")
    assert torch.equal(ours[0].state["master"], wide[0].weight)
    assert torch.equal(ours[0].weight, wide[0].weight.to(BF16))


def test_each_slot_has_its_own_step() -> None:
    weights, grads = [torch.randn(7, dtype=F64) for _ in range(2)], some_grads([(7,), (7,)], steps=5)
    slots = slots_of([w.clone() for w in weights])
    run(adamw, slots[:1], [of_step[:1] for of_step in grads[:2]])
    run(adamw, slots, grads[2:])
    expected = torch_adamw(weights[:1], [of_step[:1] for of_step in grads])
    expected += torch_adamw(weights[1:], [of_step[1:] for of_step in grads[2:]])
    for slot, weight in zip(slots, expected, strict=True):
        assert relative_error(slot.weight, weight) < 1e-14
    assert [int(slot.state["step"]) for slot in slots] == [5, 3]


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("way", ["stochastic", "nearest", "master"])
@pytest.mark.parametrize("rule", [adamw, adamw_8bit])
def test_parts_of_a_parameter_are_updated_as_the_whole(rule: Callable[..., None], way: str) -> None:
    """Bit for bit; blocks of 8 bits only where the cuts are at blocks."""
    weight, grads = torch.randn(45, 61).to(BF16), some_grads([(45, 61)], dtype=BF16)
    cuts = [0, 2, 7, 1701, 2048] if rule is adamw else [0, 2 * BLOCK, 7 * BLOCK]
    whole = slots_of([weight.clone()])
    run(rule, whole, grads, way)
    cuts.append(weight.numel())
    parts = []
    for start, stop in pairwise(cuts):
        part = weight.flatten()[start:stop].clone()
        parts.append(Slot(part, torch.zeros_like(part), key=whole[0].key, first=start))
    of_parts = [[g.flatten()[a:b] for a, b in pairwise(cuts)] for (g,) in grads]
    run(rule, parts, of_parts, way)
    assert torch.equal(torch.cat([part.weight for part in parts]), whole[0].weight.flatten())


@pytest.mark.parametrize("way", ["stochastic", "nearest"])
def test_columns_of_a_parameter_are_updated_as_the_whole(way: str) -> None:
    weight, grads = torch.randn(23, 31).to(BF16), some_grads([(23, 31)], dtype=BF16)
    whole = slots_of([weight.clone()])
    run(adamw, whole, grads, way)
    buffer = weight.clone()
    inside = buffer[3:20, 4:17]  # not contiguous
    part = Slot(inside, torch.zeros_like(inside), key=whole[0].key, first=3 * 31 + 4, row_stride=31)
    run(adamw, [part], [[g[3:20, 4:17]] for (g,) in grads], way)
    assert torch.equal(buffer[3:20, 4:17], whole[0].weight[3:20, 4:17])
    assert torch.equal(buffer[:3], weight[:3])


@each_rule
@pytest.mark.parametrize("dtype", [BF16, F32, F64])
def test_zero_gradients(rule: Callable[..., None], dtype: torch.dtype) -> None:
    """First, later, and in a row: what is left is the weight decay."""
    weight = torch.randn(6, 300).to(dtype)
    slots = slots_of([weight.clone()])
    zero = torch.zeros(6, 300)
    run(rule, slots, [[zero]] * 2)
    decayed = weight.double() * (1 - OPTIONS["lr"] * OPTIONS["weight_decay"]) ** 2
    assert relative_error(slots[0].weight, decayed) < 2 * torch.finfo(dtype).eps
    one_row = torch.randn(6, 300) * (torch.arange(6) == 2).unsqueeze(1)
    run(rule, slots, [[one_row], [zero], [zero]])
    assert slots[0].weight.isfinite().all()


@each_rule
def test_tiny_and_huge_gradients(rule: Callable[..., None]) -> None:
    slots = slots_of([torch.ones(6, 300)])
    for scale in (1e-25, 1e-15, 1e15):
        run(rule, slots, [[scale * torch.randn(6, 300)]])
    assert slots[0].weight.isfinite().all()
    assert (slots[0].weight - 1).abs().max() < 1


@each_rule
def test_empty_slots(rule: Callable[..., None]) -> None:
    slots = slots_of([torch.zeros(0, 5), torch.zeros(5, 0)])
    run(rule, slots, [[torch.zeros(0, 5), torch.zeros(5, 0)]])


@each_rule
def test_a_rounding_that_cannot_be_changes_nothing(rule: Callable[..., None]) -> None:
    good, bad = slots_of([torch.ones(3, 4, dtype=BF16), torch.ones(3, 4, dtype=F16)])
    with pytest.raises(ValueError, match="float16 has too few exponents"):
        rule([good, bad], **OPTIONS, rounding="stochastic")
    assert not good.state
    assert (good.weight == 1).all()


@each_rule
def test_bf16_moves_by_less_than_its_precision(rule: Callable[..., None]) -> None:
    """Steps of 1e-4 from 1: to nearest none is ever seen; stochastically, their mean is."""
    options = OPTIONS | {"lr": 1e-4, "weight_decay": 0.0}
    means = {}
    for way in ("stochastic", "nearest"):
        (slot,) = slots_of([torch.ones(50, 101, dtype=BF16)])
        for _ in range(10):
            slot.grad = torch.ones(50, 101, dtype=BF16)
            rule([slot], **options, rounding=way)
        means[way] = float(slot.weight.double().mean())
    assert means["nearest"] == 1.0
    # Steps of 1/256 or 1/512 with probability of some 0.02 to 0.05.
    assert abs(means["stochastic"] - 0.999) < 4 * 10**0.5 * (1e-4 / 256) ** 0.5 / 5050**0.5


# 8 bits


@pytest.mark.parametrize("signed", [True, False])
def test_the_values_are_a_tree(signed: bool) -> None:
    """A number of evenly spaced values in each decade that doubles from one to the next."""
    values, boundaries = eight_bit._values(signed, torch.device("cpu"))
    distinct = values.unique()
    assert len(values) == 256
    assert len(distinct) == 256 - signed
    assert len(boundaries) == len(distinct) - 1
    assert (boundaries >= distinct[:-1]).all()
    assert (boundaries <= distinct[1:]).all()
    assert values[0] == 0
    assert distinct[-1] == 1
    if signed:
        assert torch.equal(distinct, -distinct.flip(0))
    positive = distinct[distinct > 0].double()
    for decade in range(7 if signed else 8):
        top = 10.0**-decade
        inside = positive[(positive > 0.1001 * top) & (positive < 1.0001 * top)]
        assert len(inside) == 2 ** ((6 if signed else 7) - decade)
        spacing = inside.diff() / top
        assert torch.allclose(spacing, torch.full_like(spacing, 0.9 / len(inside)), rtol=1e-3)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
def test_what_was_quantised_is_quantised_to_the_same(count: int, signed: bool) -> None:
    value = torch.randn(count) * 10.0 ** (8 * torch.rand(count) - 8) * 10.0 ** torch.randint(-25, 25, ())
    value = value if signed else value.abs()
    codes, scale = quantized(value, signed=signed)
    assert codes.dtype == torch.uint8
    assert codes.shape == (count,)
    assert scale.shape == (-(-count // BLOCK),)
    again = dequantized(codes, scale, signed=signed)
    second_codes, second_scale = quantized(again, signed=signed)
    assert torch.equal(second_codes, codes)
    assert torch.equal(second_scale, scale)
    # The nearest value: within half of the widest gap of its decade, or of the smallest value.
    bits = 6 if signed else 7
    within = torch.maximum(value.abs().double(), scale.repeat_interleave(BLOCK)[:count] * 1e-6)
    decade = (within / scale.repeat_interleave(BLOCK)[:count]).log10().ceil().clamp_max(0)
    gap = 0.9 * 10**decade / 2.0 ** (bits + decade).clamp_min(0)
    error = (again.double() - value.double()).abs() / scale.repeat_interleave(BLOCK)[:count]
    assert (error <= (gap / 2 * 1.001).clamp_min(1.001e-6)).all()


def test_all_codes_survive() -> None:
    for signed in (True, False):
        codes = torch.arange(256).to(torch.uint8)
        codes[128] = 1 if signed else 128
        scale = torch.tensor([1.7e-3])
        again, same = quantized(dequantized(codes, scale, signed=signed), signed=signed)
        assert torch.equal(again, codes)
        assert torch.equal(same, scale)


def test_special_blocks() -> None:
    """Zero stays zero, what float32 barely holds counts as zero, and NaN and infinity are not lost."""
    value = torch.zeros(5 * BLOCK)
    value[BLOCK] = 1e-40
    value[2 * BLOCK + 5], value[3 * BLOCK + 7] = float("nan"), float("inf")
    value[4 * BLOCK :] = 1.0
    codes, scale = quantized(value, signed=True)
    again = dequantized(codes, scale, signed=True)
    assert not codes[: 2 * BLOCK].any()
    assert not again[: 2 * BLOCK].any()
    assert again[2 * BLOCK : 3 * BLOCK].isnan().all()
    assert not again[3 * BLOCK : 4 * BLOCK].isfinite().all()
    assert (again[4 * BLOCK :] == 1).all()


def test_a_second_moment_stays_above_zero() -> None:
    value = torch.full((BLOCK,), 1e-12)
    value[3], value[4] = 1.0, 0.0
    again = dequantized(*quantized(value, signed=False), signed=False)
    assert (again > 0).sum() == BLOCK - 1


@pytest.mark.usefixtures("_small_pieces")
def test_8_bits_are_near_float32() -> None:
    """The same updates but for some per cent, and the same loss of a linear regression in the end."""
    torch.manual_seed(1)
    inputs, target = torch.randn(200, 43), torch.randn(43, 31)
    losses, weights = {}, {}
    for name, rule in (("float32", adamw), ("8 bits", adamw_8bit)):
        (slot,) = slots_of([torch.zeros(43, 31)])
        for _ in range(150):
            slot.grad = inputs.T @ (inputs @ (slot.weight - target)) / 200
            rule([slot], lr=0.05, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, rounding="nearest")
        losses[name] = float((slot.weight - target).square().mean())
        weights[name] = slot.weight
    assert losses["float32"] < 1e-3
    assert losses["8 bits"] < 3 * losses["float32"] + 1e-4
    assert relative_error(weights["8 bits"], weights["float32"]) < 0.03


def test_the_first_update_of_8_bits_is_exact_and_its_state_small() -> None:
    weight, grads = torch.randn(37, 19), some_grads([(37, 19)], steps=1, dtype=F32)
    ours, wide = slots_of([weight.clone()]), slots_of([weight.clone()])
    run(adamw_8bit, ours, grads)
    run(adamw, wide, grads)
    assert relative_error(ours[0].weight, wide[0].weight) < 1e-7
    shapes = {name: (tuple(x.shape), x.dtype) for name, x in ours[0].state.items()}
    assert shapes == {
        "step": ((), F32),
        "exp_avg": ((703,), torch.uint8),
        "exp_avg_scale": ((3,), F32),
        "exp_avg_sq": ((703,), torch.uint8),
        "exp_avg_sq_scale": ((3,), F32),
    }


def test_8_bits_of_columns_that_are_no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces begin at blocks of the slot, whatever its columns."""
    weight, grads = torch.randn(1100, 7), some_grads([(1100, 7)], dtype=F32)
    whole, pieces = slots_of([weight.clone()]), slots_of([weight.clone()])
    run(adamw_8bit, whole, grads)
    monkeypatch.setattr(rounding, "PIECE", 1500)
    run(adamw_8bit, pieces, grads)
    assert torch.equal(whole[0].weight, pieces[0].weight)
    assert torch.equal(whole[0].state["exp_avg"], pieces[0].state["exp_avg"])


# Factored


def plain_factored(weight: Tensor, grads: list[Tensor]) -> Tensor:
    """The formula, in float64."""
    weight, beta, lr = weight.double().clone(), OPTIONS["betas"][1], OPTIONS["lr"]
    row, column = torch.zeros(len(weight), dtype=F64), torch.zeros(weight.shape[1], dtype=F64)
    for t, g in enumerate((grad.double() for grad in grads), 1):
        row = beta * row + (1 - beta) * (g * g).mean(1)
        column = beta * column + (1 - beta) * (g * g).mean(0)
        second = torch.outer(row, column) / row.mean() / (1 - beta**t)
        update = g / (second.sqrt() + OPTIONS["eps"])
        update /= max(1.0, float(update.square().mean().sqrt()))
        weight -= lr * OPTIONS["weight_decay"] * weight + lr * update
    return weight


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("shape", [(37, 53), (101, 3), (1, 9), (3, 700)], ids=str)
def test_factored(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Of gradients that grow, so that an update is clipped, and that rows and columns tell apart."""
    weight = torch.randn(shape, dtype=F64).to(dtype)
    scales = torch.rand(shape[0], 1, dtype=F64) * torch.rand(shape[1], dtype=F64)
    grads = [scales * growth * torch.randn(shape, dtype=F64) for growth in (1.0, 5.0, 30.0, 1.0)]
    slots = slots_of([weight.clone()])
    run(factored, slots, [[g.to(dtype)] for g in grads])
    truth = plain_factored(weight, [g.to(dtype) for g in grads])
    assert relative_error(slots[0].weight, truth) < 10 * torch.finfo(dtype).eps
    state = slots[0].state
    assert {name: tuple(x.shape) for name, x in state.items()} == {
        "step": (),
        "row": shape[:1],
        "column": shape[1:],
    }
    assert state["row"].dtype == dtype


def test_factored_takes_matrices_only() -> None:
    slot = Slot(torch.ones(5), torch.ones(5))
    with pytest.raises(ValueError, match=r"weight.dim\(\)=1: rows and columns need a whole matrix"):
        factored([slot], **OPTIONS, rounding="nearest")
