"""The one way every update rule reads and writes a weight, which may be narrower than what it computes in.

A bfloat16 weight has 8 significant bits: rounded to nearest, it does not move at all by an update of less
than 1/512 of it. Rounded stochastically, up with the probability that makes the mean right, it moves on
average by what it should, and needs no float32 copy beside it. The random bits are a hash of an element's
place in its whole parameter, of the parameter and of the step: any layout rounds alike, and any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import get_args

import torch
from torch import Tensor

from .projection import WORD, mixed
from .slots import Rounding, Slot

PIECE = 2**22
"""Elements that are computed at once: temporary tensors of 16 MiB each in float32."""

PLACE, MIX_1, MIX_2 = 0x9E3779B1, 0x7FEB352D, 0x846CA68B
"""Odd factors of the hash: an integer near 2^32 over the golden ratio, and those of the lowbias32 mixer."""


def arithmetic_dtype(weight: Tensor) -> torch.dtype:
    """What a weight is computed in: float64 if it has it, else float32."""
    return torch.promote_types(weight.dtype, torch.float32)


def prepare(slot: Slot, rounding: Rounding) -> None:
    """Refuses what cannot be written, and makes the float32 copy if there is to be one and is none.

    Raises:
        ValueError: The rounding is unknown, or the weight's dtype is not one that it can write.
    """
    dtype = slot.weight.dtype
    if rounding not in get_args(Rounding):
        raise ValueError(f"rounding={rounding!r}: must be one of {', '.join(get_args(Rounding))}.")
    if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"weight.dtype={dtype}: must be bfloat16, float16, float32 or float64.")
    if rounding == "stochastic" and dtype == torch.float16:
        raise ValueError(
            "rounding='stochastic': float16 has too few exponents for small updates to be rounded so; "
            "pass 'master' or 'nearest', or make the weights bfloat16."
        )
    wide = arithmetic_dtype(slot.weight)
    if rounding == "master" and dtype != wide and "master" not in slot.state:
        slot.state["master"] = slot.weight.detach().to(wide, memory_format=torch.contiguous_format)


def read(slot: Slot, rounding: Rounding) -> Tensor:
    """The weight in the dtype it is computed in, to be changed in place and given to `write`.

    Returns:
        The weight itself where it has that dtype; else `state["master"]` with the rounding `master`, or a new
        float32 tensor.

    Raises:
        ValueError: See `prepare`.
    """
    prepare(slot, rounding)
    wide = arithmetic_dtype(slot.weight)
    if rounding == "master" and slot.weight.dtype != wide:
        return slot.state["master"]
    return slot.weight.to(wide)


def write(slot: Slot, value: Tensor, rounding: Rounding, step: int) -> None:
    """Rounds a new value into the weight.

    Args:
        slot: Whose weight is written.
        value: Of the weight's shape; nothing is done if it is the weight itself.
        rounding: How a weight narrower than float32 is written.
        step: Of the parameter, from 1; each step rounds by other random bits.

    Raises:
        ValueError: See `prepare`.
    """
    if value is slot.weight:
        return
    prepare(slot, rounding)
    if rounding != "stochastic" or slot.weight.dtype != torch.bfloat16:
        slot.weight.copy_(value)
        return
    key32, start = mixed(slot.key, step) & WORD, 0
    for piece, _ in cut(slot):
        rows = value[start : start + len(piece.weight)]
        rounded = stochastically_rounded(rows, key32, first=piece.first, row_stride=piece.row_stride)
        piece.weight.copy_(rounded)
        start += len(rows)


def stochastically_rounded(value: Tensor, key32: int, *, first: int, row_stride: int) -> Tensor:
    """bfloat16 above or below each value, so that the mean over keys is the value; infinities and NaN stay.

    Args:
        value: float32, `(elements,)` or `(rows, columns)`, less than 2^31 in a row.
        key32: 32 bits; another one for each parameter and step.
        first: Flat index of the first element in the whole parameter.
        row_stride: From a row to the next in the whole parameter; of no meaning in one dimension.
    """
    added = random_16_bits(value.shape, key32, first, row_stride, value.device)
    # Sign and magnitude: what is added to the bits makes the magnitude larger, and never passes infinity.
    rounded = added.add_(value.view(torch.int32)).bitwise_and_(-0x10000).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)


def random_16_bits(
    shape: torch.Size, key32: int, first: int, row_stride: int, device: torch.device
) -> Tensor:
    """int32 from 0 to 65535 of the given shape: the high half of a hash of each element's place."""
    rows, columns = shape if len(shape) == 2 else (1, shape[0])
    row = torch.arange(rows, dtype=torch.int64, device=device) * row_stride + first
    start = _int32((row & WORD) * PLACE + key32)
    word = start.unsqueeze(1) + torch.arange(columns, dtype=torch.int32, device=device) * _signed(PLACE)
    # Shifts of signed integers bring copies of the sign, which the mask takes away. A last `^= >> 16` of the
    # hash would leave its high half as it is.
    word ^= (word >> 16) & 0xFFFF
    word *= MIX_1
    word ^= (word >> 15) & 0x1FFFF
    word *= _signed(MIX_2)
    return ((word >> 16) & 0xFFFF).view(shape)


def _int32(value: Tensor) -> Tensor:
    """The low 32 bits of int64."""
    low = value & WORD
    return (low - ((low >> 31) << 32)).to(torch.int32)


def _signed(word: int) -> int:
    """A word of 32 bits as the int32 that multiplies alike: products wrap."""
    return word - ((word >> 31) << 32)


def cut(slot: Slot, *, multiple: int = 1) -> Iterator[tuple[Slot, slice]]:
    """Up to `PIECE` elements of a slot at a time, in their order: whole rows, one at least.

    Args:
        slot: What is cut; nothing is copied.
        multiple: Divides where each piece begins, counted in elements of the slot.

    Yields:
        A piece, with the part of each state tensor of the weight's shape; and the elements that it is of the
        slot, counted row by row.
    """
    weight = slot.weight
    columns, stride = (weight.shape[1], slot.row_stride) if weight.dim() == 2 else (1, 1)
    unit = multiple // gcd(multiple, columns)
    rows = max(PIECE // max(columns * unit, 1), 1) * unit
    for start in range(0, len(weight), rows):
        stop = min(start + rows, len(weight))
        state = {
            name: value[start:stop]
            for name, value in slot.state.items()
            if isinstance(value, Tensor) and value.shape == weight.shape
        }
        first = slot.first + start * stride
        piece = Slot(weight[start:stop], slot.grad[start:stop], state, slot.key, first, slot.row_stride)
        yield piece, slice(start * columns, stop * columns)
