"""Copies of checkpoints wait for what they must: on simulated streams and on a GPU."""

from __future__ import annotations

import ctypes
import gc
from functools import partial

import pytest
import torch
from simulated_streams import Event, Machine
from torch import Tensor

from longseq.mst.checkpoint_store import MAX_CHUNKS, CheckpointStore, Kept
from longseq.mst.pinned_slab import PinnedSlab

BLOCK = 4096


def in_use(store: CheckpointStore) -> int:
    """Bytes of the slab that somebody holds."""
    gc.collect()
    return store.slab.total_bytes - store.slab.free_bytes


class Run:
    """Passes of a small model over a simulated GPU; what backward reads is compared when all is done."""

    def __init__(self, seed: int, shape: tuple[int, int] = (23, 60)) -> None:
        self.machine = Machine(seed)
        self.random = self.machine.random
        self.store = CheckpointStore(PinnedSlab(block_bytes=BLOCK))
        self.store._copier = self.machine
        self.shape = shape
        self.read: list[tuple[Tensor, Tensor]] = []
        self.constants: list[Tensor] = []

    def layer_input(self) -> tuple[Tensor, Tensor]:
        """A device tensor that the compute stream fills, and what it will hold."""
        truth = torch.randn(self.shape)
        self.constants.append(truth)
        x = self.machine.empty(self.shape, torch.float32)
        self.machine.move(x, truth)
        return x, truth

    def forward(self, num_layers: int = 4) -> tuple[list[Kept], list[Tensor]]:
        chain: list[Kept] = []
        truths: list[Tensor] = []
        for _ in range(num_layers):
            x, truth = self.layer_input()
            truths.append(truth)
            chain.append(self.store.keep(x, chain[-1] if chain else None))
            if self.random.random() < 0.5:
                chain[-1].settle()
                self.machine.queue(partial(ctypes.memset, x.data_ptr(), 255, x.nbytes))  # in place
            del x
            self.machine.empty(self.shape, torch.float32)  # the layer's own work
            self.sometimes_run()
        return chain, truths

    def backward(self, kept: Kept, truth: Tensor) -> None:
        num_rows, tile = self.shape[0], self.random.choice([1, 5, 23])
        stops_at = self.random.choice([0, 9, num_rows, num_rows])
        fetched = self.store.fetch(kept)
        for start in range(0, num_rows, tile):
            stop = min(start + tile, num_rows)
            fetched.wait(stop)
            got = torch.empty(stop - start, self.shape[1])
            self.machine.move(got, fetched.tensor[start:stop])
            self.read.append((got, truth[start:stop]))
            if stop <= stops_at:
                fetched.release(start, stop)
            elif self.random.random() < 0.1:
                break  # an exception; nobody waits for the rest
        del fetched
        self.machine.empty(self.shape, torch.float32)
        self.sometimes_run()

    def sometimes_run(self) -> None:
        if self.random.random() < 0.3:
            self.machine.run(self.random.randrange(40))

    def finish(self) -> None:
        self.machine.run()
        for got, truth in self.read:
            assert torch.equal(got, truth)


@pytest.mark.parametrize("seed", range(40))
def test_every_wait_is_there(seed: int) -> None:
    run = Run(seed)
    for _ in range(3):
        passes = [run.forward() for _ in range(run.random.choice([1, 1, 2]))]
        for chain, truths in passes:
            if run.random.random() < 0.2:
                continue  # a forward without a backward
            order = list(range(len(chain)))[::-1]
            if run.random.random() < 0.2:
                run.random.shuffle(order)
            for index in order:
                run.backward(chain[index], truths[index])
                if run.random.random() < 0.7:
                    chain[index] = None
        del passes, chain
    run.finish()
    assert in_use(run.store) == 0


def test_a_host_that_runs_ahead_needs_no_more_memory() -> None:
    """Steps queued without anything done: host memory and device memory are those of one step."""
    run = Run(seed=1)
    run.sometimes_run = lambda: None
    for _ in range(4):
        chain, truths = run.forward()
        while chain:
            run.backward(chain.pop(), truths.pop())
    assert run.store.slab.total_bytes == 4 * 2 * BLOCK  # two blocks hold a layer's 5,520 bytes
    assert len(run.machine.pool) <= 3
    run.finish()


def test_memory_of_a_copy_in_flight_goes_with_its_event() -> None:
    run = Run(seed=0)
    run.sometimes_run = lambda: None
    num_bytes = 23 * 60 * 4
    (kept,), _ = run.forward(1)
    stored = kept._rows.stored
    del kept
    blocks = run.store.slab.take(num_bytes)
    assert blocks.after == (stored,)
    blocks.release()
    (kept,), _ = run.forward(1)
    fetched = run.store.fetch(kept)
    arrived = fetched._arrivals[-1][1]
    del kept, fetched
    blocks = run.store.slab.take(num_bytes)
    assert blocks.after == (arrived,)

    other = Event()  # of another store, say
    blocks.copied_by(other)
    blocks.release()
    (kept,), (truth,) = run.forward(1)
    with pytest.raises(AssertionError, match="streams wait for one another"):
        run.machine.run()
    other.done = True
    run.backward(kept, truth)
    run.finish()


def test_a_source_is_let_go_and_keeps_no_graph() -> None:
    run = Run(seed=0)
    x = run.machine.empty((5, 4), torch.float32).requires_grad_() * 2
    below = run.store.keep(x)
    assert below._source.tensor.data_ptr() == x.data_ptr()
    assert below._source.tensor.grad_fn is None
    above = run.store.keep(x, below)
    assert below._source is None
    assert above._source is not None
    run.store.fetch(above)
    assert above._source is None


def test_the_layer_below_is_fetched_before_it_is_asked_for() -> None:
    run = Run(seed=0)
    (below, above), truths = run.forward(2)
    fetched = run.store.fetch(above)
    for start in range(0, 23, 10):
        fetched.release(start, min(start + 10, 23))
    run.machine.run()
    num_queued = [len(queue) for queue in run.machine.queues.values()]
    fetched = run.store.fetch(below)
    assert [len(queue) for queue in run.machine.queues.values()] == num_queued == [0, 0, 0]
    assert torch.equal(fetched.tensor, truths[0])
    assert len(fetched._arrivals) == 3


def test_the_first_rows_are_there_before_the_last() -> None:
    run = Run(seed=0, shape=(100, 3))
    (kept,), (truth,) = run.forward(1)
    run.machine.run()
    fetched = run.store.fetch(kept)
    assert 1 < len(fetched._arrivals) <= MAX_CHUNKS
    queue = run.machine.queues["to_device"]
    first = next(place for place, (kind, _) in enumerate(queue) if kind == "record")
    del queue[first + 1 :]
    fetched.wait(1)
    run.machine.run()  # no stream waits for what was never copied
    assert torch.equal(fetched.tensor[:7], truth[:7])


# ---- On a GPU --------------------------------------------------------------------------------------------


def gpu_store() -> CheckpointStore:
    return CheckpointStore(PinnedSlab("cuda", block_bytes=2**20))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 8), (1, 3), (4099, 1031)])
def test_what_comes_back_to_a_gpu_is_what_went(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    store = gpu_store()
    x = torch.randn(shape, dtype=dtype, device="cuda")
    kept, before = store.keep(x), x.clone()
    kept.settle()
    x.fill_(torch.nan)
    fetched = store.fetch(kept)
    assert fetched.tensor.device == x.device
    assert torch.equal(fetched.whole(), before)
    assert all(piece.is_pinned() for piece in kept._rows.blocks.pieces)


@pytest.mark.gpu
def test_steps_on_a_gpu_that_lags_behind() -> None:
    """The host queues whole steps while the GPU still sleeps: everything has to wait for everything."""
    store = gpu_store()
    num_rows, tile = 5000, 613
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    seeds = [torch.full((num_rows, 512), float(layer), device="cuda") for layer in range(6)]
    torch.cuda.synchronize()
    for step in range(4):
        torch.cuda._sleep(100_000_000)
        chain: list[Kept] = []
        for seed in seeds:
            chain.append(store.keep(seed + step, chain[-1] if chain else None))
            chain[-1].settle()
            torch.full_like(seed, torch.nan)  # takes the memory that was just let go
        for layer in range(len(chain))[::-1]:
            fetched = store.fetch(chain.pop())
            for start in range(0, num_rows, tile):
                stop = min(start + tile, num_rows)
                fetched.wait(stop)
                wrong += (fetched.tensor[start:stop] != layer + step).sum()
                fetched.release(start, stop)
    assert store.slab.total_bytes < 8 * seeds[0].nbytes
    assert wrong.item() == 0
    del fetched
    torch.cuda.synchronize()
    assert in_use(store) == 0


@pytest.mark.gpu
def test_a_gpu_holds_no_second_copy_and_the_host_does_not_wait() -> None:
    store = gpu_store()
    num_bytes = 64 * 2**20
    store.slab.reserve(4 * num_bytes)
    store.slab.take(4 * num_bytes).release()  # all pinned
    torch.ones(num_bytes // 4, 1, device="cuda").sum()  # a kernel's first launch may wait for the GPU
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    asleep = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)
    asleep.record()
    chain: list[Kept] = []
    for _ in range(4):
        x = torch.ones(num_bytes // 4, 1, device="cuda")
        chain.append(store.keep(x, chain[-1] if chain else None))
        del x
        chain[-1].settle()
    while chain:
        fetched = store.fetch(chain.pop())
        fetched.whole().sum()
        fetched.release(0, num_bytes // 4)
    assert not asleep.query()
    assert torch.cuda.max_memory_allocated() - base < 1.1 * num_bytes
