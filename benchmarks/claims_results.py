"""What `claims.py` reads: rows of the results' files, and what it says of a number."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DATE = re.compile(r"\d{4}-\d\d-\d\d")
Row = dict[str, Any]


class MissingError(Exception):
    """A number that was not measured; the text says which file or row lacks."""


@dataclass(frozen=True)
class Found:
    """What was measured of a claim.

    Attributes:
        text: The number, in a reader's words.
        verdict: One of "reached", "short by ...", "other machine ...".
        numbers: As they were measured, by name.
        command: Which made them, where the results know it best.
    """

    text: str
    verdict: str
    numbers: dict[str, float] = field(default_factory=dict)
    command: str | None = None


class Results:
    """A folder of results.

    Attributes:
        used: Device and date of each row that was taken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.used: list[str] = []
        self._files: dict[str, Row] = {}

    def file(self, name: str) -> Row:
        """The content of `name.json`.

        Raises:
            MissingError: It is not there.
        """
        if name not in self._files:
            path = self.folder / f"{name}.json"
            if not path.exists():
                raise MissingError(f"there is no {name}.json")
            self._files[name] = json.loads(path.read_text())
        return self._files[name]

    def all(self, name: str, /, *having: str, **wanted: Any) -> list[Row]:
        """Rows that have these values, and numbers of these names.

        Raises:
            MissingError: There is none.
        """
        found = self.file(name)
        rows = [
            row
            for row in found["rows"]
            if all(row.get(key) == value for key, value in wanted.items())
            and all(row.get(key) is not None for key in having)
        ]
        if not rows:
            what = ", ".join([*(f"{key}={value}" for key, value in wanted.items()), *having])
            raise MissingError(f"{name}.json has no row with {what}")
        for row in rows:
            # A file may have rows of several days, each with the time of its launch.
            launched = DATE.match(str(row.get("run")))
            self.use(row.get("environment") or found["environment"], launched[0] if launched else None)
        return rows

    def use(self, environment: Row, date: str | None = None) -> None:
        """A row that was measured there is taken."""
        days = ", ".join(one[:10] for one in environment["date"].split(", "))
        self.used.append(f"{environment['device']}, {date or days}")

    def one(self, name: str, /, *having: str, **wanted: Any) -> Row:
        """The first of them."""
        return self.all(name, *having, **wanted)[0]


def reached(value: float, wanted: float, *, lower: bool = False) -> str:
    """Whether a number is as high as another, or as low; else by what factor it is short."""
    factor = value / wanted if lower else wanted / value
    if factor <= 1:
        return "reached"
    return f"short by a factor of {factor:.3g}"


def verdict_of_longest(row: Row) -> str:
    """How sure the longest sequence of an end-to-end row is."""
    return str(row["longest"].get("state", "not ended"))


def longest_tokens(row: Row) -> int:
    """The longest sequence of an end-to-end row.

    Raises:
        MissingError: It was not looked for, or not found.
    """
    tokens = (row.get("longest") or {}).get("tokens")
    if not tokens:
        raise MissingError(f"end_to_end.json has no longest sequence of {row['name']}")
    return int(tokens)
