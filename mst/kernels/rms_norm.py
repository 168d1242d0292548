"""RMS norm of rows and its gradient by hand, which keeps nothing of the forward (arXiv:1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import check_rows, takes_triton, wide


@torch.no_grad()
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * (weight + weight_offset)`, computed wide and rounded once.

    Args:
        x: `(rows, D)` or `(rows, n, D)` of any strides, the last dimension's being 1: a norm of each head may
            be given a slice of the columns of all projections.
        weight: `(D,)`, any floating dtype; None is a weight of 1, without an offset.
        eps: Added to the mean square.
        weight_offset: 1 for families that store the weight minus 1 (Gemma).
        out_dtype: Of a new result; x's if None.
        out: Where the result goes instead, of x's shape and any dtype and strides; may be x itself, but not
            overlap it otherwise.

    Returns:
        `out`, or a new contiguous tensor of x's shape.

    Raises:
        ValueError: A shape or a stride is none of these; `out_dtype` is not that of `out`.
    """
    if out is not None and out_dtype not in (None, out.dtype):
        raise ValueError(f"rms_norm: out_dtype={out_dtype} is not out's, {out.dtype}; pass one of the two.")
    if out is None:
        out = x.new_empty(x.shape, dtype=out_dtype)
    _check("rms_norm", x, weight, out=out)
    if takes_triton(x, weight, out):
        from . import rms_norm_triton

        rms_norm_triton.forward(x, weight, eps, weight_offset, out)
        return out
    normed = wide(x) * _inverse_rms(wide(x), eps)
    return out.copy_(normed if weight is None else normed * (wide(weight) + weight_offset))


@torch.no_grad()
def rms_norm_backward(
    x: Tensor,
    weight: Tensor | None,
    grad_out: Tensor,
    eps: float,
    *,
    weight_offset: float = 0.0,
    residual_grad: Tensor | None = None,
    weight_grad: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient of `rms_norm` by x, plus `residual_grad`: what flows past the norm.

    With `r = 1 / sqrt(mean(x^2) + eps)`, `n = x * r` and `g = grad_out * (weight + weight_offset)` it is
    `r * (g - n * mean(g * n))`. Tensors may differ in dtype and strides.

    Args:
        x, weight, eps, weight_offset: As `rms_norm` had them.
        grad_out: Gradient of its result, of x's shape.
        residual_grad: Added to the gradient before it is rounded; of x's shape.
        weight_grad: `(D,)`, float32 (float64 if x is float64); the weight's gradient is added to it, the same
            bits each time.
        out: Where the gradient goes, of x's shape; may be `grad_out`, `residual_grad` or x itself.

    Returns:
        `out`, or a new contiguous tensor of x's shape and dtype.

    Raises:
        ValueError: A shape or a stride is none of these; `weight_grad` without a weight, or in a dtype that
            is too narrow to add up in.
    """
    if out is None:
        out = x.new_empty(x.shape)
    _check("rms_norm_backward", x, weight, grad_out=grad_out, residual_grad=residual_grad, out=out)
    if weight_grad is not None:
        _check_weight_grad(x, weight, weight_grad)
    if takes_triton(x, weight, grad_out, residual_grad, weight_grad, out):
        from . import rms_norm_triton

        rms_norm_triton.backward(x, weight, grad_out, eps, weight_offset, residual_grad, weight_grad, out)
        return out
    inverse = _inverse_rms(wide(x), eps)
    normed, gradient = wide(x) * inverse, wide(grad_out)
    if weight_grad is not None:
        weight_grad += (gradient * normed).flatten(0, -2).sum(0)
    if weight is not None:
        gradient = gradient * (wide(weight) + weight_offset)
    gradient = inverse * (gradient - normed * (gradient * normed).mean(-1, keepdim=True))
    return out.copy_(gradient if residual_grad is None else gradient + wide(residual_grad))


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _check(function: str, x: Tensor, weight: Tensor | None, **others: Tensor | None) -> None:
    if x.dim() not in (2, 3):
        raise ValueError(f"{function}: x of shape {tuple(x.shape)} must be (rows, D) or (rows, n, D).")
    check_rows(function, x.shape, x=x, **others)
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"{function}: weight of shape {tuple(weight.shape)} must have {(x.shape[-1],)}.")


def _check_weight_grad(x: Tensor, weight: Tensor | None, weight_grad: Tensor) -> None:
    if weight is None or weight_grad.shape != weight.shape:
        shape = None if weight is None else tuple(weight.shape)
        raise ValueError(
            f"rms_norm_backward: weight_grad of shape {tuple(weight_grad.shape)} must have the shape "
            f"of the weight, {shape}; pass None where there is no weight."
        )
    least = torch.promote_types(x.dtype, torch.float32)
    if weight_grad.dtype != least:
        raise ValueError(
            f"rms_norm_backward: weight_grad is {weight_grad.dtype}, but must be {least} to be added up over "
            f"tiles with x in {x.dtype}; round it once at the end."
        )
