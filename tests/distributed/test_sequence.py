"""Batches on their way to the ranks: no label lost, no document mixed with another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longseq.distributed import ProcessGroups, shard_batch
from longseq.distributed.sequence import (
    document_positions,
    offsets_from_positions,
    pad_batch,
    shift_labels,
)


def offsets_of(*bounds: int) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def row(length: int, rows: int = 1) -> dict[str, Tensor]:
    ids = torch.arange(1, rows * length + 1).view(rows, length)
    return {"input_ids": ids, "labels": ids + 1000}


def shards_of(batch: dict[str, Tensor], sp_size: int) -> list[dict[str, Tensor]]:
    return [shard_batch(batch, ProcessGroups(rank, sp_size, sp_size)) for rank in range(sp_size)]


def test_each_token_predicts_the_next_of_its_row() -> None:
    labels = torch.tensor([[1, 2, 3], [4, -100, 6]])
    assert shift_labels(labels).tolist() == [[2, 3, -100], [-100, 6, -100]]


def test_no_token_predicts_into_the_next_document() -> None:
    labels = torch.arange(1, 8)[None]
    shifted = shift_labels(labels, offsets_of(0, 3, 4, 4, 7))
    assert shifted.tolist() == [[2, 3, -100, -100, 6, 7, -100]]
    assert labels.tolist() == [[1, 2, 3, 4, 5, 6, 7]], "the caller's labels are its own"


def test_positions_and_offsets_say_the_same() -> None:
    positions = document_positions(offsets_of(0, 3, 4, 7))
    assert positions.tolist() == [[0, 1, 2, 0, 0, 1, 2]]
    assert offsets_from_positions(positions).tolist() == [0, 3, 4, 7]
    assert offsets_from_positions(positions).dtype == torch.int32
    assert offsets_from_positions(torch.arange(5, 9)[None]).tolist() == [0, 4]
    assert offsets_from_positions(torch.zeros(1, 1, dtype=torch.long)).tolist() == [0, 1]


def test_padding_is_a_document_of_its_own() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9]]),
        "shift_labels": torch.tensor([[6, 7, -100, 9, -100]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1]]),
        "document_offsets": offsets_of(0, 3, 5),
    }
    padded = pad_batch(batch, 4, pad_token_id=2)
    assert padded["input_ids"].tolist() == [[5, 6, 7, 8, 9, 2, 2, 2]]
    assert padded["shift_labels"].tolist() == [[6, 7, -100, 9, -100, -100, -100, -100]]
    assert padded["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert padded["document_offsets"].tolist() == [0, 3, 5, 8]
    assert padded["document_offsets"].dtype == torch.int32
    assert batch["input_ids"].shape == (1, 5)
    assert pad_batch(batch, 5) is batch


def test_padding_of_plain_rows_goes_on_counting() -> None:
    batch = {
        "input_ids": torch.ones(2, 3, dtype=torch.long),
        "shift_labels": torch.ones(2, 3, dtype=torch.long),
        "position_ids": torch.arange(3).expand(2, 3),
    }
    padded = pad_batch(batch, 5)
    assert padded["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert padded["shift_labels"].tolist() == [[1, 1, 1, -100, -100]] * 2
    assert "document_offsets" not in padded


@pytest.mark.parametrize("documents", [None, (0, 5, 6, 17), (0, 1, 17), (0, 17)])
@pytest.mark.parametrize("sp_size", [1, 2, 3, 4])
def test_the_shards_together_are_the_whole(sp_size: int, documents: tuple[int, ...] | None) -> None:
    batch = row(17)
    if documents:
        batch["document_offsets"] = offsets_of(*documents)
    shards = shards_of(batch, sp_size)
    assert {shard["input_ids"].shape for shard in shards} == {(1, -(-17 // sp_size))}
    whole = {
        name: torch.cat([shard[name] for shard in shards], dim=1)
        for name in ("input_ids", "shift_labels", "position_ids")
    }
    padding = whole["input_ids"].shape[1] - 17
    wanted = shift_labels(batch["labels"], batch.get("document_offsets"))
    assert torch.equal(whole["input_ids"][:, :17], batch["input_ids"])
    assert torch.equal(whole["shift_labels"][:, :17], wanted)
    assert whole["shift_labels"][0, 17:].tolist() == [-100] * padding
    assert torch.equal(
        whole["position_ids"][:, :17],
        torch.arange(17)[None] if documents is None else document_positions(batch["document_offsets"]),
    )
    for shard in shards:
        bounds = [*documents, 17 + padding] if documents and padding else documents
        assert shard["document_offsets"].tolist() == list(bounds or (0, 17 + padding))


@pytest.mark.parametrize("sp_size", [2, 3])
def test_several_plain_rows_are_cut_alike(sp_size: int) -> None:
    shards = shards_of(row(7, rows=3), sp_size)
    labels = torch.cat([shard["shift_labels"] for shard in shards], dim=1)
    assert "document_offsets" not in shards[0], "documents are of one row"
    assert torch.equal(labels[:, :7], shift_labels(row(7, rows=3)["labels"]))


def test_fewer_tokens_than_ranks() -> None:
    shards = shards_of(row(2), 4)
    assert [shard["input_ids"].tolist() for shard in shards] == [[[1]], [[2]], [[0]], [[0]]]
    assert [shard["shift_labels"].tolist() for shard in shards] == [[[1002]], [[-100]], [[-100]], [[-100]]]


@pytest.mark.parametrize(("length", "multiple", "shard"), [(17, 8, 16), (17, 4, 12), (16, 8, 8), (1, 5, 5)])
def test_a_shard_is_a_multiple_of_what_is_asked(length: int, multiple: int, shard: int) -> None:
    shards = [shard_batch(row(length), ProcessGroups(rank, 2, 2), multiple=multiple) for rank in range(2)]
    assert [one["input_ids"].shape for one in shards] == [(1, shard)] * 2
    labels = torch.cat([one["shift_labels"] for one in shards], dim=1)
    assert torch.equal(labels[:, :length], shift_labels(row(length)["labels"]))
    assert (labels[:, length:] == -100).all()


def test_the_batch_is_cut_by_the_rank_in_its_sequence() -> None:
    third = shard_batch(row(6), ProcessGroups(rank=2, world_size=4, sp_size=2))
    assert third["input_ids"].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("sp_size", [1, 2])
def test_positions_that_restart_are_documents(sp_size: int) -> None:
    told = {**row(7), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])}
    by_offsets = {**row(7), "document_offsets": offsets_of(0, 3, 7)}
    for mine, wanted in zip(shards_of(told, sp_size), shards_of(by_offsets, sp_size), strict=True):
        assert mine.keys() == wanted.keys()
        assert all(torch.equal(mine[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"document_offsets": offsets_of(0, 3, 6)}, r"run from 0 to the sequence's 7 tokens"),
        ({"document_offsets": offsets_of(1, 7)}, r"\[1, 7\] must run from 0"),
        ({"document_offsets": offsets_of(0)}, r"\[0\] must run from 0"),
        ({"document_offsets": offsets_of(0, 5, 3, 7)}, "fall from 5 to 3 at index 2"),
        ({"labels": torch.ones(1, 6)}, r"\(1, 7\) and labels \(1, 6\)"),
        ({"input_ids": torch.ones(7), "labels": torch.ones(7)}, r"\(7,\) .* must both be \(B, L\)"),
        ({"position_ids": torch.arange(6)[None]}, r"position_ids \(1, 6\)"),
        ({"attention_mask": torch.ones(1, 7)}, "does not know attention_mask"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(changed: dict[str, Tensor], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        shard_batch({**row(7), **changed}, ProcessGroups())


@pytest.mark.parametrize(
    "told",
    [{"document_offsets": offsets_of(0, 3, 7)}, {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 2)}],
)
def test_packed_documents_in_several_rows_are_refused(told: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"need one row, \(1, L\), not \(2, 7\)"):
        shard_batch({**row(7, rows=2), **told}, ProcessGroups())
