"""One step as the GPU and its driver saw it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from .gaps import Event


class Recording(NamedTuple):
    """What was seen of a step, in nanoseconds of one clock.

    Attributes:
        on_gpu: Kernels and copies, by start.
        host_calls: Calls of the driver, of all threads, and what the profiler itself cost.
        start: When the step was called.
        end: When the GPU had done it.
    """

    on_gpu: list[Event]
    host_calls: list[Event]
    start: int
    end: int


def record(step: Callable[[], object], device: torch.device) -> Recording:
    """Run a step once on a GPU.

    A small kernel before it and one after it mark its ends on the GPU's own clock; they are not in the
    recording. The driver's calls are recorded, PyTorch's own on the CPU are not: they would slow the step.
    """
    from torch.profiler import ProfilerActivity, profile

    mark = torch.zeros(1, device=device)
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        mark.add_(1)
        torch.cuda.synchronize(device)
        step()
        torch.cuda.synchronize(device)
        mark.add_(1)
        torch.cuda.synchronize(device)
    # profiler.events() would make a heavy Python object of each of up to a million events.
    found = profiler.profiler.kineto_results.events()
    index = torch.cuda.current_device() if device.index is None else device.index
    return between_marks(found, index)


def between_marks(found: Iterable[Any], device_index: int) -> Recording:
    """A recording of the profiler's events; the first and the last on the GPU are its ends.

    Raises:
        RuntimeError: The profiler saw no kernels.
    """
    on_gpu, host_calls = [], []
    for event in found:
        start, name = event.start_ns(), event.name()
        seen = Event(start, start + event.duration_ns(), name)
        if event.device_type() != torch.autograd.DeviceType.CUDA:
            host_calls.append(seen)
        # Annotations (nccl:all_gather) have a length, too, but nothing runs for them.
        elif event.device_index() == device_index and not (
            event.is_user_annotation() or name.startswith("nccl:")
        ):
            on_gpu.append(seen)
    if len(on_gpu) < 2:
        raise RuntimeError(
            "torch.profiler saw no kernels on the GPU. Another profiler may hold it (Nsight, DCGM), or this "
            "build of PyTorch has no CUPTI; run without the profile."
        )
    on_gpu.sort()
    last = max(on_gpu, key=lambda event: event.end)
    start, end = on_gpu[0].end, last.start
    inside = [event for event in on_gpu[1:] if event is not last]
    return Recording(inside, [call for call in host_calls if call.end > start], start, end)
