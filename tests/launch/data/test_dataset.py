from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from longseq.launch.config import DataConfig
from longseq.launch.data.dataset import (
    Batch,
    SequenceDataset,
    evaluation_batches,
    join_sequences,
    micro_batches,
    sequence_order,
)
from longseq.launch.data.prepare import prepare
from longseq.launch.data.token_store import TokenStore

LENGTHS = [1, 2, 3, 5, 8, 13, 16, 17, 40, 1, 7, 33]
LENGTH = 16


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Document `i` consists of tokens `i`; the first of them carries no loss if there are others."""
    folder = tmp_path_factory.mktemp("data")
    with (folder / "ids.jsonl").open("w") as file:
        for i, length in enumerate(LENGTHS):
            labels = [i] if length == 1 else [-100] + [i] * (length - 1)
            file.write(json.dumps({"input_ids": [i] * length, "labels": labels}) + "\n")
    data = DataConfig(source=str(folder / "ids.jsonl"), cache_dir=str(folder / "cache"), eval_fraction=0)
    return prepare(data, "bytes").train


def documents(sequence: Batch) -> list[slice]:
    bounds = sequence["document_offsets"].tolist()
    return [slice(a, b) for a, b in pairwise(bounds)]


@pytest.mark.parametrize("pack", [True, False])
def test_sequences_hold_every_token_once_with_its_place(store: TokenStore, pack: bool) -> None:
    dataset = SequenceDataset(store, length=LENGTH, pack=pack, pad_token_id=258)
    counts = np.zeros(len(LENGTHS), int)
    learned = np.zeros(len(LENGTHS), int)
    for i in range(len(dataset)):
        sequence = dataset[i]
        size = len(sequence["input_ids"])
        assert size == LENGTH if pack else size <= LENGTH
        assert sequence["document_offsets"].dtype == torch.int32
        assert {sequence[name].dtype for name in ("input_ids", "labels", "position_ids")} == {torch.int64}
        offsets = sequence["document_offsets"].tolist()
        assert offsets[0] == 0
        assert offsets[-1] == size
        assert offsets == sorted(set(offsets))
        for part in documents(sequence):
            ids, labels = sequence["input_ids"][part], sequence["labels"][part]
            assert sequence["position_ids"][part].tolist() == list(range(len(ids)))
            [token] = set(ids.tolist())
            if token == 258:
                assert set(labels.tolist()) == {-100}
                assert part.stop == size
            else:
                assert set(labels.tolist()) <= {token, -100}
                counts[token] += len(ids)
                learned[token] += int((labels == token).sum())
    assert counts.tolist() == LENGTHS
    assert learned.tolist() == [max(length - 1, 1) for length in LENGTHS]


def test_refused_documents_are_named_by_file_and_row(store: TokenStore) -> None:
    with pytest.raises(ValueError, match=r"ids\.jsonl:9: 40 tokens"):
        SequenceDataset(store, length=LENGTH, long_documents="refuse")


def test_there_must_be_documents(store: TokenStore) -> None:
    with pytest.raises(ValueError, match="no document"):
        SequenceDataset(store.select(np.empty(0, np.int64)), length=LENGTH)


def test_an_index_out_of_range_ends_iteration(store: TokenStore) -> None:
    dataset = SequenceDataset(store, length=LENGTH)
    assert len(list(dataset)) == len(dataset)
    with pytest.raises(IndexError):
        dataset[-1]


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    for n in (1, 2, 1000):
        assert sorted(sequence_order(n, 3, 4).tolist()) == list(range(n))
    orders = {tuple(sequence_order(50, seed, epoch).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    # A checkpoint of last year resumes in this order: it must not change with NumPy's version.
    assert sequence_order(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def test_joined_sequences_stay_apart(store: TokenStore) -> None:
    dataset = SequenceDataset(store, length=LENGTH, pack=False)
    first, second = dataset[3], dataset[5]
    joined = join_sequences([first, second])
    assert joined["input_ids"].shape == (1, 18)
    assert joined["document_offsets"].tolist() == [0, 5, 18]
    assert joined["document_offsets"].dtype == torch.int32
    assert joined["position_ids"].tolist() == [[*range(5), *range(13)]]


def consumed(dataset: SequenceDataset, first: int, dp_size: int, micro_batch: int = 1) -> list[list[int]]:
    """The tokens of each sequence that one step of 4 takes, rank after rank."""
    found = []
    for rank in range(dp_size):
        for batch in micro_batches(
            dataset,
            seed=5,
            first_sequence=first,
            global_batch=4,
            micro_batch=micro_batch,
            dp_rank=rank,
            dp_size=dp_size,
        ):
            assert batch["document_offsets"][-1] == batch["input_ids"].shape[1]
            found += [row.tolist() for row in batch["input_ids"][0].split(LENGTH)]
    return found


@pytest.mark.parametrize(("dp_size", "micro_batch"), [(1, 1), (1, 3), (2, 1), (2, 2), (4, 1), (4, 8)])
def test_a_step_takes_the_same_sequences_for_any_number_of_gpus(
    store: TokenStore, dp_size: int, micro_batch: int
) -> None:
    dataset = SequenceDataset(store, length=LENGTH)
    for first in (0, 3, 100):
        n = len(dataset)
        expected = [
            dataset[int(sequence_order(n, 5, k // n)[k % n])]["input_ids"].tolist()
            for k in range(first, first + 4)
        ]
        assert sorted(consumed(dataset, first, dp_size, micro_batch)) == sorted(expected)


def test_an_epoch_takes_every_sequence_once_across_steps(store: TokenStore) -> None:
    dataset = SequenceDataset(store, length=LENGTH)
    n = len(dataset)
    assert n % 4
    seen = [row for step in range(n) for row in consumed(dataset, 4 * step, 1)]
    everything = sorted(dataset[i]["input_ids"].tolist() for i in range(n))
    for epoch in range(4):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == everything


def test_every_rank_has_as_many_micro_batches(store: TokenStore) -> None:
    dataset = SequenceDataset(store, length=LENGTH)
    options = {"seed": 0, "first_sequence": 0, "global_batch": 6, "micro_batch": 2, "dp_size": 2}
    shapes = [
        [batch["input_ids"].shape[1] for batch in micro_batches(dataset, dp_rank=rank, **options)]
        for rank in range(2)
    ]
    assert shapes == [[32, 16], [32, 16]]


def test_a_batch_that_does_not_divide_is_refused(store: TokenStore) -> None:
    dataset = SequenceDataset(store, length=LENGTH)
    with pytest.raises(ValueError, match=r"global_batch_sequences=4 .* 3 groups .*use 6"):
        consumed(dataset, 0, 3)


@pytest.mark.parametrize("dp_size", [1, 2, 3, 5])
def test_evaluation_counts_each_label_once_for_any_number_of_gpus(store: TokenStore, dp_size: int) -> None:
    dataset = SequenceDataset(store, length=LENGTH)
    for limit in (1, 4, 1000):
        labels, shapes = [], set()
        for rank in range(dp_size):
            batches = list(
                evaluation_batches(dataset, max_sequences=limit, micro_batch=2, dp_rank=rank, dp_size=dp_size)
            )
            shapes.add(tuple(batch["input_ids"].shape[1] for batch in batches))
            labels += [label for batch in batches for label in batch["labels"].flatten().tolist()]
        assert len(shapes) == 1
        order = sequence_order(len(dataset), 0, 0)[:limit]
        expected = [label for i in order.tolist() for label in dataset[i]["labels"].tolist()]
        assert sorted(label for label in labels if label != -100) == sorted(
            label for label in expected if label != -100
        )
