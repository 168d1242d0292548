"""One loss over every token of a step, whatever ranks and micro batches they are on.

The contract: a rank's loss is `C * (its summed NLL) / (valid tokens of the whole step)`, where C is what the
gradient reducer divides its sum by. Means of means, ranks without a label and windows of unequal micro
batches are then all right by construction.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .groups import ProcessGroups
from .sequence import IGNORE_INDEX


def count_tokens(micro_batches: Iterable[Tensor], groups: ProcessGroups, device: torch.device) -> Tensor:
    """Valid labels of a whole step: over this rank's micro batches, then over all ranks (one collective).

    Args:
        micro_batches: Shifted labels of each micro batch of this rank.
        groups: The process groups.
        device: Where the count is needed, and where the ranks can talk.

    Returns:
        The count, a float64 scalar on `device`.
    """
    local = sum(
        ((labels != IGNORE_INDEX).sum() for labels in micro_batches), torch.zeros((), dtype=torch.long)
    )
    return groups.all_sum(local.to(device, torch.float64))


def global_token_loss(nll_sum: Tensor, num_tokens: Tensor | float, *, reducer_divisor: float = 1.0) -> Tensor:
    """The loss a rank calls backward on.

    Args:
        nll_sum: Negative log-likelihood summed over this rank's labels of one micro batch, a scalar.
        num_tokens: Valid labels of the whole step, from `count_tokens`.
        reducer_divisor: What the reducer divides the ranks' summed gradients by: 1 on one device, the
            number of ranks for DDP, FSDP2's default and DeepSpeed without its own sequence parallelism.

    Returns:
        A scalar whose gradients, once reduced and summed over micro batches, are those of the mean over
        every valid token; 0 where the step has none.
    """
    tokens = torch.as_tensor(num_tokens, device=nll_sum.device, dtype=torch.float64).clamp(min=1)
    return nll_sum * (reducer_divisor / tokens).to(nll_sum.dtype)
