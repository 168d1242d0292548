"""Where one step's time goes on the GPU: by kind of kernel, and by gap between kernels."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .gaps import Event, Gap, Span, explain, find_gaps, length, merged, overlap
from .kernel_kinds import ATTENTION, BESIDE, PRODUCTS, computes, kind_of, order, short_name
from .recording import Recording, record

SMALLEST_GAP = 0.002
"""Of the step's time; smaller gaps are summed."""
NUM_TOP_KERNELS = 20
TOP_NAME = 200
"""Characters; PyTorch's own have thousands."""
_NS = 1e9


class KindTime(NamedTuple):
    """What the kernels of one kind took.

    Attributes:
        seconds: In which at least one of them ran.
        exposed_s: The part that counts: a moment in which several kinds run belongs to products, else to
            attention, else to other computing, else to NCCL, else to copies of the host. So all kinds'
            exposed seconds and the idle ones add up to the step's.
        calls: Kernels or copies.
    """

    seconds: float
    exposed_s: float
    calls: int


class TopKernel(NamedTuple):
    """A kernel that takes much of the step: its seconds are summed over its calls."""

    name: str
    seconds: float
    calls: int


@dataclass(frozen=True)
class StepProfile:
    """A step, taken apart.

    Attributes:
        on_gpu: Without a GPU there is nothing but `wall_s`.
        wall_s: From the step's call until the GPU had done it.
        busy_s: With any kernel or copy on any stream.
        kinds: The one with most exposed seconds first.
        gaps: Between computing kernels, over `SMALLEST_GAP` of the step; the longest together first.
        small_gaps: How many others there are.
        small_gaps_s: Their seconds.
        before_first_s: From the step's call to the first kernel or copy.
        after_last_s: From the last one's end to the end of the step.
        top: The kernels that took most.
        top_beside: Of the others than products and attention those that ran longest while neither of these
            did; several may have run at once.
    """

    on_gpu: bool
    wall_s: float
    busy_s: float = 0.0
    kinds: dict[str, KindTime] = field(default_factory=dict)
    gaps: tuple[Gap, ...] = ()
    small_gaps: int = 0
    small_gaps_s: float = 0.0
    before_first_s: float = 0.0
    after_last_s: float = 0.0
    top: tuple[TopKernel, ...] = ()
    top_beside: tuple[TopKernel, ...] = ()

    @property
    def idle_s(self) -> float:
        """With nothing on the GPU."""
        return self.wall_s - self.busy_s if self.on_gpu else 0.0

    @property
    def beside_products_and_attention(self) -> float:
        """Share of the step in which neither a product nor attention runs; 0 without a GPU."""
        if not self.on_gpu or not self.wall_s:
            return 0.0
        inside = sum(self.kinds[kind].exposed_s for kind in (*PRODUCTS, *ATTENTION) if kind in self.kinds)
        return 1 - inside / self.wall_s

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs: seconds, shares of the step."""
        if not self.on_gpu:
            return {"on_gpu": False, "wall_s": self.wall_s}
        return {
            "on_gpu": True,
            "wall_s": self.wall_s,
            "busy_s": self.busy_s,
            "idle_s": self.idle_s,
            "beside_products_and_attention": self.beside_products_and_attention,
            "before_first_s": self.before_first_s,
            "after_last_s": self.after_last_s,
            "kinds": {
                kind: {
                    "s": took.seconds,
                    "exposed_s": took.exposed_s,
                    "share": self._share(took.exposed_s),
                    "calls": took.calls,
                }
                for kind, took in self.kinds.items()
            },
            "gaps": [self._gap_json(gap) for gap in self.gaps],
            "small_gaps": {"count": self.small_gaps, "s": self.small_gaps_s},
            "top": [_kernel_json(kernel) for kernel in self.top],
            "top_beside": [_kernel_json(kernel) for kernel in self.top_beside],
        }

    def table(self) -> list[str]:
        """Lines to print."""
        if not self.on_gpu:
            return [f"The step took {self.wall_s:.3f} s. There is no GPU, so there are no kernels to show."]
        lines = [
            f"step {self.wall_s:.3f} s: GPU busy {self.busy_s:.3f} s, idle {self.idle_s:.3f} s, of which "
            f"{self.before_first_s:.3f} s before the first kernel and {self.after_last_s:.3f} s at the end",
            f"beside products and attention: {self.beside_products_and_attention:.1%} of the step",
            "",
        ]
        rows = [("kind", "s", "exposed s", "share", "calls")]
        rows += [
            (
                kind,
                f"{took.seconds:.4f}",
                f"{took.exposed_s:.4f}",
                self._percent(took.exposed_s),
                f"{took.calls}",
            )
            for kind, took in self.kinds.items()
        ]
        rows.append(("idle", "", f"{self.idle_s:.4f}", self._percent(self.idle_s), ""))
        lines += [*_aligned(rows), "", *self._beside_lines()]
        lines.append(f"gaps between computing kernels, over {SMALLEST_GAP:.1%} of the step")
        rows = [("before", "after", "s", "share", "times", "longest s", "meanwhile")]
        rows += [
            (
                *(gap.before, gap.after, f"{gap.length / _NS:.4f}", self._percent(gap.length / _NS)),
                *(f"{len(gap.spans)}", f"{gap.longest / _NS:.4f}", meanwhile(self._gap_json(gap))),
            )
            for gap in self.gaps
        ]
        small = self.small_gaps_s
        rows.append(("all others", "", f"{small:.4f}", self._percent(small), f"{self.small_gaps}", "", ""))
        return lines + _aligned(rows)

    def _beside_lines(self) -> list[str]:
        """The kernels beside products and attention that are worth a look."""
        rows = [
            (short_name(name), f"{seconds:.4f}", self._percent(seconds), f"{calls}")
            for name, seconds, calls in self.top_beside
            if seconds >= SMALLEST_GAP * self.wall_s
        ]
        if not rows:
            return []
        title = f"kernels while neither products nor attention run, over {SMALLEST_GAP:.1%} of the step"
        return [title, *_aligned([("kernel", "s", "share", "calls"), *rows]), ""]

    def _share(self, seconds: float) -> float:
        return seconds / self.wall_s if self.wall_s else 0.0

    def _percent(self, seconds: float) -> str:
        return f"{self._share(seconds):.2%}"

    def _gap_json(self, gap: Gap) -> dict[str, Any]:
        return {
            "before": gap.before,
            "after": gap.after,
            "s": gap.length / _NS,
            "idle_s": gap.idle / _NS,
            "share": self._share(gap.length / _NS),
            "count": len(gap.spans),
            "longest_s": gap.longest / _NS,
            "beside": {kind: ns / _NS for kind, ns in gap.beside.items()},
            "host": {call: ns / _NS for call, ns in gap.host.items()},
        }


def _kernel_json(kernel: TopKernel) -> dict[str, Any]:
    return {"kernel": kernel.name, "s": kernel.seconds, "calls": kernel.calls}


def meanwhile(gap: dict[str, Any]) -> str:
    """What ran during a gap (as in `as_json`), and what the process waited for or did, in words."""
    parts = [f"{kind} {_of(seconds, gap['s'])}" for kind, seconds in gap["beside"].items()]
    parts += [f"{call} {_of(seconds, gap['s'])}" for call, seconds in list(gap["host"].items())[:2]]
    if gap["idle_s"]:
        parts.insert(0, f"idle {_of(gap['idle_s'], gap['s'])}")
    return ", ".join(parts)


def _of(seconds: float, whole: float) -> str:
    return f"{seconds / whole:.0%}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def profile_step(step: Callable[[], object], device: torch.device) -> StepProfile:
    """Run a step once, recorded.

    Warm up before: a first step compiles and allocates. With several processes one records, and the others
    run the step.

    Args:
        step: All of it; it need not wait for the GPU.
        device: Where it runs. On a CPU its seconds are all that is told.
    """
    if device.type != "cuda":
        started = time.perf_counter()
        step()
        return StepProfile(on_gpu=False, wall_s=time.perf_counter() - started)
    return taken_apart(record(step, device))


def taken_apart(recording: Recording) -> StepProfile:
    """The profile of a recorded step."""
    start, end = recording.start, recording.end
    events = [
        event
        if start <= event.start and event.end <= end
        else Event(max(event.start, start), min(event.end, end), event.name)
        for event in recording.on_gpu
        if event.start < end and event.end > start
    ]
    busy = merged((begun, ended) for begun, ended, _ in events)
    computing = [
        Event(begun, ended, short_name(name))
        for begun, ended, name in events
        if computes(kind_of(name)) and ended > begun
    ]
    gaps = find_gaps(computing, start, end)
    shown = [gap for gap in gaps if gap.length >= SMALLEST_GAP * (end - start)]
    small = gaps[len(shown) :]
    explain(shown, _beside(events), recording.host_calls)
    return StepProfile(
        on_gpu=True,
        wall_s=(end - start) / _NS,
        busy_s=length(busy) / _NS,
        kinds=by_kind(events),
        gaps=tuple(shown),
        small_gaps=sum(len(gap.spans) for gap in small),
        small_gaps_s=sum(gap.length for gap in small) / _NS,
        before_first_s=(busy[0][0] - start) / _NS if busy else 0.0,
        after_last_s=(end - busy[-1][1]) / _NS if busy else 0.0,
        top=top_kernels(events),
        top_beside=top_beside(events),
    )


def _beside(events: Iterable[Event]) -> dict[str, list[Span]]:
    """When NCCL and copies of the host ran."""
    spans: dict[str, list[Span]] = {kind: [] for kind in BESIDE}
    for event in events:
        kind = kind_of(event.name)
        if not computes(kind):
            spans[kind].append((event.start, event.end))
    return {kind: merged(found) for kind, found in spans.items()}


def by_kind(events: Sequence[Event]) -> dict[str, KindTime]:
    """What each kind took, the one with most exposed seconds first."""
    kinds = sorted({kind_of(event.name) for event in events}, key=order)
    index = {kind: place for place, kind in enumerate(kinds)}
    edges = []
    calls, running, since = [0] * len(kinds), [0] * len(kinds), [0] * len(kinds)
    took, exposed = [0] * len(kinds), [0] * len(kinds)
    for start, end, name in events:
        place = index[kind_of(name)]
        calls[place] += 1
        if end > start:
            edges += [(start, 1, place), (end, -1, place)]
    edges.sort()
    mask, before = 0, 0  # a bit for each kind that runs; the lowest is the first in order
    for now, sign, place in edges:
        if mask:
            exposed[(mask & -mask).bit_length() - 1] += now - before
        before = now
        running[place] += sign
        if sign > 0 and running[place] == 1:
            since[place] = now
            mask |= 1 << place
        elif not running[place]:
            took[place] += now - since[place]
            mask &= ~(1 << place)
    found = {
        kind: KindTime(took[place] / _NS, exposed[place] / _NS, calls[place]) for kind, place in index.items()
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].exposed_s))


def top_kernels(events: Iterable[Event]) -> tuple[TopKernel, ...]:
    """Those that took most together."""
    totals: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for start, end, name in events:
        totals[name] += end - start
        calls[name] += 1
    most = totals.most_common(NUM_TOP_KERNELS)
    return tuple(TopKernel(name[:TOP_NAME], ns / _NS, calls[name]) for name, ns in most)


def top_beside(events: Iterable[Event]) -> tuple[TopKernel, ...]:
    """Of other kinds than products and attention, those that ran longest while neither of these did."""
    work: list[Span] = []
    spans: dict[str, list[Span]] = {}
    for start, end, name in events:
        is_work = kind_of(name) in (*PRODUCTS, *ATTENTION)
        (work if is_work else spans.setdefault(name, [])).append((start, end))
    work = merged(work)
    found = []
    for name, calls in spans.items():
        ran = merged(calls)
        found.append(TopKernel(name[:TOP_NAME], (length(ran) - overlap(ran, work)) / _NS, len(calls)))
    return tuple(sorted(found, key=lambda kernel: -kernel.seconds)[:NUM_TOP_KERNELS])
