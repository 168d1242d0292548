"""The picture of `end_to_end.py`: the longest sequence and the speed at 65,536 tokens, rung by rung.

python benchmarks/end_to_end_plot.py benchmarks/results/end_to_end.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import report

LONG_TOKENS = 65536
OURS, OURS_MINI, OTHERS = "#2a78b8", "#1b9e77", "0.6"
ANCHORS = ("liger", "alst", "alst-host", "mini-s")
Row = dict[str, Any]


def draw(rows: list[Row], path: Path) -> None:
    """Both panels as a PNG; ours in colours, by optimizer, others' in grey; without a smaller card's rows."""
    rows = [row for row in rows if row.get("card_gib") is None and row.get("times") is not None]
    lengths = {row["name"]: row.get("longest", {}).get("tokens") for row in rows}
    # No longer one was seen to have no room: the bar is what was tried, and no limit.
    at_least = {row["name"] for row in rows if row.get("longest", {}).get("fails_tokens") is None}
    for row in rows:
        source = row.get("longest", {}).get("as")
        lengths[row["name"]] = lengths[row["name"]] or lengths.get(source)
        if source is not None and source not in at_least:
            at_least.discard(row["name"])
    speeds = {row["name"]: speed_of(row) for row in rows}
    panels = ((lengths, "longest sequence (tokens)"), (speeds, "tokens/s at 65,536 tokens"))
    if not any(value for values, _ in panels for value in values.values()):
        print(f"no picture: no row has a length or a speed ({path.name} is not written)")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(15, 0.42 * len(rows) + 1.6), sharey=True)
    places = range(len(rows))
    for axis, (values, title) in zip(axes, panels, strict=True):
        numbers = [values[row["name"]] or 0 for row in rows]
        axis.barh(places, numbers, color=[color_of(row) for row in rows], height=0.72)
        for place, number in zip(places, numbers, strict=True):
            mark = "\u2265 " if values is lengths and rows[place]["name"] in at_least else ""
            text = f" {mark}{number:,.0f}" if number else " -"
            axis.text(number, place, text, va="center", fontsize=8)
        axis.set_xlabel(title)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set_xlim(0, 1.18 * max(numbers) or 1)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0].set_yticks(places, [row["label"] for row in rows], fontsize=9)
    axes[0].invert_yaxis()
    handles = [
        pyplot.Rectangle((0, 0), 1, 1, color=color, label=name)
        for color, name in (
            (OURS, "the ladder, AdamW"),
            (OURS_MINI, "longseq, APOLLO-Mini in backward"),
            (OTHERS, "others, AdamW"),
        )
    ]
    figure.legend(handles=handles, fontsize=8, loc="lower center", ncols=len(handles), frameon=False)
    figure.suptitle("Llama-3-8B, all weights trained, one GPU; -: no room, or not measured", fontsize=11)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    report.save_figure(figure, path)


def speed_of(row: Row) -> float | None:
    """Tokens a second at the length of the picture."""
    return next((one.get("tokens_per_second") for one in row["times"] if one["tokens"] == LONG_TOKENS), None)


def color_of(row: Row) -> str:
    """Whose a row is, and by which optimizer."""
    if row["name"] in ANCHORS:
        return OTHERS
    return OURS if row["optimizer"] == "AdamW" else OURS_MINI


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("json", type=Path)
    path = options.parse_args(arguments).json
    draw(json.loads(path.read_text())["rows"], path.with_suffix(".png"))


if __name__ == "__main__":
    main()
