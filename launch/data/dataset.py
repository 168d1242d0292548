"""Sequences of tokens for the training loop, and their order."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch

from .encode import IGNORED_LABEL
from .packing import Packing, pack_documents
from .token_store import TokenStore

Batch = dict[str, torch.Tensor]
"""`input_ids`, `labels` and `position_ids`, int64 (1, L), and `document_offsets`, int32 (documents + 1,)."""


class Piece(NamedTuple):
    """Tokens `start` to `stop` of a document, which was read at `name`."""

    name: str
    start: int
    stop: int


class SequenceDataset:
    """Packed sequences of a store; read from disk as they are asked for.

    Attributes:
        packing: Which documents share a sequence.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        length: int,
        pack: bool = True,
        long_documents: Literal["split", "refuse"] = "split",
        pad_token_id: int = 0,
    ) -> None:
        """Packs the documents.

        Args:
            store: Tokens of documents.
            length: Tokens of a sequence, padding included.
            pack: False makes each document a sequence of its own, of its own length.
            long_documents: What becomes of a document longer than `length`.
            pad_token_id: Fills what is left of a sequence.

        Raises:
            ValueError: There is no document, or one is too long and to be refused.
        """
        if not len(store):
            raise ValueError(f"{store.path} holds no document; nothing can be trained on.")
        self.packing: Packing = pack_documents(
            store.lengths, length, long_documents=long_documents, pack=pack, name=store.name
        )
        self._store = store
        self._pad = pad_token_id

    def __len__(self) -> int:
        """Number of sequences."""
        return self.packing.num_sequences

    def __getitem__(self, i: int) -> Batch:
        """Sequence `i`.

        Returns:
            `input_ids` and `position_ids` (from 0 in each document), int64 (L,); `labels`, int64 (L,):
            the token itself, not yet shifted, or -100 where it carries no loss; `document_offsets`, int32
            (documents + 1,), from 0 to L. Padding at the end counts as one more document.
        """
        packing, bounds = self.packing, self._bounds(i)
        tokens = [self._store.tokens(*bound) for bound in bounds]
        masks = [self._store.loss_mask(*bound) for bound in bounds]
        padding = 0 if packing.capacity is None else packing.capacity - sum(map(len, tokens))
        if padding:
            tokens.append(np.full(padding, self._pad, np.int64))
            masks.append(np.zeros(padding, bool))
        input_ids = np.concatenate(tokens)
        offsets = np.cumsum([0, *map(len, tokens)])
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(np.where(np.concatenate(masks), input_ids, IGNORED_LABEL)),
            "position_ids": torch.from_numpy(np.concatenate([np.arange(len(one)) for one in tokens])),
            "document_offsets": torch.from_numpy(offsets.astype(np.int32)),
        }

    def pieces(self, i: int) -> list[Piece]:
        """Where the text of sequence `i` comes from."""
        return [Piece(self._store.name(document), start, stop) for document, start, stop in self._bounds(i)]

    def _bounds(self, i: int) -> list[tuple[int, int, int]]:
        if not 0 <= i < len(self):
            raise IndexError(f"sequence {i} of {len(self)}")
        packing = self.packing
        pieces = slice(int(packing.sequence_offsets[i]), int(packing.sequence_offsets[i + 1]))
        columns = (packing.document, packing.start, packing.stop)
        return list(zip(*(column[pieces].tolist() for column in columns), strict=True))


@lru_cache(maxsize=2)
def sequence_order(num_sequences: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation that is a function of the seed and the epoch alone.

    Made from Philox's raw numbers, which are the same in every version of NumPy; what
    `Generator.permutation` makes of them may change, and a resumed run would then see data twice.

    Returns:
        int64 (num_sequences,), read-only.
    """
    draws = np.random.Philox(key=[seed, epoch]).random_raw(num_sequences)
    order = np.argsort(draws, kind="stable")
    order.flags.writeable = False
    return order


def join_sequences(sequences: list[Batch]) -> Batch:
    """Several sequences end to end in one row (1, sum of L): no padding, and no attention between them."""
    joined = {
        name: torch.cat([sequence[name] for sequence in sequences])[None]
        for name in ("input_ids", "labels", "position_ids")
    }
    offsets, total = [torch.zeros(1, dtype=torch.int32)], 0
    for sequence in sequences:
        offsets.append(sequence["document_offsets"][1:] + total)
        total += len(sequence["input_ids"])
    joined["document_offsets"] = torch.cat(offsets)
    return joined


def micro_batches(
    dataset: SequenceDataset,
    *,
    seed: int,
    first_sequence: int,
    global_batch: int,
    micro_batch: int,
    dp_rank: int,
    dp_size: int,
) -> Iterator[Batch]:
    """The micro batches of one optimizer step for one data-parallel rank.

    Sequence `k` of a run is sequence `k % n` of the order of epoch `k // n`, n being the number of
    sequences, whatever the number of GPUs; a step takes the sequences `first_sequence` to
    `first_sequence + global_batch`, so that this count is all that a resumed run needs. All ranks that
    share a sequence pass the same `dp_rank`.

    Args:
        dataset: The sequences.
        seed: Of the order.
        first_sequence: Sequences that the run has consumed before this step.
        global_batch: Sequences of the step, over all ranks.
        micro_batch: Sequences that are joined into one row, at most.
        dp_rank: This rank's index among the data-parallel ones.
        dp_size: Their number.

    Raises:
        ValueError: `dp_size` does not divide `global_batch`.
    """
    for taken in step_sequences(
        len(dataset),
        seed=seed,
        first_sequence=first_sequence,
        global_batch=global_batch,
        micro_batch=micro_batch,
        dp_rank=dp_rank,
        dp_size=dp_size,
    ):
        yield join_sequences([dataset[i] for i in taken])


def step_sequences(
    num_sequences: int,
    *,
    seed: int,
    first_sequence: int,
    global_batch: int,
    micro_batch: int,
    dp_rank: int,
    dp_size: int,
) -> list[list[int]]:
    """Which sequences `micro_batches` takes: for each micro batch, their indices in the dataset."""
    if global_batch % dp_size:
        raise ValueError(
            f"train.global_batch_sequences={global_batch} is not a multiple of the {dp_size} groups of GPUs "
            f"that work on different sequences; use {-(-global_batch // dp_size) * dp_size}."
        )
    mine = range(first_sequence + dp_rank, first_sequence + global_batch, dp_size)
    return [
        [_index(num_sequences, seed, k) for k in mine[start : start + micro_batch]]
        for start in range(0, len(mine), micro_batch)
    ]


def _index(num_sequences: int, seed: int, k: int) -> int:
    epoch, position = divmod(k, num_sequences)
    return int(sequence_order(num_sequences, seed, epoch)[position])


def evaluation_batches(
    dataset: SequenceDataset, *, max_sequences: int, micro_batch: int, dp_rank: int, dp_size: int
) -> Iterator[Batch]:
    """The micro batches of one evaluation for one data-parallel rank: the same sequences every time.

    Every rank gets equally many batches of equally many sequences, because the ranks work in step;
    where sequences run out, one of them comes again with no label that counts.
    """
    num_sequences = min(max_sequences, len(dataset))
    per_rank = -(-num_sequences // dp_size)
    for start in range(0, per_rank, micro_batch):
        turns = range(start, min(start + micro_batch, per_rank))
        yield join_sequences([_evaluated(dataset, turn * dp_size + dp_rank, num_sequences) for turn in turns])


def _evaluated(dataset: SequenceDataset, k: int, num_sequences: int) -> Batch:
    sequence = dataset[_index(len(dataset), 0, k % num_sequences)]
    if k >= num_sequences:
        sequence["labels"] = torch.full_like(sequence["labels"], IGNORED_LABEL)
    return sequence
