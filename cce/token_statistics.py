"""What a head says of each token, to look at: log-probability of its label, entropy, likeliest word."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .head import ELSEWHERE, IGNORED, Head, Tokens, wide_dtype
from .portable import chunk_tokens
from .recompute import kernels_for
from .reference import cap_logits


class TokenStatistics(NamedTuple):
    """Shaped like the labels; 0 for ignored tokens. No gradient flows through them."""

    log_prob: Tensor  # of the label, in nats
    entropy: Tensor  # of the softmax, in nats
    argmax: Tensor  # int64: the likeliest word


@torch.no_grad()
def token_statistics(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    memory_mib: int | None = None,
) -> TokenStatistics:
    """Log-probability, entropy and likeliest word of each token, without storing the logits.

    One pass over the vocabulary, as long as the forward of `linear_cross_entropy`. For a loss, or anything
    that is differentiated, take `linear_cross_entropy` with `reduction="none"` (its negative is `log_prob`).

    Args:
        hidden: Hidden states, `(..., D)`.
        weight: The head's weight, `(V, D)`.
        labels: Word of each token, `(...)`; its log-probability is NaN if it is no word.
        bias: Added to the logits, `(V,)`.
        ignore_index: Label of the tokens that are left out.
        softcap: See `linear_cross_entropy`.
        logit_scale: See `linear_cross_entropy`.
        memory_mib: Memory of a chunk of logits, where the fused kernels do not run.

    Raises:
        ValueError: Shapes or dtypes do not fit.
    """
    if weight.dim() != 2 or hidden.shape[-1:] != weight.shape[1:] or labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and labels {tuple(labels.shape)} "
            "must be (..., D), (V, D) and (...)."
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; cast one.")
    flat = labels.reshape(-1).long()
    word = (flat >= 0) & (flat < weight.shape[0])
    rows = torch.where(word, flat, ELSEWHERE).masked_fill(flat == ignore_index, IGNORED)
    tokens = Tokens(hidden.reshape(-1, hidden.shape[-1]), rows)
    head = Head(weight, bias, None, softcap, float(logit_scale))
    kernels = kernels_for(tokens, head)
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        found = _by_chunks(tokens, head, memory_mib) if kernels is None else kernels.look(tokens, head)
    log_prob, entropy, argmax = (part.masked_fill(rows == IGNORED, 0) for part in found)
    log_prob = log_prob.masked_fill(rows == ELSEWHERE, float("nan"))
    return TokenStatistics(*(part.view(labels.shape) for part in (log_prob, entropy, argmax.long())))


def _by_chunks(tokens: Tokens, head: Head, memory_mib: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and argmax, `(N,)`, in plain PyTorch."""
    hidden, wide = tokens.hidden, wide_dtype(tokens.hidden.dtype)
    log_prob, entropy = (hidden.new_empty(hidden.shape[0], dtype=wide) for _ in range(2))
    argmax = torch.empty_like(tokens.labels)
    size = chunk_tokens(head.weight.shape[0], hidden.dtype, memory_mib=memory_mib, in_place=False)
    for start in range(0, hidden.shape[0], size):
        rows = slice(start, start + size)
        logits = (hidden[rows] @ head.weight.T).to(wide)
        if head.bias is not None:
            logits += head.bias
        log_p = torch.log_softmax(cap_logits(logits, head), dim=-1)
        log_prob[rows] = log_p.gather(-1, tokens.labels[rows].clamp(min=0).unsqueeze(-1)).squeeze(-1)
        argmax[rows] = log_p.argmax(-1)
        # A word that cannot be has p log p = 0, not 0 times -inf.
        entropy[rows] = -(log_p.exp() * log_p.clamp(min=torch.finfo(wide).min)).sum(-1)
    return log_prob, entropy, argmax
