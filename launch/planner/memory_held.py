"""What stays from step to step (weights, optimizer) and what a step's gradients add, engine by engine."""

from __future__ import annotations

from dataclasses import dataclass

from ...distributed.engine import REDUCE_BUCKET_BYTES
from .knobs import Knobs
from .workload import Workload


@dataclass(frozen=True)
class Held:
    """Bytes of one process, by what holds them.

    Attributes:
        weights: On the GPU throughout.
        masters: Float32 copies that the optimizer steps.
        states: Of the optimizer.
        sums: Gradients that have a buffer of their own throughout.
        late_sums: The same, from the first reduction of a backward until the step.
        buffers: Of communication, throughout.
        backward_buffers: Of communication, in backward.
        gathered: Weights that ZeRO-3 gathers while a layer is run: this one's, and the next one's coming.
        gathered_last: In the last layer's forward: what comes is the LM head.
        gathered_head: At the LM head.
        lingering: Gradients of the layer above that wait to be reduced while a layer's backward is run.
        head_reduction: What is alive to reduce the LM head's gradient.
        layer_reduction: The same of a layer, beside its gradients.
        embedding_reduction: The same of the embedding, beside its gradient.
        whole_reduction: The same where all gradients are reduced together behind backward.
        step: What the optimizer's step, and the norm before it, take beside all that.
        keeps_gradients: The model's own gradients stay until the end of backward.
        steps_from_gradients: And until the optimizer's step.
        gradient_bytes: Of a number of them; None is as the weight's.
        pending_bytes: Blocks that are free, but which other streams may still use.
        communicators: Groups of processes that have NCCL's buffers.
        host: Of the process, pinned and not, for all this.
    """

    weights: int
    masters: int
    states: int
    sums: int = 0
    late_sums: int = 0
    buffers: int = 0
    backward_buffers: int = 0
    gathered: int = 0
    gathered_last: int = 0
    gathered_head: int = 0
    lingering: int = 0
    head_reduction: int = 0
    layer_reduction: int = 0
    embedding_reduction: int = 0
    whole_reduction: int = 0
    step: int = 0
    keeps_gradients: bool = False
    steps_from_gradients: bool = False
    gradient_bytes: int | None = None
    pending_bytes: int = 0
    communicators: int = 0
    host: int = 0


def held(work: Workload, knobs: Knobs) -> Held:
    """By the engine that these knobs mean."""
    if knobs.zero_stage == 0:
        return _local(work, knobs)
    from .memory_zero import held_by_deepspeed

    return held_by_deepspeed(work, knobs)


def _local(work: Workload, knobs: Knobs) -> Held:
    """`LocalEngine`: all of it on each process."""
    each = work.adapter_bytes(0) if work.has_adapters else work.weight_bytes(0)
    step = 0
    if knobs.num_gpus > 1:  # gradients are summed in buckets
        step = max(REDUCE_BUCKET_BYTES, work.largest_trained * each)
    return Held(
        weights=work.whole_bytes(0),
        masters=0,
        states=work.state_bytes,
        step=step,
        keeps_gradients=not work.in_backward,
        steps_from_gradients=not work.in_backward,
        communicators=communicators(knobs),
    )


def communicators(knobs: Knobs) -> int:
    """Groups of processes: all of them, and those that share a sequence."""
    return int(knobs.num_gpus > 1 or knobs.zero_stage > 0) + int(knobs.ulysses_degree > 1)
