"""Whether there is room, and the right to write, where a run writes."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..sizes import size_text
from .findings import Finding, error, ok, warning

LOW_BYTES = 10 << 30


@dataclass(frozen=True)
class Place:
    """Facts on one folder.

    Attributes:
        what: Key or variable that names it.
        path: Where it is.
        free_bytes: On its file system.
        failure: Why nothing can be written there; empty where it can.
        needed_bytes: What a run will write there, as far as that is known.
        needed_for: What that is.
    """

    what: str
    path: Path
    free_bytes: int
    failure: str = ""
    needed_bytes: int = 0
    needed_for: str = ""


def read_place(what: str, path: Path, needed_bytes: int = 0, needed_for: str = "") -> Place:
    """Looks at a folder, or where it is not there yet at the one that it would be made in."""
    path = path.expanduser().absolute()
    failure = ""
    try:
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        free = shutil.disk_usage(there).free
        # What access() says is not what a network file system or a quota does.
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"longseq")
    except OSError as refused:
        free, failure = 0, refused.strerror or str(refused)
    return Place(what, path, free, failure, needed_bytes, needed_for)


def hub_home() -> Path:
    """Where Hugging Face's libraries keep what they download."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME")
    return Path(named or "~/.cache/huggingface").expanduser()


def check_place(place: Place) -> list[Finding]:
    """One line for a folder."""
    line = f"{place.what} ({place.path})"
    if place.failure:
        return [
            error(f"{line} cannot be written: {place.failure}", "Name another folder, or mend its rights.")
        ]
    if place.needed_bytes > place.free_bytes:
        return [
            error(
                f"{line} has {size_text(place.free_bytes)} free, {place.needed_for} take "
                f"{size_text(place.needed_bytes)}",
                "Free some, name another folder, or keep fewer (checkpoint.keep=1).",
            )
        ]
    if place.free_bytes < LOW_BYTES:
        return [
            warning(
                f"{line} has only {size_text(place.free_bytes)} free",
                "Checkpoints, tokens and downloads of a large model take more: free some, or name another "
                "folder.",
            )
        ]
    need = f", {place.needed_for} take {size_text(place.needed_bytes)}" if place.needed_bytes else ""
    return [ok(f"{line}: {size_text(place.free_bytes)} free{need}")]
