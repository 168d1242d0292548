"""Host memory is lent by the byte, comes back with its holder's end, and is pinned or refused."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch

from longseq.mst import pinned_memory
from longseq.mst.pinned_memory import HostMemoryError
from longseq.mst.pinned_slab import BLOCK_BYTES, PinnedSlab

BLOCK = 4 * 4096


class Event:
    def __init__(self, done: bool = False) -> None:
        self.done = done

    def query(self) -> bool:
        return self.done


def test_bytes_are_striped_over_blocks_and_overlap_nowhere() -> None:
    slab = PinnedSlab(block_bytes=BLOCK)
    held = [slab.take(size) for size in (1, 4096, 4097, 3 * BLOCK + 5, 0, BLOCK)]
    for number, blocks in enumerate(held):
        assert sum(piece.numel() for piece in blocks.pieces) == blocks.num_bytes
        for piece in blocks.pieces:
            piece.fill_(number)
    for number, blocks in enumerate(held):
        assert all((piece == number).all() for piece in blocks.pieces)
    assert slab.total_bytes == 6 * BLOCK  # 1 + 1 + 2 + 13 + 4 pages of 4 a block
    assert slab.free_bytes == slab.total_bytes - 21 * 4096
    assert not slab.pinned


def test_memory_comes_back_when_its_holder_goes() -> None:
    slab = PinnedSlab(block_bytes=BLOCK)
    released, dropped = slab.take(3 * BLOCK), slab.take(BLOCK)
    released.release()
    released.release()
    assert (slab.free_bytes, released.pieces) == (3 * BLOCK, ())
    circle = [dropped]
    circle.append(circle)
    del dropped, circle
    gc.collect()
    assert slab.free_bytes == slab.total_bytes == 4 * BLOCK
    slab.take(4 * BLOCK)
    assert slab.total_bytes == 4 * BLOCK


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 1, 3), (1, 3, 0, 2)])
def test_pages_that_come_back_are_one_piece_again(order: tuple[int, ...]) -> None:
    slab = PinnedSlab(block_bytes=BLOCK)
    pages = [slab.take(4096) for _ in range(4)]
    for page in order:
        pages[page].release()
        assert slab.free_bytes > 0  # taken in
    assert len(slab.take(BLOCK).pieces) == 1


def test_memory_whose_copy_is_not_over_goes_last_and_with_its_event() -> None:
    slab = PinnedSlab(block_bytes=BLOCK)
    slab.take(3 * BLOCK).release()
    slow, quick = slab.take(BLOCK), slab.take(BLOCK)
    copy = Event()
    slow.copied_by(Event())
    slow.copied_by(copy)
    quick.copied_by(Event(done=True))
    place = slow.pieces[0].data_ptr()
    slow.release()
    quick.release()
    clean = slab.take(2 * BLOCK)
    assert clean.after == ()
    half = slab.take(BLOCK // 2)
    assert half.after == (copy,)
    assert half.pieces[0].data_ptr() == place
    other = slab.take(BLOCK // 2)
    assert other.after == (copy,)
    # Given back unused, it is as busy as it was.
    other.release()
    assert slab.take(BLOCK // 2).after == (copy,)
    assert slab.total_bytes == 3 * BLOCK
    half.release()
    copy.done = True
    assert slab.take(BLOCK // 2).after == ()


def test_a_reserve_is_made_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    go, made = threading.Semaphore(0), []
    new_block = pinned_memory._new_block

    def slowly(*args):
        go.acquire()
        made.append(threading.current_thread())
        return new_block(*args)

    monkeypatch.setattr(pinned_memory, "_new_block", slowly)
    slab = PinnedSlab(block_bytes=BLOCK)
    slab.reserve(5 * BLOCK - 1)
    slab.reserve(BLOCK)
    assert slab.total_bytes == 0
    go.release()
    first = slab.take(BLOCK)  # does not wait for the others
    assert slab.total_bytes == BLOCK
    for _ in range(4):
        go.release()
    second = slab.take(4 * BLOCK)
    assert slab.total_bytes == 5 * BLOCK
    assert len(made) == 5
    assert threading.main_thread() not in made
    assert len(first.pieces) + len(second.pieces) == 5


def test_the_host_has_not_that_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_memory, "free_host_bytes", lambda: 3 * BLOCK)
    slab = PinnedSlab(block_bytes=BLOCK)
    with pytest.raises(
        HostMemoryError, match=r"ask for 65,536 bytes .* 65,536 bytes more .* 49,152 bytes is"
    ):
        slab.reserve(4 * BLOCK)
    with pytest.raises(MemoryError, match=r"fewer tokens a GPU.*spread_inputs\(num_layers"):
        slab.take(4 * BLOCK)
    held = slab.take(3 * BLOCK)
    monkeypatch.setattr(pinned_memory, "free_host_bytes", lambda: 0)
    with pytest.raises(HostMemoryError, match="0 bytes is available"):
        slab.take(1)
    held.release()
    slab.take(3 * BLOCK)


class Cudart:
    """A CUDA runtime that pins the first `most` blocks."""

    def __init__(self, most: int = 10**9) -> None:
        self.most = most
        self.pinned: dict[int, int] = {}
        self.threads: set[int] = set()
        self.unpins = 0  # what cudaHostUnregister returns

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        self.threads.add(threading.get_ident())
        if len(self.pinned) >= self.most:
            return 2
        self.pinned[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return self.unpins

    def cudaGetErrorString(self, code: int) -> str:
        return "out of memory"


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Cudart:
    runtime = Cudart()
    runtime.devices, runtime.synchronized = [], []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "set_device", runtime.devices.append)
    monkeypatch.setattr(torch.cuda, "synchronize", runtime.synchronized.append)
    return runtime


def test_blocks_are_pinned_and_unpinned(cudart: Cudart) -> None:
    slab = PinnedSlab("cuda:3", block_bytes=BLOCK)
    assert slab.pinned
    held = slab.take(3 * BLOCK)
    assert list(cudart.pinned.values()) == [BLOCK] * 3
    assert set(cudart.devices) == {torch.device("cuda", 3)}
    assert threading.get_ident() not in cudart.threads
    held.release()
    slab.close()
    slab.close()
    assert cudart.pinned == {}
    assert cudart.synchronized == [torch.device("cuda", 3)]
    for use in (slab.take, slab.reserve):
        with pytest.raises(ValueError, match="closed"):
            use(1)


def test_memory_stays_pinned_while_it_is_held(cudart: Cudart) -> None:
    held = PinnedSlab("cuda:0", block_bytes=BLOCK).take(BLOCK)
    gc.collect()
    assert len(cudart.pinned) == 1
    held.release()
    gc.collect()
    assert cudart.pinned == {}

    slab = PinnedSlab("cuda:0", block_bytes=BLOCK)
    held, other = slab.take(BLOCK), slab.take(BLOCK)
    slab.close()
    other.release()
    assert len(cudart.pinned) == 2
    del held
    gc.collect()
    assert cudart.pinned == {}


def test_a_block_that_is_ready_after_the_close_is_unpinned(cudart: Cudart) -> None:
    for _ in range(20):
        slab = PinnedSlab("cuda:0", block_bytes=BLOCK)
        memory = slab._memory
        slab.reserve(8 * BLOCK)
        slab.close()
        deadline = time.monotonic() + 10
        while memory._threads and time.monotonic() < deadline:
            time.sleep(0.001)
        assert cudart.pinned == {}


def test_memory_that_cannot_be_pinned_is_an_error(cudart: Cudart) -> None:
    cudart.most = 2
    slab = PinnedSlab("cuda:0", block_bytes=BLOCK)
    slab.reserve(4 * BLOCK)
    held = slab.take(2 * BLOCK)
    for _ in range(2):
        with pytest.raises(HostMemoryError, match=r"cudaHostRegister of 16,384 bytes failed: out of memory"):
            slab.take(BLOCK)
    assert slab.total_bytes == 2 * BLOCK
    cudart.most = 3  # memory has come free
    assert len(slab.take(BLOCK).pieces) == 1
    del held


def test_one_thread_that_fails_is_no_failure_while_another_is_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    failed, wanted = threading.Event(), threading.Event()
    new_block, calls = pinned_memory._new_block, []

    def one_fails(*args):
        calls.append(None)
        if len(calls) == 1:
            failed.set()
            raise MemoryError("not this one")
        wanted.wait(10)
        return new_block(*args)

    monkeypatch.setattr(pinned_memory, "_num_threads", lambda: 2)
    monkeypatch.setattr(pinned_memory, "_new_block", one_fails)
    slab = PinnedSlab(block_bytes=BLOCK)
    slab.reserve(2 * BLOCK)
    failed.wait(10)
    threading.Timer(0.05, wanted.set).start()
    assert len(slab.take(BLOCK).pieces) == 1


def test_memory_that_cannot_be_unpinned_is_an_error(cudart: Cudart, caplog: pytest.LogCaptureFixture) -> None:
    cudart.unpins = 1
    slab = PinnedSlab("cuda:0", block_bytes=BLOCK)
    slab.take(1)
    with pytest.raises(RuntimeError, match=r"1 blocks .* could not be unpinned: out of memory \(error 1\)"):
        slab.close()
    slab = PinnedSlab("cuda:0", block_bytes=BLOCK)
    slab.take(1)
    del slab
    gc.collect()
    assert "could not be unpinned: out of memory" in caplog.text


def test_a_child_leaves_its_parents_memory_alone(cudart: Cudart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_memory, "_memory_of_parents", kept := [])
    slab = PinnedSlab("cuda:0", block_bytes=BLOCK)
    slab.take(1)
    pid = os.getpid()
    monkeypatch.setattr(pinned_memory.os, "getpid", lambda: pid + 1)
    del slab
    gc.collect()
    assert (len(cudart.pinned), len(kept)) == (1, 1)


def test_the_threads_keep_nothing_alive() -> None:
    slab = PinnedSlab(block_bytes=BLOCK)
    memory = weakref.ref(slab._memory)
    slab.take(50 * BLOCK)
    for thread in list(slab._memory._threads):
        thread.join(10)
    del slab
    assert memory() is None


@pytest.mark.parametrize("wrong", [0, 100, 4097, -4096])
def test_a_block_of_no_pages(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"block_bytes={wrong}"):
        PinnedSlab(block_bytes=wrong)


_LEAVES_AT_ONCE = """
import torch
from longseq.mst.checkpoint_store import CheckpointStore
from longseq.mst.pinned_slab import PinnedSlab
slab = PinnedSlab({device!r})
slab.reserve(2**30)
store = CheckpointStore(slab)
kept = store.keep(torch.ones(2**20, device={device!r}))
"""


def _leave_at_once(device: str) -> None:
    command = [
        sys.executable,
        "-X",
        "faulthandler",
        "-W",
        "error",
        "-c",
        _LEAVES_AT_ONCE.format(device=device),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_interpreter_ends_while_blocks_are_made() -> None:
    _leave_at_once("cpu")


@pytest.mark.gpu
def test_the_interpreter_ends_while_blocks_are_pinned() -> None:
    _leave_at_once("cuda")


@pytest.mark.gpu
def test_a_gpus_blocks_are_pinned_until_the_close() -> None:
    slab = PinnedSlab("cuda")
    slab.reserve(BLOCK_BYTES + 1)
    held = slab.take(BLOCK_BYTES + 1)
    pieces = held.pieces
    assert [piece.is_pinned() for piece in pieces] == [True, True]
    held.release()
    slab.close()
    assert [piece.is_pinned() for piece in pieces] == [False, False]
    pieces[0].fill_(1)  # the memory itself lives as long as somebody has it
