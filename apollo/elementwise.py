"""AdamW, for parameters that are not projected: any elements of a parameter, each by itself."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import TRITON_DTYPES, has_triton
from .rounding import PIECE, arithmetic_dtype, cut, prepare, read, write
from .slots import Rounding, Slot


class Factors(NamedTuple):
    """The numbers of one step of AdamW, as torch.optim.AdamW uses them."""

    decay: float
    """Of the weight: `1 - lr * weight_decay`."""
    gain_1: float
    """Of the gradient in the first moment: `1 - beta_1`."""
    beta_2: float
    gain_2: float
    """Of the squared gradient in the second moment: `1 - beta_2`."""
    step_size: float
    """`lr / (1 - beta_1^t)`."""
    root: float
    """`sqrt(1 - beta_2^t)`, which divides the root of the second moment."""
    eps: float


def factors(step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> Factors:
    """Of step `step`, counted from 1."""
    beta_1, beta_2 = betas
    step_size, root = lr / (1 - beta_1**step), sqrt(1 - beta_2**step)
    return Factors(1 - lr * weight_decay, 1 - beta_1, beta_2, 1 - beta_2, step_size, root, eps)


@torch.no_grad()
def adamw(
    slots: list[Slot],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    rounding: Rounding,
) -> None:
    """One step of AdamW (arXiv 1711.05101), as torch.optim.AdamW computes it.

    On a GPU one kernel reads and writes each element once. Elsewhere, and for float64 or weights that are not
    contiguous, it is plain PyTorch, in pieces whose temporary tensors are small.

    Args:
        slots: Of any shapes, dtypes, devices and steps. Their states have `step` () float32 on the CPU;
            `exp_avg` and `exp_avg_sq` of the weight's shape, float64 for a float64 weight and else float32;
            and `master` with that rounding.
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
    groups: dict[tuple, list[Slot]] = {}
    for slot in slots:
        step = advance(slot)
        _make_moments(slot)
        alike = slot.weight.device, slot.weight.dtype, slot.grad.dtype, step, takes_triton(slot)
        groups.setdefault(alike, []).append(slot)
    for (*_, step, on_triton), group in groups.items():
        numbers = factors(step, lr, betas, eps, weight_decay)
        if on_triton:
            from .kernels.elementwise import adamw_step

            adamw_step(group, numbers, rounding, step)
            continue
        for batch in _batches(group):
            _update(batch, numbers, rounding, step)


def advance(slot: Slot) -> int:
    """Counts a step, on the CPU, where it can be read without waiting for a device; from 1."""
    step = slot.state.setdefault("step", torch.zeros((), dtype=torch.float32))
    step += 1
    return int(step)


def takes_triton(slot: Slot) -> bool:
    """Whether the Triton kernel is run: on a GPU, side by side in memory, and nothing wider than float32."""
    given = slot.weight, slot.grad
    kept = [slot.state[name] for name in ("exp_avg", "exp_avg_sq", "master") if name in slot.state]
    known = all(x.is_cuda and x.dtype in TRITON_DTYPES for x in given)
    return known and all(x.is_contiguous() for x in (*given, *kept)) and has_triton()


def _make_moments(slot: Slot) -> None:
    weight = slot.weight
    for name in ("exp_avg", "exp_avg_sq"):
        if name not in slot.state:
            zeros = torch.zeros(weight.shape, dtype=arithmetic_dtype(weight), device=weight.device)
            slot.state[name] = zeros


def _batches(slots: list[Slot]) -> Iterator[list[Slot]]:
    """Many small slots together, which spares launches, or a piece of a large one, which spares memory."""
    batch: list[Slot] = []
    elements = 0
    for slot in slots:
        for piece, _ in cut(slot):
            if batch and elements + piece.weight.numel() > PIECE:
                yield batch
                batch, elements = [], 0
            batch.append(piece)
            elements += piece.weight.numel()
    if batch:
        yield batch


def _update(batch: list[Slot], numbers: Factors, rounding: Rounding, step: int) -> None:
    moments: list[Tensor] = [slot.state["exp_avg"] for slot in batch]
    squares: list[Tensor] = [slot.state["exp_avg_sq"] for slot in batch]
    grads = [slot.grad.to(m.dtype) for slot, m in zip(batch, moments, strict=True)]
    weights = [read(slot, rounding) for slot in batch]
    torch._foreach_lerp_(moments, grads, numbers.gain_1)
    torch._foreach_mul_(squares, numbers.beta_2)
    torch._foreach_addcmul_(squares, grads, grads, numbers.gain_2)
    below = torch._foreach_sqrt(squares)
    torch._foreach_div_(below, numbers.root)
    torch._foreach_add_(below, numbers.eps)
    torch._foreach_mul_(weights, numbers.decay)
    torch._foreach_addcdiv_(weights, moments, below, -numbers.step_size)
    for slot, weight in zip(batch, weights, strict=True):
        write(slot, weight, rounding, step)
