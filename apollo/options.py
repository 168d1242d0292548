"""What a parameter group of `Apollo` may say, and its parameters' names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from torch import Tensor

from .selection import Rule
from .slots import Rounding

ScaleType = Literal["channel", "tensor"]
CHANNEL_RANK, TENSOR_RANK = 256, 1
TENSOR_ALPHA = math.sqrt(128)
"""The paper's for APOLLO-Mini in pre-training; it makes up for a projection to one dimension."""


def named_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """What an optimizer is given, as groups."""
    given = list(params)
    if not given or isinstance(given[0], dict):  # torch refuses to have none
        return [dict(group) for group in given]
    return [{"params": given}]


def named(group: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A group whose parameters have names.

    Raises:
        ValueError: It has names that are not its parameters', or the same name twice.
    """
    group = dict(group)
    params = group["params"]
    members = [params] if isinstance(params, Tensor) else list(params)
    names = group.get("names")
    if members and isinstance(members[0], tuple):
        names = [name for name, _ in members]
        members = [param for _, param in members]
    if names is None:
        names = [f"{index}.{place}" for place in range(len(members))]
    names = list(names)
    if len(names) != len(members) or len(set(names)) != len(names):
        raise ValueError(
            f"param group {index} has {len(members)} parameters and {len(set(names))} different names; give "
            "each one its own name."
        )
    return {**group, "params": members, "names": names}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check(group: Mapping[str, Any]) -> None:
    """See that a group's options, all of which it has, are in range.

    Raises:
        ValueError: Which are not.
    """
    rules = {
        "lr": (group["lr"] >= 0, "must be 0 or above"),
        "rank": (_is_count(group["rank"]), "must be a whole number from 1"),
        "scale_type": (group["scale_type"] in get_args(ScaleType), "must be 'channel' or 'tensor'"),
        "update_gap": (_is_count(group["update_gap"]), "must be a whole number from 1"),
        "alpha": (group["alpha"] > 0, "must be above 0"),
        "betas": (all(0 <= beta < 1 for beta in group["betas"]), "must each be from 0 to below 1"),
        "eps": (group["eps"] > 0, "must be above 0"),
        "weight_decay": (group["weight_decay"] >= 0, "must be 0 or above"),
        "norm_growth_limit": (
            group["norm_growth_limit"] is None or group["norm_growth_limit"] > 1,
            "must be above 1, or None for no limit",
        ),
        "rounding": (group["rounding"] in get_args(Rounding), f"must be one of {get_args(Rounding)}"),
        "rule": (group["rule"] in (None, *get_args(Rule)), f"must be None or one of {get_args(Rule)}"),
    }
    wrong = [f"{key}={group[key]!r} {rule}" for key, (holds, rule) in rules.items() if not holds]
    if wrong:
        raise ValueError("; ".join(wrong) + ".")
