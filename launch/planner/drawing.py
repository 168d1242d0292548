"""A plan's memory as bars: what each component takes of card and host, and where their limits are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..images import refuse_other_formats, save
from .report import model_name

if TYPE_CHECKING:
    from .plan import Plan

GIB = 2**30
LIMIT = "#b00020"
SMALL_SHARE = 0.01
"""Components below this share of the larger bar are drawn together: no one could tell them apart."""
NUMBER_SHARE = 0.03
"""Of the axis: what is narrower has no room for its number."""


def draw(plan: Plan, path: Path) -> None:
    """Draw a plan's memory, one bar for the card and one for the host.

    Args:
        plan: What is drawn.
        path: The image to write.

    Raises:
        ValueError: Its name ends in no kind of image that is known.
        OSError: It cannot be written there.
    """
    refuse_other_formats(path)
    # Not pyplot: it keeps every figure in a process-wide list and may look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    bars = [_of_card(plan), _of_host(plan)]
    sums = [sum(sizes.values()) / GIB for sizes in bars]
    limits = [plan.machine.gpu.memory_bytes / GIB, plan.host_room / GIB]
    end = max(*sums, *limits)
    _draw_bars(axes, [_joined(sizes, SMALL_SHARE * max(sums) * GIB) for sizes in bars], NUMBER_SHARE * end)
    for row, (taken, limit) in enumerate(zip(sums, limits, strict=True)):
        axes.plot([limit, limit], [0.65 - row, 1.35 - row], color=LIMIT, linewidth=2)
        # In the middle above its line, unless that would stand over the other axis.
        align = "left" if limit < end / 10 else "center"
        told = f"{taken:,.1f} of {limit:,.1f} GiB"
        axes.text(limit, 1.38 - row, told, color=LIMIT, ha=align, va="bottom", size=8)
    _dress(axes, plan, end)
    save(figure, path)


def _draw_bars(axes: Any, rows: list[dict[str, int]], least: float) -> None:
    """A bar for each row, a colour for each name, and numbers on parts of at least so many GiB."""
    names = list(dict.fromkeys(name for sizes in rows for name in sizes))
    left = [0.0] * len(rows)
    for index, name in enumerate(names):
        widths = [sizes.get(name, 0) / GIB for sizes in rows]
        axes.barh([1, 0], widths, left=left, height=0.5, color=_colour(index), edgecolor="white", label=name)
        for row, width in enumerate(widths):
            if width >= least:
                place = left[row] + width / 2
                axes.text(place, 1 - row, f"{width:,.1f}", ha="center", va="center", size=8)
        left = [start + width for start, width in zip(left, widths, strict=True)]


def _of_card(plan: Plan) -> dict[str, int]:
    sizes = {part.name: part.gpu_bytes for part in plan.memory.parts if part.gpu_bytes}
    return {**sizes, "fragments and context": plan.memory.reserved_bytes - plan.memory.peak_bytes}


def _of_host(plan: Plan) -> dict[str, int]:
    return {part.name: part.host_bytes for part in plan.memory.parts if part.host_bytes}


def _joined(sizes: dict[str, int], least: float) -> dict[str, int]:
    large = {name: size for name, size in sorted(sizes.items(), key=lambda item: -item[1]) if size >= least}
    small = sum(sizes.values()) - sum(large.values())
    return {**large, "others": small} if small else large


def _colour(index: int) -> Any:
    from matplotlib import colormaps

    # Light ones of each pair first: numbers stand on them in black.
    return colormaps["tab20"]((2 * index + 1) % 20 if index < 10 else (2 * index) % 20)


def _dress(axes: Any, plan: Plan, end: float) -> None:
    knobs, machine = plan.knobs, plan.machine
    axes.set_yticks([1, 0], ["each GPU", "host memory,\neach process"])
    axes.set_xlim(0, 1.06 * end)
    axes.set_ylim(-0.5, 1.7)
    axes.set_xlabel("GiB")
    fits = "fits" if plan.fits else "does not fit"
    told = f"{model_name(plan)}, {knobs.length:,} tokens on {machine.num_gpus} x {machine.gpu.name}: {fits}"
    axes.set_title(told, loc="left", size=11)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False, fontsize=8)
