"""Short batches with what goes wrong in long ones: odd lengths, packed documents, parts without labels."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ...distributed.sequence import IGNORE_INDEX
from .clone import VOCABULARY

TILE = 16
"""Tokens of a mini-sequence: half of the batches' lengths are no multiple, and one is shorter."""
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Sample:
    """A batch and what is special about it.

    Attributes:
        name: What it tries.
        batch: `input_ids` and unshifted `labels`, `(B, L)`; with one row `document_offsets` too.
    """

    name: str
    batch: Batch

    @property
    def is_packed(self) -> bool:
        """Whether several documents share its row."""
        return len(self.batch["document_offsets"]) > 2 if "document_offsets" in self.batch else False


def make_samples() -> list[Sample]:
    """One row each, as the training loop has them; together they are one step of four micro-batches."""
    return [
        _packed(),
        Sample("7 tokens, less than a tile", _row(7, seed=1)),
        Sample("48 tokens, no label in the first half", _row(48, seed=2, masked=[(0, 27)])),
        Sample("20 tokens, no label at all", _row(20, seed=3, masked=[(0, 20)])),
    ]


def make_long_sample(length: int) -> Sample:
    """One document of many tiles."""
    return Sample(f"{length} tokens", _row(length, seed=4, masked=[(0, length // 3)]))


def make_rows() -> Sample:
    """Two rows of one document each, as a loop without packing has them."""
    batch = {"input_ids": _ids(2, 39, seed=5)}
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][0, :19] = IGNORE_INDEX
    return Sample("2 rows of 39 tokens", batch)


def documents(batch: Batch) -> list[tuple[int, slice]]:
    """Row and tokens of each document."""
    rows, length = batch["input_ids"].shape
    offsets = batch.get("document_offsets")
    bounds = [0, length] if offsets is None else offsets.tolist()
    return [(row, slice(*bound)) for row in range(rows) for bound in pairwise(bounds)]


def num_labels(batches: list[Batch]) -> int:
    """Labels that count: a document's first token is never predicted."""
    return sum(
        int((batch["labels"][row, tokens][1:] != IGNORE_INDEX).sum())
        for batch in batches
        for row, tokens in documents(batch)
    )


def _packed() -> Sample:
    """Four documents, one of a single token; a third without labels, and a whole tile of those."""
    batch = _row(63, seed=0, masked=[(0, 6), (TILE, 2 * TILE + 1)], bounds=[0, 13, 14, 41, 63])
    return Sample("63 tokens, 4 packed documents", batch)


def _row(
    length: int, *, seed: int, masked: list[tuple[int, int]] | None = None, bounds: list[int] | None = None
) -> Batch:
    ids = _ids(1, length, seed)
    labels = ids.clone()
    for first, stop in masked or ():
        labels[0, first:stop] = IGNORE_INDEX
    offsets = torch.tensor(bounds or [0, length], dtype=torch.int32)
    return {"input_ids": ids, "labels": labels, "document_offsets": offsets}


def _ids(rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(100 + seed))
