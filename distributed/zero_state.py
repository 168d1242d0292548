"""What a rank owns under DeepSpeed's ZeRO, written so that any number of ranks and any stage can read it.

ZeRO keeps float32 master weights and optimizer states in flat tensors, one for each group of parameters (in
ZeRO 3, for each sub-group). Stages 1 and 2 lay a group's parameters end to end and cut that into as many
partitions as there are ranks; stage 3 cuts each parameter. Either way a rank owns at most one run of
consecutive elements of a parameter, which is what `state_files` stores.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..apollo.selection import whole_shape
from .state_files import (
    WEIGHT,
    Piece,
    SavedState,
    load_buffers,
    loaded_scalar,
    persistent_buffers,
    piece_file,
    split_state,
)
from .tensor_file import TensorFile

logger = logging.getLogger(__name__)


class Span(NamedTuple):
    """Where a parameter lies in a partition.

    Attributes:
        param: The model's parameter.
        start: First element of this rank's, in the flat parameter.
        offset: The same element, in the partition.
        numel: Number of elements, without padding; 0 where others own all of it.
    """

    param: nn.Parameter
    start: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Partition:
    """This rank's part of a group of parameters.

    Attributes:
        master: The flat float32 weights, `(elements,)`, that the optimizer steps; padding at the end.
        group: The optimizer's settings for it.
        spans: The group's parameters.
    """

    master: Tensor
    group: dict[str, Any]
    spans: list[Span]


def partitions(optimizer: Any, rank: int | None = None) -> list[Partition]:
    """What a rank steps of a DeepSpeed ZeRO optimizer, whichever its stage.

    Args:
        optimizer: DeepSpeed's.
        rank: Whose spans; this rank's own if None. Masters are this rank's.
    """
    rank = dist.get_rank(optimizer.dp_process_group) if rank is None else rank
    groups = optimizer.optimizer.param_groups
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        group_of = optimizer.sub_group_to_group_id
        return [
            Partition(master, groups[group_of[i]], list(_cut_parameters(params, rank)))
            for i, (master, params) in enumerate(
                zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
            )
        ]
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        masters = optimizer.single_partition_of_fp32_groups
        # Not `bit16_groups`, nor what is noted at the parameters: `round_robin_gradients` has another order.
        params_of, offsets_of = optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets
    else:  # ZeRO 1 in bf16 has an optimizer of another class
        masters, params_of = optimizer.fp32_groups_flat_partition, optimizer.bf16_groups
        offsets_of = [
            list(accumulate((param.numel() for param in params[:-1]), initial=0)) for params in params_of
        ]
    return [
        Partition(master, group, list(_cut_group(params, offsets, master.numel(), rank)))
        for master, group, params, offsets in zip(masters, groups, params_of, offsets_of, strict=True)
    ]


def _cut_parameters(params: list[nn.Parameter], rank: int) -> Iterator[Span]:
    """ZeRO 3: every rank has a part of the same size of every parameter, the last ones padded."""
    offset = 0
    for param in params:
        size = param.partition_numel()
        start = min(size * rank, param.ds_numel)
        yield Span(param, start, offset, min(size, param.ds_numel - start))
        offset += size


def _cut_group(params: list[nn.Parameter], offsets: Iterable[int], size: int, rank: int) -> Iterator[Span]:
    """ZeRO 1 and 2: the parameters lie end to end, and every rank has a part of the same size of that."""
    for param, offset in zip(params, offsets, strict=True):
        first = min(max(offset, rank * size), offset + param.numel())
        last = max(min(offset + param.numel(), (rank + 1) * size), first)
        yield Span(param, first - offset, min(max(first - rank * size, 0), size), last - first)


def partition_file(
    name: str, optimizer: Any, module: nn.Module, *, num_files: int, states: Sequence[Piece] = ()
) -> TensorFile:
    """What this rank owns, as one of a checkpoint's files; the first rank's has the buffers too.

    `states` are those of an optimizer that keeps other states than elements of the flat tensors.
    """
    names = {param: name for name, param in module.named_parameters()}
    pieces = list(states)
    for part in partitions(optimizer):
        elementwise, scalars = split_state(optimizer.optimizer.state.get(part.master, {}), part.master)
        tensors = {WEIGHT: part.master.detach(), **elementwise}
        for param, start, offset, numel in part.spans:
            if numel:
                mine = {key: tensor.narrow(0, offset, numel) for key, tensor in tensors.items()}
                pieces.append(Piece(names[param], whole_shape(param), start, mine, scalars))
    buffers = persistent_buffers(module) if dist.get_rank() == 0 else None
    return piece_file(name, pieces, num_files=num_files, buffers=buffers)


@torch.no_grad()
def load_partitions(
    folder: Path,
    optimizer: Any,
    module: nn.Module,
    load_states: Callable[[SavedState], None] | None = None,
) -> None:
    """Bring masters, states, the weights to compute with and buffers back from any layout's files.

    Settings such as betas stay the optimizer's own. `load_states` is what brings other states back than
    elements of the flat tensors.

    Raises:
        ValueError: A checkpoint of another model, or one that is not whole.
    """
    saved = SavedState(folder)
    names = {param: name for name, param in module.named_parameters()}
    parts = partitions(optimizer)
    shapes = {names[span.param]: whole_shape(span.param) for part in parts for span in part.spans}
    saved.check(shapes, persistent_buffers(module))
    if load_states is None:
        saved.check_elementwise()
    for part in parts:
        spans = [(names[span.param], span) for span in part.spans]
        for name, span in spans:
            saved.read_into(part.master.narrow(0, span.offset, span.numel), name, WEIGHT, span.start)
        if load_states is None:
            state = optimizer.optimizer.state[part.master]
            loaded = _states(saved, part, spans, state)
            state.clear()
            state.update(loaded)
    if load_states is not None:
        load_states(saved)
    load_buffers(module, saved)
    _compute_with_masters(optimizer, parts)


def _states(
    saved: SavedState, part: Partition, spans: list[tuple[str, Span]], there: dict[str, Any]
) -> dict[str, Any]:
    """The optimizer's state of a partition; padding, and a weight that no step has reached, has zeros.

    Tensors that are there are filled, not replaced: there may be no memory for two.
    """
    states: dict[str, Any] = {}
    for name, span in spans:
        for key in saved.states(name):
            if key not in states:
                earlier = there.get(key)
                states[key] = torch.zeros_like(part.master) if earlier is None else earlier.zero_()
            saved.read_into(states[key].narrow(0, span.offset, span.numel), name, key, span.start)
        for key, value in saved.scalars(name).items():
            number = loaded_scalar(value, group=part.group, device=part.master.device)
            if key in states and states[key] != number:
                logger.warning(
                    "%s of %s is %s and that of others %s: ZeRO has one for all, and takes the larger.",
                    *(key, name, float(number), float(states[key])),
                )
                number = max(number, states[key])
            states[key] = number
    return states


def _compute_with_masters(optimizer: Any, parts: list[Partition]) -> None:
    """Let the model's weights be the masters', on every rank."""
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer._hp_optimizer_states_linked = False  # its views of states are made anew at the next step
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()  # small weights that stay gathered between steps are let go
    for part in parts:
        for span in part.spans:
            shard = span.param.ds_tensor
            shard.data.copy_(part.master.narrow(0, span.offset, shard.numel()))
    optimizer.checkpoint_event_epilogue()  # and gathered anew
