"""Where documents come from: `data.source` to readers of rows."""

from __future__ import annotations

import glob
import gzip
import hashlib
import os
import re
import shutil
import sysconfig
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..exit_status import is_disk_full
from .arrow_rows import ArrowRows
from .hf_datasets import load_folder, load_hub, load_parquet, load_saved, saved_shards
from .rows import JsonLines, Problem, Rows, TextFiles

LINE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
_REFUSED_SUFFIXES = (".csv", ".tsv", ".arrow", ".zip", ".tar", ".gz", ".zst", ".xz", ".bz2", ".pdf", ".docx")
_TABLE_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".parquet")
_CARD_SUFFIXES = (".md", ".json", ".yaml", ".yml", "license")  # what describes a dataset beside its tables
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """One place of `data.source`, found but not yet read.

    Attributes:
        spec: As it was written.
        form: `stdlib`, `files` told apart by their suffixes, a folder of `texts`, a folder that
            `datasets` saved (`saved`) or loads (`folder`), or a name on the Hugging Face hub (`hub`).
        paths: Its files; none for `hub`.
        split: Split of a Hugging Face dataset.
    """

    spec: str
    form: Literal["stdlib", "files", "texts", "saved", "folder", "hub"]
    paths: tuple[Path, ...]
    split: str

    def fingerprint(self) -> str:
        """A digest that changes when the data does: each file's path, size and time of change, or what
        the Hugging Face cache calls the version of a dataset."""
        digest = hashlib.sha256(f"{self.form}\0{self.split}".encode())
        if self.form == "hub":
            digest.update(load_hub(self.spec, self.split)._fingerprint.encode())
        for path in self.paths:
            try:
                stat = path.stat()
                stamp = f"{stat.st_size}\0{stat.st_mtime_ns}"
            except OSError:
                stamp = "unreadable"
            digest.update(f"\0{path.absolute()}\0{stamp}".encode(errors="surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True)
class OpenedSource:
    """The rows of a source, and the files of it that cannot be read at all."""

    rows: list[Rows]
    problems: list[Problem]


def find_sources(specs: str | Sequence[str], split: str) -> list[Source]:
    """What `data.source` names.

    Raises:
        ValueError: Something is not there, or is of a kind that cannot be read; names all of them.
    """
    found, errors = [], []
    for spec in [specs] if isinstance(specs, str) else specs:
        try:
            found.append(_find_source(spec, split))
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError("\n".join(errors))
    if not found:
        raise ValueError("data.source is an empty list; name a source, or leave it out for `stdlib`.")
    return found


def _find_source(spec: str, split: str) -> Source:
    if spec == "stdlib":
        return Source(spec, "stdlib", tuple(_stdlib_files()), split)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _find_folder(spec, path, split)
    if path.exists():
        _check_suffix(path)
        return Source(spec, "files", (path,), split)
    if glob.has_magic(spec):
        # What a pattern hits besides files that can be read is left to the person who wrote it.
        paths = sorted(Path(hit) for hit in glob.glob(str(path), recursive=True) if Path(hit).is_file())
        if not paths:
            raise ValueError(f"data.source={spec!r}: no file fits the pattern (from {Path.cwd()}); check it.")
        for hit in paths:
            _check_suffix(hit)
        return Source(spec, "files", tuple(paths), split)
    looks_local = spec.startswith((".", "/", "~")) or path.suffix in {*LINE_SUFFIXES, ".parquet", ".txt"}
    if looks_local or not _HUB_NAME.fullmatch(spec):
        raise ValueError(
            f"data.source={spec!r}: there is no such file or folder (from {Path.cwd()}), and it is no name "
            "on the Hugging Face hub either; check the path, or name `owner/name` or `owner/name:config`."
        )
    return Source(spec, "hub", (), split)


def _find_folder(spec: str, path: Path, split: str) -> Source:
    files = tuple(_visible_files(path))
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return Source(spec, "saved", files, split)
    if not files:
        raise ValueError(f"data.source={spec!r}: the folder holds no file that is not hidden; name another.")
    tables = {suffix for suffix in _TABLE_SUFFIXES for file in files if file.name.lower().endswith(suffix)}
    if not tables:
        if all(file.name.lower().endswith((*LINE_SUFFIXES, *_REFUSED_SUFFIXES)) for file in files):
            raise ValueError(
                f"data.source={spec!r}: the folder holds no text, but {files[0].name} and the like; name "
                f"files of JSON lines by a pattern ({Path(spec, '*.json')}), convert others."
            )
        return Source(spec, "texts", files, split)
    strangers = [
        file for file in files if not file.name.lower().endswith((*_TABLE_SUFFIXES, *_CARD_SUFFIXES))
    ]
    if len(tables) > 1 or strangers:
        # `datasets` would take one sort and pass over the others without a word.
        raise ValueError(
            f"data.source={spec!r}: the folder mixes {', '.join(sorted(tables))} files"
            f"{f' and others such as {strangers[0].name}' if strangers else ''}; name those that are meant "
            "by patterns (data/*.jsonl)."
        )
    return Source(spec, "folder", files, split)


def _check_suffix(path: Path) -> None:
    name = path.name.lower()
    if name.endswith(_REFUSED_SUFFIXES) and not name.endswith(LINE_SUFFIXES):
        raise ValueError(
            f"data.source={str(path)!r}: {path.suffix} files are not read; convert it to JSONL "
            "(one object a line), Parquet or plain text."
        )


def _visible_files(folder: Path) -> list[Path]:
    """All files below a folder, sorted, hidden ones (and those in hidden folders) left out."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(root, name) for name in files if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _stdlib_files() -> list[Path]:
    """The interpreter's own modules, tests and empty files left out."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _STDLIB_LEFT_OUT]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    kept = sorted(path for path in found if path.stat().st_size > 0)
    if not kept:
        raise ValueError(
            f"data.source='stdlib': this Python has no .py files below {root}; name a source of your own."
        )
    return kept


def open_source(source: Source, max_documents: int | None, scratch: Path) -> OpenedSource:
    """Finds and weighs the rows of a source, reading as little as that takes.

    Args:
        source: From `find_sources`.
        max_documents: Leave out all rows after this many.
        scratch: Empty folder for unpacked copies; it must stay until the rows are read.

    Raises:
        ValueError: A Hugging Face dataset cannot be loaded.
    """
    if source.form == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        paths = list(source.paths[:max_documents])
        names = [f"stdlib/{path.relative_to(root).as_posix()}" for path in paths]
        return OpenedSource([TextFiles(paths, names, python=True)], [])
    if source.form == "files":
        return _open_files(source.paths, max_documents, scratch)
    if source.form == "texts":
        paths = list(source.paths[:max_documents])
        return OpenedSource([TextFiles(paths, [str(path) for path in paths])], [])
    if source.form == "saved":
        try:
            dataset = load_saved(source.spec, source.split)
        except ValueError as error:
            return _open_shards(source, max_documents, error)
    elif source.form == "folder":
        dataset = load_folder(source.spec, source.split, source.paths, scratch)
    else:
        dataset = load_hub(source.spec, source.split)
    name = f"{source.spec}[{source.split}]"
    try:
        return OpenedSource([ArrowRows(dataset, name, max_documents)], [])
    except ValueError as error:
        return OpenedSource([], [Problem(name, "no usable columns", str(error))])


def _open_files(paths: Sequence[Path], max_documents: int | None, scratch: Path) -> OpenedSource:
    rows: list[Rows] = []
    problems: list[Problem] = []
    texts: list[Path] = []
    left = max_documents

    def take(opened: Rows) -> None:
        nonlocal left
        rows.append(opened)
        if left is not None:
            left -= len(opened.sizes)

    def take_texts() -> None:
        if texts:
            take(TextFiles(texts[:left], [str(path) for path in texts[:left]]))
            texts.clear()

    # Text files that follow each other are one source; order is kept, so that max_documents cuts the end.
    for path in paths:
        name = path.name.lower()
        if not name.endswith((*LINE_SUFFIXES, ".parquet")):
            texts.append(path)
            continue
        take_texts()
        if left is not None and left <= 0:
            break
        try:
            take(_open_table(path, left, scratch))
        except ValueError as error:
            problems.append(Problem(str(path), "no usable columns", str(error)))
        except (OSError, EOFError, zlib.error) as error:
            if is_disk_full(error):  # of the copy, which says nothing of the file
                raise
            problems.append(Problem(str(path), "unreadable file", str(error)))
    if left is None or left > 0:
        take_texts()
    return OpenedSource(rows, problems)


def _open_table(path: Path, max_rows: int | None, scratch: Path) -> Rows:
    name = path.name.lower()
    if name.endswith(".parquet"):
        return ArrowRows(load_parquet(path, scratch), str(path), max_rows)
    if name.endswith(".gz"):
        # A compressed file cannot be read from its middle.
        unpacked = scratch / f"{len(os.listdir(scratch))}-{path.stem}"
        with gzip.open(path) as packed, unpacked.open("wb") as file:
            shutil.copyfileobj(packed, file)
        return JsonLines(unpacked, str(path), max_rows)
    return JsonLines(path, str(path), max_rows)


def _open_shards(source: Source, max_documents: int | None, error: ValueError) -> OpenedSource:
    """The files of a saved dataset one by one, where it cannot be loaded as a whole; `error` says why not."""
    opened, left = OpenedSource([], []), max_documents
    for path, shard in saved_shards(source.spec, source.split):
        if left is not None and left <= 0:
            break
        if isinstance(shard, Exception):
            opened.problems.append(Problem(str(path), "unreadable file", str(shard)))
            continue
        opened.rows.append(ArrowRows(shard, str(path), left))
        left = None if left is None else left - len(shard)
    if not opened.problems:  # it is something else
        raise error
    return opened
