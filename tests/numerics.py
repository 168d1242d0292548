"""How right is shown: ours must be as near to the float64 truth as plain PyTorch in the same dtype is."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; NaN anywhere gives NaN."""
    truth = truth.double()
    scale = truth.norm()
    return float((value.double() - truth).norm() / (scale if scale > 0 else 1.0))


def assert_as_accurate_as(
    ours: Tensor, plain: Tensor, truth: Tensor, *, slack: float = 1.5, name: str = ""
) -> None:
    """`error(ours) <= slack * error(plain) + tiny`, tiny being a rounding of the coarser of the two dtypes.

    Args:
        ours: What is tested.
        plain: What plain PyTorch gives in the same dtype.
        truth: The float64 result.
        slack: Factor that is allowed.
        name: Of the tensor, for the message.
    """
    assert ours.shape == truth.shape, f"{name}: {tuple(ours.shape)} is not {tuple(truth.shape)}"
    assert ours.dtype == plain.dtype, f"{name}: {ours.dtype} is not {plain.dtype}"
    mine, theirs = relative_error(ours, truth), relative_error(plain, truth)
    # A rounding or two of the result itself, which plain PyTorch may by luck not have needed. The truth
    # has float64's own roundings, so that there is no truth to tell two float64 results apart by.
    roundings = 100.0 if ours.dtype == torch.float64 else 2.0 if ours.dim() == 0 else 0.25
    tiny = roundings * torch.finfo(ours.dtype).eps
    if not mine <= slack * theirs + tiny:
        worst = (ours.double() - truth.double()).abs().flatten().nan_to_num(nan=torch.inf).argmax()
        raise AssertionError(
            f"{name}: relative error {mine:.3e}, plain {theirs:.3e}, allowed {slack} x plain + {tiny:.1e}; "
            f"worst at [{int(worst)}]: ours {ours.flatten()[worst].item()}, "
            f"plain {plain.flatten()[worst].item()}, truth {truth.flatten()[worst].item()}"
        )
