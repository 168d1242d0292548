"""What a streamed decoder layer takes, phase by phase: mst/decoder_layer.py in bytes.

A layer's backward has two large moments: the MLP half, tile by tile, and attention, one group of heads at a
time. Alive through both are the layer's input, its output's gradient (over which the input's is written),
attention's output, and queries, keys and values where they are all at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ...distributed.attention import KERNELS
from ...distributed.short_offsets import MOST_OFFSET
from .knobs import Knobs
from .memory_sizes import Sizes, attending, exchanges_in_turn, group_plan, kernel_workspace
from .workload import Workload

Keeps = Literal["nothing", "fetched", "output", "joined", "all"]
"""What forward has kept of a layer's attention: its output on the host, or on the GPU; there also what the
MLP half starts from, and all with queries, keys and values."""
ON_GPU = ("output", "joined", "all")


@dataclass(frozen=True)
class LayerMoment:
    """One moment of a layer's work, beside what other layers keep.

    Attributes:
        tensors: Of tokens: what grows with their number.
        kernel: The attention kernel's own sums, which do as well.
        exchange: What is packed for other ranks, sent and received; likewise.
        weights: Copies and float32 sums of weights: what does not grow.
    """

    tensors: int
    kernel: int = 0
    exchange: int = 0
    weights: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.tensors + self.kernel + self.exchange + self.weights


class LayerMemory:
    """The moments of one layer, for one way to keep its attention."""

    def __init__(self, work: Workload, knobs: Knobs, sizes: Sizes, num_groups: int) -> None:
        self.work, self.knobs, self.sizes, self.num_groups = work, knobs, sizes, num_groups
        layer = work.widest_layer
        self._numel = work.numel(layer=layer)
        self._numbers = work.compute_bytes
        self._weight_bytes = work.weight_bytes(knobs.zero_stage)
        self._through = sizes.hidden  # the input's gradient takes the output's place
        self._gradients = work.numel(layer=layer, trained=True) - work.numel(
            "adapter", layer=layer, trained=True
        )
        self._mlp_half = work.numel("gate_up", "down", "output", layer=layer) if not work.has_adapters else 0
        self._projections = work.numel("projections", layer=layer)
        self.at_once = work.layer.at_once(num_groups)
        self.shares = knobs.ulysses_degree > 1
        self.shared = attending(sizes, work.layer.heads, knobs.ulysses_degree, num_groups)
        self.in_turn = exchanges_in_turn(work.layer.heads, knobs.ulysses_degree, num_groups)

    @property
    def copies(self) -> int:
        """Of weights: in the dtype of products where they have another, and q, k and v as one matrix."""
        cast = self._numel * self._numbers if self._weight_bytes != self._numbers else 0
        return cast + self._projections * self._numbers

    @property
    def gradients(self) -> int:
        """Of the layer's weights, in their dtype, once its backward is over; adapters' float32 or not."""
        adapters = self.work.numel("adapter", layer=self.work.widest_layer, trained=True)
        own = self._gradients * self._weight_bytes
        return own + adapters * self.work.adapter_bytes(self.knobs.zero_stage)

    def forward(self, keeps: Keeps) -> LayerMoment:
        """A layer's forward; its input, and what it keeps on the GPU, are counted by those who hold them."""
        sizes = self.sizes
        # Where attention's output is not kept, the layer's may take its place.
        reuses = keeps == "nothing" and sizes.queries == sizes.hidden
        attended = sizes.queries + sizes.log_sums if keeps in ("nothing", "fetched") else 0
        mlp = attended + (0 if reuses else sizes.hidden) + self._tile_forward()
        return _largest(self._attending(keeps), LayerMoment(mlp, weights=self.copies))

    def mlp(self, keeps: Keeps) -> LayerMoment:
        """The MLP half's backward."""
        sizes = self.sizes
        tile, sums = self._mlp_work(keeps)
        tensors = self._through + tile + self._attended_grad
        exchange = 0
        if keeps == "nothing":
            tensors += sizes.queries + sizes.log_sums
            tensors += sizes.heads if self.at_once else 0
        if self.work.layer.norms_whole and keeps in ("nothing", "all"):
            tensors += sizes.queries + sizes.key_values // 2  # normalised
        if keeps == "all" and self.shares:
            # Queries, keys, values and output of all groups are on their way.
            exchange = 2 * (self.shared.heads + self.shared.queries)
        return LayerMoment(tensors, exchange=exchange, weights=self.copies + sums + self._adapter_sums())

    def attention(self, keeps: Keeps) -> LayerMoment:
        """Attention's backward."""
        sizes, groups, left = self.sizes, self.num_groups, 0
        tensors = self._through + self._attended_grad + self._normed_heads(groups)
        if keeps == "nothing":
            tensors += sizes.queries + sizes.log_sums
        if self.at_once:
            # Gradients take the projections' place, but not the place of saved ones.
            tensors += sizes.heads
        else:  # queries' gradients take the place of attention's output, but not of a saved one
            tensors += sizes.key_values + (sizes.queries if keeps in ON_GPU else 0)
            tensors += sizes.heads // groups
            if self.in_turn and not self.work.layer.norms_heads:
                left = sizes.heads // groups  # once they are sent
        if self.work.layer.norms_whole:
            # Normalised queries and keys, and gradients beside what was projected.
            tensors += sizes.queries + sizes.key_values // 2 + sizes.key_values
            tensors += 0 if keeps in ("nothing", "fetched") else sizes.queries
        kernel, exchange = self.kernel_workspace(), 0
        finished = self._mlp_half * self._weight_bytes
        weights = self.copies + finished + self._adapter_sums()
        if self.shares:
            exchange = self._backward_exchange(keeps)
        else:  # the group's gradients, into it and out
            incoming = 0 if self._attended_grad else sizes.queries
            tensors += (incoming + sizes.heads) // groups
        moments = [LayerMoment(tensors - left, kernel, exchange, weights)]
        if self.in_turn and keeps != "all":
            moments.append(LayerMoment(tensors, 0, self._departure(), weights))
        if keeps == "nothing":
            again = self._attending(keeps)
            moments.append(replace(again, tensors=again.tensors + self._through))
        return _largest(*moments)

    def _attending(self, keeps: Keeps) -> LayerMoment:
        """Attention of a forward."""
        sizes, groups = self.sizes, self.num_groups
        of_attention = sizes.queries + sizes.log_sums
        if self.at_once:
            tensors = sizes.heads + of_attention + self._normed_heads(1)
        else:  # normalised tokens stay for all groups
            tensors = sizes.input + of_attention + (sizes.heads + sizes.queries) // groups
        if keeps == "all":
            tensors -= sizes.heads
        if keeps in ON_GPU:
            tensors -= of_attention
        return LayerMoment(max(tensors, 0), exchange=self._forward_exchange(), weights=self.copies)

    def kernel_workspace(self) -> int:
        """Of attention's backward."""
        shared, kernel = self.shared, self.work.layer.kernel
        query_to_key = 2 * shared.queries // shared.key_values
        whole = kernel_workspace(kernel, shared, self.num_groups, query_to_key, self._numbers)
        copies = self._copies_of_what_reaches_far() if KERNELS[kernel].counts_in_32_bits else 0
        if not copies:
            return whole
        # One key/value head at a time, whose gradients are there beside everybody's.
        return (whole + copies + shared.heads // self.num_groups) // self._key_heads_here()

    def _copies_of_what_reaches_far(self) -> int:
        """Bytes of a group's tensors that the kernel cannot count through (distributed/short_offsets.py)."""
        sizes, groups = self.sizes, self.num_groups
        queries, heads = self.shared.queries // groups, self.shared.heads // groups

        def if_far(rows: int, part: int) -> int:
            return part if rows // self._numbers > MOST_OFFSET else 0

        if self.shares:  # each tensor arrives by itself then
            return if_far(queries, heads + 2 * queries)
        # Attention's output is columns of all heads', and so are queries, keys and values of one projection.
        return (
            if_far(sizes.queries, queries)
            + if_far(sizes.heads if self.at_once else heads, heads)
            + if_far(sizes.queries if self._attended_grad else queries, queries)
        )

    def _key_heads_here(self) -> int:
        """Key/value heads of a group, on the rank that attends with most."""
        heads, degree = self.work.layer.heads, self.knobs.ulysses_degree
        plan = group_plan(heads, degree, self.num_groups)
        return heads.num_kv_heads // self.num_groups if plan is None else max(plan.keys.counts)

    def projections(self, keeps: Keeps) -> LayerMoment:
        """The projections' backward, tile by tile: all of the layer's gradients are there or being summed."""
        sizes = self.sizes
        tile = 2 * sizes.input * sizes.tile // max(sizes.tokens, 1)
        tensors = self._through + tile
        if keeps == "nothing":
            tensors += sizes.queries + sizes.log_sums
        # As in attention's backward, queries' gradients may take the place of attention's output.
        beside = sizes.queries if self.at_once or keeps in ON_GPU else 0
        tensors += sizes.key_values + beside
        sums = 0 if self.work.has_adapters else 4 * self._projections
        finished = self._mlp_half * self._weight_bytes
        return LayerMoment(tensors, weights=self.copies + finished + sums + self._adapter_sums())

    @property
    def _attended_grad(self) -> int:
        """Of attention's output, whole: where a norm stands behind the output projection."""
        return self.sizes.queries if self.work.layer.post_attention_norm else 0

    def _normed_heads(self, groups: int) -> int:
        """Queries and keys, normalised head by head; what went into the norms is there as well."""
        layer = self.work.layer
        if not layer.norms_heads or layer.norms_whole:
            return 0
        return (self.sizes.queries + self.sizes.key_values // 2) // groups

    def _adapter_sums(self) -> int:
        return 4 * self.work.numel("adapter", layer=self.work.widest_layer, trained=True)

    def _tile_forward(self) -> int:
        """Of an MLP's tile: what it starts from, normalised tokens, gate and up."""
        tile, shape = self.sizes.tile, self.work.shape
        width = shape.hidden_size * (self._weight_bytes + self._numbers)
        return tile * (width + 2 * shape.intermediate_size * self._numbers)

    def _mlp_work(self, keeps: Keeps) -> tuple[int, int]:
        """Of the MLP half's backward on tiles: tensors, and float32 sums of weight gradients, at their most.

        A weight's sum is made with its first product, so a single tile never has all of both at once.
        """
        tile, shape = self.sizes.tile, self.work.shape
        one = tile * shape.hidden_size * self._numbers  # tokens as products take them
        wide = tile * shape.intermediate_size * self._numbers  # gate, up, or their product
        # What the half starts from, where it is not saved.
        is_saved = keeps in ("joined", "all") and not self.work.layer.post_attention_norm
        joined = 0 if is_saved else tile * shape.hidden_size * self._weight_bytes
        layer = self.work.layer
        # Normalised tokens and a cast gradient; what goes into a norm behind, and what comes out of it.
        steps = (layer.mlp_norm, self._weight_bytes != self._numbers, layer.post_attention_norm)
        base = joined + one * (sum(steps) + layer.post_mlp_norm)
        down = 4 * self._trained("down")
        gates, output = 4 * self._trained("gate_up"), 4 * self._trained("output")
        # While the down projection's gradient is made; while the gates' are, and their input's.
        moments = [(base + 3 * wide, down), (base + 2 * wide + one, down + gates)]
        if self.sizes.num_tiles > 1:
            moments.append((base + 3 * wide, down + gates + output))
        # The sums are rounded one by one.
        rounded = self._trained("down") * self._weight_bytes if self._weight_bytes < 4 else 0
        moments.append((0, down + gates + output + rounded))
        return max(moments, key=sum)

    def _trained(self, kind: str) -> int:
        return self.work.numel(kind, layer=self.work.widest_layer, trained=True)

    def _forward_exchange(self) -> int:
        """Packed and received: of the group that attends, and of the next one or of the one that returns."""
        if not self.shares:
            return 0
        sizes, groups = self.shared, self.num_groups
        if self.in_turn:
            return 2 * sizes.heads // groups
        here = sizes.heads + sizes.queries
        beside = 2 * max(sizes.heads, sizes.queries) if groups > 1 else 0
        return (here + beside) // groups

    def _departure(self) -> int:
        """Of a group that goes to other ranks for its backward: packed, received, and its gradient."""
        sent = self.shared.heads + 2 * self.shared.queries
        incoming = 0 if self._attended_grad else self.sizes.queries
        return (2 * sent + incoming) // self.num_groups

    def _backward_exchange(self, keeps: Keeps) -> int:
        sizes, groups = self.shared, self.num_groups
        sent = sizes.heads + 2 * sizes.queries  # queries, keys, values, output and its gradient
        here = sent + sizes.heads  # and the gradients of the heads that this rank attends with
        beside = 2 * sent if groups > 1 and not self.in_turn else 0
        if keeps == "all":  # all but the gradient went ahead, of all groups
            beside = 2 * (sizes.heads + sizes.queries) * (groups - 1)
            beside += 2 * sizes.queries if groups > 1 else 0
        return (here + beside) // groups


def _largest(*moments: LayerMoment) -> LayerMoment:
    return max(moments, key=lambda one: one.total)
