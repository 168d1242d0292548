"""A GPU's streams, simulated: any order that events allow, so that a missing wait shows."""

from __future__ import annotations

import ctypes
import math
import random
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Event:
    def __init__(self) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done


class Machine:
    """A copier whose streams are queues: nothing is done before `run`, and then in any order they allow.

    Its allocator is stream-ordered, as CUDA's caching one is: memory that the host let go is handed out
    again at once, whatever other streams have still to do with it, and overwritten on the compute stream.
    Streams know addresses, not tensors, so that they keep nothing alive.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.queues: dict[str, list[tuple[str, Any]]] = {"compute": [], "to_host": [], "to_device": []}
        self.pool: list[np.ndarray] = []

    def compute_stream(self) -> str:
        return "compute"

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        for memory in self.pool:
            # The pool, the loop and the call refer to it; a living tensor would too.
            if memory.nbytes == num_bytes and sys.getrefcount(memory) == 3:
                break
        else:
            memory = np.empty(num_bytes, dtype=np.uint8)
            self.pool.append(memory)
        self.queue(partial(ctypes.memset, memory.ctypes.data, self.random.randrange(256), num_bytes))
        return torch.from_numpy(memory).view(dtype).view(shape)

    def queue(self, work: Callable[[], Any], stream: str = "compute") -> None:
        self.queues[stream].append(("work", work))

    def move(self, destination: Tensor, source: Tensor, stream: str = "compute") -> None:
        self.queue(partial(ctypes.memmove, destination.data_ptr(), source.data_ptr(), source.nbytes), stream)

    def mark(self, stream: str = "compute") -> Event:
        event = Event()
        self.queues[stream].append(("record", event))
        return event

    def wait(self, event: Event, stream: str | None = None) -> None:
        self.queues[stream or "compute"].append(("wait", event))

    def copy(self, direction: str, pairs: list[tuple[Tensor, Tensor]], after: list[Event | None]) -> Event:
        for event in after:
            if event is not None:
                self.wait(event, direction)
        for destination, source in pairs:
            self.move(destination, source, direction)
        return self.mark(direction)

    def run(self, most: int = 10**9) -> None:
        """Do what is queued, or the first of it; streams that wait for one another are a failure."""
        # Some streams are slow, so that they fall far behind the others.
        speed = {stream: self.random.choice([0.01, 1.0]) for stream in self.queues}
        for _ in range(most):
            if not any(self.queues.values()):
                return
            able = [name for name, queue in self.queues.items() if queue and self._able(*queue[0])]
            assert able, "streams wait for one another"
            name = self.random.choices(able, [speed[name] for name in able])[0]
            kind, what = self.queues[name].pop(0)
            if kind == "record":
                what.done = True
            elif kind == "work":
                what()

    @staticmethod
    def _able(kind: str, what: Any) -> bool:
        return kind != "wait" or what.done
