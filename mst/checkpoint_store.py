"""Checkpoints in host memory: copied out while the GPU computes, and back in time for backward.

Copies run on two streams of their own, one for each direction of the bus. All waiting is done by the GPU, on
events; the host never stops. Device memory is not marked with `record_stream`: the allocator would keep it
until the *host* sees the copy done, and a host that runs layers ahead of the GPU would pile up memory. Here
the compute stream waits for the last copy before memory goes back, so that memory is free in stream order.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .pinned_slab import Blocks, PinnedSlab

MAX_CHUNKS = 16
"""Copies that a fetched tensor comes in: the first rows are there after a sixteenth of the time."""


class CheckpointStore:
    """Keeps tensors in the host memory of a slab and brings them back.

    Every call belongs to the compute stream, the one that is current when it is made: tensors kept were
    allocated and last written there, and tensors fetched are used there.

    Args:
        slab: Whose memory is used, and whose device the tensors are on. On a CPU copies are made at once.
    """

    def __init__(self, slab: PinnedSlab) -> None:
        self.slab = slab
        self._copier: Any = CudaCopier(slab.device) if slab.device.type == "cuda" else CpuCopier()

    def keep(self, tensor: Tensor, previous: Kept | None = None) -> Kept:
        """Begin to copy a tensor to the host and return at once.

        The tensor's memory is held until `Kept.settle`, or until the layer above keeps its own. It must
        not be written before one of these.

        Args:
            tensor: `(rows, ...)`, contiguous, any dtype.
            previous: What the layer below kept, of the same shape: backward wants it next after this one.
                It is let go of (`Kept.settle`); the caller keeps it alive.

        Raises:
            ValueError: Another device or layout, or `previous` is of another shape or dtype.
            HostMemoryError: The host has no more memory.
        """
        self._check(tensor, previous)
        if previous is not None:
            previous.settle()
        tensor = tensor.detach()
        rows = _HostRows(tensor, self.slab.take(tensor.nbytes), previous)
        source = _DeviceMemory(tensor, self._copier)
        written = self._copier.mark()
        pairs = list(rows.pairs(source.bytes, 0, rows.num_rows, to_host=True))
        rows.stored = self._copier.copy("to_host", pairs, [written, *rows.blocks.after])
        rows.blocks.copied_by(rows.stored)
        source.copied_by(rows.stored)
        return Kept(rows, None if rows.stored is None else source)

    def fetch(self, kept: Kept) -> Fetched:
        """Begin to bring a tensor back and return at once.

        If the rows of the layer above were released, this is their memory and most rows are on their way
        or there; the `Fetched` of that layer is spent with this call. Else the memory is new.
        """
        kept.settle()
        fetched, kept._incoming = kept._incoming, None
        if fetched is None:
            rows = kept._rows
            tensor = self._copier.empty(rows.shape, rows.dtype)
            fetched = Fetched(rows, _DeviceMemory(tensor, self._copier), self._copier)
        fetched._hand_over()
        return fetched

    def _check(self, tensor: Tensor, previous: Kept | None) -> None:
        if tensor.device != self.slab.device:
            raise ValueError(f"A tensor on {tensor.device} cannot go to a slab for {self.slab.device}.")
        if tensor.dim() == 0 or not tensor.is_contiguous():
            raise ValueError(
                f"A checkpoint of shape {tuple(tensor.shape)} and strides {tensor.stride()} must have rows "
                "and be contiguous; call .contiguous() first."
            )
        if previous is not None and (previous.shape, previous.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(
                f"previous is {tuple(previous.shape)} {previous.dtype}, the tensor {tuple(tensor.shape)} "
                f"{tensor.dtype}: they must agree, for one comes back into the other's memory."
            )


class Kept:
    """A tensor in host memory, until this object dies. Made by `CheckpointStore.keep`.

    Attributes:
        shape: Of the tensor.
        dtype: Of the tensor.
    """

    def __init__(self, rows: _HostRows, source: _DeviceMemory | None) -> None:
        self.shape, self.dtype = rows.shape, rows.dtype
        self._rows = rows
        self._source = source
        self._incoming: Fetched | None = None  # being filled where the layer above has released its rows

    @property
    def previous(self) -> Kept | None:
        """What the layer below kept, while it lives."""
        return self._rows.previous()

    def settle(self) -> None:
        """Let the device tensor go: what is queued on the compute stream from now on may overwrite it.

        The compute stream waits for the copy, so call it late: at the end of the layer's forward.
        """
        if self._source is not None:
            self._source.await_copies()
            self._source = None


class Fetched:
    """A tensor on its way back to the device. Made by `CheckpointStore.fetch`."""

    def __init__(self, rows: _HostRows, memory: _DeviceMemory, copier: Any) -> None:
        self._rows = rows
        self._memory = memory
        self._copier = copier
        self._turn = memory.turn  # changes as the memory is handed on
        self._arrivals: list[tuple[int, Any]] = []  # rows [0, first) are there after second
        self._filled = 0
        self._released = 0
        self._next: Any = None  # weak reference to the Fetched that refills the rows released

    @property
    def tensor(self) -> Tensor:
        """The device tensor; rows that were not waited for, or were released, hold anything.

        Raises:
            RuntimeError: The memory belongs to the layer below by now.
        """
        self._require_own()
        return self._memory.tensor

    def wait(self, stop: int) -> None:
        """Make the compute stream wait until rows [0, stop) are there.

        Raises:
            ValueError: There are not so many rows.
            RuntimeError: The memory belongs to the layer below by now.
        """
        self._require_own()
        if not 0 <= stop <= self._rows.num_rows:
            raise ValueError(f"stop={stop} must be from 0 to the {self._rows.num_rows} rows there are.")
        if stop > 0:
            self._copier.wait(next(event for filled, event in self._arrivals if filled >= stop))

    def whole(self) -> Tensor:
        """The tensor, with the compute stream waiting for all of it."""
        self.wait(self._rows.num_rows)
        return self.tensor

    def release(self, start: int, stop: int) -> None:
        """Say that the last use of rows [start, stop) is queued: the layer below refills them.

        Ranges follow one another from row 0 upward. Does nothing if no layer below waits for its own.

        Raises:
            ValueError: The range does not begin where the last ended, or there are not so many rows.
            RuntimeError: The memory belongs to the layer below by now.
        """
        self._require_own()
        if start != self._released or not start <= stop <= self._rows.num_rows:
            raise ValueError(
                f"Rows {start} to {stop} cannot be released: {self._released} of {self._rows.num_rows} rows "
                "are, and ranges must follow one another."
            )
        self._released = stop
        if stop == start:
            return
        if start == 0:
            self._begin_next()
        refilling = None if self._next is None else self._next()
        if refilling is not None:
            refilling._fill(stop, self._copier.mark())

    def _begin_next(self) -> None:
        below = self._rows.previous()
        # A second backward through this layer alone finds the one below filled already.
        if below is not None and below._incoming is None:
            below._incoming = Fetched(below._rows, self._memory, self._copier)
            self._next = weakref.ref(below._incoming)

    def _hand_over(self) -> None:
        """Take the memory, whoever had it, and bring what rows are missing."""
        self._memory.turn += 1
        self._turn = self._memory.turn
        num_rows = self._rows.num_rows
        if self._filled < num_rows:
            used = self._copier.mark()
            chunk = -(-num_rows // MAX_CHUNKS)
            for stop in range(min(self._filled + chunk, num_rows), num_rows + chunk, chunk):
                self._fill(min(stop, num_rows), used)

    def _fill(self, stop: int, used: Any) -> None:
        """Copy rows up to `stop`, once the memory's last use, before the event `used`, is over."""
        rows = self._rows
        pairs = list(rows.pairs(self._memory.bytes, self._filled, stop, to_host=False))
        arrived = self._copier.copy("to_device", pairs, [used, rows.stored])
        rows.blocks.copied_by(arrived)
        self._memory.copied_by(arrived)
        self._arrivals.append((stop, arrived))
        self._filled = stop

    def _require_own(self) -> None:
        if self._turn != self._memory.turn:
            raise RuntimeError("This checkpoint's memory was handed to the layer below; fetch it again.")


class _HostRows:
    """Rows in blocks of host memory; apart from `Kept`, so that no reference runs in a circle."""

    def __init__(self, tensor: Tensor, blocks: Blocks, previous: Kept | None) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.num_rows = tensor.shape[0]
        self.blocks = blocks
        self.stored: Any = None  # event: the copy to the host is over
        self._row_bytes = tensor.nbytes // max(1, self.num_rows)
        self._previous = None if previous is None else weakref.ref(previous)

    def previous(self) -> Kept | None:
        return None if self._previous is None else self._previous()

    def pairs(
        self, device: Tensor, start: int, stop: int, *, to_host: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(destination, source) of the copies that move rows [start, stop), cut where pieces end."""
        first, last = start * self._row_bytes, stop * self._row_bytes
        offset = 0
        for piece in self.blocks.pieces:
            low, high = max(first, offset), min(last, offset + piece.numel())
            if low < high:
                host, there = piece[low - offset : high - offset], device[low:high]
                yield (host, there) if to_host else (there, host)
            offset += piece.numel()


class _DeviceMemory:
    """Device memory that copies use too; the compute stream waits for them before the memory is free."""

    def __init__(self, tensor: Tensor, copier: Any) -> None:
        self.tensor = tensor
        # Not through `.detach()`, which shares the version counter: autograd would take a row that is
        # refilled after its last use for a saved tensor changed before its first.
        self.bytes = tensor.data.reshape(-1).view(torch.uint8)
        self.turn = 0
        self._last_copy: list[Any] = []
        stream = copier.compute_stream()
        self._finalizer = weakref.finalize(self, _wait_for_last, copier, stream, self._last_copy)
        self._finalizer.atexit = False

    def copied_by(self, event: Any) -> None:
        """A copy uses this memory until `event`; copies of one memory follow one another."""
        self._last_copy[:] = [event]

    def await_copies(self) -> None:
        """Make the compute stream wait for the last copy; no more may follow."""
        self._finalizer()


def _wait_for_last(copier: Any, stream: Any, last_copy: list[Any]) -> None:
    for event in last_copy:
        copier.wait(event, stream)


class CudaCopier:
    """Copies on streams of their own. Every method is about `device`, whichever is current."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams = {"to_host": torch.cuda.Stream(device), "to_device": torch.cuda.Stream(device)}

    def compute_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Memory of the compute stream; what it held before may still be in use until a `mark` from now."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def mark(self) -> torch.cuda.Event:
        """An event behind all that is queued on the compute stream."""
        return self.compute_stream().record_event()

    def copy(
        self, direction: str, pairs: Iterable[tuple[Tensor, Tensor]], after: Iterable[torch.cuda.Event | None]
    ) -> torch.cuda.Event:
        """Queue copies behind the events `after`; the event behind them."""
        stream = self._streams[direction]
        for event in after:
            if event is not None:
                stream.wait_event(event)
        with torch.cuda.stream(stream):
            for destination, source in pairs:
                destination.copy_(source, non_blocking=True)
        return stream.record_event()

    def wait(self, event: torch.cuda.Event, stream: torch.cuda.Stream | None = None) -> None:
        """Make a stream, else the compute stream, wait for an event."""
        (stream or self.compute_stream()).wait_event(event)


class CpuCopier:
    """The same on a CPU, where everything is over when a call returns: no streams, no events."""

    def compute_stream(self) -> None:
        return None

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def mark(self) -> None:
        return None

    def copy(self, direction: str, pairs: Iterable[tuple[Tensor, Tensor]], after: Iterable[None]) -> None:
        for destination, source in pairs:
            destination.copy_(source)

    def wait(self, event: None, stream: None = None) -> None:
        return None
