"""How many bytes a training step takes at its peak, and where in the step that is; no GPU is asked.

A step is walked through: what is held throughout (memory_held.py, memory_zero.py), what each layer leaves for
its backward (memory_streamed.py, memory_plain.py), and what is at work at each moment (memory_layers.py,
memory_head.py). The largest sum is the peak. docs/memory.md has the formulas, and how near they come.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .knobs import Knobs
from .machine import Machine
from .memory_host import host_parts
from .memory_plain import PlainLayers
from .memory_step import Moment, Step
from .memory_streamed import StreamedLayers
from .workload import Workload

FRAGMENTS = 0.02
"""Of the peak: what the allocator holds in pieces that fit nothing."""
COMMUNICATOR_BYTES = int(1.2 * 2**30)
"""NCCL's buffers for one group of processes, outside of PyTorch's allocator. Measured on four GPUs of a node:
1.3 GiB with one group, 2.4 with two."""


@dataclass(frozen=True)
class Part:
    """A share of the memory.

    Attributes:
        name: What it is.
        gpu_bytes: At the peak.
        host_bytes: Of this process.
        note: How it comes about, for a table.
    """

    name: str
    gpu_bytes: int
    host_bytes: int = 0
    note: str = ""


@dataclass(frozen=True)
class MemoryEstimate:
    """What a step takes.

    Attributes:
        parts: Their GPU bytes add up to the peak, their host bytes to the host's.
        peak_bytes: What `torch.cuda.max_memory_allocated()` will say for a step, states there already.
        moment: Where in the step that is.
        moments: The peak of each moment.
        reserved_bytes: Of the card, with what the allocator cannot use and what it knows nothing of.
        host_bytes: Of one process: pinned memory, and states that were moved there.
    """

    parts: tuple[Part, ...]
    peak_bytes: int
    moment: str
    moments: dict[str, int]
    reserved_bytes: int
    host_bytes: int


def estimate_memory(work: Workload, knobs: Knobs, machine: Machine) -> MemoryEstimate:
    """Of one process, the same on all."""
    step = Step(work, knobs, machine.gpu.name)
    largest: dict[str, int] = {}
    peak, at_peak = -1, None
    for moment in _moments(step):
        total = step.total(moment)
        if total > largest.get(moment.name, -1):
            largest[moment.name] = total
        if total > peak:
            peak, at_peak = total, moment
    assert at_peak is not None
    on_host = host_parts(work, knobs, step.sizes, step.held)
    return MemoryEstimate(
        parts=(
            *(Part(name, size) for name, size in (*step.throughout(at_peak), *at_peak.parts) if size),
            *(Part(name, 0, size, note) for name, size, note in on_host if size),
        ),
        peak_bytes=peak,
        moment=at_peak.name,
        moments=largest,
        reserved_bytes=_reserved(step, peak) + machine.gpu.context_bytes,
        host_bytes=sum(size for _, size, _ in on_host),
    )


def _moments(step: Step) -> Iterator[Moment]:
    layers = StreamedLayers(step) if step.knobs.stream else PlainLayers(step)
    yield from layers.moments()
    yield from step.outside(layers.kept_by_all)


def _reserved(step: Step, peak: int) -> int:
    held = step.held
    return int(peak * (1 + FRAGMENTS)) + held.pending_bytes + held.communicators * COMMUNICATOR_BYTES
