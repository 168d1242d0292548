"""Files that are written aside, named once their bytes are on the disk, and known by size and checksums.

The sums are CRC-32 of each 64 MiB. What they guard against is chance (a bit that flipped, a page that never
arrived), not a person; a file that was changed by chance passes one time in four billion. They cost a fifth
of what a SHA-256 does, and those of single chunks let several processes, and threads, share a large file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

CHUNK_BYTES = 2**26
"""What one checksum is of; part of the format of a manifest."""
READ_BYTES = 2**20
"""At most this much is read at a time."""


class Writable(Protocol):
    """A file to be: its name, its size, and its bytes in order."""

    name: str

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        ...

    def chunks(self) -> Iterator[memoryview | bytes]:
        """All its bytes; each chunk is written before the next is asked for."""
        ...


@dataclass(frozen=True)
class BytesFile:
    """A small file that is in memory as a whole."""

    name: str
    data: bytes

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return len(self.data)

    def chunks(self) -> Iterator[bytes]:
        """All of it."""
        yield self.data


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its size, and the CRC-32 of each `CHUNK_BYTES` of it, as hexadecimal digits."""

    num_bytes: int
    checksums: tuple[str, ...]


class WriteError(OSError):
    """A file could not be written. The message says which, how large it is, and how much room there is."""

    def __init__(self, path: Path, num_bytes: int, error: OSError) -> None:
        reason = error.strerror or str(error)
        message = f"{path} ({readable(num_bytes)}) cannot be written: {reason}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message += f"; {readable(_free_bytes(path))} free on its disk"
        super().__init__(message)
        self.path = path
        self.errno = error.errno


class _Sums:
    """Adds up what passes by."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._done: list[str] = []
        self._crc = 0

    def add(self, data: memoryview) -> None:
        while len(data):
            part = data[: CHUNK_BYTES - self.num_bytes % CHUNK_BYTES]
            self._crc = zlib.crc32(part, self._crc)
            self.num_bytes += len(part)
            if self.num_bytes % CHUNK_BYTES == 0:
                self._done.append(f"{self._crc:08x}")
                self._crc = 0
            data = data[len(part) :]

    def record(self) -> FileRecord:
        rest = [f"{self._crc:08x}"] if self.num_bytes % CHUNK_BYTES else []
        return FileRecord(self.num_bytes, (*self._done, *rest))


def write_file(path: Path, file: Writable) -> FileRecord:
    """Write a file; it appears whole or not at all, and only once its bytes are on the disk.

    Args:
        path: Where it is to be; its folder is there.
        file: What is written.

    Returns:
        Size and checksums, taken as the bytes go by.

    Raises:
        WriteError: The disk is full, or will not be written; nothing is left of the file.
    """
    sums, draft = _Sums(), path.with_name(f".{path.name}.partial")
    try:
        with draft.open("wb", buffering=0) as raw:
            for chunk in file.chunks():
                data = memoryview(chunk).cast("B")
                _write_all(raw.fileno(), data)
                sums.add(data)
                # What they lie in may be large, and goes before the next is made.
                del chunk, data
            os.fsync(raw.fileno())
        os.replace(draft, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise WriteError(path, file.num_bytes, error) from error
    return sums.record()


def _write_all(descriptor: int, data: memoryview) -> None:
    while len(data):
        data = data[os.write(descriptor, data) :]


def record_of(path: Path) -> FileRecord:
    """Size and checksums of a file that another library wrote, which is brought to the disk too."""
    sums = _Sums()
    with path.open("rb", buffering=0) as raw:
        buffer = memoryview(bytearray(READ_BYTES))
        while count := raw.readinto(buffer):
            sums.add(buffer[:count])
        os.fsync(raw.fileno())
    return sums.record()


def chunk_problem(path: Path, record: FileRecord, index: int) -> str | None:
    """What is wrong with one chunk of a file, in words; None where its checksum is right."""
    try:
        with path.open("rb", buffering=0) as raw:
            raw.seek(index * CHUNK_BYTES)
            crc, left, buffer = 0, CHUNK_BYTES, memoryview(bytearray(min(CHUNK_BYTES, READ_BYTES)))
            while left and (count := raw.readinto(buffer[: min(left, len(buffer))])):
                crc = zlib.crc32(buffer[:count], crc)
                left -= count
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    if f"{crc:08x}" == record.checksums[index]:
        return None
    first = index * CHUNK_BYTES
    last = min(first + CHUNK_BYTES, record.num_bytes) - 1
    return f"has other bytes than were written (checksum of bytes {first:,} to {last:,})"


def sync_folders(folders: Iterable[Path]) -> None:
    """Bring names to the disk: a power cut would else leave files that no folder knows."""
    for folder in folders:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some network file systems know no such thing, and keep names safe by themselves.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


def readable(num_bytes: int) -> str:
    """Bytes for a message, in decimal units as disks are sold: `12.3 GB`, `450 MB`, `812 bytes`."""
    for factor, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if num_bytes >= factor:
            value = num_bytes / factor
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{num_bytes:,} bytes"


def _free_bytes(path: Path) -> int:
    try:
        return shutil.disk_usage(path.parent).free
    except OSError:
        return 0
