"""States as runs of elements of whole tensors, which any layout can be given again.

Weights that are whole, or cut flat, have them. The states of a DTensor are DTensors, which torch's own
distributed checkpoints cut anew; its 8-bit moments, whose blocks are of each shard, become such in a
`state_dict`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import is_dtensor
from .eight_bit import dequantized, quantized
from .placement import Placed, local_part

if TYPE_CHECKING:
    from .optimizer import Apollo

Read = Callable[[str, int, Tensor], None]
"""Fills a flat tensor with a state's elements: name of the state, the first of them, where they go."""

MOMENTS = ("exp_avg", "exp_avg_sq")
KEPT = {
    "low_rank": {*MOMENTS, "update_norm", "step"},
    "adamw": {*MOMENTS, "step"},
    "adamw_8bit": {*MOMENTS, "step"},
    "factored": {"row", "column", "step"},
}
"""What each rule keeps, beside `master` where that is asked for; 8-bit moments are carried as float32."""


class StatePart(NamedTuple):
    """Consecutive elements of a state.

    Attributes:
        shape: Of the whole state.
        start: The first element, in the flat whole.
        values: `(elements,)`.
    """

    shape: tuple[int, ...]
    start: int
    values: Tensor


def state_parts(optimizer: Apollo) -> Iterator[tuple[str, dict[str, StatePart], dict[str, Tensor]]]:
    """For each parameter with elements of states here: its name, parts of tensors, and single numbers."""
    for group, placed in optimizer.placed():
        rule = optimizer.rule_of(group, placed.layout.shape)
        parts: dict[str, StatePart] = {}
        numbers: dict[str, Tensor] = {}
        for key, value in placed.local().items():
            if key.endswith("_scale"):
                continue
            if key == "step" or (key == "update_norm" and not value.dim()):
                numbers[key] = value
                continue
            if rule == "adamw_8bit" and key in MOMENTS:
                scale = placed.kept[f"{key}_scale"].view(-1)
                value = dequantized(value.view(-1), scale, signed=key == "exp_avg")
            if value.numel() and (key != "update_norm" or placed.owned.start == 0 < placed.owned.size):
                parts[key] = StatePart(*_place(rule, key, placed, group), value.reshape(-1))
        if parts:
            yield placed.name, parts, numbers


def restore_state(
    optimizer: Apollo,
    group: Mapping[str, Any],
    placed: Placed,
    shapes: Mapping[str, tuple[int, ...]],
    numbers: Mapping[str, Tensor],
    read: Read,
) -> None:
    """Give a weight the state that parts of all ranks were of, on whatever layout it is now.

    Args:
        optimizer: Whose weight it is.
        group: Its group.
        placed: The weight, as `optimizer.placed` gives it.
        shapes: Of the states that there are; none leaves the weight as before its first step.
        numbers: The single numbers.
        read: Where the elements come from.

    Raises:
        ValueError: The states are of another rule, or of another rank.
    """
    rule = optimizer.rule_of(group, placed.layout.shape)
    if shapes:
        _check(rule, placed, group, shapes, numbers)
    device = placed.weight.device
    dtype = torch.promote_types(placed.weight.dtype, torch.float32)
    state: dict[str, Tensor] = {}
    for key, number in numbers.items():
        state[key] = number.to("cpu") if key == "step" else number.to(device)
    for key in shapes:
        _, start = _place(rule, key, placed, group)
        values = torch.zeros(_here(rule, key, placed, group), dtype=dtype, device=device)
        if values.numel():
            read(key, start, values.view(-1))
        if rule == "adamw_8bit" and key in MOMENTS:
            state[key], state[f"{key}_scale"] = quantized(values.view(-1).float(), signed=key == "exp_avg")
        elif key != "master" or group["rounding"] == "master":
            state[key] = values
    if state:
        optimizer.state[placed.owner] = state
    else:
        optimizer.state.pop(placed.owner, None)


def as_dtensors(param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """The state of a parameter; of a DTensor, with float32 DTensors for moments of 8 bits."""
    if not is_dtensor(param) or "exp_avg_scale" not in state:
        return state
    from torch.distributed.tensor import DTensor

    wide = {key: value for key, value in state.items() if not key.startswith("exp_avg")}
    for key in MOMENTS:
        codes, scale = (local_part(state[name]).view(-1) for name in (key, f"{key}_scale"))
        value = dequantized(codes, scale, signed=key == "exp_avg").view(param.to_local().shape)
        mesh, placements = param.device_mesh, param.placements
        wide[key] = DTensor.from_local(
            value, mesh, placements, shape=param.shape, stride=param.stride(), run_check=False
        )
    return wide


def in_8_bits(state: dict[str, Any]) -> dict[str, Any]:
    """What `as_dtensors` was given, of these shards, or of the whole weight that they were gathered to."""
    narrow = dict(state)
    for key in MOMENTS:
        values = local_part(state[key]).reshape(-1).float()
        narrow[key], narrow[f"{key}_scale"] = quantized(values, signed=key == "exp_avg")
    return narrow


def _place(rule: str, key: str, placed: Placed, group: Mapping[str, Any]) -> tuple[tuple[int, ...], int]:
    """Shape of a whole state, and where this rank's elements start in it."""
    layout = placed.layout
    if rule == "low_rank" and key in MOMENTS:
        shape = (*layout.shape[:-2], layout.matrices.channels, group["rank"])
        return shape, placed.owned.start * group["rank"]
    if key == "update_norm":
        return layout.shape[:-2], 0
    if key == "row":
        return (math.prod(layout.shape[:-1]),), 0
    if key == "column":
        return layout.shape[-1:], 0
    return layout.shape, placed.first


def _here(rule: str, key: str, placed: Placed, group: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of this rank's part of a state."""
    if rule == "low_rank" and key in MOMENTS:
        if placed.layout.dim is None:
            return placed.owned.size, group["rank"]
        return _place(rule, key, placed, group)[0]
    if key in ("update_norm", "row", "column"):
        return _place(rule, key, placed, group)[0]
    return tuple(placed.weight.shape)


def _check(
    rule: str,
    placed: Placed,
    group: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    numbers: Mapping[str, Tensor],
) -> None:
    there = {*shapes, *numbers} - {"master"}
    expected = {key: _place(rule, key, placed, group)[0] for key in shapes if key in KEPT[rule]}
    if there != KEPT[rule] or any(tuple(shapes[key]) != shape for key, shape in expected.items()):
        raise ValueError(
            f"the saved states of {placed.name} are {dict(shapes)}, and rule {rule!r} of rank "
            f"{group['rank']} keeps {expected or sorted(KEPT[rule])}: they are of another optimizer or of "
            "another rank. Set it as it was (in a config optimizer.name, optimizer.apollo.rank and "
            "optimizer.apollo.embeddings), or start a new run from the weights."
        )
