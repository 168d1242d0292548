"""Seconds and MiB of a function, on a GPU or (seconds alone) on a CPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from lm_head_data import Problem
from lm_head_truth import Gradients
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
MAX_REPEATS = 20
BUDGET_S = 0.12
BARE_LOGITS_BYTES = 4 * 2**30


def run_step(loss: Loss, problem: Problem) -> Gradients:
    """Forward and backward; the gradients are those in `.grad`, not copies."""
    problem.hidden.grad = problem.weight.grad = None
    value = loss(problem.hidden, problem.weight, problem.labels)
    value.backward()
    return Gradients(value.detach(), problem.hidden.grad, problem.weight.grad)


def seconds(function: Callable[[], Any], min_repeats: int) -> float:
    """Time of a warm function, run back to back: a GPU under load is slower than a rested one."""
    timer = _gpu_s if torch.cuda.is_available() else _cpu_s
    first = timer(function, 1)
    return timer(function, max(min_repeats, min(MAX_REPEATS, int(BUDGET_S / max(first, 1e-9)))))


def seconds_beside(
    function: Callable[[], Any], yardstick: Callable[[], Any], min_repeats: int
) -> tuple[float, float]:
    """Time of a function, and of the yardstick right before and after it (their mean)."""
    before = seconds(yardstick, min_repeats)
    took = seconds(function, min_repeats)
    return took, (before + seconds(yardstick, min_repeats)) / 2


def peak_mib(function: Callable[[], Any], device: str) -> float | None:
    """Peak of what is allocated while the function runs, over what was before; None on a CPU."""
    if device == "cpu":
        return None
    free(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def bare_matmul(problem: Problem) -> Callable[[], None]:
    """G: `hidden @ weight.T` into memory that is there already, in as few parts as its bytes allow."""
    hidden, columns = problem.hidden.detach(), problem.weight.detach().T
    row_bytes = columns.shape[1] * hidden.element_size()
    parts = hidden.chunk(-(-len(hidden) * row_bytes // BARE_LOGITS_BYTES))
    logits = hidden.new_empty(len(parts[0]), columns.shape[1])

    def run() -> None:
        for part in parts:
            torch.mm(part, columns, out=logits[: len(part)])

    return run


def free(device: str) -> None:
    """Give back to the device what nothing holds."""
    if device != "cpu":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _gpu_s(function: Callable[[], Any], repeats: int) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        function()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3 / repeats


def _cpu_s(function: Callable[[], Any], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - started) / repeats
