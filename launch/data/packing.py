"""Which documents share a sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

_WORST = 5
_WORD_BITS = 1024


@dataclass(frozen=True)
class Packing:
    """Sequences of documents, or of pieces of long ones.

    Sequence `s` holds the pieces `sequence_offsets[s]` to `sequence_offsets[s + 1]`; piece `p` is the
    tokens `start[p]` to `stop[p]` of document `document[p]`.

    Attributes:
        capacity: Tokens of a sequence, padding included; None if each is as long as its one piece.
        document: int64 (pieces,).
        start: int64 (pieces,).
        stop: int64 (pieces,).
        sequence_offsets: int64 (sequences + 1,), from 0 to the number of pieces.
    """

    capacity: int | None
    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    sequence_offsets: np.ndarray

    @property
    def num_sequences(self) -> int:
        """Number of sequences."""
        return len(self.sequence_offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of documents in all the sequences."""
        return int((self.stop - self.start).sum())

    @property
    def efficiency(self) -> float:
        """Share of the sequences' tokens that are no padding."""
        if self.capacity is None:
            return 1.0
        return self.num_tokens / (self.num_sequences * self.capacity)


def pack_documents(
    lengths: np.ndarray,
    capacity: int,
    *,
    long_documents: Literal["split", "refuse"] = "split",
    pack: bool = True,
    name: Callable[[int], str] = lambda i: f"document {i}",
) -> Packing:
    """Lays documents into sequences.

    Best fit, longest first: each piece goes where the least space is left after it. Equal lengths are
    laid together, so that it takes seconds for millions of documents.

    Args:
        lengths: Tokens of each document, int64 (documents,), each at least 1.
        capacity: Tokens of a sequence (`sequence.length`).
        long_documents: Cut a longer document into pieces of `capacity` (the last is what remains), or
            refuse it.
        pack: False gives each piece a sequence of its own, of its own length.
        name: What a document is called in the complaint about it.

    Raises:
        ValueError: A document is longer than `capacity` and is to be refused.
    """
    lengths = np.asarray(lengths, np.int64)
    if long_documents == "refuse":
        _refuse_long(lengths, capacity, name)
    pieces_of = -(-lengths // capacity)
    document = np.repeat(np.arange(len(lengths)), pieces_of)
    first = np.cumsum(pieces_of) - pieces_of
    start = (np.arange(len(document)) - first[document]) * capacity
    stop = np.minimum(start + capacity, lengths[document])
    if not pack:
        return Packing(None, document, start, stop, np.arange(len(document) + 1))
    sequence, num_sequences = _best_fit(stop - start, capacity)
    # Within a sequence, documents keep the order of the data.
    order = np.argsort(sequence, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(sequence, minlength=num_sequences))])
    return Packing(capacity, document[order], start[order], stop[order], offsets.astype(np.int64))


def _refuse_long(lengths: np.ndarray, capacity: int, name: Callable[[int], str]) -> None:
    long = np.flatnonzero(lengths > capacity)
    if not len(long):
        return
    worst = long[np.argsort(-lengths[long], kind="stable")][:_WORST]
    listing = "".join(f"\n  {name(int(i))}: {int(lengths[i]):,} tokens" for i in worst)
    raise ValueError(
        f"data.long_documents=refuse: {len(long):,} of {len(lengths):,} documents are longer than "
        f"sequence.length={capacity:,}; the longest:{listing}\n"
        f"Raise sequence.length to {int(lengths[worst[0]]):,}, or set data.long_documents=split."
    )


def _best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """The bin of each piece, int64 (pieces,), and the number of bins."""
    order = np.argsort(-sizes, kind="stable")
    distinct, counts = np.unique(-sizes, return_counts=True)
    bins = np.empty(len(sizes), np.int64)  # in the order of `order`
    open_bins = _OpenBins(capacity)
    num_bins, placed = 0, 0
    for size, count in zip((-distinct).tolist(), counts.tolist(), strict=True):
        end = placed + count
        while placed < end and (found := open_bins.take_fullest(size)) is not None:
            space, bin_ = found
            # What remains is smaller than what was there, so that it is the best fit again.
            fitting = min(space // size, end - placed)
            bins[placed : placed + fitting] = bin_
            placed += fitting
            open_bins.add(space - fitting * size, [bin_])
        if placed < end:
            per_bin = capacity // size
            rest = end - placed
            bins[placed:end] = num_bins + np.arange(rest) // per_bin
            whole, last = divmod(rest, per_bin)
            open_bins.add(capacity - per_bin * size, range(num_bins, num_bins + whole))
            if last:
                open_bins.add(capacity - last * size, [num_bins + whole])
            num_bins += whole + (last > 0)
            placed = end
    result = np.empty_like(bins)
    result[order] = bins
    return result, num_bins


class _OpenBins:
    """Bins by the space that is left in them, with the fullest that still fits found at once.

    Which spaces occur is a bit set in words, and which words are not empty is one more: a look-up
    touches two numbers, however many bins are open.
    """

    def __init__(self, capacity: int) -> None:
        self._bins: dict[int, list[int]] = {}
        self._words = [0] * (capacity // _WORD_BITS + 1)
        self._used_words = 0

    def add(self, space: int, bins: list[int] | range) -> None:
        """Adds bins with `space` left; full ones and none at all are forgotten."""
        if space == 0 or not bins:
            return
        if space not in self._bins:
            self._bins[space] = []
            self._words[space // _WORD_BITS] |= 1 << space % _WORD_BITS
            self._used_words |= 1 << space // _WORD_BITS
        self._bins[space].extend(bins)

    def take_fullest(self, size: int) -> tuple[int, int] | None:
        """Takes out a bin with the least space that is at least `size`: its space and the bin."""
        word, bit = divmod(size, _WORD_BITS)
        above = self._words[word] >> bit
        if above:
            space = size + _lowest_bit(above)
        else:
            words = self._used_words >> (word + 1)
            if not words:
                return None
            word += 1 + _lowest_bit(words)
            space = word * _WORD_BITS + _lowest_bit(self._words[word])
        bins = self._bins[space]
        bin_ = bins.pop()
        if not bins:
            del self._bins[space]
            self._words[space // _WORD_BITS] &= ~(1 << space % _WORD_BITS)
            if not self._words[space // _WORD_BITS]:
                self._used_words &= ~(1 << space // _WORD_BITS)
        return space, bin_


def _lowest_bit(number: int) -> int:
    return (number & -number).bit_length() - 1
