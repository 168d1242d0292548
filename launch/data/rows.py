"""Readers of rows: lines of a JSONL file, whole text files, rows of an Arrow table.

A reader knows how large its rows are before it reads them, so that work can be cut into even parts,
and it reads any stretch of rows on its own, so that the parts can go to other processes.
"""

from __future__ import annotations

import json
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

Kind = Literal["messages", "completion", "ids", "text"]

KIND_COLUMNS: dict[Kind, tuple[str, ...]] = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "ids": ("input_ids",),
    "text": ("text",),
}
"""The columns that make a kind. The first kind whose columns are all there wins, so that a chat set
that also carries its `prompt`, or a tokenised one that also carries its `text`, is read as meant."""

OPTIONAL_COLUMNS: dict[Kind, tuple[str, ...]] = {
    "messages": ("tools",),
    "completion": (),
    "ids": ("labels",),
    "text": (),
}

_DECIDING_COLUMNS = {name for names in KIND_COLUMNS.values() for name in names} | {"labels"}
_SCAN_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Document:
    """One row that is to become tokens.

    Attributes:
        kind: What its columns say it is.
        row: The columns of that kind.
        where: `file:line`, or what else finds the row again.
    """

    kind: Kind
    row: dict[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class Problem:
    """A file or row that cannot be used.

    Attributes:
        where: `file:line`, or what else finds it.
        reason: A few words, the same for all problems of a sort: skipped rows are counted by it.
        detail: What is wrong here, and what would be right.
    """

    where: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}: {self.detail}"


Read = tuple[int, "Document | Problem"]
"""A row's number in its file, as `row_name` takes it, and the row."""


def row_name(style: str, names: list[str], number: int) -> str:
    """The name under which a person finds row `number` again.

    Args:
        style: `line` (of a file), `row` (of a table, from 0) or `file`.
        names: The file or table, or with `file` all the files.
        number: Line, row, or index into `names`.
    """
    if style == "line":
        return f"{names[0]}:{number}"
    if style == "row":
        return f"{names[0]} row {number}"
    return names[number]


def kind_of_columns(columns: set[str]) -> Kind | None:
    """What a source with these columns is; None if nothing that can be trained on."""
    for kind, needed in KIND_COLUMNS.items():
        if columns.issuperset(needed):
            return kind
    return None


def columns_advice(columns: set[str]) -> str:
    """The second half of the complaint about a source of unknown kind."""
    return (
        f"has the columns {', '.join(sorted(columns)) or '(none)'}; it needs `messages`, `prompt` and "
        "`completion`, `input_ids`, or `text`. Rename its columns."
    )


class Reader(Protocol):
    """Reads parts of a source; small when pickled."""

    def read(self, part: Any) -> Iterator[Read]: ...


class Rows(Protocol):
    """A source whose rows can be counted, weighed and read in any order."""

    style: str
    names: list[str]
    sizes: np.ndarray  # int64 (rows,), bytes; an estimate is enough
    reader: Reader

    def part(self, start: int, stop: int) -> Any:
        """What `reader.read` needs for rows `start` to `stop`; small when pickled."""


@dataclass(frozen=True)
class LineReader:
    """Reads JSON objects from stretches of a file."""

    path: str
    name: str
    kind: Kind
    columns: frozenset[str]

    def read(self, part: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Iterator[Read]:
        with open(self.path, "rb") as file:
            for start, stop, line in zip(*(column.tolist() for column in part), strict=True):
                file.seek(start)
                yield line, self._parse(file.read(stop - start), f"{self.name}:{line}")

    def _parse(self, raw: bytes, where: str) -> Document | Problem:
        row = parse_json_object(raw, where)
        if isinstance(row, Problem):
            return row
        columns = _DECIDING_COLUMNS & row.keys()
        if columns != self.columns:
            return Problem(
                where,
                "other columns than the first row",
                f"found {_listed(columns)}, the file's first row has {_listed(self.columns)}",
            )
        names = KIND_COLUMNS[self.kind] + OPTIONAL_COLUMNS[self.kind]
        return Document(self.kind, {name: row[name] for name in names if name in row}, where)


def _listed(columns: set[str] | frozenset[str]) -> str:
    return ", ".join(sorted(columns)) or "none that is used"


def parse_json_object(raw: bytes, where: str) -> dict[str, Any] | Problem:
    """One line of JSON as a dict, or what is wrong with it."""
    try:
        # A byte order mark, which Windows editors write, stands before the first line alone.
        row = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Problem(where, "not UTF-8", f"{error.reason} at byte {error.start} of the line")
    except (json.JSONDecodeError, RecursionError) as error:
        hint = raw[:60].decode("utf-8", errors="replace").strip()
        return Problem(where, "invalid JSON", f"{error}; the line begins with {hint!r}")
    if not isinstance(row, dict):
        return Problem(where, "invalid JSON", f"a {type(row).__name__}, not an object with named columns")
    return row


class JsonLines:
    """A file with one JSON object a line; blank lines are passed over."""

    style = "line"

    def __init__(self, path: Path, name: str, max_rows: int | None = None) -> None:
        """Finds the lines.

        Args:
            path: The file.
            name: What it is called in messages (it may be unpacked from elsewhere).
            max_rows: Leave out all rows after this many.

        Raises:
            ValueError: The first row that can be read has no columns to train on.
            OSError: The file cannot be read.
        """
        self.names = [name]
        starts, stops = _line_bounds(path)
        kept = np.flatnonzero(stops > starts)[:max_rows]
        self._starts, self._stops, self._lines = starts[kept], stops[kept], kept + 1
        self.sizes = self._stops - self._starts
        self.reader = LineReader(str(path), name, *self._first_row(path, name))

    def part(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._starts[start:stop], self._stops[start:stop], self._lines[start:stop]

    def _first_row(self, path: Path, name: str) -> tuple[Kind, frozenset[str]]:
        with path.open("rb") as file:
            for start, stop in zip(self._starts.tolist(), self._stops.tolist(), strict=True):
                file.seek(start)
                raw = file.read(stop - start)
                if start == 0 and raw.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
                    raise ValueError(
                        "is one JSON array, not one object a line; convert it with "
                        f"`jq -c '.[]' {name} > rows.jsonl`"
                    )
                row = parse_json_object(raw, name)
                if isinstance(row, dict):
                    kind = kind_of_columns(set(row))
                    if kind is None:
                        raise ValueError(columns_advice(set(row)))
                    return kind, frozenset(_DECIDING_COLUMNS & row.keys())
        # No row can be read: whatever the kind, each becomes a problem that names its line.
        return "text", frozenset(KIND_COLUMNS["text"])


def _line_bounds(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Where each line starts and, without its line end (`\\n` or `\\r\\n`), stops; int64 (lines,)."""
    ends, position, returns = [], 0, []
    last = b""
    with path.open("rb") as file:
        while block := file.read(_SCAN_BYTES):
            codes = np.frombuffer(block, np.uint8)
            newlines = np.flatnonzero(codes == ord("\n"))
            before = np.where(newlines > 0, codes[newlines - 1], last[0] if last else 0)
            ends.append(newlines + position)
            returns.append(before == ord("\r"))
            position += len(block)
            last = block[-1:]
    end = np.concatenate([*ends, np.empty(0, np.int64)])
    cr = np.concatenate([*returns, np.empty(0, bool)])
    if last and last != b"\n":
        end, cr = np.append(end, position), np.append(cr, last == b"\r")
    starts = np.concatenate([[0], end[:-1] + 1]) if len(end) else end
    return starts.astype(np.int64), (end - cr).astype(np.int64)


@dataclass(frozen=True)
class FileReader:
    """Reads whole text files; with `python`, in the encoding that the source declares."""

    python: bool

    def read(self, part: list[tuple[int, str, str]]) -> Iterator[Read]:
        for number, path, name in part:
            try:
                yield number, Document("text", {"text": self._text(path)}, name)
            except (UnicodeDecodeError, SyntaxError) as error:
                yield number, Problem(name, "not UTF-8", f"{error}; convert it or leave it out")
            except OSError as error:
                yield number, Problem(name, "unreadable file", str(error))

    def _text(self, path: str) -> str:
        if self.python:
            with tokenize.open(path) as file:
                return file.read()
        # Line ends stay as they are: they are what the model is to learn.
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()


@dataclass
class TextFiles:
    """A list of text files, each one document."""

    paths: list[Path]
    names: list[str]
    python: bool = False
    style: str = "file"
    sizes: np.ndarray = field(init=False)
    reader: FileReader = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = np.array([_size(path) for path in self.paths], np.int64)
        self.reader = FileReader(self.python)

    def part(self, start: int, stop: int) -> list[tuple[int, str, str]]:
        return [(i, str(self.paths[i]), self.names[i]) for i in range(start, stop)]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
