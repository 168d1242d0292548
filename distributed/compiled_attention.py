"""Attention as one operator that torch.compile puts into its graph whole.

Which kernel runs depends on where documents end, which is not known when a graph is traced, and so does the
layout of its log-sum-exp; inside the operator it is. What leaves it has one layout, so that a graph is right
for all: this costs a copy where a kernel's own differs, which is why eager calls go by autograd's function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import attention
from .attention_kernels import AttentionOptions, Documents
from .per_head import PerHead, sink_gradient


@torch.library.custom_op("longseq::attention", mutates_args=())
def attention_operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    offsets: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Output `(B, N, L, H)` and log-sum-exp `(B, N, L)`, both contiguous."""
    options = AttentionOptions(scale, window, softcap)
    out, lse = attention.attention_forward(query, key, value, options, offsets, PerHead(sinks, slopes))
    return out.contiguous(), lse.reshape(query.shape[:3]).contiguous()


@attention_operator.register_fake
def _(query, key, value, sinks, slopes, offsets, scale, window, softcap):
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=_wide(query))


@torch.library.custom_op("longseq::attention_backward", mutates_args=())
def _backward_operator(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    offsets: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values and (without any: an empty tensor) sinks."""
    options = AttentionOptions(scale, window, softcap)
    per_head = PerHead(sinks, slopes)
    documents = Documents.whole(query.shape[2]) if offsets is None else Documents.of(offsets)
    lse = attention.own_log_sum(lse, query, key, options, documents, per_head)
    grads = attention.attention_backward(grad_out, query, key, value, out, lse, options, documents, per_head)
    of_sinks = query.new_empty(0) if sinks is None else sink_gradient(grad_out, out, lse, sinks)
    return *(grad.contiguous() for grad in grads), of_sinks


@_backward_operator.register_fake
def _(grad_out, query, key, value, out, lse, sinks, slopes, offsets, scale, window, softcap):
    grads = (one.new_empty(one.shape) for one in (query, key, value))
    return *grads, query.new_empty(0) if sinks is None else lse.new_empty(sinks.shape)


def _wide(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, sinks, slopes, offsets, *ctx.rules = inputs
    ctx.save_for_backward(query, key, value, *output, sinks, slopes, offsets)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    sinks = ctx.saved_tensors[5]
    *grads, of_sinks = _backward_operator(grad_out.contiguous(), *ctx.saved_tensors, *ctx.rules)
    return *grads, None if sinks is None else of_sinks.to(sinks.dtype), *[None] * 5


attention_operator.register_autograd(_backward, setup_context=_keep)
