"""What `loss_curves.py` says of its runs: how each lies beside the plain one, and beside the yardsticks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from loss_curves_plot import smoothed

SMOOTH_STEPS = 20  # of the moving mean, and of a block of the standard error
APART = 2.0  # times the yardsticks' largest difference
Row = dict[str, Any]


def table(runs: list[Row], warmup_steps: int) -> list[Row]:
    """A row a run: how it lies beside the plain one, and that beside the yardsticks."""
    plain = next((run for run in runs if run["name"] == "plain"), None)
    beside = {run["name"]: compare(run, plain, warmup_steps) for run in runs if plain and run is not plain}
    rows = []
    for run in runs:
        row: Row = {"run": run["name"], "head": run["label"]}
        row["held-out loss"] = float(np.mean(run["heldout losses"]))
        row |= beside.get(run["name"], {})
        if run["name"] in beside and not run["yardstick"]:
            row["told apart"] = told_apart(
                row, [beside[one["name"]] for one in runs if one["yardstick"] and one["name"] in beside]
            )
        rows.append(row | {"tokens/s": run["tokens/s"], "device": run["environment"]["device"]})
    return rows


def compare(run: Row, plain: Row, warmup_steps: int) -> Row:
    """Differences of a run to the plain one."""
    apart = np.subtract(run["losses"], plain["losses"])[warmup_steps:]
    smooth = smoothed(apart, SMOOTH_STEPS)
    heldout = np.subtract(run["heldout losses"], plain["heldout losses"])
    return {
        "held-out difference": float(heldout.mean()),
        "its standard error": standard_error(heldout),
        "mean difference": float(apart.mean()),
        "standard error": standard_error(blocks(apart, SMOOTH_STEPS)),
        "largest difference, smoothed": float(np.abs(smooth).max()),
        "largest difference, a step": float(np.abs(apart).max()),
    }


def blocks(values: np.ndarray, size: int) -> np.ndarray:
    """Means of blocks: neighbouring steps' differences are alike, those of blocks are less so."""
    if len(values) < 2 * size:
        return values
    return values[: len(values) // size * size].reshape(-1, size).mean(1)


def standard_error(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def told_apart(row: Row, yardsticks: list[Row]) -> str | None:
    """ "yes" if a difference is over `APART` times the yardsticks' largest; None without a yardstick."""
    if not yardsticks:
        return None
    for name in ("largest difference, smoothed", "held-out difference"):
        allowed = APART * max(abs(one[name]) for one in yardsticks)
        if not abs(row[name]) <= allowed:  # a NaN is no small difference
            return "yes"
    return "no"
