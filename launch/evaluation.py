"""How sequences are scored: by the same code in training and in evaluation, on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed.engine import Engine
from ..distributed.groups import ProcessGroups
from ..distributed.sequence import IGNORE_INDEX, shard_batch
from .config import TrainConfig
from .data.dataset import SequenceDataset, evaluation_batches


def summed_nll(engine: Engine, batch: dict[str, Tensor], device: torch.device) -> Tensor:
    """Negative log-likelihood summed over this rank's labels of a batch that `shard_batch` cut."""
    on_device = {
        # Documents stay with the host: attention needs their bounds there in every layer.
        name: tensor if name == "document_offsets" else tensor.to(device, non_blocking=True)
        for name, tensor in batch.items()
    }
    labels = on_device["shift_labels"]
    return engine(**on_device, labels=labels, num_items_in_batch=1, use_cache=False).loss


@dataclass(frozen=True)
class Evaluator:
    """The held-out sequences of a run; the same ones every time, whatever the number of ranks."""

    sequences: SequenceDataset
    config: TrainConfig
    groups: ProcessGroups
    device: torch.device

    def loss(self, engine: Engine) -> tuple[float, int]:
        """Mean negative log-likelihood in nats a token, and the number of tokens; every rank calls it."""
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        engine.module.eval()
        with torch.no_grad():
            for batch in self._shards():
                totals[0] += summed_nll(engine, batch, self.device)
                totals[1] += (batch["shift_labels"] != IGNORE_INDEX).sum().to(self.device)
        engine.module.train()
        nll_sum, num_tokens = self.groups.all_sum(totals).tolist()
        return nll_sum / max(1.0, num_tokens), round(num_tokens)

    def unigram_entropy(self, vocab_size: int) -> float:
        """Loss of a model that knows how frequent each word is here and no more, in nats a token."""
        counts = torch.zeros(vocab_size, dtype=torch.float64)
        for batch in self._shards():
            labels = batch["shift_labels"].flatten()
            counts += torch.bincount(labels[labels != IGNORE_INDEX], minlength=vocab_size)
        counts = self.groups.all_sum(counts.to(self.device))
        return float(torch.special.entr(counts / counts.sum().clamp(min=1)).sum())

    def _shards(self) -> Iterator[dict[str, Tensor]]:
        batches = evaluation_batches(
            self.sequences,
            max_sequences=self.config.eval_sequences,
            micro_batch=self.config.micro_batch_sequences,
            dp_rank=self.groups.dp_rank,
            dp_size=self.groups.dp_size,
        )
        return (shard_batch(batch, self.groups) for batch in batches)
