"""What to change so that a run takes less memory, and at what price.

For a plan that does not fit, and for a run whose memory ran out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config_changes import with_values
from ..config_rules import broken_rules
from ..sizes import gib
from .costs import CARD_SHARE
from .ideas import Idea, ideas
from .machine import HOST_SHARE
from .memory import MemoryEstimate, estimate_memory
from .seconds import estimate_seconds

if TYPE_CHECKING:
    from .plan import Plan

WORTH_BYTES = 2**28
"""What less than this frees is within what an estimate does not know."""
SAME = 0.005
"""Shares of a step below this are no difference."""


@dataclass(frozen=True)
class Change:
    """One way out.

    Attributes:
        overrides: `key=value`, to be put behind the command.
        gpu_bytes: That it frees of each GPU; below 0 it takes more.
        host_bytes: That it frees of a process's host memory; below 0 it takes more.
        slower: How much longer a step takes, as a share of it; below 0 it is faster.
        fits: Whether card and host have room for the run then.
        note: What it changes beside memory and time.
    """

    overrides: str
    gpu_bytes: int
    host_bytes: int
    slower: float
    fits: bool
    note: str


def advice(plan: Plan, count: int | None = None) -> list[str]:
    """Lines that say what would help, the best first: keys of the config, and what a machine would need.

    Args:
        plan: What was planned, whether it fits or not.
        count: How many changes are told, at most; None tells all.
    """
    lines = []
    if not plan.fits and plan.longest_tokens is not None:
        lines.append(f"sequence.length={plan.longest_tokens} is the longest that fits as the rest is set")
    lines += [_line(plan, change) for change in best_changes(plan)[:count]]
    needed = _needed_machine(plan)
    return [*lines, needed] if needed else lines


def best_changes(plan: Plan) -> list[Change]:
    """Changes that free memory, one of each family: what makes a run fit first, then what frees most."""

    def worth(change: Change) -> tuple[bool, float]:
        makes_it_fit = change.fits and not plan.fits
        return makes_it_fit, -change.slower if makes_it_fit else _freed(plan, change)

    best: dict[str, Change] = {}
    for idea in ideas(plan):
        change = _weigh(plan, idea)
        if change is None or _freed(plan, change) < WORTH_BYTES:
            continue
        known = best.get(idea.family)
        if known is None or worth(change) > worth(known):
            best[idea.family] = change
    return sorted(best.values(), key=worth, reverse=True)


def _freed(plan: Plan, change: Change) -> int:
    """Bytes of what is too full; of the card where nothing is, by the plan."""
    memory, freed = plan.memory, 0
    if memory.host_bytes > plan.host_room:
        freed += change.host_bytes
    if memory.reserved_bytes > plan.card_room or plan.fits:
        freed += change.gpu_bytes
    return freed


def _weigh(plan: Plan, idea: Idea) -> Change | None:
    """Its estimates; None where the config's rules forbid it, or it takes of what is too full."""
    config, work = with_values(plan.config, idea.values), idea.work or plan.work
    # The model's positions and heads are judged by the plan, which knows more than the config.
    if broken_rules(config, plan.machine.num_gpus, ("model.config",)):
        return None
    if idea.knobs.ulysses_degree > work.shape.num_heads:
        return None
    memory = estimate_memory(work, idea.knobs, plan.machine)
    fits = memory.host_bytes <= plan.host_room and memory.reserved_bytes <= plan.card_room
    if not fits and _is_moved_to_where_none_is(plan, memory):
        return None
    seconds = estimate_seconds(work, idea.knobs, plan.machine).seconds
    return Change(
        " ".join(f"{key}={_written(value)}" for key, value in idea.values.items()),
        plan.memory.reserved_bytes - memory.reserved_bytes,
        plan.memory.host_bytes - memory.host_bytes,
        # Per token, so that a shorter sequence is not taken for a faster step.
        seconds * plan.knobs.length / (plan.seconds.seconds * idea.knobs.length) - 1,
        fits,
        idea.note,
    )


def _is_moved_to_where_none_is(plan: Plan, memory: MemoryEstimate) -> bool:
    """Whether more is taken than before of a card or a host that has no room for it."""
    sides = (
        (memory.reserved_bytes, plan.memory.reserved_bytes, plan.card_room),
        (memory.host_bytes, plan.memory.host_bytes, plan.host_room),
    )
    return any(then > max(now, room) for then, now, room in sides)


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _line(plan: Plan, change: Change) -> str:
    sides = ((change.gpu_bytes, "each GPU"), (change.host_bytes, "each process's host memory"))
    freed = " and ".join(f"{gib(size)} GiB of {what}" for size, what in sides if size >= WORTH_BYTES)
    parts = [f"{change.overrides} frees {freed}"]
    parts += [f"takes {gib(-size)} GiB more of {what}" for size, what in sides if size <= -WORTH_BYTES]
    if abs(change.slower) < SAME:
        parts.append("is no slower")
    else:
        parts.append(f"is {100 * abs(change.slower):.0f} % {'slower' if change.slower > 0 else 'faster'}")
    line = ", ".join(parts) + (f" ({change.note})" if change.note else "")
    return line + ("; then it fits" if change.fits and not plan.fits else "")


def _needed_machine(plan: Plan) -> str | None:
    """What a machine would need where there is too little of it."""
    memory, needs = plan.memory, []
    if memory.reserved_bytes > plan.card_room:
        needs.append(f"GPUs of {math.ceil(memory.reserved_bytes / CARD_SHARE / 2**30):,} GiB")
    if memory.host_bytes > plan.host_room:
        sharing = min(plan.machine.gpus_per_node, plan.machine.num_gpus)
        node = math.ceil(memory.host_bytes * sharing / HOST_SHARE / 2**30)
        needs.append(f"nodes with {node:,} GiB of host memory")
    return f"{' and '.join(needs)} would have room for it as it is" if needs else None
