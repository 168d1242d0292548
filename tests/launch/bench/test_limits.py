"""A smaller card and a smaller host: what is planned with, what the allocator gets, what ends a run."""

from __future__ import annotations

import mmap
import os
from types import SimpleNamespace

import pytest
import torch
from plan_samples import machine_with

from longseq.distributed import ProcessGroups
from longseq.launch.bench.limits import GpuLimit, HostWatch, card_bytes, hold_allocator
from longseq.launch.exit_status import OUT_OF_MEMORY, status_of
from longseq.launch.planner import at_start, machine
from longseq.launch.planner.catalogue import CONTEXT_BYTES
from longseq.launch.planner.machine import taken_to_have, this_machine
from longseq.launch.planner.memory import COMMUNICATOR_BYTES
from longseq.mst.pinned_memory import HostMemoryError

GIB = 2**30
DEVICE = torch.device("cuda", 0)


def test_a_card_is_as_large_as_one_that_is_sold() -> None:
    assert card_bytes("80G") == card_bytes("h100-80g") == int(79.1 * GIB)
    assert card_bytes("141G") == 141 * GIB
    assert card_bytes("79.5GiB") == int(79.5 * GIB)
    with pytest.raises(ValueError, match=r"--gpu-memory 'lots'.* Or name a card: b200"):
        card_bytes("lots")


class Card:
    """A GPU of 140 GiB of which so much is outside of torch's allocator."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.outside, self.reserved, self.share = GIB // 2, 0, 1.0
        total = 140 * GIB
        monkeypatch.setattr(
            torch.cuda, "mem_get_info", lambda device=None: (total - self.outside - self.reserved, total)
        )
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: self.reserved)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self.set_share)

    def set_share(self, share: float, device: torch.device) -> None:
        self.share = share

    @property
    def allowed(self) -> int:
        return round(self.share * 140 * GIB)


def test_a_larger_card_than_there_is_holds_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch)
    assert hold_allocator(150 * GIB) == 150 * GIB - card.outside
    assert card.share == 1.0


def test_the_allocator_gets_what_a_smaller_card_would_leave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch)
    limit = GpuLimit(80 * GIB, DEVICE, world_size=4)
    # At first the plan's figures, for libraries take theirs when they are used.
    assert card.allowed == 80 * GIB - CONTEXT_BYTES - COMMUNICATOR_BYTES
    card.outside, card.reserved = 3 * GIB, 70 * GIB
    limit.check(77 * GIB)
    limit.tighten()
    assert card.allowed == 77 * GIB
    with pytest.raises(torch.OutOfMemoryError, match=r"a step took 80\.5 GiB .* 80\.0 GiB of --gpu-memory"):
        limit.check(int(77.5 * GIB))
    card.outside = 80 * GIB
    with pytest.raises(torch.OutOfMemoryError, match="outside"):
        limit.tighten()
    with pytest.raises(ValueError, match=r"--gpu-memory 150\.0 GiB is above the 140\.0 GiB"):
        GpuLimit(150 * GIB, DEVICE, world_size=1)
    with pytest.raises(ValueError, match="torch sees none; leave it out"):
        GpuLimit(80 * GIB, torch.device("cpu"), world_size=1)


def test_a_plan_sees_the_smaller_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=140 * GIB, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(machine, "host_limit_bytes", lambda: 1000 * GIB)
    before = dict(os.environ)
    with taken_to_have(80 * GIB, None), taken_to_have(None, 100 * GIB):
        found = this_machine(1)
    assert (found.gpu.memory_bytes, found.host_bytes) == (80 * GIB, 85 * GIB)
    with taken_to_have(None, None):
        found = this_machine(1)
    assert (found.gpu.memory_bytes, found.host_bytes) == (140 * GIB, 850 * GIB)
    assert dict(os.environ) == before


def test_a_run_on_a_smaller_card_is_planned_without_what_others_have_of_it(monkeypatch) -> None:
    card = Card(monkeypatch)
    monkeypatch.setattr(at_start, "this_machine", lambda world_size: machine_with(80))
    card.outside = CONTEXT_BYTES
    assert at_start.machine_now(1, DEVICE).gpu.memory_bytes == 80 * GIB
    card.outside = CONTEXT_BYTES + 9 * GIB
    assert at_start.machine_now(1, DEVICE).gpu.memory_bytes == 71 * GIB


def _touched(num_bytes: int, flags: int) -> mmap.mmap:
    """Memory of the kernel's own: an allocator may answer with what an earlier test left resident."""
    memory = mmap.mmap(-1, num_bytes, flags=flags)
    memory[:: mmap.PAGESIZE] = b"\1" * (num_bytes // mmap.PAGESIZE)
    return memory


@pytest.mark.parametrize("flags", [mmap.MAP_PRIVATE, mmap.MAP_SHARED])
def test_a_host_that_is_over_ends_the_run_as_one_out_of_memory(flags: int) -> None:
    watch = HostWatch()
    with watch.watching():
        before = watch.look()
        more = _touched(128 * 2**20, flags)
        assert watch.look() - before == pytest.approx(len(more), rel=0.1)
        more.close()
        assert watch.look() - before < 20 * 2**20
        watch.check(None, ProcessGroups())
        watch.check(watch.peak_bytes, ProcessGroups())
        with pytest.raises(HostMemoryError, match="--host-memory is 100 MiB; keep more") as over:
            watch.check(100 * 2**20, ProcessGroups())
    # What is freed again was held all the same.
    assert watch.peak_bytes >= before + 115 * 2**20
    assert status_of(over.value) == OUT_OF_MEMORY
