"""The picture of `decoder.py`: peak memory and speed against length, one line a variant.

python benchmarks/decoder_plot.py benchmarks/results/decoder.json       # of a run that was cut short
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import report

PANELS = (("peak GiB", "peak GPU memory (GiB)"), ("tokens/s", "tokens/s"))
OTHERS_STYLES = ("--", ":", "-.")
Row = dict[str, Any]


def draw(rows: list[Row], path: Path) -> None:
    """Both panels as a PNG; ours in colours and whole lines, others' in grey and broken ones."""
    if not any(points(rows, column) for column, _ in PANELS):
        print(f"no picture: no row has a peak or a speed ({path.name} is not written)")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(14, 6))
    styles = styles_of(rows, [matplotlib.colormaps["turbo"](place / 15) for place in range(1, 16)])
    for axis, (column, label) in zip(axes, PANELS, strict=True):
        lines = points(rows, column)
        for variant, line in lines.items():
            axis.plot(*zip(*line, strict=True), label=variant, markersize=4, linewidth=1.2, **styles[variant])
        ticks = sorted({tokens for line in lines.values() for tokens, _ in line})
        if ticks:
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [f"{tokens:,}" for tokens in ticks], rotation=30)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("tokens")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    handles = {}
    for axis in axes:
        for handle, variant in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(variant, handle)
    legend_in = 0.22 * ((len(handles) + 1) // 2) + 0.4
    figure.set_figheight(5.5 + legend_in)
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=2, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, legend_in / (5.5 + legend_in), 1, 1))
    report.save_figure(figure, path)


def points(rows: list[Row], column: str) -> dict[str, list[tuple[int, float]]]:
    """Of each variant its lengths and what the column says of them; a length without a number has none."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        if row.get(column) is not None:
            lines.setdefault(row["variant"], []).append((row["tokens"], row[column]))
    return lines


def styles_of(rows: list[Row], colors: list[Any]) -> dict[str, dict[str, Any]]:
    """A line's look, by variant."""
    styles: dict[str, dict[str, Any]] = {}
    num_ours = num_others = 0
    for row in rows:
        if row["variant"] in styles:
            continue
        if row["key"].startswith("longseq"):
            styles[row["variant"]] = {"color": colors[num_ours % len(colors)], "marker": "o"}
            num_ours += 1
        else:
            grey = str(0.1 + 0.15 * (num_others % 5))
            style = OTHERS_STYLES[num_others % len(OTHERS_STYLES)]
            styles[row["variant"]] = {"color": grey, "linestyle": style, "marker": "s"}
            num_others += 1
    return styles


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("json", type=Path)
    path = options.parse_args(arguments).json
    draw(json.loads(path.read_text())["rows"], path.with_suffix(".png"))


if __name__ == "__main__":
    main()
