"""Method `recompute`: statistics of each token in forward, logits made again in backward.

What a loss needs of the logits are three numbers a token, differentiable here; the loss itself, its reduction
and any function of a token's log-probability are then plain PyTorch. Four products of the problem's size.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from . import portable
from .head import Gradients, Head, Needs, Statistics, Tokens, refuse_second_order, wide_dtype


def kernels_for(tokens: Tokens, head: Head) -> ModuleType | None:
    """This library's own kernels where they can take the problem, else None: `portable` takes all."""
    if not tokens.hidden.is_cuda or find_spec("triton") is None:
        return None
    from . import fused

    return fused if fused.supports(tokens, head) else None


def head_statistics(tokens: Tokens, head: Head, *, need_mean: bool, memory_mib: int | None) -> Statistics:
    """Each token's log-sum-exp, label's logit and mean logit, with gradients."""
    flat = (tokens.hidden, head.weight, head.bias, tokens.inner, head.outer)
    settings = (head.softcap, head.logit_scale)
    lse, target, mean = _HeadStatistics.apply(*flat, tokens.labels, *settings, need_mean, memory_mib)
    return Statistics(lse, target, mean if need_mean else None)


def head_statistics_backward(
    tokens: Tokens,
    head: Head,
    lse: Tensor,
    upstream: Statistics,
    needs: Needs,
    memory_mib: int | None,
) -> Gradients:
    """Gradients of what `needs` names, given those of the statistics."""
    found = _backward_op(
        *(tokens.hidden, head.weight, head.bias, tokens.inner, head.outer),
        tokens.labels,
        lse,
        upstream.lse.contiguous(),
        upstream.target.contiguous(),
        None if upstream.mean is None else upstream.mean.contiguous(),
        head.softcap,
        head.logit_scale,
        list(needs),
        memory_mib,
    )
    return Gradients(*(value if need else None for value, need in zip(found, needs, strict=True)))


class _HeadStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, inner, outer, labels, softcap, logit_scale, need_mean, memory_mib):
        flat = (hidden, weight, bias, inner, outer)
        lse, target, mean = _statistics_op(*flat, labels, softcap, logit_scale, need_mean, memory_mib)
        ctx.save_for_backward(*flat, labels, lse)
        ctx.settings = (softcap, logit_scale, need_mean, memory_mib)
        return lse, target, mean

    @staticmethod
    @refuse_second_order
    def backward(ctx, g_lse, g_target, g_mean):
        hidden, weight, bias, inner, outer, labels, lse = ctx.saved_tensors
        softcap, logit_scale, need_mean, memory_mib = ctx.settings
        needs = Needs(*ctx.needs_input_grad[:5])
        found = head_statistics_backward(
            Tokens(hidden, labels, inner),
            Head(weight, bias, outer, softcap, logit_scale),
            lse,
            Statistics(g_lse, g_target, g_mean if need_mean else None),
            needs,
            memory_mib,
        )
        return (*found, *[None] * 5)


@torch.library.custom_op("longseq::head_statistics", mutates_args=())
def _statistics_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inner: Tensor | None,
    outer: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    logit_scale: float,
    need_mean: bool,
    memory_mib: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, head = Tokens(hidden, labels, inner), Head(weight, bias, outer, softcap, logit_scale)
    kernels = kernels_for(tokens, head)
    if kernels is None:
        found = portable.statistics(tokens, head, need_mean=need_mean, memory_mib=memory_mib)
    else:
        # Triton launches on the current device, wherever the tensors are.
        with torch.cuda.device_of(hidden):
            found = kernels.statistics(tokens, head, need_mean=need_mean)
    return found.lse, found.target, found.lse.new_empty(0) if found.mean is None else found.mean


@_statistics_op.register_fake
def _(hidden, weight, bias, inner, outer, labels, softcap, logit_scale, need_mean, memory_mib):
    wide = wide_dtype(hidden.dtype)
    num_tokens = hidden.shape[0]
    sizes = (num_tokens, num_tokens, num_tokens if need_mean else 0)
    return tuple(hidden.new_empty(size, dtype=wide) for size in sizes)


@torch.library.custom_op("longseq::head_statistics_backward", mutates_args=())
def _backward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inner: Tensor | None,
    outer: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    g_lse: Tensor,
    g_target: Tensor,
    g_mean: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    needs: list[bool],
    memory_mib: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, head = Tokens(hidden, labels, inner), Head(weight, bias, outer, softcap, logit_scale)
    way = kernels_for(tokens, head) or portable
    upstream = Statistics(g_lse, g_target, g_mean)
    # Backward may run inside an autocast that forward was outside of.
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        found = way.statistics_backward(tokens, head, lse, upstream, Needs(*needs), memory_mib)
    return tuple(hidden.new_empty(0) if value is None else value for value in found)


@_backward_op.register_fake
def _(
    hidden,
    weight,
    bias,
    inner,
    outer,
    labels,
    lse,
    g_lse,
    g_target,
    g_mean,
    softcap,
    logit_scale,
    needs,
    memory_mib,
):
    likes = (hidden, weight, bias, inner, outer)
    return tuple(
        like.new_empty(like.shape) if need else hidden.new_empty(0)
        for need, like in zip(needs, likes, strict=True)
    )
