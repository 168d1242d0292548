"""Norms on tiles, with their gradients by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .kernels.rms_norm import rms_norm, rms_norm_backward
from .linear_map import ModuleMap
from .weight_sums import WeightSums


class RMSNorm:
    """`x / rms(x) * (weight + offset)`, computed in float32 and rounded once."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._weight, self._dtype = module.weight, dtype
        self._eps = rms_norm_eps(module)
        self._offset = weight_offset(module)

    def forward(self, x: Tensor, *, out: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The normalised `(T, D)` or `(T, n, D)`, in the dtype of the products that follow."""
        return rms_norm(
            x, self._weight, self._eps, weight_offset=self._offset, out_dtype=dtype or self._dtype, out=out
        )

    def backward(
        self,
        x: Tensor,
        grad: Tensor,
        sums: WeightSums,
        *,
        residual_grad: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Gradient of `x`, plus the one that flows past the norm; `out` may be either gradient."""
        return rms_norm_backward(
            x,
            self._weight,
            grad,
            self._eps,
            weight_offset=self._offset,
            residual_grad=residual_grad,
            weight_grad=sums.buffer(self._weight) if sums.wants(self._weight) else None,
            out=out,
        )


class ModuleNorm:
    """Any other norm, by autograd."""

    def __init__(
        self, module: nn.Module, dtype: torch.dtype, autocast: tuple[str, torch.dtype] | None
    ) -> None:
        self._map = ModuleMap(module, dtype, autocast)
        self._dtype = dtype

    def forward(self, x: Tensor, *, out: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """As `RMSNorm.forward`."""
        return self._map.forward(x, out=out).to(dtype or self._dtype)

    def backward(
        self,
        x: Tensor,
        grad: Tensor,
        sums: WeightSums,
        *,
        residual_grad: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """As `RMSNorm.backward`."""
        total = self._map.backward(x, grad, sums)
        if residual_grad is not None:
            total = total + residual_grad
        return total if out is None else out.copy_(total)


TokenNorm = RMSNorm | ModuleNorm


def token_norm(
    module: nn.Module | None, dtype: torch.dtype, autocast: tuple[str, torch.dtype] | None
) -> TokenNorm | None:
    """A norm module as one of the above; None stays None."""
    if module is None:
        return None
    return RMSNorm(module, dtype) if is_rms_norm(module) else ModuleNorm(module, dtype, autocast)


def is_rms_norm(module: nn.Module) -> bool:
    """Whether the module is an RMS norm of Hugging Face's or torch's kind, by its class's name and parts."""
    has_weight = isinstance(getattr(module, "weight", None), Tensor)
    plain = {name for name, _ in module.named_parameters()} == {"weight"}
    return "RMSNorm" in type(module).__name__ and has_weight and plain and _eps_of(module) is not None


def weight_offset(module: nn.Module) -> float:
    """Gemma's norms scale by 1 + weight."""
    return 1.0 if type(module).__name__.startswith("Gemma") else 0.0


def rms_norm_eps(module: nn.Module) -> float:
    """What is added to the mean square."""
    eps = _eps_of(module)
    assert eps is not None
    return eps


def _eps_of(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        if isinstance(getattr(module, name, None), float):
            return getattr(module, name)
    return None
