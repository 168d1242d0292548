"""The definition of right: linear cross-entropy in a few lines of plain PyTorch.

It stores every logit. In float64 it is the truth that the other methods are held against; in a lower
precision it is what plain PyTorch would have given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .options import LossOptions


def reference_linear_cross_entropy(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (T,)
    token_weights: Tensor | None,  # (T,)
    options: LossOptions,
) -> tuple[Tensor, Tensor]:
    """Loss, reduced as asked, and each token's log-sum-exp `(T,)`, both differentiable."""
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    logits = cap_logits(logits, options)
    losses, lse = token_losses(logits, labels, token_weights, options)
    return reduce_losses(losses, labels, token_weights, options), lse


def cap_logits(logits: Tensor, options: LossOptions) -> Tensor:
    """Scale and soft-cap raw logits, in that order."""
    if options.logit_scale != 1.0:
        logits = logits * options.logit_scale
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    return logits


def token_losses(
    logits: Tensor,  # (T, V)
    labels: Tensor,
    token_weights: Tensor | None,
    options: LossOptions,
) -> tuple[Tensor, Tensor]:
    """Each token's loss and log-sum-exp, `(T,)`; 0 where ignored, NaN where the label is no word."""
    vocab_size = logits.shape[-1]
    lse = torch.logsumexp(logits, dim=-1)
    target = logits.gather(-1, labels.clamp(0, vocab_size - 1).unsqueeze(-1)).squeeze(-1)
    losses = lse - target
    if options.label_smoothing:
        smooth = lse - logits.mean(dim=-1)
        losses = (1.0 - options.label_smoothing) * losses + options.label_smoothing * smooth
    if options.z_loss:
        losses = losses + options.z_loss * lse.square()
    if token_weights is not None:
        losses = losses * token_weights.to(losses.dtype)
    losses = losses.masked_fill(labels == options.ignore_index, 0.0)
    return losses.masked_fill(is_out_of_range(labels, vocab_size, options), float("nan")), lse


def reduce_losses(
    losses: Tensor, labels: Tensor, token_weights: Tensor | None, options: LossOptions
) -> Tensor:
    """Sum, mean over the weight of the tokens that count, or the losses as they are."""
    if options.reduction == "none":
        return losses
    total = losses.sum()
    if options.reduction == "sum":
        return total
    return total * inverse_weight(labels, token_weights, options).to(total.dtype)


def inverse_weight(labels: Tensor, token_weights: Tensor | None, options: LossOptions) -> Tensor:
    """1 / (summed weight of the tokens that count), 0 where there is none: no host sync, no NaN."""
    counts = labels != options.ignore_index
    # Wide before the sum: float16 ends at 65,504 tokens, bfloat16 counts in steps long before.
    wide = torch.float64 if labels.device.type != "mps" else torch.float32
    weight = (
        counts.sum() if token_weights is None else torch.where(counts, token_weights.to(wide), 0.0).sum()
    ).to(wide)
    return torch.where(weight != 0, 1.0 / weight, torch.zeros_like(weight))


def is_out_of_range(labels: Tensor, vocab_size: int, options: LossOptions) -> Tensor:
    """Where a label is neither a word nor `ignore_index`."""
    return ((labels < 0) | (labels >= vocab_size)) & (labels != options.ignore_index)
