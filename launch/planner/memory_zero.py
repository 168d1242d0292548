"""What DeepSpeed keeps: read from its source (0.19.8), file by file.

`bf16_optimizer.py` is ZeRO-1 in bf16, `zero/stage_1_and_2.py` ZeRO-2 (and 1 with the optimizer on the host),
`zero/stage3.py` with `zero/partition_parameters.py` ZeRO-3. Sizes of buckets are those that
`distributed/zero_config.py` asks for.
"""

from __future__ import annotations

from ...distributed.zero_config import PERSISTENT_NUMEL
from .knobs import Knobs
from .memory_held import Held, communicators
from .workload import Workload

SUB_GROUP_NUMEL = 10**9
"""DeepSpeed's default `sub_group_size`: elements of this rank that ZeRO-3 steps at once."""
REDUCTIONS_ON_THEIR_WAY = 3
"""Layers whose gradients may be under way on a stream of their own (`max_param_reduce_events` and one)."""
NORM_BYTES = 8
"""Of a number in the gradients' norm: they are converted to float64, one weight at a time."""


def held_by_deepspeed(work: Workload, knobs: Knobs) -> Held:
    """By stage."""
    if knobs.zero_stage == 3:
        return _stage_3(work, knobs)
    if knobs.zero_stage == 1 and work.is_bf16 and not knobs.offload_optimizer:
        return _bf16_optimizer(work, knobs)
    return _stage_1_and_2(work, knobs)


def pinned(num_bytes: int) -> int:
    """What PyTorch pins for so many bytes: the next power of two."""
    return 1 << max(num_bytes - 1, 0).bit_length()


def _states(work: Workload, knobs: Knobs) -> int:
    """Of this rank's share; states follow the elements, or channels, that a rank owns."""
    return -(-work.state_bytes // knobs.num_gpus)


def _bucket_numel(work: Workload) -> int:
    return work.numel(layer=work.widest_layer)


def _bf16_optimizer(work: Workload, knobs: Knobs) -> Held:
    trained, ranks = work.trained_numel, knobs.num_gpus
    return Held(
        weights=2 * (trained + work.frozen_numel),
        masters=4 * trained // ranks,
        states=_states(work, knobs),
        sums=4 * trained,  # of the whole model
        # A gradient on its way into its sum; then all sums in bf16, as they are sent.
        whole_reduction=max(4 * work.largest_trained, 2 * trained),
        keeps_gradients=True,
        steps_from_gradients=True,
        communicators=communicators(knobs),
    )


def _stage_1_and_2(work: Workload, knobs: Knobs) -> Held:
    trained, ranks, each = work.trained_numel, knobs.num_gpus, work.compute_bytes
    partition, states = 4 * trained // ranks, _states(work, knobs)
    bucket = _bucket_numel(work)
    largest = work.largest_trained
    mine = min(largest, -(-trained // ranks))  # of one weight, what a rank owns at most
    host, to_host = 0, 0
    if knobs.offload_optimizer:
        # Masters and their gradients, and the weights on their way back, are pinned; states are not.
        host = 2 * pinned(partition) + pinned(each * trained // ranks) + states + pinned(each * largest)
        to_host = NORM_BYTES * mine  # norms are taken weight by weight, before they go
    shared = {
        "weights": each * (trained + work.frozen_numel),
        "masters": 0 if knobs.offload_optimizer else partition,
        "states": 0 if knobs.offload_optimizer else states,
        "late_sums": partition,
        "buffers": each * largest if knobs.offload_optimizer else 0,
        "step": 0 if knobs.offload_optimizer else NORM_BYTES * mine,
        "communicators": communicators(knobs),
        "host": host,
    }
    if knobs.zero_stage == 1:  # gradients are summed in float32 where they are, and reduced in the end
        whole = max(to_host, 4 * mine)
        return Held(
            **shared,
            backward_buffers=4 * bucket,
            whole_reduction=whole,
            keeps_gradients=True,
            gradient_bytes=4,
        )
    head = 0 if work.tied else work.numel("head", trained=True)
    inside = work.largest_of_layers
    return Held(
        **shared,
        backward_buffers=each * bucket,
        # A gradient, and the float32 copy of it that is added to its sum.
        head_reduction=each * head + max(to_host, 4 * min(head, mine)),
        # Of a layer's gradients those before it are put together once more.
        layer_reduction=each * bucket + max(min(to_host, NORM_BYTES * inside), 4 * inside),
        embedding_reduction=max(to_host, 4 * mine),
    )


def _stage_3(work: Workload, knobs: Knobs) -> Held:
    trained, ranks, each = work.trained_numel, knobs.num_gpus, work.compute_bytes
    partition, states = 4 * trained // ranks, _states(work, knobs)
    small = work.remembered(("small",), lambda: _small_numel(work))
    parts = each * (trained + work.frozen_numel) // ranks
    layer = each * _bucket_numel(work)
    gradients = each * work.numel(layer=work.widest_layer, trained=True)
    head = each * (work.numel("head") or work.numel("embedding"))
    # A single rank has all weights whole where they are.
    comes = ranks > 1 or knobs.offload_parameters
    host = 0
    if knobs.offload_optimizer:
        host += partition + 2 * pinned(partition) + states
    if knobs.offload_parameters:
        host += pinned(parts)
    step = NORM_BYTES * work.largest_trained // ranks
    if not knobs.offload_optimizer:
        # Its gradients are put together once more.
        sub_group = work.remembered(("sub-group", ranks), lambda: _largest_sub_group(work, ranks))
        step = max(step, 4 * sub_group)
    return Held(
        weights=(0 if knobs.offload_parameters else parts) + each * small,
        masters=0 if knobs.offload_optimizer else partition,
        states=0 if knobs.offload_optimizer else states,
        sums=0 if knobs.offload_optimizer else partition,
        gathered=2 * layer * comes,
        gathered_last=(layer + head) * comes,
        gathered_head=head * comes,
        lingering=gradients,
        head_reduction=each * work.numel("head", trained=True),
        layer_reduction=gradients,
        step=step,
        pending_bytes=layer + 2 * REDUCTIONS_ON_THEIR_WAY * gradients,
        communicators=communicators(knobs),
        host=host,
    )


def _small_numel(work: Workload) -> int:
    """Of weights that stay whole on every rank."""
    return sum(weight.numel for weight in work.weights if weight.numel <= PERSISTENT_NUMEL)


def _largest_sub_group(work: Workload, ranks: int) -> int:
    """Elements of this rank: weights are taken in their order until there are enough."""
    largest = numel = 0
    for weight in work.weights:
        if weight.trained and len(weight.shape) > 1:
            numel += -(-weight.numel // ranks)
            largest = max(largest, numel)
            numel = 0 if numel >= SUB_GROUP_NUMEL else numel
    return largest
