"""Whether a model gives the numbers of one rank where ranks share its sequence: measured on a short batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from .apply_ulysses import apply_ulysses
from .groups import ProcessGroups
from .sequence import IGNORE_INDEX, shard_batch, shift_labels

ROUNDINGS = 1e5
"""Of the dtype's, that two ways to the same gradient may differ by: 2e-11 in float64."""
LARGEST = 0.1
"""Difference that is never a rounding, in bfloat16 either."""


@dataclass(frozen=True)
class SequenceCheck:
    """What `compare_with_one_rank` found.

    Attributes:
        loss: Mean loss by the ranks together.
        loss_of_one: By the plain model, each document alone.
        gradients: Of each weight, the largest difference over the largest element of the plain one.
        tolerance: What these may be.
    """

    loss: float
    loss_of_one: float
    gradients: dict[str, float]
    tolerance: float

    @property
    def worst(self) -> tuple[str, float]:
        """The weight whose gradient differs most, and by how much."""
        return max(self.gradients.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])

    @property
    def is_right(self) -> bool:
        """Whether loss and every gradient are those of one rank."""
        in_loss = abs(self.loss - self.loss_of_one) / max(abs(self.loss_of_one), 1e-30)
        # A comparison with nan is false.
        return in_loss <= self.tolerance and self.worst[1] <= self.tolerance


def compare_with_one_rank(
    model: nn.Module,
    groups: ProcessGroups,
    batch: dict[str, Tensor],
    tolerance: float | None = None,
    apply: Callable[[nn.Module], Callable[[], None]] | None = None,
) -> SequenceCheck:
    """Run a plain model on a whole batch, and again with the batch spread over the ranks of a sequence.

    Every rank calls it with the same weights and the same batch. Gradients are held twice: take a short
    batch, and a copy of few layers of a large model. The model is left as it was, without gradients.

    Args:
        model: A Hugging Face causal LM that nothing has been applied to.
        groups: The process groups.
        batch: `input_ids` and unshifted `labels` `(B, L)`, perhaps `document_offsets`.
        tolerance: Relative difference that counts as the same; None takes 1e5 roundings of the model's dtype,
            at most 0.1.
        apply: What is put on the model beside `apply_ulysses`, such as mini-sequences (with `loss="logits"`);
            it returns what takes it off again.

    Raises:
        ValueError: As `apply_ulysses` and `shard_batch`.
    """
    if tolerance is None:
        tolerance = min(ROUNDINGS * torch.finfo(next(model.parameters()).dtype).eps, LARGEST)
    wanted_loss, wanted = _loss_and_grads(model, _documents(batch))
    with ExitStack() as applied:
        applied.callback(apply_ulysses(model, groups).undo)
        if apply is not None:
            applied.callback(apply(model))
        loss, grads = _loss_and_grads(model, [shard_batch(batch, groups)])
    count = (shift_labels(batch["labels"], batch.get("document_offsets")) != IGNORE_INDEX).sum().clamp(min=1)
    if groups.sp_size > 1:
        for tensor in (loss, *grads.values()):
            dist.all_reduce(tensor, group=groups.sp)
    return SequenceCheck(
        float(loss / count),
        float(wanted_loss / count),
        {name: _difference(grads[name], grad) for name, grad in wanted.items()},
        tolerance,
    )


def _documents(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Each document as a batch of its own, with shifted labels."""
    ids, labels = batch["input_ids"], batch["labels"]
    offsets = batch.get("document_offsets")
    bounds = [0, ids.shape[1]] if offsets is None else offsets.tolist()
    return [
        {"input_ids": ids[:, start:stop], "shift_labels": shift_labels(labels[:, start:stop])}
        for start, stop in pairwise(bounds)
        if stop > start
    ]


def _loss_and_grads(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed negative log-likelihood, and the gradient of each trainable weight."""
    total = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    model.zero_grad()
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "shift_labels"}
        logits = model(**inputs, use_cache=False).logits
        labels = batch["shift_labels"].flatten()
        nll = F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORE_INDEX, reduction="sum")
        nll.backward()
        total += nll.detach()
    grads = {
        name: torch.zeros_like(param) if param.grad is None else param.grad.clone()
        for name, param in model.named_parameters()
        if param.requires_grad
    }
    model.zero_grad()
    return total, grads


def _difference(found: Tensor, wanted: Tensor) -> float:
    largest = wanted.abs().max()
    return float((found - wanted).abs().max() / largest.clamp(min=torch.finfo(wanted.dtype).tiny))
