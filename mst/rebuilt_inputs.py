"""Layers' inputs that were not kept: made again by running layers below once more, and where they wait."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .checkpoint_store import CheckpointStore, Kept
from .segments import rebuilt_on_host


@dataclass(frozen=True)
class Rerun:
    """How a layer is called again, to rebuild its output without grad, as it was called in forward."""

    module: nn.Module
    forward: Callable
    """The module's forward at that time: the handle may have been undone since."""
    shape: torch.Size
    args: tuple
    kwargs: dict
    autocast: tuple[str, torch.dtype] | None
    """Device and dtype, if autocast was on."""

    def __call__(self, flat: Tensor) -> Tensor:
        """From `(B x S, D)` to the same."""
        device, dtype = self.autocast or (flat.device.type, None)
        autocast = torch.autocast(device, dtype, enabled=dtype is not None, cache_enabled=False)
        # By the module itself, so that hooks that gather its weights (ZeRO-3) fire.
        with torch.no_grad(), autocast, _with_forward(self.module, self.forward):
            out = self.module(flat.view(self.shape), *self.args, **self.kwargs)
        return out.reshape(flat.shape)


@contextmanager
def _with_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    of_instance = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if of_instance is None:
            del module.forward
        else:
            module.forward = of_instance


class RebuiltInputs:
    """What was rebuilt in a pass, until each layer's backward takes its own.

    It waits in the room that inputs have left which forward kept on the host, so that the host never holds
    more than it did then; what finds no room there waits on the device.
    """

    def __init__(self, store: CheckpointStore | None) -> None:
        self._store = store
        self._waiting: dict[int, Tensor | Kept] = {}
        self._slots: list[weakref.ref[Kept]] = []

    def __contains__(self, index: int) -> bool:
        return index in self._waiting

    def add_slot(self, kept: Kept) -> None:
        """An input that forward keeps on the host: once it is gone, another may take its room."""
        self._slots.append(weakref.ref(kept))

    def take(self, index: int) -> Tensor | Kept:
        """The input of a layer, which is freed with whoever takes it."""
        return self._waiting.pop(index)

    def make(
        self, start: int, reruns: Sequence[Rerun], first: Callable[[], Tensor], below: Kept | None
    ) -> None:
        """Run layers again, and keep what the one above each of them begins with.

        Args:
            start: The first of them.
            reruns: Of these layers.
            first: Gives the first one's input, `(B x S, D)`; a caller that had it would hold on to it.
            below: The same on the host, if it is there.
        """
        # Backward frees inputs in the same order on all ranks; where the graph is kept it frees none.
        on_host = rebuilt_on_host(start, start + len(reruns) + 1, self._free_slots())
        hidden = first()
        for index, rerun in enumerate(reruns, start + 1):
            hidden = rerun(hidden)
            if index in on_host:
                self._waiting[index] = below = self._store.keep(hidden, alike(below, hidden))
                continue
            self._waiting[index] = hidden
            if below is not None:  # as late as this: its copy has had the time of a layer
                below.settle()
                below = None

    def _free_slots(self) -> int:
        gone = sum(slot() is None for slot in self._slots)
        return gone - sum(isinstance(waiting, Kept) for waiting in self._waiting.values())


def alike(kept: Kept | None, tensor: Tensor) -> Kept | None:
    """What was kept, if it is of the same shape and dtype: then one may come back into the other's memory."""
    return kept if kept is not None and (kept.shape, kept.dtype) == (tensor.shape, tensor.dtype) else None
