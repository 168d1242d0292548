"""The picture of `optimizer_pretraining.py`: held-out perplexity over tokens, one line a run.

python benchmarks/optimizer_plot.py DIR/runs picture.png
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import report

LABELS = {
    "adamw": "AdamW",
    "apollo": "APOLLO",
    "mini": "APOLLO-Mini",
    "mini-bf16": "APOLLO-Mini, bf16 weights",
}
COLORS = {"adamw": "0.25", "apollo": "tab:blue", "mini": "tab:orange", "mini-bf16": "tab:green"}
Row = dict[str, Any]


def draw(runs: list[Row], path: Path) -> None:
    """The best run of each optimizer is bold, its other learning rates are thin."""
    runs = [run for run in runs if run["curve"]]
    if not runs:
        print(f"no picture: no run has a curve ({path.name} is not written)")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axis = pyplot.subplots(figsize=(8, 5.5))
    best = best_of_each(runs)
    for run in runs:
        tokens = [point["tokens"] / 1e6 for point in run["curve"]]
        perplexities = [math.exp(point["heldout nll"]) for point in run["curve"]]
        bold = run["name"] in best
        alpha = "" if run["alpha"] is None else f", alpha {run['alpha']:g}"
        label = f"{LABELS[run['method']]}{alpha}, lr {run['lr']:g}"
        if run["perplexity"] is not None:
            label += f": {run['perplexity']:.2f}"
        axis.plot(
            tokens,
            perplexities,
            color=COLORS[run["method"]],
            linewidth=2.4 if bold else 0.8,
            alpha=1.0 if bold else 0.6,
            marker="o" if bold else None,
            markersize=4,
            label=label,
        )
    axis.set_yscale("log")
    for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        which(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlabel("million tokens")
    axis.set_ylabel("held-out perplexity")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7, frameon=False, ncols=2)
    figure.tight_layout()
    report.save_figure(figure, path)


def best_of_each(runs: list[Row]) -> set[str]:
    """Names of the runs with an optimizer's lowest perplexity; one that diverged is none."""
    found: dict[str, Row] = {}
    for run in runs:
        if run["perplexity"] is None:
            continue
        other = found.get(run["method"])
        if other is None or run["perplexity"] < other["perplexity"]:
            found[run["method"]] = run
    return {run["name"] for run in found.values()}


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("runs", type=Path, help="folder of the runs' files")
    options.add_argument("picture", type=Path)
    args = options.parse_args(arguments)
    draw([json.loads(path.read_text()) for path in sorted(args.runs.glob("*.json"))], args.picture)


if __name__ == "__main__":
    main()
