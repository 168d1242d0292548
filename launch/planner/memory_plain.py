"""Layers that are not streamed: transformers' own code under autograd, with our attention and tiled MLPs.

Counted from transformers' modules: an RMS norm saves its input in float32 and the normalised one; a linear
layer its input (under autocast a bf16 copy of its own, and one of its weight); attention queries, keys,
values, output and log-sum-exp; a tiled MLP its input alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from .memory_layers import LayerMemory
from .memory_step import Moment, Parts, Step

BACKWARD = "backward of a layer"
PLAIN_INTERMEDIATES = 6
"""Tensors of a tile as wide as the MLP that autograd has at once in backward (mst/tiling.py)."""


class PlainLayers:
    """All layers keep what autograd saves."""

    def __init__(self, step: Step) -> None:
        self.step, self.work, self.knobs, self.sizes = step, step.work, step.knobs, step.sizes
        self._layer = LayerMemory(self.work, self.knobs, self.sizes, 1)
        self._weight_bytes = self.work.weight_bytes(self.knobs.zero_stage)
        self._is_cast = self._weight_bytes != self.work.compute_bytes

    @property
    def kept_by_all(self) -> Parts:
        """By the end of forward."""
        layers = self.work.num_layers * self._saved_by_layer()
        # Its input is the last layer's output, which is counted by itself.
        norm = self._saved_by_norm() - (self.sizes.hidden if self._weight_bytes == 4 else 0)
        return ("what layers keep for backward", layers), ("what the final norm keeps", norm)

    def moments(self) -> Iterator[Moment]:
        """Backward of each layer, from the last to the first."""
        step, found, saved = self.step, self.step.held, self._saved_by_layer()
        gradients, last = step.gradients_of_head, self.work.num_layers - 1
        lingering = 0
        for index in range(last, -1, -1):
            parts = (
                ("gradients", gradients + lingering),
                ("gathered weights", found.gathered),
                ("what layers keep for backward", (index + 1) * saved),
                ("a layer's tensors and gradients", self._at_work()),
            )
            yield Moment(BACKWARD, parts, has_sums=index < last or found.head_reduction > 0)
            if found.keeps_gradients and not step.gradients_before:
                gradients += step.layer_gradients[index]
            lingering = found.lingering

    def _saved_by_norm(self) -> int:
        """Its input in float32, and the normalised one."""
        wide = 4 * self.sizes.tokens * self.work.shape.hidden_size
        return 2 * wide if self._is_cast or not self.work.is_bf16 else wide + self.sizes.input

    def _saved_by_layer(self) -> int:
        """Bytes that one layer leaves for its backward."""
        work, sizes, tokens = self.work, self.sizes, self.sizes.tokens
        projected = 3 * sizes.input if self._is_cast else sizes.input
        shared = self._layer.shared
        attention = shared.heads + shared.queries + shared.log_sums
        saved = 2 * self._saved_by_norm() + projected + attention + sizes.hidden
        if self.knobs.tile_tokens is None:
            saved += 4 * tokens * work.shape.intermediate_size * work.compute_bytes
        if self._is_cast:
            layer = work.widest_layer
            saved += work.numel("projections", "output", layer=layer) * work.compute_bytes
        if self.knobs.ulysses_degree > 1:
            saved += sizes.queries  # attention's output, here and where its heads are
        if work.has_adapters:
            saved += sizes.input  # of an adapter, in its own dtype
        return saved

    def _at_work(self) -> int:
        """The larger of the MLP's backward and of attention's, with the gradients that each has made."""
        work, sizes = self.work, self.sizes
        numbers = work.compute_bytes
        mlp = 0 if work.has_adapters else work.numel("gate_up", "down", layer=work.widest_layer)
        casts = mlp * numbers if self._is_cast else 0
        tile = sizes.tile * work.shape.intermediate_size * numbers * PLAIN_INTERMEDIATES
        # Of several tiles the sum is float32, with the next tile's gradient beside it.
        sums = mlp * (self._weight_bytes if sizes.num_tiles == 1 else 4 + self._weight_bytes)
        shared = self._layer.shared
        attention = self._layer.kernel_workspace() + shared.heads + 2 * shared.queries + self._layer.gradients
        if self.knobs.ulysses_degree > 1:
            attention += 2 * shared.heads  # gradients, packed and received
        return 2 * sizes.hidden + max(attention, tile + sums + casts)
