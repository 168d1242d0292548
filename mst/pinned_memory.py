"""Blocks of host memory, touched and pinned by threads in the background.

The first touch of 8 GiB takes some seconds on a virtual machine, and pinning walks the pages once more: far
too long for a step, and nothing beside loading a model.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import mmap
import os
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from .placement import free_host_bytes, gib, local_world_size

logger = logging.getLogger(__name__)

PAGE_BYTES = 4096
MAX_PIN_THREADS = 4


class HostMemoryError(MemoryError):
    """The host has not the memory that checkpoints ask for."""


class PinnedMemory:
    """The blocks themselves and the threads that make them; knows nothing of who holds which bytes.

    Apart from `PinnedSlab`, so that threads and finalizers do not keep a slab alive that everybody dropped.
    """

    def __init__(self, device: torch.device, block_bytes: int) -> None:
        self.device = device
        self.block_bytes = block_bytes
        self.pins = device.type == "cuda"
        self.blocks: list[Tensor] = []
        # An RLock within: a finalizer may come back in while this very thread holds it.
        self.changed = threading.Condition()
        self.closed = False
        self.holders: dict[object, None] = {}
        self._wanted = 0
        self._begun = 0
        self._failure: Exception | None = None
        self._threads: list[threading.Thread] = []
        self._pid = os.getpid()
        _memories.add(self)

    def views(self, extents: list[tuple[int, int]], num_bytes: int) -> list[Tensor]:
        """The first `num_bytes` of extents [start, stop) of all blocks' bytes, cut where blocks end."""
        views = []
        for start, stop in extents:
            stop = min(stop, start + num_bytes)
            num_bytes -= stop - start
            while start < stop:
                index, offset = divmod(start, self.block_bytes)
                size = min(stop - start, self.block_bytes - offset)
                views.append(self.blocks[index][offset : offset + size])
                start += size
        return views

    def require_open(self) -> None:
        if self.closed:
            raise ValueError("This PinnedSlab is closed; make a new one.")

    def order(self, num_blocks: int, asked_bytes: int) -> None:
        """Have threads make blocks until there are `num_blocks`."""
        with self.changed:
            self.require_open()
            if num_blocks <= self._wanted:
                return
            # Blocks that are ordered and not yet there still count as free with the system.
            missing = (num_blocks - len(self.blocks)) * self.block_bytes
            if missing > (free := free_host_bytes()):
                raise HostMemoryError(self._message(asked_bytes, missing, free, "the host has not that much"))
            self._wanted = num_blocks
            self._failure = None
            for _ in range(min(_num_threads(), num_blocks - self._begun) - len(self._threads)):
                thread = threading.Thread(target=self._make_blocks, name="longseq-pin", daemon=True)
                self._threads.append(thread)
                thread.start()

    def await_block(self, num_blocks: int, asked_bytes: int) -> None:
        """Wait, under the lock, for one more block; order up to `num_blocks` if nobody has."""
        self.order(num_blocks, asked_bytes)
        before = len(self.blocks)

        def all_failed() -> bool:
            return self._failure is not None and self._begun == len(self.blocks)

        self.changed.wait_for(lambda: len(self.blocks) > before or self.closed or all_failed())
        self.require_open()
        if len(self.blocks) == before:
            missing = (num_blocks - before) * self.block_bytes
            message = self._message(asked_bytes, missing, free_host_bytes(), str(self._failure))
            raise HostMemoryError(message) from self._failure

    def _make_blocks(self) -> None:
        """A thread: blocks, one after the other, until there are as many as were ordered."""
        while True:
            with self.changed:
                if self.closed or self._begun >= self._wanted:
                    # Off the list while the lock is held, or an order just now would count on this thread.
                    self._threads.remove(threading.current_thread())
                    return
                self._begun += 1
            try:
                block = _new_block(self.block_bytes, self.device)
            except Exception as failure:  # raised by whoever waits for the block
                with self.changed:
                    self._begun -= 1
                    self._wanted = self._begun
                    # Its frames would keep the block that could not be pinned.
                    self._failure = failure.with_traceback(None)
                    self.changed.notify_all()
                continue
            with self.changed:
                self.blocks.append(block)
                del block
                self.changed.notify_all()
            if self.closed:
                self.let_go()  # closed meanwhile, and nobody else would unpin this one

    def close(self) -> list[str]:
        """Make no more blocks, unpin those there are if nobody holds any; the errors of that."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
            return [] if self.holders else self._unpin()

    def let_go(self) -> None:
        """`close` for finalizers, where nobody could catch an error."""
        if os.getpid() == self._pid:
            for failure in self.close()[:1]:
                logger.warning("Host memory could not be unpinned: %s", failure)
        else:
            # A forked child has not the memory, and to unmap it could hit what lies there in the child.
            _memory_of_parents.extend(self.blocks)

    def end_threads(self) -> None:
        """At the interpreter's end: a thread cut off inside CUDA would take the process with it.

        Nothing is unpinned: that has to wait for the GPU, which may never be done if another rank has
        failed, and the system unpins the memory of a process that ends.
        """
        if os.getpid() != self._pid:
            return
        with self.changed:
            self.closed = True
            self.holders[self] = None  # for good
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    def _unpin(self) -> list[str]:
        blocks, self.blocks = self.blocks, []
        if not self.pins or not blocks:
            return []
        try:
            torch.cuda.synchronize(self.device)  # no copy may be in flight
        except RuntimeError as broken:  # an earlier error has ended this process's use of CUDA
            return [str(broken)]
        codes = [torch.cuda.cudart().cudaHostUnregister(block.data_ptr()) for block in blocks]
        return [_cuda_error(code) for code in codes if int(code) != 0]

    def _message(self, asked: int, missing: int, free: int, why: str) -> str:
        return (
            f"Checkpoints ask for {gib(asked)} of {'pinned ' if self.pins else ''}host memory; "
            f"{gib(len(self.blocks) * self.block_bytes)} is there already, {gib(missing)} more is needed and "
            f"{gib(free)} is available: {why}. Use fewer tokens a GPU, keep fewer layers' inputs "
            "(checkpoints=spread_inputs(num_layers, on_gpu, on_host), which rebuilds the others) or more of "
            "them on the GPU (on_gpu), or give the job more host memory."
        )


_memories: weakref.WeakSet[PinnedMemory] = weakref.WeakSet()
_memory_of_parents: list[Tensor] = []


@atexit.register
def _end_threads() -> None:
    for memory in list(_memories):
        memory.end_threads()


def _new_block(num_bytes: int, device: torch.device) -> Tensor:
    """A uint8 tensor of host memory, pinned if it is for a GPU."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block = torch.frombuffer(memory, dtype=torch.uint8)
    if device.type != "cuda":
        return block
    _advise(memory, "MADV_HUGEPAGE")  # fewer faults, fewer pages to pin
    # A fork (a data loader's workers) would else copy what is pinned, or at least its page tables.
    _advise(memory, "MADV_DONTFORK")
    block[::PAGE_BYTES].fill_(0)  # the first touch: without the GIL, in this thread alone
    torch.cuda.set_device(device)  # this thread's; pinning makes a context on the device it finds
    code = torch.cuda.cudart().cudaHostRegister(block.data_ptr(), num_bytes, 0)
    if int(code) != 0:
        raise MemoryError(f"cudaHostRegister of {num_bytes:,} bytes failed: {_cuda_error(code)}")
    return block


def _advise(memory: mmap.mmap, advice: str) -> None:
    """A hint that some kernels do not know."""
    if hasattr(mmap, advice):
        with contextlib.suppress(OSError):
            memory.madvise(getattr(mmap, advice))


def _cuda_error(code: Any) -> str:
    return f"{torch.cuda.cudart().cudaGetErrorString(code)} (error {int(code)})"


def _num_threads() -> int:
    return max(1, min(MAX_PIN_THREADS, (os.cpu_count() or 1) // local_world_size()))
