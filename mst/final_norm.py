"""The norm behind the last layer, with no float32 copies of the sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .gradient_owner import GradientOwner
from .kernels.rms_norm import rms_norm, rms_norm_backward
from .token_norm import rms_norm_eps, weight_offset


def fused_norm(module: nn.Module, hidden: Tensor, gradients: GradientOwner) -> Tensor:
    """An RMS norm of `(..., D)` as Hugging Face computes it, with one rounding; it keeps `hidden` alone."""
    return _FusedNorm.apply(hidden, module.weight, rms_norm_eps(module), weight_offset(module), gradients)


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, eps: float, offset: float, gradients: GradientOwner
    ) -> Tensor:
        ctx.save_for_backward(hidden)
        # By ctx: ZeRO-3 has changed what a weight holds by the time of its backward.
        ctx.weight, ctx.eps, ctx.offset, ctx.gradients = weight, eps, offset, gradients
        flat = hidden.reshape(-1, hidden.shape[-1])
        return rms_norm(flat, weight, eps, weight_offset=offset).view(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (hidden,) = ctx.saved_tensors
        weight = ctx.weight
        flat = hidden.reshape(-1, hidden.shape[-1])
        weight_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        rms_norm_backward(
            flat,
            weight,
            grad.reshape(flat.shape).contiguous(),
            ctx.eps,
            weight_offset=ctx.offset,
            weight_grad=weight_grad,
            out=out.view(flat.shape),
        )
        ctx.gradients.own(out)
        return out, None if weight_grad is None else weight_grad.to(weight.dtype), None, None, None
