"""How long one decoder layer takes, forward and backward: products, attention, and what memory bounds.

The numbers here are of the code, not of a GPU: how often each thing is done, and what it reads and writes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from ...mst.tiling import number_of_tiles
from .knobs import Knobs
from .machine import Gpu
from .memory_sizes import group_plan

if TYPE_CHECKING:
    from .workload import Workload

BACKWARD_ATTENTION = 2.5
"""Of attention's forward: five products where forward has two (arXiv 2307.08691)."""
RAMP_TOKENS = 1200
"""At a document of so many attention attains half of its rate: blocks on the diagonal are half empty."""
NARROW_HEADS = {64: 0.8}
"""Of attention's rate, by the heads' width, where it is not that of 128."""
BLOCKWISE_SHARE = 0.15
"""Of attention's rate, what plain products attain, which do a softcap without flash-attn; not measured."""
EAGER_BYTES = 120.0
"""A token and number of its width, moved by transformers' own norms and rotation; twice that in backward."""
FLOAT32_SHARE = 1 / 15
"""Of the rate of bf16 products, what float32 ones without TF32 attain, by the datasheets; not measured."""
FLOAT32_SUM_BYTES = 12.0
"""A weight and tile: its gradient's float32 sum is read and written, and what is added to it."""


@dataclass(frozen=True)
class Layer:
    """Seconds of one decoder layer of a micro-batch."""

    products: float
    attention: float
    elementwise: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.products + self.attention + self.elementwise

    def times(self, factor: float) -> Layer:
        """So many such layers."""
        return Layer(self.products * factor, self.attention * factor, self.elementwise * factor)

    def plus(self, other: Layer) -> Layer:
        """Both."""
        return Layer(
            self.products + other.products,
            self.attention + other.attention,
            self.elementwise + other.elementwise,
        )


class LayerTimes:
    """A decoder layer of one micro-batch on one rank.

    Attributes:
        gpu: Its rates, for the dtype of the products.
        tokens: Of this rank.
        width: Bytes of a number in products.
        hidden_bytes: Of a number of hidden states.
        trains_base: The model's own weights are trained, and not adapters beside them.
    """

    def __init__(self, work: Workload, knobs: Knobs, gpu: Gpu, lengths: list[int]) -> None:
        self.work, self.knobs, self.lengths = work, knobs, lengths
        self.gpu = gpu if work.is_bf16 else _in_float32(gpu)
        self.tokens = knobs.tokens_a_gpu
        self.layers = work.num_layers
        self.width = work.compute_bytes
        self.hidden_bytes = work.weight_bytes(knobs.zero_stage)
        self.trains_base = not work.has_adapters
        self.tiles = number_of_tiles(self.tokens, knobs.tile_tokens or max(self.tokens, 1))

    def forward(self) -> Layer:
        """Without grad where layers are streamed."""
        return Layer(
            self.products("projections", "output", "gate_up", "down"),
            self.attend(self.gpu.attention_forward_tflops, 1.0),
            self.moved(self.forward_bytes() + self.cast_bytes()),
        )

    def rerun(self) -> Layer:
        """What backward makes again: gate and up always, what was not kept of attention and before it."""
        knobs = self.knobs
        if not knobs.stream:
            # Autograd keeps attention; a mini-sequence of the MLP is run again as a whole.
            is_tiled = knobs.tile_tokens is not None
            return Layer(self.products("gate_up", "down") if is_tiled else 0.0, 0.0, 0.0)
        with_nothing, with_output, with_all = self.kept_shares()
        projections, output = self.products("projections"), self.products("output")
        again = (with_nothing + with_output) * (projections + output)
        if not self.work.layer.at_once(knobs.head_groups):
            # A group's projections do not stay: they are made for attention's forward and for its backward.
            again += (with_nothing + with_all) * projections
        attention = with_nothing * self.attend(self.gpu.attention_forward_tflops, 1.0)
        norms = self.moved(self.token_bytes(4 * self.work.shape.hidden_size + 2 * self.head_width()))
        return Layer(self.products("gate_up") + again, attention, norms)

    def backward(self) -> Layer:
        """Gradients of inputs, and of weights where they are trained."""
        kinds = ("projections", "output", "gate_up", "down")
        # Base weights' gradients, or those of adapters: as much again as inputs' gradients.
        products = 2 * self.products(*kinds) if self.trains_base else self.products(*kinds) + self.adapters()
        return Layer(
            products,
            self.attend(self.gpu.attention_backward_tflops, BACKWARD_ATTENTION),
            self.moved(self.backward_bytes() + self.sum_bytes() + self.cast_bytes()),
        )

    def products(self, *kinds: str) -> float:
        """Seconds of one product of all tokens with each weight of these kinds, their adapters included."""
        numel = self.work.numel(*kinds, layer=0)
        seconds = 2 * self.tokens * numel / (self.gpu.matmul_tflops * 1e12)
        if self.work.has_adapters:
            seconds += self.adapters() * len(kinds) / 4
        return seconds

    def adapters(self) -> float:
        """Of one pass through a layer's adapters: they read and write what their linear layers do, again."""
        shape = self.work.shape
        ends = 7 * shape.hidden_size + 2 * self.head_width() + 5 * shape.intermediate_size
        return self.moved(self.tokens * self.width * ends)

    def attend(self, tflops: float, times: float) -> float:
        """Attention of this rank's heads over whole sequences."""
        shape, knobs = self.work.shape, self.knobs
        heads = self.busiest_heads()
        windowed = shape.num_sliding_layers / shape.num_layers
        share = self.kernel_share() * NARROW_HEADS.get(shape.head_dim, 1.0)
        seconds = 0.0
        for length in self.lengths:
            pairs = length * length / 2
            if shape.sliding_window is not None and length > shape.sliding_window:
                seen = shape.sliding_window * length - shape.sliding_window**2 / 2
                pairs = (1 - windowed) * pairs + windowed * seen
            operations = 4 * pairs * heads * shape.head_dim * times * knobs.micro_batch
            attained = tflops * 1e12 * share * length / (length + RAMP_TOKENS)
            seconds += operations / attained
        return seconds

    def busiest_heads(self) -> int:
        """Query heads of the rank that has most of them, for which the others wait in each group."""
        knobs, heads = self.knobs, self.work.layer.heads
        plan = group_plan(heads, knobs.ulysses_degree, knobs.head_groups)
        if plan is None:
            return -(-heads.num_heads // knobs.ulysses_degree)
        return knobs.head_groups * max(plan.queries.counts)

    def kernel_share(self) -> float:
        """Of attention's rate, what the kernel attains that does this attention."""
        shape, kernel = self.work.shape, self.work.layer.kernel
        if kernel == "blockwise":
            return BLOCKWISE_SHARE
        if kernel in ("fa3", "fa4"):
            return 1.0
        is_plain = len(self.lengths) == 1 and shape.sliding_window is None and shape.head_dim <= 128
        return 1.0 if is_plain else self.gpu.flash_share

    def kept_shares(self) -> tuple[float, float, float]:
        """Of all layers: those that keep nothing of attention, its output, and everything."""
        saved = self.knobs.attention
        on_gpu = min(saved.gpu_layers, self.layers)
        on_host = self.layers - on_gpu if saved.host else 0
        with_all = on_gpu if saved.everything else 0
        with_output = on_gpu - with_all + on_host
        nothing = self.layers - with_all - with_output
        return nothing / self.layers, with_output / self.layers, with_all / self.layers

    def rebuilt_layers(self) -> float:
        """Layers whose input was not kept and is made again by running them forward once more."""
        return self.knobs.inputs.count("rebuild", self.layers)

    def rebuilt_share(self) -> float:
        """The same, of all layers."""
        return self.rebuilt_layers() / self.layers

    def copies_of_rebuilt(self) -> int:
        """Inputs copied because of it: rebuilt ones to the host and back, and what they start from again."""
        inputs = self.knobs.inputs
        places, waits = inputs.all_places(self.layers), inputs.waits(self.layers)
        steps = zip(places, waits, strict=True)
        rebuilt = sum(place == "rebuild" and waiting == "host" for place, waiting in steps)
        again = sum(place == "host" and above == "rebuild" for place, above in pairwise(places))
        return 2 * rebuilt + again

    # Bytes of elementwise kernels

    def head_width(self) -> int:
        """Of queries and keys together."""
        heads = self.work.layer.heads
        return (heads.num_heads + heads.num_kv_heads) * heads.width

    def token_bytes(self, elements: float) -> float:
        """Of so many elements a token."""
        return self.tokens * self.width * elements

    def forward_bytes(self) -> float:
        """Two norms, the rotation, the activation; each reads and writes."""
        shape = self.work.shape
        norms, rotation, activation = (
            4 * shape.hidden_size,
            2 * self.head_width(),
            3 * shape.intermediate_size,
        )
        wider = self.wider_bytes(4, sums=2)
        return self.token_bytes(norms + rotation + activation) + wider + self.eager_bytes(EAGER_BYTES)

    def backward_bytes(self) -> float:
        """The same backward, and gradients that are put side by side."""
        shape = self.work.shape
        elements = 10 * shape.hidden_size + 4 * self.head_width() + 6 * shape.intermediate_size
        wider = self.wider_bytes(8, sums=1)
        return self.token_bytes(elements) + wider + self.eager_bytes(2 * EAGER_BYTES)

    def wider_bytes(self, times: int, sums: int) -> float:
        """Hidden states in float32 where products are not: more is read, and sums are their own kernels."""
        more = self.hidden_bytes - self.width
        if not more:
            return 0.0
        own = self.width + 2 * self.hidden_bytes
        return float(times * more + sums * own) * self.work.shape.hidden_size * self.tokens

    def eager_bytes(self, of_width: float) -> float:
        """Where layers are not streamed, norms and rotations are many small kernels."""
        return 0.0 if self.knobs.stream else of_width * self.work.shape.hidden_size * self.tokens

    def sum_bytes(self) -> float:
        """Sums of weights' gradients: one read and written in float32 with each tile, and cast at the end."""
        if not self.trains_base:
            return 0.0
        numel = self.work.numel(layer=0, trained=True)
        return numel * (FLOAT32_SUM_BYTES * (self.tiles - 1) + 4 + 4 + self.hidden_bytes)

    def cast_bytes(self) -> float:
        """Weights in float32 are cast to the dtype of the products."""
        if self.hidden_bytes == self.width:
            return 0.0
        return self.work.numel(layer=0) * float(self.hidden_bytes + self.width)

    def moved(self, num_bytes: float) -> float:
        """Seconds of kernels that are bound by the GPU's memory."""
        return num_bytes / (self.gpu.memory_gb_s * 1e9)


def _in_float32(gpu: Gpu) -> Gpu:
    slower = gpu.matmul_tflops * FLOAT32_SHARE
    return replace(
        gpu,
        matmul_tflops=slower,
        attention_forward_tflops=slower,
        attention_backward_tflops=slower,
    )
