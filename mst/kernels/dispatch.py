"""Who computes: Triton or plain PyTorch; in which precision; and what both ask of their tensors."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def takes_triton(*tensors: Tensor | None) -> bool:
    """Whether the Triton kernels are run: every tensor is on a GPU, and none is wider than float32."""
    given = [tensor for tensor in tensors if tensor is not None]
    return all(tensor.is_cuda and tensor.dtype in TRITON_DTYPES for tensor in given) and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the precision that plain PyTorch computes in: float64 if it has it, else float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_rows(function: str, shape: torch.Size, **tensors: Tensor | None) -> None:
    """Every tensor that is given has this shape, and elements of its last dimension that lie side by side.

    Raises:
        ValueError: One has not.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{function}: {name} of shape {tuple(tensor.shape)} must have {tuple(shape)}.")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{function}: {name}.stride(-1)={tensor.stride(-1)} must be 1; pass {name}.contiguous(), or "
                "a slice of whole rows."
            )
