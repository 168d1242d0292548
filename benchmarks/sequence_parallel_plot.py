"""The pictures of `sequence_parallel.py`: speed by length, speed by GPUs, memory by a rank's tokens.

python benchmarks/sequence_parallel_plot.py benchmarks/results/sequence_parallel.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report

Row = dict[str, Any]
Lines = dict[str, list[tuple[float, float]]]
STYLES = {"ours": {"marker": "o", "linestyle": "-"}, "alst": {"marker": "s", "linestyle": "--"}}


def draw(rows: list[Row], path: Path) -> None:
    """All panels as a PNG; ours in whole lines, ALST's in broken ones, a colour a variant."""
    measured = [row for row in rows if "s" in row]
    if not measured:
        print(f"no picture: no row has a speed ({path.name} is not written)")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        ("tokens", "tokens/s", by_length(measured)),
        ("GPUs", "tokens/s", by_gpus(measured)),
        ("tokens of a rank", "peak GPU memory (GiB)", by_local_tokens(measured)),
    ]
    panels = [panel for panel in panels if panel[2]]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6.5 * len(panels), 6), squeeze=False)
    colors = matplotlib.colormaps["tab20"]
    for axis, (x_label, y_label, lines) in zip(axes[0], panels, strict=True):
        for place, (name, line) in enumerate(sorted(lines.items())):
            style = STYLES[name.split()[0]]
            axis.plot(*zip(*line, strict=True), label=name, color=colors(place % 20), markersize=4, **style)
        ticks = sorted({x for line in lines.values() for x, _ in line})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks], rotation=30)
        axis.set_ylim(bottom=0)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    report.save_figure(figure, path)


def by_length(rows: list[Row]) -> Lines:
    """Speed of each variant on each number of GPUs."""
    return _lines(rows, _on_gpus, "tokens", "tokens/s")


def by_gpus(rows: list[Row]) -> Lines:
    """Speed of each variant at each length that several numbers of GPUs have done, all for one sequence."""
    found: dict[str, dict[float, float]] = {}
    for row in sorted(rows, key=lambda row: (row["gpus"], row["tokens/s"])):
        if row["sp"] == row["gpus"]:  # one GPU with an optimizer and one without: the faster one
            name = f"{row['system']} {row['key']}, {row['tokens']:,} tokens"
            found.setdefault(name, {})[row["gpus"]] = row["tokens/s"]
    return {name: list(line.items()) for name, line in found.items() if len(line) > 1}


def by_local_tokens(rows: list[Row]) -> Lines:
    """Peak memory of each variant on each number of GPUs."""
    rows = [{**row, "local": row["tokens"] // row["sp"]} for row in rows if row.get("peak GiB")]
    return _lines(rows, _on_gpus, "local", "peak GiB")


def _on_gpus(row: Row) -> str:
    sp = "" if row["sp"] == row["gpus"] else f", sp {row['sp']}"
    plain = ", no optimizer" if row["optimizer"] == "none" else ""
    return f"{row['system']} {row['key']}, {row['gpus']} GPU{'s' * (row['gpus'] > 1)}{sp}{plain}"


def _lines(rows: list[Row], name: Callable[[Row], str], x: str, y: str) -> Lines:
    lines: Lines = {}
    for row in sorted(rows, key=lambda row: row[x]):
        lines.setdefault(name(row), []).append((row[x], row[y]))
    return lines


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("json", type=Path)
    path = options.parse_args(arguments).json
    draw(json.loads(path.read_text())["rows"], path.with_suffix(".png"))


if __name__ == "__main__":
    main()
