"""Rotary position embeddings in place, and their transpose for the gradient (arXiv:2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import check_rows, takes_triton, wide


@torch.no_grad()
def rotate_(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False, out: Tensor | None = None) -> None:
    """Turn the first R of each head's H elements, halves of R paired (as Hugging Face has them).

    `y1 = x1 * cos1 - x2 * sin1` and `y2 = x2 * cos2 + x1 * sin2`, where 1 is `[..., :R/2]` and 2 is
    `[..., R/2:R]`; computed wide and rounded once.

    Args:
        x: `(B, S, n, H)` of any strides, the last dimension's being 1: queries or keys, which may be slices
            of one buffer, or both as heads beside each other.
        cos, sin: `(B, S, R)` or `(1, S, R)`, R even and from 2 to H, any floating dtype.
        inverse: Apply the transpose instead, which takes the gradient of the result to that of x.
        out: Where the result goes, all H elements of each head, of x's shape and dtype; None is x itself.

    Raises:
        ValueError: A shape or a stride is none of these.
    """
    cos, sin = _check(x, cos, sin)
    if out is None:
        out = x
    elif out.shape != x.shape or out.dtype != x.dtype:
        raise ValueError(
            f"rotate_: out {tuple(out.shape)} {out.dtype} must be like x, {tuple(x.shape)} {x.dtype}."
        )
    check_rows("rotate_", x.shape, out=out)
    if takes_triton(x, cos, sin):
        from . import rope_triton

        rope_triton.rotate_(x, cos, sin, inverse, out)
        return
    half = cos.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half : 2 * half]
    cos1, cos2 = wide(cos).unsqueeze(2).split(half, -1)
    sin1, sin2 = wide(sin).unsqueeze(2).split(half, -1)
    if inverse:  # the matrix [[cos1, -sin1], [sin2, cos2]] is transposed
        sin1, sin2 = -sin2, -sin1
    y1, y2 = wide(x1) * cos1 - wide(x2) * sin1, wide(x2) * cos2 + wide(x1) * sin2
    if out is not x:
        out[..., 2 * half :] = x[..., 2 * half :]
    out[..., :half] = y1
    out[..., half : 2 * half] = y2


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, with a last dimension that is contiguous."""
    if x.dim() != 4:
        raise ValueError(f"rotate_: x of shape {tuple(x.shape)} must be (B, S, n, H).")
    check_rows("rotate_", x.shape, x=x)
    for name, angles in (("cos", cos), ("sin", sin)):
        fits = angles.dim() == 3 and angles.shape[0] in (1, x.shape[0]) and angles.shape[1] == x.shape[1]
        width = angles.shape[-1]
        if not fits or not 2 <= width <= x.shape[3] or width % 2 or angles.shape != cos.shape:
            raise ValueError(
                f"rotate_: {name} of shape {tuple(angles.shape)} must be (B or 1, S, R) for x of shape "
                f"{tuple(x.shape)}, R even and from 2 to {x.shape[3]}, and alike for cos and sin."
            )
    return tuple(angles if angles.stride(-1) == 1 else angles.contiguous() for angles in (cos, sin))
