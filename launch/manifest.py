"""What a checkpoint must be to be whole: its files, their sizes and checksums, and how that is looked at.

    manifest.json
        {"format": 1, "chunk_bytes": 67108864,
         "files": {"engine/model.safetensors": {"bytes": 81234, "crc32": ["9ae0daaf"]}, ...},
         "crc32_of_files": "1c291ca3"}

Sizes are looked at whenever a checkpoint is chosen, which takes no time; checksums before it is used, which
reads all of it once. Checkpoints of earlier versions have no manifest: they are taken for what they seem.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..distributed.checked_file import CHUNK_BYTES, BytesFile, FileRecord, chunk_problem, write_file
from .byte_progress import byte_progress

MANIFEST = "manifest.json"
STATE_FILE = "state.json"
LATEST = "latest"
"""Beside the checkpoints: the name of the one that was completed last."""
HAS_MANIFEST = "manifest"
"""In the state of a checkpoint that was written with a manifest: one that has lost it is not an early one."""
FORMAT = 1
READING_THREADS = 4
STEP = re.compile(r"step-(\d+)(\.older)?")


@dataclass(frozen=True)
class Survey:
    """What there is in a run's folder of checkpoints.

    Attributes:
        good: Those whose files are all there and of the right size, the newest last.
        passed_over: What is no checkpoint to go on from, with the reason.
    """

    good: list[Path] = field(default_factory=list)
    passed_over: list[tuple[Path, str]] = field(default_factory=list)

    @property
    def newest(self) -> Path | None:
        """The good one of the highest step."""
        return self.good[-1] if self.good else None


def survey(folder: Path) -> Survey:
    """Look at every checkpoint of a run, by names and sizes."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no folder; move it away, or set another log.run_dir.")
    found = Survey()
    for path in sorted(folder.glob("step-*"), key=_age):
        if not STEP.fullmatch(path.name):
            continue
        problem = size_problem(path)
        if problem is None:
            found.good.append(path)
        else:
            found.passed_over.append((path, problem))
    for path in sorted(folder.glob(".step-*.partial")):
        found.passed_over.append((path, "its writing was cut off"))
    lost = _lost_latest(folder, {path.name for path in folder.glob("step-*")})
    if lost is not None:
        found.passed_over.append(lost)
    return found


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says."""
    match = re.search(r"step-(\d+)", path.name)
    return int(match[1]) if match else -1


def _age(path: Path) -> tuple[int, bool]:
    # Of two of one step, the one that was to be replaced comes first.
    return step_of(path), not path.name.endswith(".older")


def _lost_latest(folder: Path, there: set[str]) -> tuple[Path, str] | None:
    pointer = folder / LATEST
    try:
        name = pointer.read_text().strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        return pointer, f"it cannot be read ({error})"
    if not STEP.fullmatch(name):
        return pointer, f"it names {name[:40]!r}, which is no checkpoint"
    return None if name in there else (folder / name, f"it is not there, and {pointer} names it")


def write_manifest(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Write what the files of a checkpoint are, by their paths in its folder.

    Raises:
        WriteError: It could not be written.
    """
    listed = {
        name: {"bytes": record.num_bytes, "crc32": list(record.checksums)}
        for name, record in sorted(files.items())
    }
    tree = {"format": FORMAT, "chunk_bytes": CHUNK_BYTES, "files": listed, "crc32_of_files": _crc(listed)}
    write_file(folder / MANIFEST, BytesFile(MANIFEST, json.dumps(tree, indent=1).encode()))


def read_manifest(folder: Path) -> dict[str, FileRecord] | None:
    """The files of a checkpoint by their paths; None where it was written without a manifest.

    Raises:
        ValueError: The manifest is damaged, lost, or of a later version.
    """
    path = folder / MANIFEST
    try:
        tree = json.loads(path.read_bytes())
        if tree["format"] != FORMAT or tree["chunk_bytes"] != CHUNK_BYTES:
            raise ValueError(f"{MANIFEST} is of another version of longseq")
        if _crc(tree["files"]) != tree["crc32_of_files"]:
            raise ValueError(f"{MANIFEST} has other bytes than were written")
        return {
            name: FileRecord(int(entry["bytes"]), tuple(entry["crc32"]))
            for name, entry in tree["files"].items()
        }
    except FileNotFoundError:
        if read_json(folder / STATE_FILE).get(HAS_MANIFEST):
            raise ValueError(f"{MANIFEST} is missing") from None
        return None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error!r})") from error
    except OSError as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error.strerror or error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: The file cannot be read, or is none.
    """
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path.name} cannot be read (it is no JSON object)")
    return tree


def _crc(listed: Any) -> str:
    return f"{zlib.crc32(json.dumps(listed, sort_keys=True).encode()):08x}"


def size_problem(folder: Path) -> str | None:
    """Why a checkpoint is not whole, by the sizes of its files; None where it is."""
    if not (folder / STATE_FILE).is_file():
        return f"it has no {STATE_FILE}"
    try:
        read_json(folder / STATE_FILE)
        files = read_manifest(folder) or {}
    except ValueError as error:
        return str(error)
    for name, record in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            return f"{name} is missing ({error.strerror})"
        if size != record.num_bytes:
            return f"{name} has {size:,} bytes, and {record.num_bytes:,} were written"
    return None


def checksum_problems(folder: Path, *, part: int = 0, parts: int = 1, processes_here: int = 1) -> list[str]:
    """Read a checkpoint's files, or one process's part of them, and compare their checksums.

    Args:
        folder: The checkpoint.
        part: Which part this process reads. They are cut by chunks, so that one large file is shared too.
        parts: How many there are.
        processes_here: Of these, on this machine.

    Returns:
        What is wrong, one line a file; nothing of a checkpoint without a manifest.

    Raises:
        ValueError: The manifest cannot be read.
    """
    files = read_manifest(folder) or {}
    chunks = [(name, index) for name in sorted(files) for index in range(len(files[name].checksums))]
    mine = chunks[part::parts]
    problems: dict[str, str] = {}

    def look(name: str, index: int) -> tuple[str, int, str | None]:
        return name, index, chunk_problem(folder / name, files[name], index)

    num_bytes = sum(_chunk_bytes(files[name], index) for name, index in mine)
    threads = max(1, min(READING_THREADS, (os.cpu_count() or 1) // processes_here))
    bar = byte_progress(f"verifying {folder.name}", num_bytes, show=part == 0)
    with bar as done, ThreadPoolExecutor(threads) as pool:
        for name, index, problem in pool.map(lambda chunk: look(*chunk), mine):
            if problem is not None:
                problems.setdefault(name, f"{name} {problem}")
            done(_chunk_bytes(files[name], index))
    return list(problems.values())


def _chunk_bytes(record: FileRecord, index: int) -> int:
    return min(CHUNK_BYTES, record.num_bytes - index * CHUNK_BYTES)
