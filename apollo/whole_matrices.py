"""Projected weights that are all here, on a GPU: several of one shape in a few launches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import TRITON_DTYPES, has_triton
from .low_rank import Projected
from .projection import WORD, mixed

BYTES_AT_ONCE = 2**31
"""Of gradients in one launch. With less, more of a gradient is still in the L2 cache when the weights are
updated, and the GPU is no slower; but the host does not get so many launches done in that time."""


def step(weights: Sequence[Projected]) -> list[Projected]:
    """Take the steps of those that the kernels know.

    Returns:
        The others.
    """
    others: list[Projected] = []
    alike: dict[tuple, list[Projected]] = {}
    for one in weights:
        if not _is_known(one):
            others.append(one)
            continue
        step, dtypes = one.step, (one.weight.dtype, one.grad.dtype)
        key = id(one.options), one.layout.matrices[1:], one.weight.device, dtypes, step
        ones = alike.setdefault(key, [])
        ones.append(one)
        # The GPU has something to do while the host is still looking at the rest.
        if len(ones) * one.grad.nbytes >= BYTES_AT_ONCE:
            _step(alike.pop(key), step)
    for (*_, step), ones in alike.items():
        _step(ones, step)
    return others


def _is_known(one: Projected) -> bool:
    rounding = one.options["rounding"]
    return (
        one.weight.is_cuda
        and one.quantized is None
        and one.weight.dtype in TRITON_DTYPES
        and one.grad.dtype in TRITON_DTYPES
        and (one.weight.dtype == torch.float32 or rounding != "master")
        and (one.weight.dtype != torch.float16 or rounding == "nearest")
        and one.weight.is_contiguous()
        and one.grad.is_contiguous()
        and has_triton()
    )


def _step(ones: list[Projected], step: int) -> None:
    from .kernels.matrices import Matrices, step_matrices

    options, matrices = ones[0].options, ones[0].layout.matrices
    count = range(matrices.count)
    numel = matrices.rows * matrices.columns
    step_matrices(
        Matrices(
            weights=_matrices([one.weight for one in ones], 2),
            grads=_matrices([one.grad for one in ones], 2),
            exp_avg=_matrices([one.state["exp_avg"] for one in ones], 2),
            exp_avg_sq=_matrices([one.state["exp_avg_sq"] for one in ones], 2),
            update_norm=_matrices([one.state["update_norm"] for one in ones], 0),
            projection_keys=[one.matrix_key(matrix, step) for one in ones for matrix in count],
            rounding_keys=[mixed(one.key, step) & WORD for one in ones for _ in count],
            first=[matrix * numel for _ in ones for matrix in count],
        ),
        rank=options["rank"],
        scale_type=options["scale_type"],
        lr=options["lr"],
        betas=options["betas"],
        eps=options["eps"],
        weight_decay=options["weight_decay"],
        alpha=options["alpha"],
        norm_growth_limit=options["norm_growth_limit"],
        step=step,
        rounding="nearest" if options["rounding"] == "nearest" else "stochastic",
    )


def _matrices(tensors: list[Tensor], dims: int) -> list[Tensor]:
    """Each batch's parts; what is none stays as it is, as views cost as much as all else here."""
    if tensors[0].dim() == dims:
        return tensors
    return [part for tensor in tensors for part in tensor]
