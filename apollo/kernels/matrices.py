"""One step of APOLLO on whole matrices of one shape, in four or five launches.

A gradient is read once for its statistics and once for the update, a weight is read and written once, and
nothing else of their size is touched: 8 bytes an element in bf16, and 16 an element of the moments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .moments import Decay, limited_scales, vector_moments
from .projection import signs
from .statistics import channel_statistics, vector_statistics
from .table import TRITON_DTYPES, VECTOR_BYTES, Table, on_device
from .tuning import Tiles
from .update import Change, update_weights


@dataclass
class Matrices:
    """Whole matrices of one shape and one dtype that take the same step; all lists are of one length.

    Attributes:
        weights: `(rows, columns)` each, contiguous; bfloat16, float32, or float16 if rounded to nearest.
        grads: Of the same shape, contiguous; bfloat16, float16 or float32.
        exp_avg: `(channels, rank)` float32 each, contiguous; zeros before the first step.
        exp_avg_sq: The same.
        update_norm: `()` float32 each; zero before the first step.
        projection_keys: 64 bits each: `projection.signs`' key of this epoch.
        rounding_keys: 32 bits each.
        first: Flat index of a matrix's first element in its parameter.
    """

    weights: list[Tensor]
    grads: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    update_norm: list[Tensor]
    projection_keys: list[int]
    rounding_keys: list[int]
    first: list[int]


def step_matrices(
    matrices: Matrices,
    *,
    rank: int,
    scale_type: Literal["channel", "tensor"],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    alpha: float,
    norm_growth_limit: float | None,
    step: int,
    rounding: Literal["stochastic", "nearest"],
    tiles: Tiles | None = None,
) -> None:
    """Updates the weights, the moments and the norms in place; nothing waits for the GPU.

    Scratch memory is that of the signs, `count x rank x inner` in the gradients' dtype, and a few floats a
    channel.

    Args:
        matrices: What is updated.
        rank: Of the projections.
        scale_type: A scale for each channel, or for each matrix.
        lr: Learning rate.
        betas: Of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled; `lr * weight_decay` of a weight goes.
        alpha: Multiplies the learning rate.
        norm_growth_limit: Of an update's norm over the one before it, at least 1; None: any.
        step: Counted from 1.
        rounding: Of bfloat16 weights; float32 is never rounded.
        tiles: Block sizes, to measure others.

    Raises:
        ValueError: A dtype that the kernels do not know, or that cannot be rounded this way.
    """
    if not matrices.weights:
        return
    tiles = tiles or Tiles()
    table = _table(matrices, rank, rounding)
    decay = Decay(betas[0], 1.0 - betas[0], betas[1], 1.0 - betas[1], eps)
    correction = (1.0 - betas[1] ** step) ** 0.5 / (1.0 - betas[0] ** step)
    change = Change(1.0 - lr * weight_decay, lr * correction * alpha)
    by_channel = scale_type == "channel"
    with torch.cuda.device_of(matrices.weights[0]):
        projection = signs(table, tiles)
        if rank == 1:
            partial = vector_statistics(table, projection, tiles)
            sums = table.scratch(table.count, 3, table.channels)
            vector_moments(table, partial, sums, decay)
        else:
            sums = channel_statistics(table, projection, decay, tiles)
        factors, scales = limited_scales(
            table, sums, by_channel=by_channel, growth_limit=norm_growth_limit, tiles=tiles
        )
        update_weights(
            table,
            factors,
            scales if by_channel else None,
            change,
            stochastic=rounding == "stochastic",
            tiles=tiles,
        )


def _table(matrices: Matrices, rank: int, rounding: str) -> Table:
    weight, grad = matrices.weights[0], matrices.grads[0]
    for name, dtype in (("weight", weight.dtype), ("grad", grad.dtype)):
        if dtype not in TRITON_DTYPES:
            raise ValueError(f"{name}.dtype={dtype}: kernels know {list(TRITON_DTYPES)}; take the plain way.")
    if weight.dtype == torch.float16 and rounding == "stochastic":
        raise ValueError("rounding='stochastic': float16 has too few exponents; take 'nearest' or 'master'.")
    tensors = (matrices.weights, matrices.grads, matrices.exp_avg, matrices.exp_avg_sq)
    addresses = [[tensor.data_ptr() for tensor in listed] for listed in tensors]
    norms = [norm.data_ptr() for norm in matrices.update_norm]
    keys = (matrices.projection_keys, matrices.rounding_keys, matrices.first)
    return Table(
        on_device([*addresses, norms, *keys], weight.device),
        len(matrices.weights),
        *weight.shape,
        rank,
        weight.dtype,
        grad.dtype,
        aligned=not any(address % VECTOR_BYTES for listed in addresses for address in listed),
    )
