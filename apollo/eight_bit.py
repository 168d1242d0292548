"""AdamW with moments of 8 bits: two bytes and a thirty-second of one an element, in place of eight.

After Dettmers, Lewis, Shleifer, Zettlemoyer: "8-bit Optimizers via Block-wise Quantization", 2021 (arXiv
2110.02861). Each block of 256 elements is divided by its largest magnitude, and each element becomes the
nearest of at most 256 values between -1 and 1. These are a tree: after the sign, the number of zero bits
before the first one is a power of ten, and the bits after it divide that decade evenly, so that small values
keep some precision.

Ours differs in two places. Of each part of a decade we take the upper end, so that 1 and -1 are values and
what was quantised is quantised again to the same. And a second moment that is not zero never becomes zero,
since its first moment would then be divided by eps alone.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .elementwise import Factors, advance, factors
from .rounding import cut, prepare, read, write
from .slots import Rounding, Slot

BLOCK = 256
"""Elements that share a scale."""

SMALLEST_SCALE = 1e-35
"""Of float32: of a block below it the small values would not be exact any more, and it counts as zero."""


@torch.no_grad()
def adamw_8bit(
    slots: list[Slot],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    rounding: Rounding,
) -> None:
    """One step of AdamW, as `elementwise.adamw`, with moments that are kept in 8 bits.

    It is computed in float32 from the moments as they were kept, in pieces whose temporary tensors are small.

    Args:
        slots: Of any shapes, dtypes, devices and steps. Their states have `step` () float32 on the CPU;
            `exp_avg` and `exp_avg_sq` (elements,) uint8, row by row; `exp_avg_scale` and `exp_avg_sq_scale`
            (blocks,) float32; and `master` with that rounding. Zeros everywhere are moments of zero.
        lr: Learning rate.
        betas: Decay of the first and of the second moment.
        eps: Added to the root of the second moment after its bias correction.
        weight_decay: Decoupled: `lr * weight_decay` of the weight goes each step.
        rounding: How weights narrower than float32 are written.

    Raises:
        ValueError: See `rounding.prepare`.
    """
    for slot in slots:
        prepare(slot, rounding)
    for slot in slots:
        step = advance(slot)
        _make_moments(slot)
        numbers = factors(step, lr, betas, eps, weight_decay)
        for piece, elements in cut(slot, multiple=BLOCK):
            _update(piece, slot.state, elements, numbers, rounding, step)


def _make_moments(slot: Slot) -> None:
    count, device = slot.weight.numel(), slot.weight.device
    for name in ("exp_avg", "exp_avg_sq"):
        if name not in slot.state:
            slot.state[name] = torch.zeros(count, dtype=torch.uint8, device=device)
            slot.state[f"{name}_scale"] = torch.zeros(-(-count // BLOCK), device=device)


def _update(
    piece: Slot, state: dict[str, Tensor], elements: slice, numbers: Factors, rounding: Rounding, step: int
) -> None:
    """Of a piece that begins with a block of its slot, whose state is given."""
    blocks = slice(elements.start // BLOCK, -(-elements.stop // BLOCK))
    grad = piece.grad.reshape(-1).float()
    moment = dequantized(state["exp_avg"][elements], state["exp_avg_scale"][blocks], signed=True)
    square = dequantized(state["exp_avg_sq"][elements], state["exp_avg_sq_scale"][blocks], signed=False)
    moment.lerp_(grad, numbers.gain_1)
    square.mul_(numbers.beta_2).addcmul_(grad, grad, value=numbers.gain_2)
    for name, value, signed in (("exp_avg", moment, True), ("exp_avg_sq", square, False)):
        codes, scale = quantized(value, signed=signed)
        state[name][elements] = codes
        state[f"{name}_scale"][blocks] = scale
    ratio = moment.div_(square.sqrt_().div_(numbers.root).add_(numbers.eps))
    weight = read(piece, rounding)
    weight.mul_(numbers.decay).sub_(ratio.view(weight.shape), alpha=numbers.step_size)
    write(piece, weight, rounding, step)


def quantized(value: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of blocks; an infinity or a NaN makes its block NaN.

    Args:
        value: `(elements,)` float32; not negative if not signed.
        signed: Which of the two sets of values.

    Returns:
        Codes `(elements,)` uint8, the negative ones of a signed set as in two's complement; and scales
        `(blocks,)` float32.
    """
    count = len(value)
    blocks = F.pad(value, (0, -count % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    scale = torch.where(largest < SMALLEST_SCALE, 0.0, largest)
    relative = blocks / torch.where(scale == 0, 1.0, scale).unsqueeze(1)
    _, boundaries = _values(signed, value.device)
    nearest = torch.bucketize(relative, boundaries, out_int32=True)
    codes = (nearest - (len(boundaries) // 2 if signed else 0)) & 0xFF
    return codes.to(torch.uint8).view(-1)[:count], scale


def dequantized(codes: Tensor, scale: Tensor, *, signed: bool) -> Tensor:
    """`(elements,)` float32 of codes `(elements,)` and scales `(blocks,)`; see `quantized`."""
    count = len(codes)
    values, _ = _values(signed, codes.device)
    blocks = values[F.pad(codes, (0, -count % BLOCK)).int()].view(-1, BLOCK)
    return (blocks * scale.unsqueeze(1)).view(-1)[:count]


@cache
def _values(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The value of each of 256 codes, and what lies between neighbours, in ascending order."""
    bits = 7 if signed else 8
    positive = [
        10.0**-zeros * (0.1 + 0.9 * part / 2 ** (bits - 1 - zeros))
        for zeros in reversed(range(bits))
        for part in range(1, 2 ** (bits - 1 - zeros) + 1)
    ]
    below = [-x for x in reversed(positive)] if signed else []
    ordered = torch.tensor([*below, 0.0, *positive], dtype=torch.float64)
    boundaries = (ordered[1:] + ordered[:-1]) / 2
    if not signed:
        boundaries[0] = 0.0
    # Of a signed set, code 128 is -0 and unused.
    by_code = torch.tensor([0.0, *positive, *([0.0] if signed else []), *below])
    return by_code.to(device, torch.float32), boundaries.to(device, torch.float32)
