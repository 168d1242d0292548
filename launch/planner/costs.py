"""What a choice of knobs takes, asked once for each: memory, seconds, and whether there is room for it."""

from __future__ import annotations

from functools import cached_property

from .knobs import Knobs
from .machine import Machine
from .memory import MemoryEstimate, estimate_memory
from .seconds import TimeEstimate, estimate_seconds
from .workload import Workload

CARD_SHARE = 0.97
"""Of a GPU's memory, what is planned with: an estimate that is short by a little must not end a run."""
CHARGE = 0.002
"""What each step away from the simplest way must save, as a share of a training step: estimates are no finer,
and what is simpler is easier to understand and fails in fewer ways."""


class Costs:
    """Estimates for one workload on one machine."""

    def __init__(self, work: Workload, machine: Machine) -> None:
        self.work, self.machine = work, machine
        self._memory: dict[Knobs, MemoryEstimate] = {}
        self._seconds: dict[Knobs, TimeEstimate] = {}

    def memory(self, knobs: Knobs) -> MemoryEstimate:
        """Of a process."""
        if knobs not in self._memory:
            self._memory[knobs] = estimate_memory(self.work, knobs, self.machine)
        return self._memory[knobs]

    def seconds(self, knobs: Knobs) -> TimeEstimate:
        """Of a training step."""
        if knobs not in self._seconds:
            self._seconds[knobs] = estimate_seconds(self.work, knobs, self.machine)
        return self._seconds[knobs]

    @cached_property
    def card_room(self) -> int:
        """Bytes of a GPU that are planned with."""
        return int(self.machine.gpu.memory_bytes * CARD_SHARE)

    @cached_property
    def host_room(self) -> int:
        """Bytes of host memory a process may take; the machine's figure leaves the system its part."""
        sharing = max(1, min(self.machine.gpus_per_node, self.machine.num_gpus))
        return self.machine.host_bytes // sharing

    def fullness(self, knobs: Knobs) -> float:
        """How much of the room on the card or on the host is taken, whichever is fuller; up to 1 it fits."""
        memory = self.memory(knobs)
        gpu = memory.reserved_bytes / self.card_room
        # Every process has some memory on the host; without room for it nothing would fit.
        return max(gpu, memory.host_bytes / max(self.host_room, 1))

    def fits(self, knobs: Knobs) -> bool:
        """Whether there is room for it, on the card and on the host."""
        return self.fullness(knobs) <= 1

    def price(self, knobs: Knobs) -> float:
        """Seconds of a step, with what is no simpler than it must be charged for."""
        return self.seconds(knobs).seconds * (1 + CHARGE * complexity(knobs))


def complexity(knobs: Knobs) -> int:
    """How many steps a choice is away from the simplest."""
    return (
        knobs.ulysses_degree.bit_length()
        - 1
        + knobs.zero_stage
        + 2 * knobs.offload_optimizer
        + 2 * knobs.offload_parameters
        + knobs.stream
        + (knobs.head_groups > 1)
        + knobs.inputs.host
        + knobs.attention.host
        + knobs.inputs.rebuilds
    )
