"""Files of tokens that are known to be what was written: each block is checked when it is first read.

A memory map would end the process, without a word, where a file has become shorter or its disk fails.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..exit_status import CRASHED

BLOCK_BYTES = 1 << 18
"""What one CRC-32 is of: little beside a sequence, so that a short document costs no more than it must."""
DAMAGE_FILE = "damaged"
"""In the folder of a store that was found damaged: what is wrong; it is made anew when it is next wanted."""


class DamagedTokensError(RuntimeError):
    """Tokens in the cache are not what was written there; the same command makes them anew and goes on."""

    exit_status = CRASHED


class BlockSums:
    """The CRC-32 of each block of what is added; the last block may be shorter."""

    def __init__(self) -> None:
        self.sums: list[int] = []
        self._filled = BLOCK_BYTES

    def add(self, data: bytes) -> None:
        """The next bytes of the file."""
        view = memoryview(data)
        while view:
            if self._filled == BLOCK_BYTES:
                self.sums.append(0)
                self._filled = 0
            part = view[: BLOCK_BYTES - self._filled]
            self.sums[-1] = zlib.crc32(part, self.sums[-1])
            self._filled += len(part)
            view = view[len(part) :]


@dataclass
class ShardFile:
    """A file that is read in stretches, and opened for each: a folder may be removed meanwhile.

    Attributes:
        path: The file.
        num_bytes: Its size.
        sums: CRC-32 of its blocks, uint32 (blocks,).
    """

    path: Path
    num_bytes: int
    sums: np.ndarray
    _is_checked: np.ndarray = field(init=False)
    _folder_number: int = field(init=False)

    def __post_init__(self) -> None:
        self._is_checked = np.zeros(len(self.sums), bool)
        self._folder_number = self.path.parent.stat().st_ino

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop).

        Raises:
            DamagedTokensError: They cannot be read, or are not those that were written.
        """
        first, last = start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)
        if self._is_checked[first:last].all():
            return self._read(start, stop)
        begin = first * BLOCK_BYTES
        data = self._read(begin, min(last * BLOCK_BYTES, self.num_bytes))
        view = memoryview(data)
        for block in range(first, last):
            part = view[block * BLOCK_BYTES - begin :][:BLOCK_BYTES]
            if zlib.crc32(part) != self.sums[block]:
                at = block * BLOCK_BYTES
                self._damaged(f"bytes {at:,} to {at + len(part):,} are not those that were written")
        self._is_checked[first:last] = True
        return data[start - begin : stop - begin]

    def _read(self, start: int, stop: int) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                data = file.read(stop - start)
                there = os.fstat(file.fileno()).st_size
        except OSError as error:
            self._damaged(f"it cannot be read: {error.strerror or error}", error)
        if len(data) != stop - start:
            self._damaged(f"it has {there:,} bytes, and had {self.num_bytes:,}")
        return data

    def _damaged(self, what: str, error: OSError | None = None) -> None:
        text = f"{self.path}: {what}"
        with contextlib.suppress(OSError):
            # Another run may have made them anew meanwhile, with the documents in another order: what does
            # not fit this run then is good, and would else be made anew for ever, by the two in turn.
            if self.path.parent.stat().st_ino == self._folder_number:
                mark_damaged(self.path.parent, text)
        raise DamagedTokensError(
            f"{text}. The tokens are a copy of the data: the same command makes them anew, and goes on."
        ) from error


def mark_damaged(folder: Path, text: str) -> None:
    """Have a store made anew when it is next wanted."""
    draft = folder / f".{DAMAGE_FILE}.{os.getpid()}"
    draft.write_text(text)
    draft.replace(folder / DAMAGE_FILE)


def file_sum(path: Path) -> int:
    """CRC-32 of a whole file."""
    total = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            total = zlib.crc32(block, total)
    return total
