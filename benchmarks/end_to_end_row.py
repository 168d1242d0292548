"""What a setting of `end_to_end.py` has found so far: said as it comes, and on disk at once."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

GIB = 2**30
Row = dict[str, Any]


class Kept:
    """A row that is written again with each number."""

    def __init__(self, path: Path, row: Row) -> None:
        self.path, self.row = path, row

    def leave_out(self, what: str) -> None:
        """Say what is missing in the row."""
        self.row["left_out"].append(what)
        self.say(f"left out: {what}")

    def summary(self, row: Row) -> str:
        """A line of progress."""
        return (
            f"{row['seconds']:.2f} s, peak {gib(row['peak_bytes'])}, reserved {gib(row['reserved_bytes'])}, "
            f"host {gib(row['host_pinned_bytes'])}, inputs {row.get('inputs')}"
        )

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{process_age_s():6.1f} s] {self.path.stem}: {text}", flush=True)

    def checked(self, environment: Row) -> Row:
        """The environment, if what the row has already is of the same, with the dates of both.

        Raises:
            SystemExit: It is not, and numbers of two would stand under one name.
        """
        earlier = self.row.get("environment", environment)
        for key in ("device", "versions"):
            if earlier.get(key) != environment.get(key):
                raise SystemExit(
                    f"{self.path} is of {key}={earlier.get(key)}, and here it is {environment.get(key)}; use "
                    "--again, or another --out."
                )
        dates = dict.fromkeys([*earlier["date"].split(", "), environment["date"]])
        return environment | {"date": ", ".join(dates)}

    def write(self) -> None:
        """Keep what there is."""
        write_row(self.path, self.row)


def lacks_times(row: Row, lengths: Sequence[int]) -> bool:
    """Whether a length is neither timed nor known to have no room, as a shorter one has none."""
    times = {time["tokens"]: time for time in row.get("times", ())}
    for tokens in sorted(lengths):
        if tokens not in times:
            return True
        if "note" in times[tokens]:
            return False
    return False


def is_over(row: Row, phase: str, lengths: Sequence[int]) -> bool:
    """Whether all of a phase is in the row."""
    return phase in row.get("done", ()) and not (phase == "times" and lacks_times(row, lengths))


def process_age_s() -> float:
    """Since this process began: to import what it needs took a part of its time."""
    return time.time() - psutil.Process().create_time()


def write_row(path: Path, row: Row) -> None:
    """Under another name first."""
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(json.dumps(row, indent=2))
    os.replace(draft, path)


def gib(num_bytes: float | None) -> str:
    """For a line of progress."""
    return "-" if num_bytes is None else f"{num_bytes / GIB:.2f} GiB"
