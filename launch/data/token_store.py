"""Tokenised documents on disk: memory-mapped shards of tokens and one table of documents.

shard-00000.bin   tokens of whole documents, one after the other, little-endian uint16 or uint32
documents.npy     one record a document, in the order of the data (`RECORD`)
runs.npy          int64 (runs, 2): stretches of a document that carry loss
meta.json         what it was made of; written last
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .encode import EncodedBatch
from .rows import row_name

FORMAT = 1
SHARD_BYTES = 1 << 29

RECORD = np.dtype(
    [
        ("source", "<i4"),  # index into meta["sources"]
        ("row", "<i8"),  # as `row_name` takes it
        ("shard", "<i4"),
        ("offset", "<i8"),  # in tokens
        ("length", "<i8"),  # in tokens
        ("first_run", "<i8"),
        ("num_runs", "<i8"),
        ("digest", "<u8"),  # equal documents have equal digests
    ]
)


class StoreWriter:
    """Writes a store into an empty folder; documents may come in any order."""

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        self._folder = folder
        self._dtype = dtype.newbyteorder("<")
        self._records = [np.empty(0, RECORD)]
        self._runs = [np.empty((0, 2), np.int64)]
        self._num_runs = 0
        self._shard_tokens: list[int] = []
        self._file: BinaryIO | None = None

    def add(self, source: int, batch: EncodedBatch) -> None:
        """Appends documents of the source with index `source`; they stay in one shard."""
        if self._file is None or (
            (self._shard_tokens[-1] + len(batch.tokens)) * self._dtype.itemsize > SHARD_BYTES
        ):
            self._next_shard()
        records = np.empty(len(batch.rows), RECORD)
        records["source"] = source
        records["row"] = batch.rows
        records["shard"] = len(self._shard_tokens) - 1
        records["offset"] = self._shard_tokens[-1] + np.cumsum(batch.lengths) - batch.lengths
        records["length"] = batch.lengths
        records["first_run"] = self._num_runs + np.cumsum(batch.num_runs) - batch.num_runs
        records["num_runs"] = batch.num_runs
        records["digest"] = batch.digests
        self._file.write(batch.tokens.astype(self._dtype, copy=False).tobytes())
        self._shard_tokens[-1] += len(batch.tokens)
        self._num_runs += len(batch.runs)
        self._records.append(records)
        self._runs.append(batch.runs)

    def finish(self, meta: dict[str, Any]) -> None:
        """Makes what was written a whole store.

        Args:
            meta: Kept in meta.json; `sources` gives each source's `style` and `names`.
        """
        self._close()
        records = np.concatenate(self._records)
        order = np.lexsort((records["row"], records["source"]))
        np.save(self._folder / "documents.npy", records[order])
        np.save(self._folder / "runs.npy", np.concatenate(self._runs))
        described = {
            "format": FORMAT,
            "dtype": self._dtype.str,
            "shard_tokens": self._shard_tokens,
            "num_documents": len(records),
            **meta,
        }
        with (self._folder / "meta.json").open("w", encoding="utf-8") as file:
            json.dump(described, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    def _next_shard(self) -> None:
        self._close()
        self._file = (self._folder / f"shard-{len(self._shard_tokens):05d}.bin").open("wb")
        self._shard_tokens.append(0)

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Documents as tokens, read from disk as they are asked for.

    Attributes:
        path: Folder of the store.
        meta: Its meta.json.
        chosen: The documents of the store that are seen here, by their index in it, int64 (documents,).
    """

    path: Path
    meta: dict[str, Any]
    chosen: np.ndarray

    @classmethod
    def open(cls, path: Path) -> TokenStore:
        """Opens a whole store.

        Raises:
            ValueError: The folder holds no store of this format, or files of it are cut short.
        """
        try:
            meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
            whole = meta["format"] == FORMAT and all(
                (path / name).stat().st_size == size for name, size in _expected_sizes(meta)
            )
            records = np.load(path / "documents.npy", mmap_mode="r")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no token store that can be read ({error}); delete it.") from error
        if not whole or len(records) != meta["num_documents"]:
            raise ValueError(f"{path} is damaged or of another version; delete it to have it made anew.")
        return cls(path, meta, np.arange(len(records)))

    def select(self, documents: np.ndarray) -> TokenStore:
        """The same store, of which only some documents are seen."""
        return TokenStore(self.path, self.meta, self.chosen[documents])

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.chosen)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 (documents,)."""
        return self._column("length")

    @property
    def digests(self) -> np.ndarray:
        """A hash of each document's tokens, uint64 (documents,)."""
        return self._column("digest")

    @cached_property
    def loss_lengths(self) -> np.ndarray:
        """Tokens of each document that carry loss, int64 (documents,)."""
        totals = np.concatenate([[0], np.cumsum(self._runs[:, 1] - self._runs[:, 0])])
        first = self._column("first_run")
        return totals[first + self._column("num_runs")] - totals[first]

    def tokens(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of document `i`, int64."""
        record = self._records[self.chosen[i]]
        start, stop = self._bounds(record, start, stop)
        shard, offset = self._shards[record["shard"]], int(record["offset"])
        return shard[offset + start : offset + stop].astype(np.int64)

    def loss_mask(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Which of the tokens [start, stop) of document `i` carry loss, bool."""
        record = self._records[self.chosen[i]]
        start, stop = self._bounds(record, start, stop)
        first = int(record["first_run"])
        mask = np.zeros(stop - start, bool)
        for begin, end in self._runs[first : first + int(record["num_runs"])].tolist():
            mask[max(begin - start, 0) : max(end - start, 0)] = True
        return mask

    def name(self, i: int) -> str:
        """Where document `i` was read: file and row."""
        record = self._records[self.chosen[i]]
        source = self.meta["sources"][record["source"]]
        return row_name(source["style"], source["names"], int(record["row"]))

    def __getstate__(self) -> dict[str, Any]:
        # Without the cached memory maps, which would be pickled as copies of the whole data.
        return {"path": self.path, "meta": self.meta, "chosen": self.chosen}

    def _bounds(self, record: np.void, start: int, stop: int | None) -> tuple[int, int]:
        length = int(record["length"])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise IndexError(f"tokens {start} to {stop} of a document of {length}")
        return start, stop

    def _column(self, name: str) -> np.ndarray:
        return np.ascontiguousarray(self._records[name][self.chosen])

    @cached_property
    def _records(self) -> np.ndarray:
        return np.load(self.path / "documents.npy", mmap_mode="r")

    @cached_property
    def _runs(self) -> np.ndarray:
        return np.load(self.path / "runs.npy", mmap_mode="r")

    @cached_property
    def _shards(self) -> list[np.ndarray]:
        dtype = np.dtype(self.meta["dtype"])
        names = [name for name, _ in _expected_sizes(self.meta)]
        return [np.memmap(self.path / name, dtype, mode="r") for name in names]


def _expected_sizes(meta: dict[str, Any]) -> list[tuple[str, int]]:
    width = np.dtype(meta["dtype"]).itemsize
    return [(f"shard-{i:05d}.bin", tokens * width) for i, tokens in enumerate(meta["shard_tokens"])]
