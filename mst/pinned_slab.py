"""Host memory for checkpoints: pinned once, in the background, and lent by the byte.

A GPU copies beside its computing only to and from page-locked ("pinned") memory, and PyTorch's allocator of
it rounds every tensor up to a power of two. Here blocks are pinned once and stay; tensors are striped over
them, in extents of whole pages, so that a warm step allocates nothing and wastes less than a page a tensor.
"""

from __future__ import annotations

import weakref
from bisect import insort
from collections import deque
from typing import Any

import torch

from .pinned_memory import PAGE_BYTES, PinnedMemory

BLOCK_BYTES = 64 * 2**20
"""Memory that is touched and pinned at once: some 30 ms of work, so the first blocks are there early."""

Extent = tuple[int, int]
"""Bytes [start, stop) of the slab, counted through its blocks."""


class Blocks:
    """Bytes of a slab, the holder's until it releases them or dies.

    Attributes:
        pieces: uint8 views of host memory; one after the other they are the bytes asked for.
        after: Events of copies that still use these bytes for the holder before: a stream that is to write
            them waits for these first. Only then may the host overtake the GPU by a whole step.
    """

    def __init__(self, slab: PinnedSlab, extents: list[Extent], num_bytes: int, after: list[Any]) -> None:
        self.num_bytes = num_bytes
        self.after = tuple(after)
        self.pieces = tuple(slab._memory.views(extents, num_bytes))
        self._last_copy: list[Any] = list(after)
        token = object()
        slab._memory.holders[token] = None  # the memory stays pinned, even if the slab itself is dropped
        self._finalizer = weakref.finalize(
            self, _give_back, slab._memory, slab._returned, token, extents, self._last_copy
        )
        self._finalizer.atexit = False

    def copied_by(self, event: Any) -> None:
        """Say that a copy uses these bytes until `event`, which comes after every earlier copy's event."""
        if event is not None:
            self._last_copy[:] = [event]

    def release(self) -> None:
        """Give the bytes back; copies in flight may still finish. Twice does no harm."""
        self.pieces = ()
        self._finalizer()


class PinnedSlab:
    """Host memory in pinned blocks, which grows when it is empty and never shrinks before `close`.

    Args:
        device: The GPU whose copies use it. None or a CPU: memory that is not pinned.
        block_bytes: Bytes of a block, whole pages.

    Raises:
        ValueError: `block_bytes` is not a positive multiple of 4,096.
    """

    def __init__(self, device: torch.device | str | None = None, block_bytes: int = BLOCK_BYTES) -> None:
        if block_bytes < PAGE_BYTES or block_bytes % PAGE_BYTES:
            raise ValueError(f"block_bytes={block_bytes} must be a positive multiple of {PAGE_BYTES}.")
        self.device = torch.device("cpu" if device is None else device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._memory = PinnedMemory(self.device, block_bytes)
        self._free: list[Extent] = []  # sorted, neighbours merged
        self._in_flight: list[tuple[list[Extent], list[Any]]] = []  # oldest first, with the copies' events
        # Filled by finalizers, which may run inside any line of any thread: no lock, only atomic appends.
        self._returned: deque[tuple[list[Extent], list[Any]]] = deque()
        self._num_blocks = 0  # of the memory's, those that are shared out here
        weakref.finalize(self, self._memory.let_go).atexit = False

    @property
    def pinned(self) -> bool:
        """Whether the memory is page-locked: for a GPU always, else never."""
        return self._memory.pins

    @property
    def total_bytes(self) -> int:
        """Bytes of the blocks that are ready."""
        return len(self._memory.blocks) * self._memory.block_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes that nobody holds, those among them with a copy in flight too."""
        with self._memory.changed:
            self._collect()
            in_flight = sum(_size(extents) for extents, _ in self._in_flight)
            return _size(self._free) + in_flight

    def reserve(self, num_bytes: int) -> None:
        """Begin to make blocks for `num_bytes` in all, in the background; returns at once.

        Raises:
            HostMemoryError: The host has not that much.
            ValueError: The slab is closed.
        """
        self._memory.order(-(-num_bytes // self._memory.block_bytes), num_bytes)

    def take(self, num_bytes: int) -> Blocks:
        """Bytes to write to; waits only where a block is still being pinned.

        Raises:
            HostMemoryError: The slab is empty and the host has no more memory, or will not pin it.
            ValueError: The slab is closed.
        """
        wanted = -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
        memory = self._memory
        with memory.changed:
            memory.require_open()
            while True:
                self._collect()
                short = wanted - _size(self._free)
                if short <= sum(_size(extents) for extents, _ in self._in_flight):
                    break
                memory.await_block(self._num_blocks + -(-short // memory.block_bytes), num_bytes)
            taken, self._free = _carve(self._free, wanted)
            after: list[Any] = []
            while _size(taken) < wanted:
                extents, events = self._in_flight.pop(0)
                some, rest = _carve(extents, wanted - _size(taken))
                taken += some
                after += events
                if rest:
                    self._in_flight.insert(0, (rest, events))
            return Blocks(self, taken, num_bytes, after)

    def close(self) -> None:
        """Unpin the memory, at once or with the last holder of it; nothing can be taken afterwards.

        Raises:
            RuntimeError: CUDA would not let a block go.
        """
        failures = self._memory.close()
        if failures:
            raise RuntimeError(f"{len(failures)} blocks of host memory could not be unpinned: {failures[0]}")

    def _collect(self) -> None:
        """Take in new blocks and what holders gave back, free once no copy uses it. Under the lock."""
        ready = max(len(self._memory.blocks), self._num_blocks)  # none are left of a closed slab
        for index in range(self._num_blocks, ready):
            start = index * self._memory.block_bytes
            _add_free(self._free, (start, start + self._memory.block_bytes))
        self._num_blocks = ready
        while self._returned:
            self._in_flight.append(self._returned.popleft())
        waiting = []
        for extents, events in self._in_flight:
            if all(event.query() for event in events):
                for extent in extents:
                    _add_free(self._free, extent)
            else:
                waiting.append((extents, events))
        self._in_flight = waiting


def _give_back(
    memory: PinnedMemory,
    returned: deque[tuple[list[Extent], list[Any]]],
    token: object,
    extents: list[Extent],
    events: list[Any],
) -> None:
    returned.append((extents, events))
    memory.holders.pop(token, None)
    if memory.closed and not memory.holders:
        memory.let_go()


def _size(extents: list[Extent]) -> int:
    return sum(stop - start for start, stop in extents)


def _carve(extents: list[Extent], num_bytes: int) -> tuple[list[Extent], list[Extent]]:
    """The first `num_bytes` of the extents, or all there are; and the rest."""
    taken: list[Extent] = []
    for position, (start, stop) in enumerate(extents):
        if num_bytes <= 0:
            return taken, extents[position:]
        middle = min(stop, start + num_bytes)
        taken.append((start, middle))
        num_bytes -= middle - start
        if middle < stop:
            return taken, [(middle, stop), *extents[position + 1 :]]
    return taken, []


def _add_free(free: list[Extent], extent: Extent) -> None:
    """Put an extent into the sorted list and merge it with its neighbours: long extents are few copies."""
    insort(free, extent)
    at = free.index(extent)
    if at + 1 < len(free) and free[at + 1][0] == extent[1]:
        free[at : at + 2] = [(extent[0], free[at + 1][1])]
    if at > 0 and free[at - 1][1] == free[at][0]:
        free[at - 1 : at + 1] = [(free[at - 1][0], free[at][1])]
