"""The mini-sequence LM head: from hidden states to the loss, a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..cce.linear_cross_entropy import linear_cross_entropy
from .low_rank import LinearParts, as_linear_head
from .mini_sequence import mini_sequence

IGNORE_INDEX = -100
HEAD_TILE_LOGITS = 2**28
"""Logits of a tile of the general head: 1 GiB in float32."""


def lm_head_loss(
    head: nn.Module,
    apply_head: Callable[[Tensor], Tensor],
    hidden: Tensor,  # (B, S, D)
    labels: Tensor,  # (B, S)
    *,
    shift: bool,
    num_items: Tensor | float | None,
    loss: str,
    memory_mib: int | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Summed negative log-likelihood over `num_items`, or its mean over the labels that count.

    Args:
        head: The LM head; an `nn.Linear`, with or without a LoRA adapter, goes through cut cross-entropy when
            `loss` says so.
        apply_head: What turns hidden states into logits (the head's own forward).
        hidden: Hidden states, `(B, S, D)`.
        labels: Labels, `(B, S)`; -100 does not count.
        shift: Token t is scored against label t + 1 of its row.
        num_items: What the sum is divided by; None takes the number of labels that count.
        loss: "cce" or "mini_sequence".
        memory_mib: MiB that the loss may take beside its gradients.
        softcap: Logits become `softcap * tanh(logits / softcap)`, after the scale.
        logit_scale: Factor of the logits.
    """
    if shift:
        labels = F.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)
    linear: LinearParts | None = as_linear_head(head) if loss == "cce" else None
    if linear is not None:
        total = linear_cross_entropy(
            hidden,
            linear.weight,
            labels,
            bias=linear.bias,
            lora=linear.lora,
            reduction="sum",
            memory_mib=memory_mib,
            softcap=softcap,
            logit_scale=logit_scale,
        )
    else:

        def logits_of(tile: Tensor) -> Tensor:
            logits = apply_head(tile) * logit_scale if logit_scale != 1.0 else apply_head(tile)
            return logits if softcap is None else softcap * torch.tanh(logits / softcap)

        total = _tiled_loss(head, logits_of, hidden, labels, memory_mib)
    if num_items is None:
        num_items = (labels != IGNORE_INDEX).sum().clamp(min=1)
    # Where nothing counts the sum is 0, and so is a mean of nothing, with its gradients: not 0 / 0.
    if isinstance(num_items, Tensor):
        num_items = num_items.to(total.device)
        return total / num_items.masked_fill(num_items == 0, 1)
    return total / (num_items or 1)


def _tiled_loss(
    head: nn.Module,
    apply_head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    labels: Tensor,
    memory_mib: int | None,
) -> Tensor:
    """Any head: its own forward, tile by tile, rebuilt in backward."""

    def tile_loss(hidden_tile: Tensor, label_tile: Tensor) -> Tensor:
        logits = apply_head(hidden_tile)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(
            logits.flatten(0, 1), label_tile.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        )
        return losses.view(label_tile.shape)

    vocab_size = getattr(head, "out_features", None) or head.weight.shape[0]
    logits_of_a_tile = HEAD_TILE_LOGITS if memory_mib is None else memory_mib * 2**20 // 4
    tile_tokens = max(1, logits_of_a_tile // vocab_size)
    return mini_sequence(tile_loss, (hidden, labels), head.parameters(), tile_tokens=tile_tokens).sum()
