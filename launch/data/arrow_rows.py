"""Rows of a Hugging Face dataset: memory-mapped, read a stretch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .rows import (
    KIND_COLUMNS,
    OPTIONAL_COLUMNS,
    Document,
    Kind,
    Problem,
    Read,
    columns_advice,
    kind_of_columns,
)

if TYPE_CHECKING:
    import datasets
    import pyarrow

_WEIGH_ROWS = 10_000
_READ_ROWS = 256
_UNREADABLE = (ValueError, OSError, OverflowError, SystemError)
"""What Arrow raises where it cannot make values of what it finds; its own errors are of these."""


@dataclass(frozen=True)
class ArrowReader:
    """Reads stretches of rows of a dataset."""

    dataset: datasets.Dataset
    name: str
    kind: Kind
    columns: tuple[str, ...]

    def read(self, part: tuple[int, int]) -> Iterator[Read]:
        start, stop = part
        for first in range(start, stop, _READ_ROWS):
            last = min(first + _READ_ROWS, stop)
            try:
                self._validate(first, last)
                columns = self.dataset[first:last]
            except _UNREADABLE:
                # One of them is: text that is not UTF-8 is seen only here.
                yield from (self._read_alone(i) for i in range(first, last))
                continue
            for i in range(last - first):
                yield first + i, self._document(first + i, {name: columns[name][i] for name in self.columns})

    def _validate(self, first: int, last: int) -> None:
        """See that rows are what they should be before they are read: a wrong offset may lead anywhere."""
        self.dataset.with_format("arrow")[first:last].validate(full=True)

    def _read_alone(self, i: int) -> Read:
        try:
            self._validate(i, i + 1)
            row = self.dataset[i]
        except _UNREADABLE as error:
            reason = "not UTF-8" if "UTF8" in str(error) else "unreadable row"
            return i, Problem(self._where(i), reason, str(error).strip())
        return i, self._document(i, {name: row[name] for name in self.columns})

    def _document(self, i: int, row: dict[str, Any]) -> Document:
        return Document(self.kind, _without_fillers(row), self._where(i))

    def _where(self, i: int) -> str:
        return f"{self.name} row {i}"


class ArrowRows:
    """A Hugging Face dataset."""

    style = "row"

    def __init__(self, dataset: datasets.Dataset, name: str, max_rows: int | None = None) -> None:
        """Weighs the rows.

        Raises:
            ValueError: It has no columns to train on.
        """
        kind = kind_of_columns(set(dataset.column_names))
        if kind is None:
            raise ValueError(columns_advice(set(dataset.column_names)))
        names = KIND_COLUMNS[kind] + OPTIONAL_COLUMNS[kind]
        columns = tuple(column for column in names if column in dataset.column_names)
        if max_rows is not None and max_rows < len(dataset):
            dataset = dataset.select(range(max_rows))
        # A format that someone set (torch tensors, transforms) would change what a row holds.
        dataset = dataset.with_format(None).select_columns(list(columns))
        self.names = [name]
        self.sizes = _row_sizes(dataset)
        self.reader = ArrowReader(dataset, name, kind, columns)

    def part(self, start: int, stop: int) -> tuple[int, int]:
        return start, stop


def _without_fillers(row: dict[str, Any]) -> dict[str, Any]:
    """Drops the nulls with which Arrow fills the keys that only other rows' messages have.

    A chat template asks `message.tool_calls is defined`, and a null is.
    """
    messages = row.get("messages")
    if isinstance(messages, list):
        row["messages"] = [
            {key: value for key, value in message.items() if value is not None}
            if isinstance(message, dict)
            else message
            for message in messages
        ]
    if row.get("tools", 0) is None:
        del row["tools"]
    return row


def _row_sizes(dataset: datasets.Dataset) -> np.ndarray:
    """Bytes of each row, int64 (rows,)."""
    arrow = dataset.with_format("arrow")
    parts = [np.empty(0, np.int64)]
    for start in range(0, len(dataset), _WEIGH_ROWS):
        table = arrow[start : start + _WEIGH_ROWS]
        sizes = sum(_value_sizes(column.combine_chunks()) for column in table.columns)
        parts.append(np.maximum(sizes, 0))  # a damaged one may be anything
    return np.concatenate(parts)


def _value_sizes(array: pyarrow.Array | pyarrow.ChunkedArray) -> np.ndarray:
    """Bytes of each value of an array, nested ones included; int64 (values,)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(array, pa.ChunkedArray):
        return np.concatenate([np.empty(0, np.int64), *map(_value_sizes, array.chunks)])
    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pc.fill_null(pc.binary_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    if pa.types.is_struct(kind):
        fields = [_value_sizes(field) for field in array.flatten()]
        return sum(fields, np.zeros(len(array), np.int64))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        counts = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        total = np.concatenate([[0], np.cumsum(_value_sizes(array.flatten()))])
        bounds = np.concatenate([[0], np.cumsum(counts.astype(np.int64))])
        return total[bounds[1:]] - total[bounds[:-1]]
    return np.full(len(array), 4, np.int64)
