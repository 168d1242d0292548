"""Files written while training goes on, from a copy of what they are to hold."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..distributed.checked_file import FileRecord, Writable, write_file
from ..distributed.tensor_file import TensorFile, flat_bytes
from ..mst.pinned_memory import HostMemoryError
from ..mst.pinned_slab import Blocks, PinnedSlab
from ..mst.placement import available_host_bytes, gib

logger = logging.getLogger(__name__)


class FileWriter:
    """A rank's files of a checkpoint, written at once or by a thread.

    Attributes:
        records: Sizes and checksums of what is written, by path in the checkpoint.
        error: What stopped the writing; None once everything is written.
    """

    def __init__(
        self, draft: Path, files: Sequence[tuple[str, Writable]], copies: Blocks | None = None
    ) -> None:
        """`files` are pairs of a folder in the checkpoint and a file; `copies` is what their bytes lie in."""
        self.records: dict[str, FileRecord] = {}
        self.error: Exception | None = RuntimeError("its files were not all written")
        self._draft = draft
        self._files = files
        self._copies = copies
        self._stopped = threading.Event()
        # A daemon: a process that dies must not wait for a checkpoint that nobody would complete.
        self._thread = threading.Thread(target=self.write, name="longseq-checkpoint", daemon=True)

    def start(self) -> None:
        """Write in a thread."""
        self._thread.start()

    def write(self) -> None:
        """Write here and now; what goes wrong is kept in `error`."""
        try:
            for folder, file in self._files:
                path = self._draft / folder / file.name
                path.parent.mkdir(parents=True, exist_ok=True)
                copied = file if self._copies is None else _Stoppable(file, self._stopped)
                self.records[f"{folder}/{file.name}"] = write_file(path, copied)
            self.error = None
        except Exception as error:  # raised by whoever waits for the files
            self.error = error
        finally:
            self._files = ()
            if self._copies is not None:
                self._copies.release()

    @property
    def is_writing(self) -> bool:
        """Whether the thread is still at it."""
        return self._thread.is_alive()

    def wait(self) -> None:
        """Until the thread is done, if there is one."""
        if self._thread.ident is not None:
            self._thread.join()

    def stop(self) -> None:
        """Have the thread leave the rest unwritten, and wait for it."""
        self._stopped.set()
        self.wait()


@dataclass(frozen=True)
class _Stoppable:
    """A file whose writing may be given up."""

    file: Writable
    stopped: threading.Event

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def num_bytes(self) -> int:
        return self.file.num_bytes

    def chunks(self) -> Iterator[memoryview | bytes]:
        for chunk in self.file.chunks():
            if self.stopped.is_set():
                raise RuntimeError("the run ended")
            yield chunk


@dataclass(frozen=True)
class CopiedFile:
    """A file of tensors as they were when it was copied."""

    name: str
    num_bytes: int
    head: bytes
    body: list[torch.Tensor]

    def chunks(self) -> Iterator[memoryview | bytes]:
        """All its bytes."""
        yield self.head
        for piece in self.body:
            yield piece.numpy().data


class HostCopies:
    """Host memory, kept from save to save and pinned where there is a GPU, for copies of a rank's state."""

    def __init__(self) -> None:
        self._slab: PinnedSlab | None = None
        self._has_said = False

    def has_room(self, files: Sequence[Writable]) -> bool:
        """Whether the host has, for copies of these; to be asked before any rank takes its own.

        That it has not is said once.
        """
        needed, free = sum(map(_body_bytes, files)), available_host_bytes()
        if needed - (self._slab.free_bytes if self._slab else 0) <= free:
            return True
        self._say(f"a copy of its {gib(needed)} does not fit the {gib(free)} of host memory that is free")
        return False

    def take(self, files: Sequence[Writable]) -> tuple[list[Writable], Blocks | None] | None:
        """Copy what is saved, and wait for the copies.

        Returns:
            The same files over the copies, and the memory to release once they are written; None where the
            host does not give it, which is said once.
        """
        needed = sum(map(_body_bytes, files))
        if not needed:
            return list(files), None
        if self._slab is None:
            self._slab = PinnedSlab("cuda" if torch.cuda.is_available() else None)
        try:
            blocks = self._slab.take(needed)
        except HostMemoryError as error:  # its message is of what else takes such memory
            why = f": {error.__cause__}" if error.__cause__ else ""
            self._say(f"a copy of its {gib(needed)} does not fit the host memory that is free{why}")
            return None
        try:
            return _copied(files, blocks), blocks
        except BaseException:
            blocks.release()
            raise

    def _say(self, why: str) -> None:
        if not self._has_said:
            logger.warning("checkpoint.background: training waits while a checkpoint is written: %s.", why)
        self._has_said = True


def _body_bytes(file: Writable) -> int:
    return file.num_bytes - len(file.head) if isinstance(file, TensorFile) else 0


def _copied(files: Sequence[Writable], blocks: Blocks) -> list[Writable]:
    room = _Room(blocks)
    copied: list[Writable] = []
    for file in files:
        if not isinstance(file, TensorFile):
            copied.append(file)
            continue
        body: list[torch.Tensor] = []
        for source in file.sources:
            body += room.keep(flat_bytes(source.read()))
        copied.append(CopiedFile(file.name, file.num_bytes, file.head, body))
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # the next step may write over what is copied, on any stream
    return copied


class _Room:
    """The bytes of `Blocks`, given away from the first to the last."""

    def __init__(self, blocks: Blocks) -> None:
        self._left = list(blocks.pieces)

    def keep(self, data: torch.Tensor) -> list[torch.Tensor]:
        """Copy bytes; where they are now."""
        kept = []
        while data.numel():
            piece, rest = self._left[0][: data.numel()], self._left[0][data.numel() :]
            piece.copy_(data[: piece.numel()], non_blocking=True)
            kept.append(piece)
            data = data[piece.numel() :]
            self._left[:1] = [rest] if rest.numel() else []
        return kept
