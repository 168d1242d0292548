"""Streamed layers over a model's depth: as backward goes down, inputs are freed and gradients come."""

from __future__ import annotations

from collections.abc import Iterator

from ...mst.decoder_layer import FREED_INPUTS
from .memory_layers import Keeps, LayerMemory, LayerMoment
from .memory_step import Moment, Parts, Step

FORWARD = "forward of a layer"
ATTENTION, MLP = "backward of a layer's attention", "backward of a layer's MLP"
PROJECTIONS, REDUCTION = "backward of a layer's projections", "reduction of a layer's gradients"
REBUILDING = "rebuilding of layers"


class StreamedLayers:
    """What each layer keeps for its backward, and its moments."""

    def __init__(self, step: Step) -> None:
        self.step, self.work, self.knobs, self.sizes = step, step.work, step.knobs, step.sizes
        self._moments: dict[tuple[int, Keeps], tuple[tuple[str, LayerMoment], ...]] = {}
        num = self.work.num_layers
        self.inputs = self.knobs.inputs.all_places(num)
        self.rebuilt_beside = self.knobs.inputs.rebuilt_beside(num)
        self.attention = [self.knobs.attention.where(index, num) for index in range(num)]
        self._layer = LayerMemory(self.work, self.knobs, self.sizes, self.knobs.head_groups)
        each = self.sizes.queries + self.sizes.log_sums
        if self.knobs.attention.everything:
            # Projected group by group, queries, keys and values are never there as a whole.
            each += self.sizes.heads if self._layer.at_once else 0
            each += 0 if self.work.layer.post_attention_norm else self.sizes.hidden
        self._saved_bytes = each

    @property
    def kept_by_all(self) -> Parts:
        """On the GPU, by the end of forward."""
        return self._kept(self.inputs.count("gpu"), self.attention.count("gpu"))

    def _kept(self, num_inputs: int, num_saved: int) -> Parts:
        return (
            ("layer inputs", num_inputs * self.sizes.hidden),
            ("saved attention", num_saved * self._saved_bytes),
        )

    def moments(self) -> Iterator[Moment]:
        """Forward of the last layer, then each layer's backward from the last to the first."""
        step, found = self.step, self.step.held
        yield self._forward()
        gradients = step.gradients_of_head
        num_inputs, num_saved = self.inputs.count("gpu"), self.attention.count("gpu")
        last = self.work.num_layers - 1
        lingering = 0
        for index in range(last, -1, -1):
            kept, fetched = self._kept(num_inputs, num_saved), self._fetched(index)
            if self.inputs[index] == "rebuild" and self.inputs[index + 1 : index + 2] != ("rebuild",):
                yield self._rebuilding(index, gradients + lingering, kept)
            for name, moment in self._backward(index):
                parts = (
                    ("gradients", gradients + lingering),
                    ("gathered weights", found.gathered),
                    *kept,
                    ("inputs that have come back", fetched),
                    ("a layer's tensors", moment.tensors),
                    ("attention kernel", moment.kernel),
                    ("exchange between GPUs", moment.exchange),
                    ("a layer's weight gradients and copies", moment.weights),
                )
                yield Moment(name, parts, has_sums=index < last or found.head_reduction > 0)
            num_inputs -= self.inputs[index] == "gpu"
            num_saved -= self.attention[index] == "gpu"
            if found.layer_reduction:
                waiting = gradients + lingering
                yield self._reduction(index, waiting, self._kept(num_inputs, num_saved))
            if found.keeps_gradients and not step.gradients_before:
                gradients += step.layer_gradients[index]
            lingering = found.lingering

    def _forward(self) -> Moment:
        index = self.work.num_layers - 1
        moment = self._layer.forward(self._keeps(index))
        incoming = 0 if self.inputs[index] == "gpu" else self.sizes.hidden
        # transformers' decoder holds the embedding's output until it is through.
        incoming += 0 if self.inputs[0] == "gpu" else self.sizes.hidden
        parts = (
            ("gradients", self.step.gradients_before),
            ("gathered weights", self.step.held.gathered_last),
            *self.kept_by_all,
            ("a layer's tensors", incoming + moment.tensors),
            ("exchange between GPUs", moment.exchange),
            ("a layer's weight gradients and copies", moment.weights),
        )
        return Moment(FORWARD, parts, in_backward=self.knobs.accumulation > 1)

    def _rebuilding(self, index: int, gradients: int, kept: Parts) -> Moment:
        """A forward of the layer below, behind the others of the segment, before this layer's backward."""
        moment = self._layer.forward("nothing")
        come_back = self.rebuilt_beside[index - 1] * self.sizes.hidden
        come_back += 0 if self.inputs[index - 1] == "gpu" else self.sizes.hidden
        if self.attention[index : index + 2] == ["host", "host"]:
            # Layers hand the memory down, and this one's has come back since the one above was done with it.
            come_back += self.sizes.queries + self.sizes.log_sums
        parts = (
            ("gradients", gradients),
            ("gathered weights", self.step.held.gathered),
            *kept,
            ("inputs that have come back", come_back),
            # The layer's own, and the gradient that waits for it.
            ("a layer's tensors", self.sizes.hidden + moment.tensors),
            ("exchange between GPUs", moment.exchange),
            ("a layer's weight gradients and copies", moment.weights),
        )
        return Moment(REBUILDING, parts, has_sums=index < self.work.num_layers - 1)

    def _reduction(self, index: int, waiting: int, kept: Parts) -> Moment:
        parts = (
            ("gradients", self.step.layer_gradients[index] + waiting),
            ("reduction", self.step.held.layer_reduction),
            *kept,
            ("a layer's tensors", self.sizes.hidden),
        )
        return Moment(REDUCTION, parts)

    def _backward(self, index: int) -> tuple[tuple[str, LayerMoment], ...]:
        groups, keeps = self._groups(index), self._keeps(index)
        key = groups, keeps
        if key not in self._moments:
            layer = LayerMemory(self.work, self.knobs, self.sizes, groups)
            self._moments[key] = (
                (ATTENTION, layer.attention(keeps)),
                (MLP, layer.mlp(keeps)),
                (PROJECTIONS, layer.projections(keeps)),
            )
        return self._moments[key]

    def _keeps(self, index: int) -> Keeps:
        where = self.attention[index]
        if where is None:
            return "nothing"
        if where == "host":
            return "fetched"
        if not self.knobs.attention.everything:
            return "output"
        return "all" if self._layer.at_once else "joined"

    def _groups(self, index: int) -> int:
        """Of a layer's backward: "auto" takes one where inputs that are gone have left room."""
        if not self.work.adapts_groups or self.knobs.head_groups == 1:
            return self.knobs.head_groups
        freed = self.knobs.inputs.freed_inputs(index, self.work.num_layers)
        one_sum = self.knobs.ulysses_degree == 1 or self.attention[index] is None
        return 1 if freed >= FREED_INPUTS and one_sum else self.knobs.head_groups

    def _fetched(self, index: int) -> int:
        """What has come back from the host, or was rebuilt, for a layer's backward and those below it."""
        size = self.sizes.hidden if self.inputs[index] != "gpu" else 0
        size += self.rebuilt_beside[index] * self.sizes.hidden
        if self.attention[index] == "host":
            size += self.sizes.queries + self.sizes.log_sums
        return size
