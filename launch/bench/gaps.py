"""Stretches of a step in which the GPU computes nothing, and arithmetic of stretches of time.

All times are integers, in nanoseconds.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Span = tuple[int, int]
START, END = "start of the step", "end of the step"


class Event(NamedTuple):
    """Something that ran, on the GPU or in the driver."""

    start: int
    end: int
    name: str


@dataclass
class Gap:
    """All stretches between computing kernels of the same two names.

    Attributes:
        before: The kernel that ended last, or `START`.
        after: The kernel that started next, or `END`.
        spans: When, in order.
        idle: With nothing at all on the GPU.
        beside: Communication and copies of the host that ran meanwhile, by kind; two may run at once.
        host: What the process had asked of the driver meanwhile, by call, the longest first; what is left is
            the process's own computing.
    """

    before: str
    after: str
    spans: list[Span] = field(default_factory=list)
    idle: int = 0
    beside: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Of all of them."""
        return length(self.spans)

    @property
    def longest(self) -> int:
        """The length of the longest one."""
        return max(end - start for start, end in self.spans)


def find_gaps(computing: Iterable[Event], start: int, end: int) -> list[Gap]:
    """Where none of the events runs, by the names around; the longest together come first.

    Args:
        computing: In any order, on any streams.
        start: Of the step; `before` of the first gap is `START`.
        end: Of the step.
    """
    found: dict[tuple[str, str], Gap] = {}
    reach, before = start, START
    for event in itertools.chain(sorted(computing), [Event(end, end, END)]):
        if event.start > reach:
            gap = found.setdefault((before, event.name), Gap(before, event.name))
            gap.spans.append((reach, event.start))
        if event.end > reach:
            reach, before = event.end, event.name
    return sorted(found.values(), key=lambda gap: -gap.length)


def explain(gaps: Sequence[Gap], beside: Mapping[str, Sequence[Span]], host: Iterable[Event]) -> None:
    """Fill in what went on during gaps.

    Args:
        gaps: To fill in; only what happens in them is looked for, so hand over those that matter.
        beside: What ran on the GPU without computing, by kind, each as `merged` gives it.
        host: Calls of the driver.
    """
    everywhere = merged(itertools.chain.from_iterable(gap.spans for gap in gaps))
    starts = [start for start, _ in everywhere]
    by_call: dict[str, list[Span]] = {}
    for start, end, name in host:
        # A step has a call for each of up to a million kernels, and most fall in no gap.
        place = bisect.bisect_left(starts, end)
        if place and everywhere[place - 1][1] > start:
            by_call.setdefault(name, []).append((start, end))
    anything = merged(itertools.chain.from_iterable(beside.values()))
    calls = {name: merged(spans) for name, spans in by_call.items()}
    for gap in gaps:
        gap.idle = gap.length - overlap(gap.spans, anything)
        gap.beside = _shared(gap.spans, beside)
        gap.host = _shared(gap.spans, calls)


def _shared(spans: Sequence[Span], named: Mapping[str, Sequence[Span]]) -> dict[str, int]:
    found = {name: overlap(spans, other) for name, other in named.items()}
    return {name: ns for name, ns in sorted(found.items(), key=lambda item: -item[1]) if ns}


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same time in spans that do not overlap, in order."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            if end > found[-1][1]:
                found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


def length(spans: Iterable[Span]) -> int:
    """Of spans that do not overlap."""
    return sum(end - start for start, end in spans)


def overlap(one: Sequence[Span], other: Sequence[Span]) -> int:
    """How long both lists have a span; each as `merged` gives it."""
    total, i, j = 0, 0, 0
    while i < len(one) and j < len(other):
        total += max(0, min(one[i][1], other[j][1]) - max(one[i][0], other[j][0]))
        if one[i][1] <= other[j][1]:
            i += 1
        else:
            j += 1
    return total
