from __future__ import annotations

import numpy as np
import pytest

from longseq.launch.data.holdout import held_out


def digests(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 63, count, dtype=np.uint64)


@pytest.mark.parametrize("count", [2, 3, 10, 1000])
@pytest.mark.parametrize("fraction", [1e-6, 0.02, 0.5, 0.999])
def test_both_sides_have_documents_and_about_the_right_share(count: int, fraction: float) -> None:
    chosen = held_out(digests(count), fraction)
    assert 1 <= chosen.sum() <= count - 1
    assert abs(chosen.sum() - fraction * count) <= 1


def test_nothing_is_held_out_unless_asked_for_or_possible() -> None:
    assert not held_out(digests(100), 0.0).any()
    assert not held_out(digests(1), 0.5).any()
    assert not held_out(digests(0), 0.5).any()


def test_copies_are_on_one_side() -> None:
    values = np.repeat(digests(50), 3)
    np.random.default_rng(1).shuffle(values)
    chosen = held_out(values, 0.3)
    assert 30 <= chosen.sum() <= 45
    assert not set(values[chosen].tolist()) & set(values[~chosen].tolist())


def test_a_document_with_many_copies_stays_in_training() -> None:
    values = np.array([1] * 90 + list(range(2, 12)), np.uint64)
    chosen = held_out(values, 0.05)
    assert chosen.sum() == 5
    assert not chosen[:90].any()


def test_copies_of_one_document_alone_are_still_split() -> None:
    assert held_out(np.full(10, 7, np.uint64), 0.2).sum() == 2


def test_the_choice_follows_the_document_not_its_place() -> None:
    values = digests(200)
    order = np.random.default_rng(2).permutation(200)
    np.testing.assert_array_equal(held_out(values, 0.1)[order], held_out(values[order], 0.1))
