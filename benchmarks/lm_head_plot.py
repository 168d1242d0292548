"""The picture of `lm_head.py`: time against memory, one panel a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import report

PANEL_TOKENS = 8192
PANEL_DATA = "zipf"
MEMORY_FLOOR_MIB = 1.0  # a method beside whose gradients nothing is held still has a place on a log axis
COLORS = {True: "tab:blue", False: "tab:gray"}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Forward and backward in G against MiB beside dE and dW, written as a PNG."""
    panels = _panels(rows)
    if not panels:
        print(f"no picture: no row has both a time and a memory ({path.name} is not written)")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4.6), squeeze=False)
    for axis, (heading, points) in zip(axes[0], panels.items(), strict=True):
        for x, y, label, ours in points:
            axis.plot(x, y, "o", color=COLORS[ours])
            place = {"xytext": (4, -9), "ha": "right"} if ours else {"xytext": (5, 4)}  # else they overlap
            axis.annotate(label, (x, y), textcoords="offset points", fontsize=7, color=COLORS[ours], **place)
        axis.axhline(3, color="black", linewidth=0.6, linestyle=":")
        axis.set_xscale("log")
        axis.set_ylim(bottom=0)
        axis.margins(x=0.25, y=0.1)
        axis.set_title(heading, fontsize=9)
        axis.set_xlabel("peak memory beside dE and dW (MiB)")
        axis.set_ylabel("forward + backward (G, one bare logits matmul)")
    figure.tight_layout()
    report.save_figure(figure, path)


def _panels(rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, float, str, bool]]]:
    """For each head the points of one case: the one nearest to 8,192 tokens, of zipf if it was run."""
    whole = [row for row in rows if row.get("fwd+bwd G") and row.get("beside dE, dW MiB") is not None]
    cases: dict[str, tuple[int, str]] = {}
    for row in whole:
        case = (row["tokens"], row["data"])
        cases[row["shape"]] = min(cases.get(row["shape"], case), case, key=_distance)
    panels: dict[str, list[tuple[float, float, str, bool]]] = {}
    for row in whole:
        if (row["tokens"], row["data"]) == cases[row["shape"]]:
            heading = f"{row['shape']}, {row['tokens']:,} tokens, {row['data']}"
            memory = max(row["beside dE, dW MiB"], MEMORY_FLOOR_MIB)
            panels.setdefault(heading, []).append((memory, row["fwd+bwd G"], row["method"], row["ours"]))
    return panels


def _distance(case: tuple[int, str]) -> tuple[int, bool]:
    return abs(case[0] - PANEL_TOKENS), case[1] != PANEL_DATA
