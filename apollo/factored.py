"""Adafactor's second moment, for matrices that are not projected: a number a row and a number a column.

After Shazeer and Stern: "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost" (arXiv 1804.04235),
without a first moment and with AdamW's decay, bias correction and weight decay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .elementwise import advance
from .rounding import arithmetic_dtype, cut, prepare, read, write
from .slots import Rounding, Slot

LARGEST_RMS = 1.0
"""Of an update before the learning rate; a larger one is scaled down to it (the paper's d)."""


@torch.no_grad()
def factored(
    slots: list[Slot],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    rounding: Rounding,
) -> None:
    """One step with a second moment of rank 1, in pieces whose temporary tensors are small.

    ```
    row = b2 row + (1-b2) mean of G*G along each row;  column = b2 column + (1-b2) mean along each column
    V = row column / mean(row) / (1-b2^t);  U = G / (sqrt(V) + eps);  U = U / max(RMS(U), 1)
    W = W (1 - lr weight_decay) - lr U
    ```

    Args:
        slots: Whole matrices; a batch of them, or a kernel, is given as one that has all their rows. Their
            states have `step` () float32 on the CPU; `row` (rows,) and `column` (columns,), float64 for a
            float64 weight and else float32; and `master` with that rounding.
        lr: Learning rate.
        betas: The second is the decay of the second moment; the first has no use here.
        eps: Added to the root of the second moment after its bias correction.
        weight_decay: Decoupled: `lr * weight_decay` of the weight goes each step.
        rounding: How weights narrower than float32 are written.

    Raises:
        ValueError: A weight is not a matrix; or see `rounding.prepare`.
    """
    for slot in slots:
        if slot.weight.dim() != 2:
            raise ValueError(
                f"weight.dim()={slot.weight.dim()}: rows and columns need a whole matrix; use adamw."
            )
        prepare(slot, rounding)
    for slot in slots:
        if slot.weight.numel() > 0:
            _step(slot, lr, betas[1], eps, weight_decay, rounding)


def _step(slot: Slot, lr: float, beta: float, eps: float, weight_decay: float, rounding: Rounding) -> None:
    step = advance(slot)
    row, column = _decayed_means(slot, beta)
    # The ratio first: a product of two means of squares could underflow.
    relative = row / row.mean().clamp_min(torch.finfo(row.dtype).tiny)
    column = column / (1 - beta**step)

    def updates(piece: Slot, start: int) -> Tensor:
        rows = relative[start : start + len(piece.weight)]
        below = (rows.unsqueeze(1) * column).sqrt_().add_(eps)
        return piece.grad / below

    # Twice the same division rather than a tensor of the matrix's size.
    total, start = torch.zeros_like(row[0]), 0
    for piece, _ in cut(slot):
        total += updates(piece, start).square_().sum()
        start += len(piece.weight)
    limit = (total / slot.weight.numel()).sqrt_().div_(LARGEST_RMS).clamp_min_(1.0)
    start = 0
    for piece, _ in cut(slot):
        update = updates(piece, start).div_(limit)
        start += len(piece.weight)
        weight = read(piece, rounding)
        weight.mul_(1 - lr * weight_decay).sub_(update, alpha=lr)
        write(piece, weight, rounding, step)


def _decayed_means(slot: Slot, beta: float) -> tuple[Tensor, Tensor]:
    """The state's `row` and `column`, with this gradient in them."""
    weight, state, dtype = slot.weight, slot.state, arithmetic_dtype(slot.weight)
    for name, size in zip(("row", "column"), weight.shape, strict=True):
        if name not in state:
            state[name] = torch.zeros(size, dtype=dtype, device=weight.device)
    row, column = state["row"].mul_(beta), state["column"].mul_(beta)
    start = 0
    for piece, _ in cut(slot):
        squares = piece.grad.to(dtype).square()
        row[start : start + len(squares)].add_(squares.mean(1), alpha=1 - beta)
        column.add_(squares.sum(0), alpha=(1 - beta) / len(weight))
        start += len(squares)
    return row, column
