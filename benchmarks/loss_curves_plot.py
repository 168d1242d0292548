"""The picture of `loss_curves.py`: the curves over each other, and how each lies beside the plain one.

python benchmarks/loss_curves_plot.py DIR/loss_curves_runs picture.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import report

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red")
YARDSTICK_STYLES = ("--", ":", "-.", (0, (1, 3)))
Row = dict[str, Any]


def smoothed(values: Any, steps: int) -> np.ndarray:
    """Moving means of so many values, of those alone that have so many; all of them if there are fewer."""
    steps = min(steps, len(values))
    return np.convolve(values, np.ones(steps) / steps, "valid")


def draw(runs: list[Row], path: Path, smooth_steps: int = 20) -> None:
    """Curves above, their smoothed differences to "plain" below; yardsticks are grey."""
    plain = next((run for run in runs if run["name"] == "plain"), None)
    if plain is None:
        print(f"no picture: there is no plain run ({path.name} is not written)")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 8), sharex=True, height_ratios=(3, 2))
    steps = np.arange(1, len(plain["losses"]) + 1)
    num_ours = num_yardsticks = 0
    for run in runs:
        if run is plain:
            style: Row = {"color": "black", "linewidth": 2.0}
        elif run["yardstick"]:
            style = {"color": "0.55", "linestyle": YARDSTICK_STYLES[num_yardsticks % len(YARDSTICK_STYLES)]}
            num_yardsticks += 1
        else:
            style = {"color": COLORS[num_ours % len(COLORS)], "linewidth": 1.1}
            num_ours += 1
        label = f"{run['label']}: {np.mean(run['heldout losses']):.4f} held out"
        above.plot(steps, run["losses"], label=label, **style)
        apart = smoothed(np.subtract(run["losses"], plain["losses"]), smooth_steps)
        if run is not plain:
            below.plot(steps[len(steps) - len(apart) :], apart, **style)
    below.axhline(0, color="black", linewidth=0.8)
    above.set_ylabel("training loss")
    below.set_ylabel(f"difference to plain, mean of {smooth_steps} steps")
    below.set_xlabel("step")
    above.legend(fontsize=8, frameon=False)
    for axis in (above, below):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    report.save_figure(figure, path)


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("runs", type=Path, help="folder of the runs' files")
    options.add_argument("picture", type=Path)
    args = options.parse_args(arguments)
    draw([json.loads(path.read_text()) for path in sorted(args.runs.glob("*.json"))], args.picture)


if __name__ == "__main__":
    main()
