"""What each layer keeps for its backward, and where: on the GPU, in host memory, or nowhere (rebuilt)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .checkpoint_store import CheckpointStore, Fetched, Kept
from .gradient_owner import GradientOwner
from .pinned_slab import PinnedSlab
from .placement import Placement
from .rebuilt_inputs import RebuiltInputs, Rerun, alike


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


KeptOfAttention = Literal["nothing", "output", "all"]
"""Of a layer: its output and log-sum-exp, or with them all that backward would else make again."""


@dataclass(frozen=True)
class SavedAttention:
    """Where attention's output and log-sum-exp are kept: they spare attention's second forward."""

    gpu_layers: int = 0
    """Of the last so many layers on the GPU."""
    host: bool = False
    """Of all others in host memory; else theirs are not kept."""
    everything: bool = False
    """Of the layers on the GPU queries, keys, values and what the MLP half starts from, too."""

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


@dataclass
class Contents:
    """Tensors by name: on the device, for autograd to save, and on the host."""

    tensors: list[Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    host: dict[str, Kept] = field(default_factory=dict)

    def copy(self) -> Contents:
        """The same tensors under the same names."""
        return Contents(list(self.tensors), list(self.names), dict(self.host))


class LayerMemory:
    """What one call of a layer left behind: tensors that autograd saves, and tensors on the host."""

    def __init__(self, this_pass: Pass, index: int) -> None:
        self._pass, self.index = this_pass, index
        self.contents = Contents()

    def put(self, name: str, tensor: Tensor, *, on_host: bool) -> None:
        """Keep one tensor."""
        contents, last = self.contents, self._pass.last_on_host
        if on_host:
            below = alike(last.get(name), tensor)
            contents.host[name] = last[name] = self._pass.store.keep(tensor, below)
        else:
            last.pop(name, None)
            contents.tensors.append(tensor)
            contents.names.append(name)

    def hand_over(self) -> list[Tensor]:
        """The device tensors, for autograd to save: from here on it frees them with the layer's backward."""
        tensors, self.contents.tensors = self.contents.tensors, []
        return tensors

    def settle(self) -> None:
        """At the end of the layer's forward: its tensors may be freed from here on."""
        for kept in self.contents.host.values():
            kept.settle()

    def free_host(self) -> None:
        """After a backward that keeps no graph: the host's memory goes, as what autograd saves does."""
        self.contents.host.clear()

    def open(self, saved: Sequence[Tensor]) -> OpenMemory:
        """What backward works with; `saved` are the tensors handed over, as autograd hands them back."""
        return OpenMemory(self, dict(zip(self.contents.names, saved, strict=True)))

    def rows(self, name: str, saved: dict[str, Tensor]) -> Rows | None:
        """One of the tensors kept, or None."""
        if name in saved:
            return Rows(saved[name])
        return self._fetch(self.contents.host[name]) if name in self.contents.host else None

    def input(self, saved: dict[str, Tensor]) -> Rows:
        """The layer's input."""
        this_pass, index = self._pass, self.index
        if this_pass.start_of(index) == index:
            return self.rows("input", saved)
        if index not in this_pass.rebuilt:
            on_host = self.contents.host.get("input")
            this_pass.rebuild(index, lambda: self.rows("input", saved).whole(), on_host)
        # Taken, so that it is freed with this layer; a second backward rebuilds it.
        rebuilt = this_pass.rebuilt.take(index)
        return Rows(rebuilt) if isinstance(rebuilt, Tensor) else self._fetch(rebuilt)

    def _fetch(self, kept: Kept) -> Rows:
        fetched = self._pass.store.fetch(kept)
        return Rows(fetched.tensor, fetched)


def log_sum_name(group: int) -> str:
    """What the log-sum-exp of a group of heads is kept under."""
    return f"log_sum_{group}"


class OpenMemory:
    """A layer's input, and what was kept of its attention."""

    def __init__(self, memory: LayerMemory, saved: dict[str, Tensor]) -> None:
        self.input = memory.input(saved)
        self.freed_inputs = memory._pass.freed_inputs(memory.index)
        self.attended: Rows | None = None
        self.projected: Tensor | None = saved.get("projected")
        self.joined: Tensor | None = saved.get("joined")
        self._log_sums: list[Rows] = []
        if memory._pass.keeps_of_attention(memory.index) != "nothing":
            self.attended = memory.rows("attended", saved)
            while (rows := memory.rows(log_sum_name(len(self._log_sums)), saved)) is not None:
                self._log_sums.append(rows)

    @property
    def num_log_sums(self) -> int:
        """Groups of heads whose log-sum-exp was kept."""
        return len(self._log_sums)

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
        """`first` is the layer that it begins with: those below want no gradient, or are not called."""
        self.store = store
        # Weak, so that what a layer keeps goes with that layer.
        self.last_on_host: weakref.WeakValueDictionary[str, Kept] = weakref.WeakValueDictionary()
        self.rebuilt = RebuiltInputs(store)
        self._places, self._num_layers, self._first = places, num_layers, first
        self._reruns: list[Rerun] = []
        self._starts: list[int] = []
        self._start: Contents | None = None
        self._given: tuple[StorageWeakRef, int] | None = None

    @property
    def next_index(self) -> int:
        """The layer that is to be called next."""
        return self._first + len(self._reruns)

    def keeps_of_attention(self, index: int) -> KeptOfAttention:
        """What is kept of a layer's attention."""
        attention = self._places.attention
        where = attention.where(index, self._num_layers)
        if where is None:
            return "nothing"
        return "all" if attention.everything and where == "gpu" else "output"

    def freed_inputs(self, index: int) -> int:
        """Inputs fewer than after forward that are on the GPU, by the time of this layer's backward."""
        return self._places.inputs.freed_inputs(index, self._num_layers)

    def start_of(self, index: int) -> int:
        """The nearest layer at or below whose input is kept."""
        return self._starts[index - self._first]

    def enter(self, rerun: Rerun, hidden: Tensor) -> LayerMemory:
        """The next layer is called on `(B x S, D)`: keep that, or what it can be rebuilt from."""
        index = self.next_index
        self._reruns.append(rerun)
        memory = LayerMemory(self, index)
        placement = self._places.inputs
        if placement.is_kept(index) or not self._is_given(hidden):
            on_host = placement.place(index, self._num_layers) == "host"
            memory.put("input", hidden, on_host=on_host)
            if on_host:
                self.rebuilt.add_slot(memory.contents.host["input"])
            self._start = memory.contents.copy()
            self._starts.append(index)
        else:
            memory.contents = self._start.copy()
            self._starts.append(self._starts[-1])
        if self.next_index == self._num_layers:
            self._start = None  # autograd alone says how long a tensor lives
        return memory

    def gave(self, out: Tensor) -> None:
        """The layer's output: the next layer can be rebuilt from it, if it is given this and no other."""
        self._given = StorageWeakRef(out.untyped_storage()), out._version

    def _is_given(self, hidden: Tensor) -> bool:
        """Whether `hidden` is what the layer before gave, unchanged, under whatever view."""
        if self._given is None:
            return False
        storage, version = self._given
        same = storage.cdata == StorageWeakRef(hidden.untyped_storage()).cdata and not storage.expired()
        return same and hidden._version == version

    def keep_attention(self, memory: LayerMemory, kept: dict[str, Tensor]) -> None:
        """Keep attention's output, each group's log-sum-exp, and what else there is."""
        on_host = self._places.attention.where(memory.index, self._num_layers) == "host"
        for name, tensor in kept.items():
            memory.put(name, tensor, on_host=on_host)

    def rebuild(self, index: int, kept: Callable[[], Tensor], on_host: Kept | None) -> None:
        """Make the inputs up to this layer's again, from the nearest that was kept, and maybe on the host."""
        start = self.start_of(index)
        self.rebuilt.make(start, self._reruns[start - self._first : index - self._first], kept, on_host)


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
        places = self._choose(hidden, attended_width)
        layers = range(index, self._num_layers)
        # The first layer's input is kept in any case.
        kept = [layer for layer in layers if layer == index or places.inputs.is_kept(layer)]
        num_inputs = sum(places.inputs.place(layer, self._num_layers) == "host" for layer in kept)
        num_saved = sum(places.attention.where(layer, self._num_layers) == "host" for layer in layers)
        num_bytes = num_inputs * hidden.nbytes
        num_bytes += num_saved * hidden.shape[0] * attended_width * hidden.itemsize
        if num_bytes and (self._store is None or self._store.slab.device != hidden.device):
            self._store = CheckpointStore(PinnedSlab(hidden.device))
        if num_bytes:
            self._store.slab.reserve(num_bytes)
        return Pass(places, self._num_layers, self._store, first=index)
