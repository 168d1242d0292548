"""Tokenised documents on disk: shards of tokens and one table of documents.

shard-00000.bin   tokens of whole documents, one after the other, little-endian uint16 or uint32
documents.npy     one record a document, in the order of the data (`RECORD`)
runs.npy          int64 (runs, 2): stretches of a document that carry loss
blocks.npy        uint32 (blocks,): CRC-32 of each block of the shards, shard by shard (`shards.py`)
meta.json         what it was made of, and CRC-32 of the three tables; written last
damaged           what is wrong with it, where that was seen
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
from .shards import BLOCK_BYTES, DAMAGE_FILE, BlockSums, ShardFile, file_sum

FORMAT = 2
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
        self._sums: list[BlockSums] = []
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
        data = batch.tokens.astype(self._dtype, copy=False).tobytes()
        self._file.write(data)
        self._sums[-1].add(data)
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
        sums = [total for shard in self._sums for total in shard.sums]
        tables = {
            "documents.npy": records[order],
            "runs.npy": np.concatenate(self._runs),
            "blocks.npy": np.array(sums, np.uint32),
        }
        described = {
            "format": FORMAT,
            "dtype": self._dtype.str,
            "shard_tokens": self._shard_tokens,
            "num_documents": len(records),
            "crc32": {name: self._save(name, table) for name, table in tables.items()},
            **meta,
        }
        with (self._folder / "meta.json").open("w", encoding="utf-8") as file:
            json.dump(described, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    def _save(self, name: str, table: np.ndarray) -> int:
        with (self._folder / name).open("wb") as file:
            np.save(file, table)
            file.flush()
            os.fsync(file.fileno())
        return file_sum(self._folder / name)

    def _next_shard(self) -> None:
        self._close()
        self._sums.append(BlockSums())
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
        """Opens a whole store: all sizes and the tables' sums are checked, and tokens once they are read.

        Raises:
            ValueError: The folder holds no store of this format, or what is in it is not what was written.
        """
        try:
            meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
            if meta["format"] != FORMAT:
                raise ValueError(f"it has format {meta['format']}, and this version writes {FORMAT}")
            problem = _problem(path, meta)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no token store that can be read ({error}); delete it.") from error
        if problem is not None:
            raise ValueError(f"{path} is damaged: {problem}; delete it to have it made anew.")
        return cls(path, meta, np.arange(meta["num_documents"]))

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
        """Tokens [start, stop) of document `i`, int64.

        Raises:
            DamagedTokensError: They are not on the disk as they were written.
        """
        record = self._records[self.chosen[i]]
        start, stop = self._bounds(record, start, stop)
        shard, offset = self._shards[record["shard"]], int(record["offset"])
        dtype = np.dtype(self.meta["dtype"])
        data = shard.read((offset + start) * dtype.itemsize, (offset + stop) * dtype.itemsize)
        return np.frombuffer(data, dtype).astype(np.int64)

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
        # Without the cached tables, which would be pickled as copies.
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
    def _shards(self) -> list[ShardFile]:
        sums, first, shards = np.load(self.path / "blocks.npy"), 0, []
        for name, size in _expected_sizes(self.meta):
            num_blocks = -(-size // BLOCK_BYTES)
            shards.append(ShardFile(self.path / name, size, sums[first : first + num_blocks]))
            first += num_blocks
        return shards


def _problem(path: Path, meta: dict[str, Any]) -> str | None:
    """What is wrong with a store of this format, as far as it shows without reading its tokens."""
    if (path / DAMAGE_FILE).exists():
        return (path / DAMAGE_FILE).read_text()
    for name, size in _expected_sizes(meta):
        there = (path / name).stat().st_size
        if there != size:
            return f"{name} has {there:,} bytes, and had {size:,}"
    for name, total in meta["crc32"].items():
        if file_sum(path / name) != total:
            return f"{name} is not what was written"
    return None


def _expected_sizes(meta: dict[str, Any]) -> list[tuple[str, int]]:
    width = np.dtype(meta["dtype"]).itemsize
    return [(f"shard-{i:05d}.bin", tokens * width) for i, tokens in enumerate(meta["shard_tokens"])]
