"""What an optimizer's states and weights take, in bytes, by rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .eight_bit import BLOCK
from .placement import Placed
from .selection import Rule

if TYPE_CHECKING:
    from .optimizer import Apollo


@dataclass(frozen=True)
class RuleMemory:
    """What the weights of one rule take on this rank.

    Attributes:
        rule: How they are updated.
        names: Of the parameters.
        elements: Of the weights that are here.
        state_bytes: Of states; before the first step, what they will take.
        state_elements: Numbers in the states.
    """

    rule: Rule
    names: tuple[str, ...]
    elements: int
    state_bytes: int
    state_elements: int


@dataclass(frozen=True)
class MemoryReport:
    """Attributes: `rules`, one entry a rule, the largest first."""

    rules: tuple[RuleMemory, ...]

    @property
    def state_bytes(self) -> int:
        """Of all states on this rank."""
        return sum(one.state_bytes for one in self.rules)

    def __str__(self) -> str:
        lines = [f"{'rule':<12}{'weights':>9}{'elements':>16}{'state MiB':>12}{'bytes/element':>15}"]
        lines += [
            f"{one.rule:<12}{len(one.names):>9,}{one.elements:>16,}{one.state_bytes / 2**20:>12,.1f}"
            f"{one.state_bytes / max(one.elements, 1):>15.4f}"
            for one in self.rules
        ]
        return "\n".join(lines)


def memory_report(optimizer: Apollo) -> MemoryReport:
    """Measured from the states that are there, and reckoned for those that the first step will make."""
    members: dict[Rule, list[tuple[str, int, dict[str, Any]]]] = {}
    for group, placed in optimizer.placed():
        rule = optimizer.rule_of(group, placed.layout.shape)
        state = placed.local() or _to_come(rule, placed, group)
        members.setdefault(rule, []).append((placed.name, placed.weight.numel(), state))
    rules = [
        RuleMemory(
            rule,
            tuple(name for name, _, _ in ones),
            sum(elements for _, elements, _ in ones),
            sum(_bytes(value) for _, _, state in ones for value in state.values()),
            sum(_numel(value) for _, _, state in ones for value in state.values()),
        )
        for rule, ones in members.items()
    ]
    return MemoryReport(tuple(sorted(rules, key=lambda one: -one.elements)))


def _to_come(rule: Rule, placed: Placed, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of a weight's first step, as tensors without memory."""
    weight, layout = placed.weight, placed.layout
    numel, wide = weight.numel(), torch.promote_types(weight.dtype, torch.float32)
    if not numel and (rule != "low_rank" or not placed.owned.size):
        return {}
    sizes: dict[str, tuple[int, torch.dtype]] = {"step": (1, torch.float32)}
    if rule == "low_rank":
        sizes |= dict.fromkeys(("exp_avg", "exp_avg_sq"), (placed.owned.size * group["rank"], wide))
        sizes["update_norm"] = layout.matrices.count, wide
    elif rule == "factored":
        sizes |= {"row": (math.prod(layout.shape[:-1]), wide), "column": (layout.shape[-1], wide)}
    elif rule == "adamw_8bit":
        sizes |= dict.fromkeys(("exp_avg", "exp_avg_sq"), (numel, torch.uint8))
        sizes |= dict.fromkeys(("exp_avg_scale", "exp_avg_sq_scale"), (-(-numel // BLOCK), torch.float32))
    else:
        sizes |= dict.fromkeys(("exp_avg", "exp_avg_sq"), (numel, wide))
    if group["rounding"] == "master" and weight.dtype != wide and placed.quantized is None:
        sizes["master"] = numel, wide
    return {key: torch.empty(size, dtype=dtype, device="meta") for key, (size, dtype) in sizes.items()}


def _bytes(value: Any) -> int:
    return value.nbytes if isinstance(value, Tensor) else 0


def _numel(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) else 0
