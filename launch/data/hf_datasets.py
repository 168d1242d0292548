"""What the library `datasets` loads for us: Parquet, saved datasets, folders of tables, and the hub's."""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .rows import KIND_COLUMNS, OPTIONAL_COLUMNS, JsonLines, Problem, columns_advice, kind_of_columns

if TYPE_CHECKING:
    import datasets


def load_parquet(path: Path, scratch: Path) -> datasets.Dataset:
    """The columns of a Parquet file that are used.

    Raises:
        ValueError: It has none.
        OSError: It cannot be read.
    """
    import datasets
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_metadata(path)
        columns = set(table.schema.to_arrow_schema().names)
        kind = kind_of_columns(columns)
        if kind is None:
            raise ValueError(columns_advice(columns))
        used = [name for name in KIND_COLUMNS[kind] + OPTIONAL_COLUMNS[kind] if name in columns]
        if not table.num_rows:  # which `datasets` takes for damage
            return datasets.Dataset.from_dict({name: [] for name in used})
        with _no_bars():
            return datasets.Dataset.from_parquet(str(path), cache_dir=str(scratch), columns=used)
    except (pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        if isinstance(error.__cause__, OSError):  # no room for the copy, perhaps
            raise error.__cause__ from error
        raise OSError(f"not a Parquet file that can be read: {error.__cause__ or error}") from error


def load_saved(spec: str, split: str) -> datasets.Dataset:
    """A split of a dataset that `datasets` has saved in a folder.

    Raises:
        ValueError: It cannot be loaded, or has no such split.
    """
    import datasets

    loaded = _loaded(spec, lambda: datasets.load_from_disk(str(Path(spec).expanduser())))
    return _one_split(loaded, spec, split)


def saved_shards(spec: str, split: str) -> Iterator[tuple[Path, datasets.Dataset | Exception]]:
    """The files of a saved dataset, each by itself, or why it cannot be read."""
    import datasets

    folder = Path(spec).expanduser()
    if (folder / "dataset_dict.json").exists():
        folder /= split
    try:
        named = json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
        paths = [folder / one["filename"] for one in named]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for path in paths:
        try:
            yield path, datasets.Dataset.from_file(str(path))
        except (OSError, ValueError) as error:
            yield path, error


def load_folder(spec: str, split: str, paths: Sequence[Path], scratch: Path) -> datasets.Dataset:
    """A split of a folder of tables, as `datasets` tells the splits by the files' names.

    Raises:
        ValueError: It cannot be loaded; names the files because of which.
    """
    import datasets

    folder = Path(spec).expanduser()
    try:
        loaded = _loaded(
            spec, lambda: datasets.load_dataset(str(folder), split=split, cache_dir=str(scratch))
        )
    except ValueError as error:
        bad = "".join(f"\n  {line}" for line in _bad_files(paths))
        if not bad:
            raise
        raise ValueError(
            f"data.source={spec!r}: not all of its files can be read:{bad}\nBring them back or take them "
            f"away; with files that are named by a pattern ({Path(spec, '*')}), data.on_error=skip leaves "
            "such files and rows out."
        ) from error
    return _one_split(loaded, spec, split)


def _bad_files(paths: Sequence[Path]) -> Iterator[str]:
    """Which tables cannot be read to their end, and why."""
    from pyarrow import parquet

    for path in paths:
        name = path.name.lower()
        try:
            if name.endswith(".parquet"):
                for _ in parquet.ParquetFile(path).iter_batches():
                    pass
            elif name.endswith(".gz"):
                with gzip.open(path) as file:
                    while file.read(1 << 24):
                        pass
            elif name.endswith((".jsonl", ".ndjson")):
                rows = JsonLines(path, str(path))
                read = rows.reader.read(rows.part(0, len(rows.sizes)))
                yield from [str(row) for _, row in read if isinstance(row, Problem)][:1]
        except (OSError, EOFError, ValueError, zlib.error) as error:
            yield f"{path}: {error}"


def load_hub(spec: str, split: str) -> datasets.Dataset:
    """A split of a dataset on the Hugging Face hub, `owner/name` or `owner/name:config`.

    Raises:
        ValueError: It cannot be loaded, or has no such split.
    """
    import datasets

    name, _, config = spec.partition(":")
    loaded = _loaded(spec, lambda: datasets.load_dataset(name, config or None, split=split))
    return _one_split(loaded, spec, split)


def _loaded(spec: str, load: Callable[[], Any]) -> Any:
    import datasets

    try:
        return load()
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"data.source={spec!r} cannot be loaded by `datasets`: {error} Check the name, data.split and "
            "your connection; files can also be named one by one or by a pattern (data/*.jsonl)."
        ) from error


def _one_split(loaded: Any, spec: str, split: str) -> datasets.Dataset:
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise ValueError(
            f"data.split={split!r} is not in data.source={spec!r}; it has {', '.join(sorted(loaded))}, "
            "so use one of these."
        )
    return loaded[split]


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Hides the progress bars of `datasets`, which would be one a file."""
    import datasets

    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
