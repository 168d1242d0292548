"""APOLLO under ZeRO: which elements of which weights DeepSpeed's flat tensors are made of, and its states."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..apollo import Apollo
from ..apollo.layout import Layout, Range
from ..apollo.placement import FlatPart
from ..apollo.portable import restore_state, state_parts
from ..apollo.selection import whole_shape
from .state_files import Piece, SavedState, loaded_scalar
from .zero_state import partitions


def lay_out_apollo(zero_optimizer: Any, module: nn.Module) -> None:
    """Tell an `Apollo` that DeepSpeed has taken how its parameters lie in DeepSpeed's flat tensors.

    Needed once, after `deepspeed.initialize` and before the first step; `longseq train` does it. On each
    rank.

    Args:
        zero_optimizer: DeepSpeed's, such as `engine.optimizer`, or accelerate's wrapper of it.
        module: The model, whose names are those that `Apollo` was given.
    """
    while not isinstance(zero_optimizer.optimizer, Apollo):
        zero_optimizer = zero_optimizer.optimizer
    names = {param: name for name, param in module.named_parameters()}
    group = zero_optimizer.dp_process_group
    on_ranks = [partitions(zero_optimizer, rank) for rank in range(dist.get_world_size(group))]
    flat_parts: dict[Tensor, tuple[dict[str, Any], list[FlatPart]]] = {}
    for mine, everyones in zip(partitions(zero_optimizer), zip(*on_ranks, strict=True), strict=True):
        spans_of = zip(*(part.spans for part in everyones), strict=True)
        parts = [
            FlatPart(
                names[span.param],
                Layout(
                    whole_shape(span.param),
                    tuple(Range(other.start, other.start + other.numel) for other in others),
                ),
                span.offset,
            )
            for span, others in zip(mine.spans, spans_of, strict=True)
        ]
        flat_parts[mine.master] = mine.group, parts
    zero_optimizer.optimizer.lay_out(flat_parts, group)


def apollo_pieces(optimizer: Apollo) -> list[Piece]:
    """All states of this rank, for a checkpoint's files."""
    pieces = []
    for name, parts, numbers in state_parts(optimizer):
        for key, part in parts.items():
            pieces.append(Piece(name, part.shape, part.start, {key: part.values}, numbers))
    return pieces


@torch.no_grad()
def load_apollo(optimizer: Apollo, saved: SavedState) -> None:
    """The states of a checkpoint, whatever the layout that wrote it.

    Raises:
        ValueError: They are of another optimizer, or of another rank.
    """
    for group, placed in optimizer.placed():
        name = placed.name
        numbers = {
            key: loaded_scalar(value, group=group, device=placed.weight.device)
            for key, value in saved.scalars(name).items()
        }
        shapes = {key: saved.state_shape(name, key) for key in saved.states(name)}
        restore_state(optimizer, group, placed, shapes, numbers, _reader(saved, name))


def _reader(saved: SavedState, name: str):
    return lambda key, start, out: saved.read_into(out, name, key, start)
