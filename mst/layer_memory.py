"""What each layer keeps for its backward, and where: on the GPU, in host memory, or nowhere (rebuilt)."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .checkpoint_store import CheckpointStore, Fetched, Kept
from .pinned_slab import PinnedSlab
from .placement import Placement


class Rows:
    """A tensor `(rows, ...)` that may still be on its way from the host."""

    def __init__(self, tensor: Tensor, fetched: Fetched | None = None) -> None:
        self._tensor: Tensor | None = tensor
        self._fetched = fetched
        self.shape, self.device = tensor.shape, tensor.device

    def __getitem__(self, tile: slice) -> Tensor:
        """A tile; the compute stream waits for it."""
        if self._fetched is not None:
            self._fetched.wait(tile.stop)
        return self._tensor[tile]

    def whole(self) -> Tensor:
        """All rows."""
        return self._tensor if self._fetched is None else self._fetched.whole()

    def writable(self) -> Tensor | None:
        """The tensor, if it may be written over: then it is a copy of what the host keeps."""
        return None if self._fetched is None else self._tensor

    def release(self, tile: slice) -> None:
        """These rows are used no more: those of the layer below may take their place."""
        if self._fetched is not None:
            self._fetched.release(tile.start, tile.stop)


@dataclass(frozen=True)
class SavedAttention:
    """Where attention's output and log-sum-exp are kept: they spare attention's second forward."""

    gpu_layers: int = 0
    """Of the last so many layers on the GPU."""
    host: bool = False
    """Of all others in host memory; else theirs are not kept."""

    def where(self, index: int, num_layers: int) -> str | None:
        """ "gpu", "host" or None for a layer."""
        if index >= num_layers - self.gpu_layers:
            return "gpu"
        return "host" if self.host else None


@dataclass(frozen=True)
class Places:
    """Where a pass keeps things."""

    inputs: Placement
    attention: SavedAttention


@dataclass(frozen=True)
class Rerun:
    """How a layer is called again, to rebuild its output without grad."""

    module: nn.Module
    shape: torch.Size
    args: tuple
    kwargs: dict

    def __call__(self, flat: Tensor) -> Tensor:
        """From `(B x S, D)` to the same."""
        with torch.no_grad():
            out = self.module(flat.view(self.shape), *self.args, **self.kwargs)
        return out.reshape(flat.shape)


class LayerMemory:
    """What one call of a layer left behind: tensors that autograd saves, and tensors on the host."""

    def __init__(self, this_pass: Pass, index: int) -> None:
        self._pass, self.index = this_pass, index
        self.tensors: list[Tensor] = []
        self._host: dict[str, Kept] = {}
        self._names: list[str] = []

    def put(self, name: str, tensor: Tensor, *, on_host: bool) -> None:
        """Keep one tensor."""
        if on_host:
            below = self._pass.last_on_host.get(name)
            if below is not None and (below.shape, below.dtype) != (tensor.shape, tensor.dtype):
                below = None
            self._host[name] = self._pass.last_on_host[name] = self._pass.store.keep(tensor, below)
        else:
            self._pass.last_on_host.pop(name, None)
            self.tensors.append(tensor)
            self._names.append(name)

    def share(self, start: LayerMemory) -> None:
        """Keep what the start of a segment keeps: this layer's input is rebuilt from it."""
        self.tensors, self._names = list(start.tensors), list(start._names)
        self._host = dict(start._host)

    def copy(self) -> LayerMemory:
        """The same tensors under the same names."""
        copied = LayerMemory(self._pass, self.index)
        copied.share(self)
        return copied

    def settle(self) -> None:
        """At the end of the layer's forward: its tensors may be freed from here on."""
        for kept in self._host.values():
            kept.settle()

    def open(self, saved: Sequence[Tensor]) -> OpenMemory:
        """What backward works with; `saved` are `tensors` as autograd hands them back."""
        return OpenMemory(self, dict(zip(self._names, saved, strict=True)))

    def rows(self, name: str, saved: dict[str, Tensor]) -> Rows | None:
        """One of the tensors kept, or None."""
        if name in saved:
            return Rows(saved[name])
        if name not in self._host:
            return None
        fetched = self._pass.store.fetch(self._host[name])
        return Rows(fetched.tensor, fetched)

    def input(self, saved: dict[str, Tensor]) -> Rows:
        """The layer's input."""
        start = self._pass.start_of(self.index)
        if start == self.index:
            return self.rows("input", saved)
        if self.index not in self._pass.rebuilt:
            self._pass.rebuild(start, self.index, self.rows("input", saved).whole())
        # Taken, so that it is freed with this layer; a second backward rebuilds it.
        return Rows(self._pass.rebuilt.pop(self.index))


class OpenMemory:
    """A layer's input, and attention's output and log-sum-exp where they were kept."""

    def __init__(self, memory: LayerMemory, saved: dict[str, Tensor]) -> None:
        self.input = memory.input(saved)
        self.attended: Rows | None = None
        self._log_sums: list[Rows] = []
        if memory._pass.saves_attention(memory.index):
            self.attended = memory.rows("attended", saved)
            while (rows := memory.rows(f"log_sum_{len(self._log_sums)}", saved)) is not None:
                self._log_sums.append(rows)

    def log_sums(self) -> list[Tensor]:
        """Of each group of heads."""
        return [rows.whole() for rows in self._log_sums]

    def release(self, tile: slice) -> None:
        """This tile is done with."""
        self.input.release(tile)
        if self.attended is not None:
            self.attended.release(tile)

    def release_log_sums(self) -> None:
        """Attention's backward is done with them."""
        for rows in self._log_sums:
            rows.release(slice(0, rows.shape[0]))


class Pass:
    """One forward pass through the layers: where their inputs are, and how to rebuild those that are not."""

    def __init__(
        self, places: Places, num_layers: int, store: CheckpointStore | None, *, first: int = 0
    ) -> None:
        """`first` is the layer that it begins with."""
        self.store = store
        self.last_on_host: dict[str, Kept] = {}
        self.rebuilt: dict[int, Tensor] = {}
        self._places, self._num_layers, self._first = places, num_layers, first
        self._reruns: list[Rerun] = []
        self._start: LayerMemory | None = None

    @property
    def next_index(self) -> int:
        """The layer that is to be called next."""
        return self._first + len(self._reruns)

    def saves_attention(self, index: int) -> bool:
        """Whether attention's output is kept."""
        return self._places.attention.where(index, self._num_layers) is not None

    def start_of(self, index: int) -> int:
        """The nearest layer at or below whose input is kept."""
        return index - index % self._places.inputs.every

    def enter(self, rerun: Rerun, hidden: Tensor) -> LayerMemory:
        """The next layer is called on `(B x S, D)`: keep that, or what it can be rebuilt from."""
        index = self.next_index
        self._reruns.append(rerun)
        memory = LayerMemory(self, index)
        where = self._places.inputs.where(index, self._num_layers)
        if where == "rebuild":
            memory.share(self._start)
        else:
            memory.put("input", hidden, on_host=where == "host")
            self._start = memory.copy()
        if self.next_index == self._num_layers:
            self._start = None  # autograd alone says how long a tensor lives
        return memory

    def keep_attention(self, memory: LayerMemory, attended: Tensor, log_sums: list[Tensor]) -> None:
        """Keep attention's output and each group's log-sum-exp."""
        on_host = self._places.attention.where(memory.index, self._num_layers) == "host"
        memory.put("attended", attended, on_host=on_host)
        for number, log_sum in enumerate(log_sums):
            memory.put(f"log_sum_{number}", log_sum, on_host=on_host)

    def rebuild(self, start: int, stop: int, hidden: Tensor) -> None:
        """Run layers `start` to `stop` again, keeping what each of those above begins with."""
        for index in range(start, stop):
            hidden = self.rebuilt[index + 1] = self._reruns[index - self._first](hidden)


class GradientOwner:
    """Tells gradients that one layer's backward made for the next, and nobody else holds.

    Such a gradient may be written over; any other must not: autograd may hand the same tensor to somebody
    else, or a hook may have kept it.
    """

    def __init__(self) -> None:
        self._made: Callable[[], Tensor | None] = lambda: None
        self._version = 0
        self._free_references = _free_references()

    @staticmethod
    def references(grad: Tensor) -> int:
        """References to a gradient; to be asked at the start of a backward, for `owns`."""
        return sys.getrefcount(grad)

    def own(self, grad: Tensor) -> None:
        """Remember a gradient that is about to be returned to autograd."""
        self._made, self._version = weakref.ref(grad), grad._version

    def owns(self, grad: Tensor, references: int) -> bool:
        """Whether `grad` is that gradient, unchanged, and held by autograd and its caller alone."""
        same = self._made() is grad and grad._version == self._version
        return same and grad.is_contiguous() and references <= self._free_references


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, found: list[int]) -> Tensor:
        ctx.found = found
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        ctx.found.append(GradientOwner.references(grad))
        return grad.clone(), None


@functools.cache
def _free_references() -> int:
    """References to a gradient that nobody holds but autograd and the backward it is given to.

    Counted on a gradient of that kind: the number differs between versions of Python.
    """
    found: list[int] = []
    with torch.enable_grad():
        x = torch.zeros(1, requires_grad=True)
        torch.autograd.grad(_Counted.apply(_Counted.apply(x, found), found).sum(), x)
    return found[-1]


class Chain:
    """The layers of one model in their order, and the memory that they share."""

    def __init__(self, num_layers: int, choose: Callable[[Tensor, int], Places]) -> None:
        """`choose` says, from the first layer's input and attention's width, where things are kept."""
        self.gradients = GradientOwner()
        self._num_layers, self._choose = num_layers, choose
        self._store: CheckpointStore | None = None
        self._pass: Pass | None = None

    def enter(
        self, index: int, rerun: Rerun, hidden: Tensor, attended_width: int
    ) -> tuple[Pass, LayerMemory]:
        """A layer is called on `(B x S, D)` and will want a backward."""
        if self._pass is None or index == 0 or index != self._pass.next_index:
            self._pass = self._new_pass(index, hidden, attended_width)
        this_pass = self._pass
        memory = this_pass.enter(rerun, hidden)
        if index == self._num_layers - 1:
            self._pass = None  # from here on it lives as long as its graph
        return this_pass, memory

    def _new_pass(self, index: int, hidden: Tensor, attended_width: int) -> Pass:
        if index != 0:
            # A layer by itself: there is nothing below to prefetch or to rebuild from.
            places = Places(Placement(gpu_layers=0, host=False), SavedAttention())
            return Pass(places, self._num_layers, None, first=index)
        places = self._choose(hidden, attended_width)
        num_inputs = places.inputs.count("host", self._num_layers)
        num_bytes = num_inputs * hidden.nbytes
        if places.attention.host:
            num_saved = self._num_layers - places.attention.gpu_layers
            num_bytes += num_saved * hidden.shape[0] * attended_width * hidden.itemsize
        if num_bytes and (self._store is None or self._store.slab.device != hidden.device):
            self._store = CheckpointStore(PinnedSlab(hidden.device))
        if num_bytes:
            self._store.slab.reserve(num_bytes)
        return Pass(places, self._num_layers, self._store)
