"""How long a training step takes, by arithmetic: operations and bytes over the rates of a machine.

Every part is one thing that a GPU does: products, attention, elementwise kernels, the head's loss, copies,
exchanges, the optimizer. Rates are the machine's (`Gpu`); the numbers here are of the code, not of a GPU: how
often each thing is done, what it reads and writes, and how much of a communication is not hidden. They were
held against measured steps (tests/launch/planner/test_seconds.py).

One document a sequence is assumed unless documents are told: short documents attend to less.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from ...cce.chunks import plan as plan_loss
from ...cce.head import Needs
from .knobs import Knobs
from .machine import Machine
from .memory_sizes import exchanges_in_turn
from .seconds_layers import LayerTimes

if TYPE_CHECKING:
    from .workload import Workload

HEAD_UNITS = {"cce": 3.25, "mini_sequence": 4.4, "logits": 3.2}
"""Of each way to the loss, in bare products of all tokens and words (benchmarks/results/lm_head.json)."""
DEFERRED_UNITS = 1.1
"""More of them where memory is short, and logits are made again for the weight's gradient."""
LOGITS_BYTES = {"cce": 0.0, "mini_sequence": 14.0, "logits": 18.0}
"""Of a token and word, what is read and written beside the products."""
ADAM_SHARE = 0.72
"""Of the memory's rate, what fused AdamW attains (benchmarks/results/optimizer.json: 2,730 of 4,000 GB/s)."""
IN_BACKWARD_BYTES = 20.0
"""A weight: its gradient is looked at, cleared of what is not finite and clipped by itself."""
HOST_STEP_GB_S = 95.0
"""By which 16 cores of a process step AdamW: what it reads and writes."""
NODE_STEP_GB_S = 270.0
"""The most that all processes of a node do together; not measured."""
EXPOSED_EXCHANGE = 0.5
"""Of the exchanges between ranks of a sequence, what nothing is computed beside."""
PACKING = 8.0
"""Bytes moved on the GPU for each byte that is exchanged: heads are put side by side and taken apart."""
EXPOSED_ZERO = 0.35
"""Of ZeRO-3's gathers and reductions, what nothing is computed beside where a layer's computing is longer."""
EXPOSED_COPY = 0.03
"""The same of the copies to the host and back."""
LAYER_START_S = 200e-6
"""Of a layer, forward and backward together: kernels that are short or wait for the host."""
STEP_START_S = 6e-3
"""Of a step: the host waits for the loss, and again for the norm."""
ZERO_START_S = 40e-3
"""The same of a step under DeepSpeed."""


_plan_loss = lru_cache(maxsize=4096)(plan_loss)


@dataclass(frozen=True)
class TimeEstimate:
    """How long a step takes.

    Attributes:
        parts: Name and seconds of each part; they add up to the step.
        seconds: Of a whole step, all its micro-batches and the optimizer.
        tokens_per_second: Of all GPUs together.
    """

    parts: tuple[tuple[str, float], ...]
    seconds: float
    tokens_per_second: float


def estimate_seconds(
    work: Workload, knobs: Knobs, machine: Machine, document_tokens: Iterable[int] | None = None
) -> TimeEstimate:
    """Estimate a step.

    Args:
        work: What is computed.
        knobs: How.
        machine: On what.
        document_tokens: Tokens of each document of one sequence; None is one document as long as it.
    """
    lengths = [knobs.length] if document_tokens is None else list(document_tokens)
    parts = _Step(work, knobs, machine, lengths).parts()
    seconds = sum(seconds for _, seconds in parts)
    tokens = knobs.length * knobs.micro_batch * knobs.accumulation * knobs.data_degree
    return TimeEstimate(tuple(parts), seconds, tokens / seconds)


class _Step(LayerTimes):
    """The parts of a step of one rank; all ranks do the same at the same time."""

    def __init__(self, work: Workload, knobs: Knobs, machine: Machine, lengths: list[int]) -> None:
        super().__init__(work, knobs, machine.gpu, lengths)
        self.machine = machine

    def parts(self) -> list[tuple[str, float]]:
        """Name and seconds; what takes no time is left out."""
        knobs, often = self.knobs, self.knobs.accumulation
        forward, again, backward = self.forward(), self.rerun(), self.backward()
        layers = forward.plus(again).plus(backward).times(self.layers)
        rebuilt = forward.times(self.rebuilt_layers()).total if knobs.stream else 0.0
        found = [
            ("products of layers", layers.products * often),
            ("attention", layers.attention * often),
            ("elementwise", layers.elementwise * often),
            ("layers rebuilt", rebuilt * often),
            ("LM head", self.head() * often),
            ("host copies", self.host_copies(forward.total, (again.plus(backward)).total) * often),
            ("exchanges", self.exchanges() * often),
            ("ZeRO", self.zero(forward.total, (again.plus(backward)).total)),
            ("optimizer", self.optimizer()),
            ("starts", self.starts()),
        ]
        return [(name, seconds) for name, seconds in found if seconds > 0]

    def head(self) -> float:
        """Final norm, loss with its gradients, and the embedding's two look-ups."""
        work, shape = self.work, self.work.shape
        one = 2 * self.tokens * shape.hidden_size * shape.vocab_size / (self.gpu.matmul_tflops * 1e12)
        units = HEAD_UNITS[work.loss] - (0 if self.trains_base else 1)
        if work.loss == "cce" and self.trains_base:
            needs, memory = Needs(hidden=True, weight=True), work.loss_memory_mib
            chunks = _plan_loss(self.tokens, shape.vocab_size, shape.hidden_size, needs, memory)
            units += DEFERRED_UNITS if chunks.defer_weight else 0
        logits = LOGITS_BYTES[work.loss] * self.tokens * shape.vocab_size
        embedding = work.numel("embedding") * 2.0 * self.hidden_bytes
        tokens = self.token_bytes(12 * shape.hidden_size)
        return one * units + self.moved(logits + embedding + tokens)

    def host_copies(self, forward_s: float, backward_s: float) -> float:
        """Layers' inputs on their way to the host and back, as far as computing does not hide them."""
        knobs, shape = self.knobs, self.work.shape
        if not knobs.stream:
            return 0.0
        on_host = knobs.inputs.count("host", self.layers)
        one_input = self.tokens * shape.hidden_size * self.hidden_bytes
        kept = on_host * one_input
        if knobs.attention.host:
            saved = self.layers - min(knobs.attention.gpu_layers, self.layers)
            kept += saved * self.tokens * shape.num_heads * (shape.head_dim * self.width + 4)
        rebuilt = self.copies_of_rebuilt() * one_input
        return sum(
            _exposed(size / (self.gpu.host_gb_s * 1e9), computed * self.layers, EXPOSED_COPY)
            for size, computed in ((kept, forward_s), (kept + rebuilt, backward_s))
        )

    def exchanges(self) -> float:
        """All-to-alls between the ranks of a sequence, and packing for them; see distributed/ulysses.py.

        With N query and K key/value heads of H: (2N + 2K) H elements a token forward, as many where backward
        attends again or a layer is rebuilt, and (4N + 4K) H in backward. Where ranks are more than the K of a
        group, each is sent one, and nothing is computed beside the exchanges of such groups.
        """
        knobs, shape = self.knobs, self.work.shape
        degree, groups = knobs.ulysses_degree, knobs.head_groups
        if degree == 1:
            return 0.0
        with_nothing, _, _ = self.kept_shares() if knobs.stream else (0.0, 0.0, 1.0)
        heads = shape.num_heads + max(shape.num_kv_heads, groups * degree)
        per_token = (6 + 2 * with_nothing + 2 * self.rebuilt_share()) * heads * shape.head_dim
        size = self.layers * self.tokens * per_token * self.width
        sent = size * (degree - 1) / degree / self.rate(degree)
        in_turn = exchanges_in_turn(self.work.layer.heads, degree, groups)
        return sent * (1.0 if in_turn else EXPOSED_EXCHANGE) + self.moved(PACKING * size)

    def zero(self, forward_s: float, backward_s: float) -> float:
        """Gathers of weights and reductions of gradients among all ranks, as far as they are not hidden."""
        ranks, knobs = self.knobs.num_gpus, self.knobs
        if ranks == 1:
            return 0.0
        rate, share, often = self.rate(ranks), (ranks - 1) / ranks, knobs.accumulation
        trained, each = self.work.trained_numel, self.work.weight_bytes(knobs.zero_stage)
        if knobs.zero_stage == 0:
            return 2 * trained * 4.0 * share / rate + self.moved(16.0 * trained)
        reduced = trained * float(each) * share / rate
        if knobs.zero_stage < 3:
            # Once where gradients are kept whole, with each micro-batch where they are cut.
            reductions = often if knobs.zero_stage == 2 else 1
            return reductions * reduced + trained * each * share / rate + self.moved(12.0 * trained)
        gathered = self.work.numel() * float(each) * share / rate
        if knobs.offload_parameters:
            gathered += self.work.numel() * float(each) / ranks / (self.gpu.host_gb_s * 1e9)
        exposed = _exposed(gathered, forward_s * self.layers, EXPOSED_ZERO)
        # Rebuilt layers are gathered once more, and computed.
        rebuilt = self.rebuilt_share()
        beside = (backward_s + rebuilt * forward_s) * self.layers
        exposed += _exposed((1 + rebuilt) * gathered + reduced, beside, EXPOSED_ZERO)
        return often * exposed

    def rate(self, ranks: int) -> float:
        """Bytes a second that one rank sends to the others of so many."""
        gpu = self.gpu
        return (gpu.link_gb_s if ranks <= self.machine.gpus_per_node else gpu.network_gb_s) * 1e9

    def starts(self) -> float:
        """When the GPU waits for the host."""
        of_step = ZERO_START_S if self.knobs.zero_stage else STEP_START_S
        return of_step + LAYER_START_S * self.layers * self.knobs.accumulation

    def optimizer(self) -> float:
        """Norm, clipping and update of what this rank steps."""
        work, knobs = self.work, self.knobs
        ranks = knobs.num_gpus if knobs.zero_stage > 0 else 1
        mine = work.trained_numel / ranks
        state_bytes = work.state_bytes / ranks
        weights = work.weight_bytes(knobs.zero_stage) if knobs.zero_stage == 0 else 4
        if work.has_adapters:
            weights = 4
        # Gradients for their norm, read and written for clipping; then everything once more.
        norm = mine * weights * 3.0
        update = mine * weights * 3.0 + 2.0 * state_bytes
        if work.optimizer != "adamw":
            update += mine * weights  # the update's own norm takes the gradient twice
        if knobs.offload_optimizer:
            local = min(ranks, self.machine.gpus_per_node)
            rate = min(HOST_STEP_GB_S, NODE_STEP_GB_S / local) * 1e9
            return update / rate + mine * 6.0 / (self.gpu.host_gb_s * 1e9)
        if work.in_backward:
            norm = mine * IN_BACKWARD_BYTES
        share = ADAM_SHARE if work.optimizer == "adamw" else 1.0
        mixed = self.moved(6.0 * mine) if knobs.zero_stage > 0 else 0.0
        return self.moved(norm) + self.moved(update) / share + mixed


def _exposed(transfer_s: float, compute_s: float, share: float) -> float:
    """Of a transfer beside computing: what is longer than that, and some of it in any case."""
    return max(transfer_s - compute_s, share * transfer_s)
