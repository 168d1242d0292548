"""AdamW in Triton: each element's gradient, weight and moments are read once and written once.

Slots are found through a table of pointers, so that many small ones take one launch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..elementwise import Factors
from ..projection import WORD, mixed
from ..rounding import MIX_1, MIX_2, PLACE
from ..slots import Rounding, Slot

BLOCK, NUM_WARPS = 2048, 8
"""Elements of a program, and its warps: 8 elements a thread, which bfloat16 loads in 16 bytes."""

LARGE = 2**20
"""Elements from which on a slot has a launch of its own: no program of it looks up which slot it is in."""

FIRST_PROGRAM, WEIGHT_AT, MASTER_AT, GRAD_AT, MOMENT_AT, SQUARE_AT = map(tl.constexpr, range(6))
COUNT, HASH_START, COLUMNS, GAP, FIELDS = map(tl.constexpr, range(6, 11))
"""Where the table has what it knows of a slot, `(slots, FIELDS)`; `_fields` says what that is."""

_PLACE, _MIX_1, _MIX_2 = tl.constexpr(PLACE), tl.constexpr(MIX_1), tl.constexpr(MIX_2)
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def adamw_step(slots: list[Slot], numbers: Factors, rounding: Rounding, step: int) -> None:
    """See `elementwise.adamw`.

    Args:
        slots: Of one device, one dtype of weights and one of gradients; contiguous, with all of their state.
        numbers: Of this step.
        rounding: How weights narrower than float32 are written.
        step: Of every slot, from 1.
    """
    for group, aligned in _launches(slots, rounding):
        _launch(group, aligned, numbers, rounding, step)


def _launches(slots: list[Slot], rounding: Rounding) -> Iterator[tuple[list[Slot], bool]]:
    """Slots that one launch takes, and whether all of them allow the widest loads."""
    small: dict[bool, list[Slot]] = {}
    for slot in slots:
        count = slot.weight.numel()
        aligned = count % 16 == 0 and all(x.data_ptr() % 16 == 0 for x in _tensors(slot, rounding))
        if count >= LARGE:
            yield [slot], aligned
        elif count > 0:
            small.setdefault(aligned, []).append(slot)
    for aligned, group in small.items():
        yield group, aligned


def _launch(slots: list[Slot], aligned: bool, numbers: Factors, rounding: Rounding, step: int) -> None:
    rows, programs = [], 0
    for slot in slots:
        rows.append([programs, *_fields(slot, rounding, step)])
        programs += triton.cdiv(slot.weight.numel(), BLOCK)
    weight, grad = slots[0].weight, slots[0].grad
    table = torch.tensor(rows, dtype=torch.int64).to(weight.device, non_blocking=True)
    with torch.cuda.device_of(weight):
        _adamw_kernel[(programs,)](
            table,
            len(slots),
            *numbers,
            WEIGHT=TYPES[weight.dtype],
            GRAD=TYPES[grad.dtype],
            ROUNDING="nearest" if weight.dtype == torch.float32 else rounding,
            ALIGNED=aligned,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )


def _tensors(slot: Slot, rounding: Rounding) -> tuple[Tensor, ...]:
    copied = rounding == "master" and slot.weight.dtype != torch.float32
    master = slot.state["master"] if copied else slot.weight
    return slot.weight, master, slot.grad, slot.state["exp_avg"], slot.state["exp_avg_sq"]


def _fields(slot: Slot, rounding: Rounding, step: int) -> list[int]:
    """What the table holds of a slot, in the order of its columns, after the number of programs before it.

    `HASH_START` is the hash's word of the first element, to which the others add `place * PLACE`; `GAP` is
    what each row adds to a place beyond the columns that are here.
    """
    weight = slot.weight
    columns = weight.shape[1] if weight.dim() == 2 else weight.numel()
    gap = slot.row_stride - columns if weight.dim() == 2 else 0
    start = (slot.first * PLACE + mixed(slot.key, step)) & WORD
    return [*(x.data_ptr() for x in _tensors(slot, rounding)), weight.numel(), start, columns, gap]


@triton.jit(do_not_specialize=["num_slots"])
def _adamw_kernel(
    table_ptr,
    num_slots,
    decay,
    gain_1,
    beta_2,
    gain_2,
    step_size,
    root,
    eps,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = table_ptr + FIELDS * _slot_of(table_ptr, num_slots, tl.program_id(0))
    weight_ptr = _pointer(row + WEIGHT_AT, WEIGHT, ALIGNED)
    grad_ptr = _pointer(row + GRAD_AT, GRAD, ALIGNED)
    moment_ptr = _pointer(row + MOMENT_AT, tl.float32, ALIGNED)
    square_ptr = _pointer(row + SQUARE_AT, tl.float32, ALIGNED)
    count = tl.load(row + COUNT)
    if ALIGNED:
        count = tl.multiple_of(count, 16)
    at = (tl.program_id(0) - tl.load(row + FIRST_PROGRAM)) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count

    # The gradient is not read again.
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    moment = tl.load(moment_ptr + at, mask=mask, other=0.0)
    square = tl.load(square_ptr + at, mask=mask, other=0.0)
    moment += gain_1 * (grad - moment)
    square = beta_2 * square + gain_2 * grad * grad
    tl.store(moment_ptr + at, moment, mask=mask)
    tl.store(square_ptr + at, square, mask=mask)

    source_ptr = weight_ptr
    if ROUNDING == "master":
        source_ptr = _pointer(row + MASTER_AT, tl.float32, ALIGNED)
    weight = tl.load(source_ptr + at, mask=mask, other=0.0).to(tl.float32)
    weight = decay * weight - step_size * (moment / (tl.sqrt(square) / root + eps))
    if ROUNDING == "master":
        tl.store(source_ptr + at, weight, mask=mask)
    if ROUNDING == "stochastic":
        weight = _rounded(weight, _place(at, row), tl.load(row + HASH_START))
    tl.store(weight_ptr + at, weight.to(WEIGHT), mask=mask)


@triton.jit
def _slot_of(table_ptr, num_slots, program):
    """The last slot that has its first program here or before."""
    low = num_slots * 0
    high = num_slots
    while high - low > 1:
        middle = (low + high) // 2
        is_there = tl.load(table_ptr + FIELDS * middle + FIRST_PROGRAM) <= program
        low = tl.where(is_there, middle, low)
        high = tl.where(is_there, high, middle)
    return low


@triton.jit
def _pointer(field_ptr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(field_ptr).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _place(at, row):
    """Of elements of a slot in the whole parameter, counted from the slot's first one."""
    gap = tl.load(row + GAP)
    if gap != 0:
        at += at // tl.load(row + COLUMNS) * gap
    return at


@triton.jit
def _rounded(value, place, start):
    """float32 that is bfloat16, by `rounding.stochastically_rounded`; `start` is the hash's at place 0."""
    word = place.to(tl.uint32) * _PLACE + start.to(tl.uint32)
    word ^= word >> 16
    word *= _MIX_1
    word ^= word >> 15
    word *= _MIX_2
    bits = value.to(tl.uint32, bitcast=True) + (word >> 16)
    rounded = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(value) < float("inf"), rounded, value)
