"""When the phases of a step end, and the most memory within each."""

from __future__ import annotations

import time
from typing import Any

import torch

PHASES = ("forward", "backward", "optimizer")


class PhaseWatch:
    """What happens at the ends of a step's phases.

    Marks are events on the GPU and counters of the host's: a step waits for neither.

    Attributes:
        seconds: Of each phase of the last step.
        peaks: Bytes that were allocated at once, at most, in each of them.
        reserved_bytes: The most that torch's allocator held in the last step.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.reserved_bytes = 0
        self._marks: list[tuple[str, Any]] = []

    def begin(self) -> None:
        """Of a step."""
        self._marks, self.peaks, self.reserved_bytes = [], {}, 0
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self._note("")

    def mark(self, phase: str) -> None:
        """The end of a phase."""
        self._note(phase)
        if self.on_gpu:
            self.peaks[phase] = max(self.peaks.get(phase, 0), torch.cuda.max_memory_allocated())
            self.reserved_bytes = max(self.reserved_bytes, torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()

    def end(self) -> None:
        """Of a step, when the GPU has done it."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        for (_, began), (phase, ended) in zip(self._marks, self._marks[1:], strict=False):
            self.seconds[phase] += began.elapsed_time(ended) / 1e3 if self.on_gpu else ended - began

    @property
    def peak_bytes(self) -> int:
        """Of the last step."""
        return max(self.peaks.values(), default=0)

    def _note(self, phase: str) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))
