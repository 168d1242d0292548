"""One step of one process, moment by moment: what stays through it, and the moments outside of the layers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from .knobs import Knobs
from .memory_head import embedding_backward, head_memory
from .memory_held import Held, held
from .memory_sizes import Sizes
from .workload import Workload

HEAD, HEAD_BACKWARD = "LM head", "backward of the LM head"
EMBEDDING, OPTIMIZER = "backward of the embedding", "optimizer step"
HEAD_REDUCTION, WHOLE_REDUCTION = "reduction of the LM head's gradient", "reduction of all gradients"

LIBRARY_BYTES = 64 * 2**20
"""Workspaces of cuBLAS and cuBLASLt, 32 MiB each on Hopper, which PyTorch's allocator gives out."""
TOKEN_BYTES = 48
"""Of each token throughout a step: its id, label and position, int64, shifted and flattened."""

Parts = tuple[tuple[str, int], ...]


class Moment(NamedTuple):
    """What is alive at one moment, beside what is held throughout the step.

    Attributes:
        name: Where in the step.
        parts: Name and bytes of each.
        in_backward: It is in backward, or behind it.
        has_sums: Some gradient has been reduced already.
        has_buffers: The buffers that backward has are there.
    """

    name: str
    parts: Parts
    in_backward: bool = True
    has_sums: bool = True
    has_buffers: bool = True


class Step:
    """What all moments of a step have in common."""

    def __init__(self, work: Workload, knobs: Knobs, gpu: str) -> None:
        self.work, self.knobs, self.gpu = work, knobs, gpu
        self.sizes = Sizes.of(work, knobs)
        self.held: Held = held(work, knobs)
        layers = range(work.num_layers)
        self.layer_gradients = [self._gradients_of(layer) for layer in layers]

    def outside(self, kept: Parts) -> Iterator[Moment]:
        """The moments at which no layer works; `kept` by all layers at the end of forward."""
        work, knobs, sizes, found = self.work, self.knobs, self.sizes, self.held
        head = head_memory(work, knobs, sizes, self.gpu)
        for name, size in ((HEAD, head.forward), (HEAD_BACKWARD, head.backward)):
            parts = (
                ("gradients", self.gradients_before),
                ("gathered weights", found.gathered_head),
                *kept,
                ("last hidden states", sizes.hidden),
                ("LM head and loss", size),
            )
            yield Moment(name, parts, in_backward=knobs.accumulation > 1)
        if found.head_reduction:
            parts = (*kept, ("last hidden states", 3 * sizes.hidden), ("reduction", found.head_reduction))
            yield Moment(HEAD_REDUCTION, parts)
        # A tied weight's gradient from the head has waited for this one.
        embedding = self.embedding_gradient * (2 if work.tied else 1)
        others = 0
        if found.keeps_gradients:
            others = self.all_gradients - (0 if self.gradients_before else self.embedding_gradient)
        summed = self.embedding_gradient - embedding  # once both are one
        at_work = max(embedding_backward(work, sizes), summed + found.embedding_reduction)
        yield Moment(
            EMBEDDING,
            (
                ("gradients", others + found.lingering + embedding),
                ("embedding's backward", sizes.hidden + at_work),
            ),
        )
        if found.whole_reduction:
            parts = (("gradients", self.all_gradients), ("reduction", found.whole_reduction))
            yield Moment(WHOLE_REDUCTION, parts)
        whole = self.all_gradients if found.steps_from_gradients else 0
        yield Moment(OPTIMIZER, (("gradients", whole), ("optimizer's step", found.step)), has_buffers=False)

    def throughout(self, moment: Moment) -> Parts:
        """What is held at a moment in any case."""
        found = self.held
        late_sums, buffers = self._of_backward(moment)
        return (
            ("weights", found.weights),
            ("float32 master weights", found.masters),
            ("optimizer states", found.states),
            ("gradient sums", found.sums + late_sums),
            ("communication buffers", found.buffers + buffers),
            ("batch and rotary embedding", self._tokens),
            ("library workspaces", LIBRARY_BYTES),
        )

    def total(self, moment: Moment) -> int:
        """Bytes at a moment."""
        return self._always + sum([size for _, size in moment.parts]) + sum(self._of_backward(moment))

    def _of_backward(self, moment: Moment) -> tuple[int, int]:
        found = self.held
        if not moment.in_backward:
            return 0, 0
        if found.whole_reduction:  # which is behind all that layers do
            has_sums = moment.name in (WHOLE_REDUCTION, OPTIMIZER)
        else:
            has_sums = moment.has_sums or self.knobs.accumulation > 1
        late_sums = found.late_sums if has_sums else 0
        return late_sums, found.backward_buffers if moment.has_buffers else 0

    @cached_property
    def _always(self) -> int:
        found = self.held
        stays = found.weights + found.masters + found.states + found.sums + found.buffers
        return stays + self._tokens + LIBRARY_BYTES

    @cached_property
    def _tokens(self) -> int:
        """Ids, labels, positions, and cosines and sines of each token."""
        width = self.work.layer.heads.width
        each = TOKEN_BYTES + 2 * width * self.work.weight_bytes(self.knobs.zero_stage)
        return self.sizes.tokens * each

    @property
    def gradients_before(self) -> int:
        """Of micro-batches before this one, where the model keeps them."""
        return self.all_gradients if self.held.keeps_gradients and self.knobs.accumulation > 1 else 0

    @cached_property
    def gradients_of_head(self) -> int:
        """What there is of gradients when the last layer's backward begins."""
        waiting = self.embedding_gradient if self.work.tied else 0
        if not self.held.keeps_gradients:
            return waiting
        return self.gradients_before + waiting if self.gradients_before else self.head_gradient

    @cached_property
    def embedding_gradient(self) -> int:
        """Of the embedding; a tied one is the head's too."""
        return self._bytes_outside("embedding")

    @cached_property
    def head_gradient(self) -> int:
        """Of the LM head, the final norm, and whatever else is outside of the layers and no embedding."""
        tied = self.embedding_gradient if self.work.tied else 0
        return self._bytes_outside("head", "norm", "other", "adapter") + tied

    @cached_property
    def all_gradients(self) -> int:
        """Of every weight, in the dtype that it is kept in."""
        embedding = 0 if self.work.tied else self.embedding_gradient
        return self.head_gradient + embedding + sum(self.layer_gradients)

    def _gradients_of(self, layer: int) -> int:
        work = self.work
        adapters = work.numel("adapter", layer=layer, trained=True)
        own = work.numel(layer=layer, trained=True) - adapters
        return own * self._gradient_bytes + adapters * work.adapter_bytes(self.knobs.zero_stage)

    def _bytes_outside(self, *kinds: str) -> int:
        return self.work.numel(*kinds, layer=None, trained=True) * self._gradient_bytes

    @cached_property
    def _gradient_bytes(self) -> int:
        return self.held.gradient_bytes or self.work.weight_bytes(self.knobs.zero_stage)
