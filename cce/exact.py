"""Exact linear cross-entropy, chunk by chunk of tokens, gradients taken in forward.

A chunk's logits live only while its loss and its two gradient products are made: three matmuls of the
problem's size in all, where recomputing the logits in backward would take four.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .options import LossOptions
from .reference import cap_logits, inverse_weight, is_out_of_range

DEFAULT_MEMORY_MIB = 2048
"""Enough for some 2,800 tokens of a 128,256-word head in bf16: cuBLAS is busy from 2,048 on."""


class Needs(NamedTuple):
    """Which gradients are wanted; read before the Function is entered, where grad mode is off."""

    hidden: bool
    weight: bool
    bias: bool


def exact_linear_cross_entropy(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (T,)
    token_weights: Tensor | None,  # (T,)
    options: LossOptions,
    memory_mib: int | None,
) -> Tensor:
    """The mean or sum loss; see `linear_cross_entropy`."""
    grad = torch.is_grad_enabled()
    needs = Needs(
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
        grad and bias is not None and bias.requires_grad,
    )
    if labels.device.type == "cpu":
        # Ignored tokens cost nothing. On a GPU their number would have to reach the host first.
        kept = (labels != options.ignore_index).nonzero().squeeze(-1)
        if kept.numel() < labels.numel():
            hidden, labels = hidden[kept], labels[kept]
            token_weights = None if token_weights is None else token_weights[kept]
    num_tokens = chunk_tokens(weight.shape[0], hidden.dtype, options, memory_mib, has_bias=bias is not None)
    return _ExactLoss.apply(hidden, weight, bias, labels, token_weights, options, needs, num_tokens)


def chunk_tokens(
    vocab_size: int,
    dtype: torch.dtype,
    options: LossOptions,
    memory_mib: int | None,
    *,
    has_bias: bool = False,
) -> int:
    """Tokens whose logits, with what is made of them, fit into `memory_mib`; at least 1."""
    wide = max(dtype.itemsize, 4)
    bytes_per_logit = dtype.itemsize + wide  # the product, or the gradient in its dtype, beside the buffer
    if options.softcap is not None:
        bytes_per_logit += 2 * wide
    elif has_bias or options.logit_scale != 1.0:
        bytes_per_logit += wide
    tokens = (memory_mib or DEFAULT_MEMORY_MIB) * 2**20 // (vocab_size * bytes_per_logit)
    return max(1, tokens // 128 * 128 if tokens >= 128 else tokens)


class _ExactLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, token_weights, options, needs, num_tokens):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = hidden.new_zeros((), dtype=wide)
        # float16 would lose small hidden gradients before the loss scale of backward reaches them.
        d_hidden_dtype = wide if hidden.dtype == torch.float16 else hidden.dtype
        d_hidden = torch.empty_like(hidden, dtype=d_hidden_dtype) if needs.hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if needs.weight else None
        d_bias = torch.zeros_like(bias, dtype=wide) if needs.bias else None
        for start in range(0, hidden.shape[0], num_tokens):
            rows = slice(start, start + num_tokens)
            row_weights = None if token_weights is None else token_weights[rows].to(wide)
            chunk_loss, row_scale, unscaled = _chunk(
                hidden[rows], weight, bias, labels[rows], row_weights, options, any(needs)
            )
            loss += chunk_loss
            if unscaled is None:
                continue
            if d_bias is not None:
                d_bias += row_scale @ unscaled
            d_logits = unscaled.new_empty(0, dtype=hidden.dtype)
            torch.mul(unscaled, row_scale.unsqueeze(-1), out=d_logits)
            del unscaled
            if d_hidden is not None:
                _product_into(d_hidden[rows], d_logits, weight)
            if d_weight is not None:
                _add_product(d_weight, d_logits.T, hidden[rows])
            del d_logits  # or it would stand beside the next chunk's logits
        # Gradients wait for the upstream one unscaled, so that a second backward finds them as they were.
        scale = loss.new_ones(())
        if options.reduction == "mean":
            scale = inverse_weight(labels, token_weights, options).to(wide)
        ctx.save_for_backward(d_hidden, d_weight, d_bias, scale)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss * scale

    @staticmethod
    def backward(ctx, upstream):
        *gradients, scale = ctx.saved_tensors
        factor = upstream * scale
        scaled = [
            None if gradient is None else torch.mul(gradient, factor, out=gradient.new_empty(0, dtype=dtype))
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None)


def _chunk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_weights: Tensor | None,
    options: LossOptions,
    need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Summed loss of a chunk, a factor of each row `(T,)`, and what it scales to the logits' gradient.

    One buffer of that size goes through it all: log-probabilities, probabilities, gradient.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    vocab_size = weight.shape[0]
    counts = labels != options.ignore_index
    row_scale = counts.to(wide) if row_weights is None else row_weights * counts
    # A label that is no word makes its loss and its gradients NaN, never a number that is wrong.
    row_scale = row_scale.masked_fill(is_out_of_range(labels, vocab_size, options), float("nan"))
    target = labels.clamp(0, vocab_size - 1).unsqueeze(-1)

    logits = hidden @ weight.T
    if bias is not None:
        logits = logits.to(wide) + bias
    if options.logit_scale != 1.0 or options.softcap is not None:
        logits = cap_logits(logits.to(wide), options)
    target_logit = logits.gather(-1, target).squeeze(-1).to(wide)
    buffer = torch.log_softmax(logits, dim=-1, dtype=wide)
    target_log_p = buffer.gather(-1, target).squeeze(-1)
    lse = target_logit - target_log_p
    smoothing = options.label_smoothing
    losses = -target_log_p
    if smoothing:
        losses = (1.0 - smoothing) * losses - smoothing * buffer.mean(dim=-1)
    if options.z_loss:
        losses = losses + options.z_loss * lse.square()
    # masked_fill, not a product alone: the loss of an ignored token may be infinite, and inf * 0 is NaN.
    loss = (losses * row_scale).masked_fill_(~counts, 0.0).sum()
    if not need_gradient:
        return loss, row_scale, None
    cap_slope = None if options.softcap is None else 1.0 - (logits / options.softcap).square_()
    del logits
    d_logits = buffer.exp_()
    if options.z_loss:
        d_logits *= (1.0 + 2.0 * options.z_loss * lse).unsqueeze(-1)
    if smoothing:
        d_logits -= smoothing / vocab_size
    d_logits.scatter_add_(-1, target, d_logits.new_full(target.shape, smoothing - 1.0))
    if cap_slope is not None:
        d_logits *= cap_slope
    return loss, row_scale * options.logit_scale, d_logits


def _product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(_wide_mm(left, right))


def _add_product(accumulator: Tensor, left: Tensor, right: Tensor) -> None:
    """`accumulator += left @ right`, the sum kept in the accumulator's precision."""
    if accumulator.dtype == left.dtype:
        accumulator.addmm_(left, right)
    elif left.is_cuda:
        # One product that adds in place: without it, each chunk would write and read a (V, D) of its own.
        torch.addmm(accumulator, left, right, out_dtype=accumulator.dtype, out=accumulator)
    else:
        accumulator += _wide_mm(left, right)


def _wide_mm(left: Tensor, right: Tensor) -> Tensor:
    """Product of low-precision matrices, given in float32."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
