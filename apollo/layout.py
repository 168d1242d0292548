"""Where the elements of a weight are, over the ranks that share it, and who keeps which channels' moments.

APOLLO's statistics are sums over elements of the gradient, so any partition of them will do. A layout says
which rectangles of the weight's matrices a rank holds. From that follow the channels that a rank has a part
of (`touched`) and those whose moments it keeps (`owned`), for all ranks alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor


class Matrices(NamedTuple):
    """A weight as a batch of matrices: `count` of them, `rows` x `columns` each."""

    count: int
    rows: int
    columns: int

    @classmethod
    def of(cls, shape: Sequence[int]) -> Matrices:
        """Of a weight's shape, of two dimensions or three."""
        rows, columns = shape[-2:]
        return cls(math.prod(shape[:-2]), rows, columns)

    @property
    def is_tall(self) -> bool:
        """Whether channels are rows: they lie along the larger dimension."""
        return self.rows >= self.columns

    @property
    def channels(self) -> int:
        """Of one matrix."""
        return max(self.rows, self.columns)

    @property
    def width(self) -> int:
        """Elements of a channel."""
        return min(self.rows, self.columns)


class Range(NamedTuple):
    """From `start` up to, not including, `stop`."""

    start: int
    stop: int

    def __and__(self, other: Range) -> Range:
        start = max(self.start, other.start)
        return Range(start, max(start, min(self.stop, other.stop)))

    @property
    def size(self) -> int:
        """How many."""
        return self.stop - self.start


class Rectangle(NamedTuple):
    """Rows and columns of one of a weight's matrices, and where they start in the rank's own tensor."""

    matrix: int
    rows: Range
    columns: Range
    offset: int

    def view(self, local: Tensor) -> Tensor:
        """These elements `(rows, columns)` of the tensor that the rank holds."""
        height, width = self.rows.size, self.columns.size
        if local.dim() == 1:
            return local[self.offset : self.offset + height * width].view(height, width)
        return local if local.dim() == 2 else local[self.offset]


@dataclass(frozen=True)
class Layout:
    """A weight over ranks, cut flat or along a dimension.

    Attributes:
        shape: Of the whole weight.
        bounds: For each rank, what it holds: flat elements, or indices along `dim`.
        dim: Dimension that is cut; None where the flat weight is.
    """

    shape: tuple[int, ...]
    bounds: tuple[Range, ...]
    dim: int | None = None

    @classmethod
    @cache
    def whole(cls, shape: tuple[int, ...]) -> Layout:
        """All of it on one rank, or the same on every one."""
        if not shape:
            return cls((), (Range(0, 1),))
        return cls(tuple(shape), (Range(0, shape[0]),), 0)

    @classmethod
    @cache
    def chunked(cls, shape: tuple[int, ...], dim: int, num_ranks: int) -> Layout:
        """As DTensor's `Shard(dim)` and `torch.chunk` cut it."""
        dim %= len(shape)
        return cls(tuple(shape), _chunks(shape[dim], num_ranks), dim)

    @cached_property
    def matrices(self) -> Matrices:
        """The weight as a batch of matrices."""
        return Matrices.of(self.shape)

    @property
    def num_channels(self) -> int:
        """Of all its matrices."""
        return self.matrices.count * self.matrices.channels

    @cached_property
    def rectangles(self) -> tuple[list[Rectangle], ...]:
        """What each rank holds: of a flat part that cuts rows in two, up to three a matrix.

        Raises:
            ValueError: A batch of matrices cut within its matrices.
        """
        if len(self.shape) > 2 and self.dim:
            raise ValueError(
                f"a weight of shape {self.shape} is sharded along dimension {self.dim}; Apollo takes batches "
                "of matrices sharded along dimension 0 alone. Shard it there, or give it the rule 'adamw'."
            )
        return tuple(self._rectangles_of(rank) for rank in range(len(self.bounds)))

    def _rectangles_of(self, rank: int) -> list[Rectangle]:
        _, rows, columns = self.matrices
        part = self.bounds[rank]
        all_rows, all_columns = Range(0, rows), Range(0, columns)
        if not part.size:
            return []
        if self.dim is None:
            return list(_cut_flat(part, rows, columns))
        if len(self.shape) > 2:
            return [Rectangle(matrix, all_rows, all_columns, matrix - part.start) for matrix in range(*part)]
        if self.dim == 0:
            return [Rectangle(0, part, all_columns, 0)]
        return [Rectangle(0, all_rows, part, 0)]

    @cached_property
    def touched(self) -> tuple[Range, ...]:
        """For each rank, the channels from the first to the last that it has elements of.

        Channels are numbered over all matrices; a rank that has none has an empty range.
        """
        return tuple(self._touched_by(rank) for rank in range(len(self.bounds)))

    def channels_of(self, rectangle: Rectangle) -> Range:
        """The channels that a rectangle has elements of."""
        along = rectangle.rows if self.matrices.is_tall else rectangle.columns
        first = rectangle.matrix * self.matrices.channels
        return Range(first + along.start, first + along.stop)

    def _touched_by(self, rank: int) -> Range:
        ranges = [self.channels_of(rectangle) for rectangle in self.rectangles[rank]]
        if not ranges:
            return Range(0, 0)
        return Range(min(one.start for one in ranges), max(one.stop for one in ranges))

    @cached_property
    def owned(self) -> tuple[Range, ...]:
        """For each rank, the channels whose moments it keeps: together all, none twice.

        A channel is the first rank's that has a part of it, where next to none has several. Where most are
        spread over ranks, they are dealt out evenly.
        """
        num_ranks = len(self.bounds)
        if self.dim is not None and len(self.shape) > 2:
            return self.touched  # whole matrices
        # Of consecutive elements, a rank and the next have at most one row in common.
        if self.dim is not None or sum(one.size for one in self.touched) >= self.num_channels + num_ranks:
            return _chunks(self.num_channels, num_ranks)
        owned, stop = [], 0
        for one in self.touched:
            owned.append(Range(max(one.start, stop), max(one.stop, stop)) if one.size else Range(stop, stop))
            stop = owned[-1].stop
        return tuple(owned)

    @cached_property
    def shared(self) -> tuple[Range, ...]:
        """The channels that a rank beside their owner has elements of, in order."""
        ends = sorted({end for one in (*self.touched, *self.owned) for end in one})
        shared: list[Range] = []
        for start, stop in pairwise(ends):
            piece = Range(start, stop)
            others = sum(
                1
                for touched, owned in zip(self.touched, self.owned, strict=True)
                if (touched & piece).size and not (owned & piece).size
            )
            if others:
                shared.append(piece)
        return tuple(shared)


def _chunks(size: int, num_ranks: int) -> tuple[Range, ...]:
    step = -(-size // num_ranks)
    return tuple(Range(min(rank * step, size), min((rank + 1) * step, size)) for rank in range(num_ranks))


def _cut_flat(part: Range, rows: int, columns: int):
    """Rectangles of consecutive elements: the end of a row, whole rows, the start of one, in each matrix."""
    at = part.start
    while at < part.stop:
        matrix, within = divmod(at, rows * columns)
        row, column = divmod(within, columns)
        left = min(part.stop - at, rows * columns - within)
        if column or left < columns:
            width = min(left, columns - column)
            shape = Range(row, row + 1), Range(column, column + width)
        else:
            shape = Range(row, row + left // columns), Range(0, columns)
        yield Rectangle(matrix, *shape, at - part.start)
        at += shape[0].size * shape[1].size
