from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from longseq.launch.data.packing import Packing, pack_documents


def lengths_like(name: str, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    return {
        "mixed": (rng.integers(1, 300, 500), 128),
        "long tail": (np.maximum(rng.lognormal(5, 1.5, 700).astype(np.int64), 1), 1025),
        "one token each": (np.ones(100, np.int64), 7),
        "capacity of one": (rng.integers(1, 5, 20), 1),
        "exactly full": (np.full(9, 64), 64),
        "one more than full": (np.full(9, 65), 64),
        "one document": (np.array([3]), 64),
        "larger than a word of bits": (rng.integers(1, 5000, 400), 4999),
    }[name]


CASES = (
    "mixed",
    "long tail",
    "one token each",
    "capacity of one",
    "exactly full",
    "one more than full",
    "one document",
    "larger than a word of bits",
)


def sizes_by_sequence(packing: Packing) -> list[list[int]]:
    sizes = (packing.stop - packing.start).tolist()
    bounds = packing.sequence_offsets.tolist()
    return [sizes[a:b] for a, b in pairwise(bounds)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pack", [True, False])
def test_every_token_is_in_exactly_one_sequence(case: str, pack: bool) -> None:
    lengths, capacity = lengths_like(case, np.random.default_rng(1))
    packing = pack_documents(lengths, capacity, pack=pack)
    seen = [np.zeros(length, int) for length in lengths]
    for document, start, stop in zip(packing.document, packing.start, packing.stop, strict=True):
        assert start < stop
        seen[document][start:stop] += 1
    assert all((one == 1).all() for one in seen)
    sequences = sizes_by_sequence(packing)
    assert all(0 < sum(sizes) <= capacity for sizes in sequences)
    assert packing.num_tokens == lengths.sum()
    if not pack:
        assert all(len(sizes) == 1 for sizes in sequences)
        assert packing.efficiency == 1.0


@pytest.mark.parametrize("case", CASES)
def test_packs_as_the_textbook_does(case: str) -> None:
    lengths, capacity = lengths_like(case, np.random.default_rng(2))
    pieces = []
    for length in lengths.tolist():
        pieces += [capacity] * (length // capacity) + ([length % capacity] if length % capacity else [])
    spaces: list[int] = []
    for piece in sorted(pieces, reverse=True):
        fitting = [space for space in spaces if space >= piece]
        if fitting:
            spaces.remove(min(fitting))
        spaces.append((min(fitting) if fitting else capacity) - piece)
    packing = pack_documents(lengths, capacity)
    ours = sorted(capacity - sum(sizes) for sizes in sizes_by_sequence(packing))
    assert ours == sorted(spaces)
    assert packing.efficiency == pytest.approx(sum(pieces) / (capacity * len(spaces)))


def test_the_same_documents_are_packed_the_same_way() -> None:
    lengths, capacity = lengths_like("mixed", np.random.default_rng(3))
    one, other = pack_documents(lengths, capacity), pack_documents(lengths, capacity)
    for name in ("document", "start", "stop", "sequence_offsets"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_documents_keep_their_order_within_a_sequence() -> None:
    packing = pack_documents(np.array([2, 5, 1, 2]), 10)
    assert packing.document.tolist() == [0, 1, 2, 3]


def test_refused_documents_are_named_longest_first() -> None:
    lengths = np.array([10, 11, 300, 10, 12])
    with pytest.raises(ValueError, match=r"3 of 5 documents .*length=10") as error:
        pack_documents(lengths, 10, long_documents="refuse", name=lambda i: f"chats.jsonl:{i + 1}")
    message = str(error.value)
    assert message.index("chats.jsonl:3: 300 tokens") < message.index("chats.jsonl:5: 12 tokens")
    assert "chats.jsonl:1:" not in message


def test_a_document_of_just_the_length_is_not_refused() -> None:
    assert pack_documents(np.array([10, 10]), 10, long_documents="refuse").num_sequences == 2
