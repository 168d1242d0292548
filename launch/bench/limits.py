"""A bench that behaves as on a smaller card, or a host of less memory, and ends where it is over."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ...distributed.groups import ProcessGroups
from ...mst import pinned_memory
from ...mst.pinned_memory import HostMemoryError
from ...mst.placement import local_world_size
from ..planner.catalogue import CARDS, CONTEXT_BYTES
from ..planner.machine import outside_bytes, parse_bytes
from ..planner.memory import COMMUNICATOR_BYTES
from ..sizes import size_text

LOOK_EVERY_S = 0.5


def card_bytes(text: str) -> int:
    """A card's memory: as one is sold (`80G` is what an H100 of 80 GB has), by its name, or as it is said.

    Raises:
        ValueError: It is no size and no card of the catalogue.
    """
    word = text.strip().lower()
    for card in CARDS:
        if word == card.key or card.key.endswith(f"-{word}"):
            return int(card.memory_gib * 2**30)
    try:
        return parse_bytes(text)
    except ValueError as error:
        keys = ", ".join(card.key for card in CARDS)
        raise ValueError(f"--gpu-memory {error} Or name a card: {keys}.") from error


def hold_allocator(num_bytes: int, device: torch.device | None = None, *, expected: int = 0) -> int:
    """Let torch's allocator have what a card of so many bytes would leave it, and no more.

    Args:
        num_bytes: Of the card; those of a larger one than there is change nothing.
        device: The GPU; None is the current one.
        expected: Beside the allocator, should there be less by now.

    Returns:
        Bytes that it may have.

    Raises:
        torch.OutOfMemoryError: The device holds more than the card would.
    """
    outside = max(outside_bytes(device), expected)
    left = num_bytes - outside
    if left <= 0:
        raise torch.OutOfMemoryError(
            f"{size_text(outside)} are outside of torch's allocator, and the card is to have "
            f"{size_text(num_bytes)}"
        )
    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(min(left / total, 1.0), device)
    return left


class GpuLimit:
    """Holds torch's allocator to what a smaller card would leave it beside what is outside of it."""

    def __init__(self, num_bytes: int, device: torch.device, world_size: int) -> None:
        """Where processes have joined, before the model is there.

        Raises:
            ValueError: The card is no larger, or there is none.
        """
        if device.type != "cuda":
            raise ValueError("--gpu-memory takes a GPU for a smaller one, and torch sees none; leave it out.")
        self.num_bytes, self.device = num_bytes, device
        _, total = torch.cuda.mem_get_info(device)
        if num_bytes > total:
            raise ValueError(
                f"--gpu-memory {size_text(num_bytes)} is above the {size_text(total)} of this GPU; say "
                "less, or leave it out."
            )
        # What a run will have outside of torch's allocator comes bit by bit: at first by the plan.
        self._expected = CONTEXT_BYTES + (COMMUNICATOR_BYTES if world_size > 1 else 0)
        self.tighten(expected=True)

    def tighten(self, *, expected: bool = False) -> None:
        """Let the allocator have what is left.

        Args:
            expected: Beside what the plan expects outside of it, should there be less by now.

        Raises:
            torch.OutOfMemoryError: The device holds more than the limit.
        """
        hold_allocator(self.num_bytes, self.device, expected=self._expected if expected else 0)

    def check(self, reserved_bytes: int) -> None:
        """See that a step stayed within.

        Args:
            reserved_bytes: By torch's allocator, at most.

        Raises:
            torch.OutOfMemoryError: It did not.
        """
        used = reserved_bytes + outside_bytes(self.device)
        if used > self.num_bytes:
            raise torch.OutOfMemoryError(
                f"a step took {size_text(used)} of the device, more than the {size_text(self.num_bytes)} of "
                "--gpu-memory"
            )


class HostWatch:
    """What this process holds of its host, looked at twice a second by a thread of its own.

    Attributes:
        peak_bytes: The most so far.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="longseq-host", daemon=True)

    @contextmanager
    def watching(self) -> Iterator[HostWatch]:
        """For as long as this lasts."""
        self._thread.start()
        try:
            yield self
        finally:
            self._ends.set()
            self._thread.join()

    def look(self) -> int:
        """What it holds now: memory of its own and shared, and what is pinned, if that is not among it."""
        return self._seen(max(_own_bytes(), pinned_bytes()))

    def check(self, limit: int | None, groups: ProcessGroups) -> None:
        """See that the processes of this node stayed within a limit, together; every rank calls it.

        Raises:
            HostMemoryError: On every rank of a node where they did not.
        """
        self.look()
        if limit is None:
            return
        peaks = groups.gathered((_node(), self.peak_bytes))
        held = sum(peak for node, peak in peaks if node == _node())
        if held > limit:
            raise HostMemoryError(
                f"out of host memory: the {local_world_size()} process(es) of this node held "
                f"{size_text(held)}, and --host-memory is {size_text(limit)}; keep more on the GPU, use more "
                "GPUs or nodes, or a shorter sequence."
            )

    def _run(self) -> None:
        while not self._ends.wait(LOOK_EVERY_S):
            self._seen(_own_bytes())  # nothing of CUDA: this thread is on no device

    def _seen(self, held: int) -> int:
        self.peak_bytes = max(self.peak_bytes, held)
        return held


def pinned_bytes() -> int:
    """Host memory that is page-locked: checkpoints' blocks, and what torch itself has pinned."""
    ours = sum(len(memory.blocks) * memory.block_bytes for memory in list(pinned_memory._memories))
    if not torch.cuda.is_available():
        return ours
    return ours + torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)


def _own_bytes() -> int:
    """Without the files that are mapped: these, libraries and tokens, can go."""
    sizes = {
        name: int(value.split()[0]) * 1024
        for name, _, value in (
            line.partition(":") for line in Path("/proc/self/status").read_text().splitlines()
        )
        if name in ("RssAnon", "RssShmem")
    }
    return sum(sizes.values())


def _node() -> str:
    import socket

    return socket.gethostname()
