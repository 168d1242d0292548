"""A whole training step of one rung of `end_to_end.py`: weights, gradients, clipping, optimizer."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from decoder_model import build, draw_tokens, fixed_attention, free, host_gib
from end_to_end_rungs import Rung
from torch import Tensor, nn
from torch.optim import Optimizer

from longseq.apollo import Apollo, parameter_groups
from longseq.apollo.in_backward import InBackwardHandle, step_in_backward
from longseq.launch.bench.limits import hold_allocator

LR = 1e-6
CLIP_NORM = 1.0
SMALL_TOKENS = 1024
PIN_THREAD = "longseq-pin"
"""The name of those of mst/pinned_memory.py, which pin what a pass over all layers will want."""
GIB = 2**30


@dataclass(frozen=True)
class Taken:
    """What a step took."""

    seconds: float
    loss: float
    norm: float
    """Of all gradients, before clipping."""
    peak_bytes: int | None
    """Allocated; None on a CPU, as the next."""
    reserved_bytes: int | None
    host_bytes: int
    """Pinned for what waits in host memory."""


def finite(taken: Taken) -> Taken:
    """The same, if its loss and gradients are numbers.

    Raises:
        ArithmeticError: They are not.
    """
    if not (math.isfinite(taken.loss) and math.isfinite(taken.norm)):
        raise ArithmeticError(f"loss {taken.loss}, gradient norm {taken.norm}")
    return taken


class Training:
    """A model of a rung and its optimizer."""

    def __init__(self, rung: Rung, shape: str, num_layers: int, device: str, host_bytes: int) -> None:
        """
        Raises:
            MissingError: This environment has not what the rung needs.
        """
        self.rung = rung
        self.model = build(shape, num_layers, device)
        self.ready = rung.prepare(self.model, host_bytes)
        self.optimizer = _optimizer(rung, self.model)
        self._in_backward = self._step_in_backward()
        self._last_tokens: int | None = None

    def step(self, num_tokens: int, lr: float = 0.0) -> Taken:
        """Loss, gradients, and the update; at a rate of 0 all of it runs, and no weight moves."""
        if num_tokens != self._last_tokens:
            self.ready.prepared.forget()
            self._last_tokens = num_tokens
        ids = draw_tokens(self.model, num_tokens)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        _wait(ids)
        if ids.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        prepared = self.ready.prepared
        with fixed_attention(ids.device), prepared.around():
            loss = prepared.loss(ids)
            loss.backward()
        norm = self._update()
        _wait(ids)
        seconds = time.perf_counter() - started
        return Taken(
            seconds,
            loss.item(),
            norm.item(),
            torch.cuda.max_memory_allocated() if ids.is_cuda else None,
            torch.cuda.max_memory_reserved() if ids.is_cuda else None,
            round(host_gib() * GIB),
        )

    def warm_up(self, num_tokens: int) -> None:
        """A step through one layer and the head: their kernels are chosen for this length, and compiled.

        Host memory is pinned by then. An anchor that pins as it goes takes a whole step.
        """
        if self.rung.host_bytes is not None:
            self.step(num_tokens)
            return
        config = self.model.config
        num_layers = config.num_hidden_layers
        config.num_hidden_layers = 1
        try:
            self.step(num_tokens)
        finally:
            config.num_hidden_layers = num_layers
        for thread in threading.enumerate():
            if thread.name == PIN_THREAD:
                thread.join()

    def recover(self) -> None:
        """After a step that ended early: nothing of it is left."""
        self.model.zero_grad(set_to_none=True)
        if self._in_backward is not None:
            self._in_backward.remove()
            self._in_backward = self._step_in_backward()
        self._last_tokens = None
        free()
        # Layers know their pass until the next begins; a short one lets go of its tensors.
        self.step(SMALL_TOKENS)
        free()

    def state_bytes(self) -> int:
        """Of the optimizer's tensors on the device."""
        states = self.optimizer.state.values()
        return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))

    def _step_in_backward(self) -> InBackwardHandle | None:
        return step_in_backward(self.optimizer, self.model, clip_norm=CLIP_NORM) if self.rung.mini else None

    def _update(self) -> Tensor:
        """As `longseq.distributed.engine.LocalEngine` does it; the norm of the gradients."""
        if self._in_backward is not None:
            return self._in_backward.finish_step()
        params = [param for param in self.model.parameters() if param.grad is not None]
        # In float32: a sum of so many squares is lost in the gradients' own bf16.
        norms = torch._foreach_norm([param.grad for param in params], 2, dtype=torch.float32)
        norm = torch.linalg.vector_norm(torch.stack(norms))
        nn.utils.clip_grads_with_norm_(params, CLIP_NORM, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def _optimizer(rung: Rung, model: nn.Module) -> Optimizer:
    if rung.mini:
        groups = parameter_groups(model, embeddings="low_rank")
        return Apollo(groups, LR, scale_type="tensor", rounding="stochastic")
    on_gpu = next(model.parameters()).is_cuda
    return torch.optim.AdamW(model.parameters(), LR, weight_decay=0.0, fused=on_gpu or None)


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


class Card:
    """The GPU's memory: all of it, or what a smaller card would have."""

    def __init__(self, gib: float | None, device: str) -> None:
        self.on_gpu = device == "cuda"
        self._total: int | None = None
        if self.on_gpu and gib is not None:
            self._emulate(round(gib * GIB))

    def room_bytes(self) -> int | None:
        """What the allocator may hold at the most, now; None on a CPU."""
        if not self.on_gpu:
            return None
        free_bytes, _ = torch.cuda.mem_get_info()
        return free_bytes + torch.cuda.memory_reserved()

    def _emulate(self, total: int) -> None:
        """Give the allocator what a card of so many bytes would, and have the library see such a card."""
        if total >= torch.cuda.mem_get_info()[1]:
            return
        most = hold_allocator(total)
        # The planner of places asks this function, and knows of no fraction.
        torch.cuda.mem_get_info = lambda device=None: (most - torch.cuda.memory_reserved(), total)


@contextmanager
def undone(changes: list[Callable[[], Any]]) -> Iterator[list[Callable[[], Any]]]:
    """What is put into the list is called at the end, the last first."""
    try:
        yield changes
    finally:
        for change in reversed(changes):
            change()
