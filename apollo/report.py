"""What an optimizer's states and weights take, in bytes, by rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .selection import Rule

if TYPE_CHECKING:
    from .optimizer import Apollo


@dataclass(frozen=True)
class RuleMemory:
    """What the weights of one rule take on this rank.

    Attributes:
        rule: How they are updated.
        names: Of the parameters.
        elements: Of the weights, wherever they are.
        state_bytes: Of states; 0 before the first step.
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
    """Measured from the states that are there."""
    members: dict[Rule, list[tuple[str, int, dict[str, Any]]]] = {}
    for group, placed in optimizer.placed():
        rule = optimizer.rule_of(group, placed.layout.shape)
        members.setdefault(rule, []).append((placed.name, placed.weight.numel(), placed.local()))
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


def _bytes(value: Any) -> int:
    return value.nbytes if isinstance(value, Tensor) else 0


def _numel(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) else 0
