"""How long documents are, as a table and as a picture."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np

_BAR_CHARACTERS = 30


def describe_lengths(lengths: np.ndarray) -> str:
    """A table of document lengths, one line a power of two.

    Args:
        lengths: Tokens of each document, int64 (documents,).
    """
    if not len(lengths):
        return "no documents"
    edges, counts, tokens = _bins(lengths)
    names = [_name(low, high) for low, high in pairwise(edges.tolist())]
    width = max(len("tokens long"), *map(len, names))
    lines = [f"{'tokens long':>{width}} {'documents':>11} {'of all tokens':>13}"]
    for name, count, total in zip(names, counts.tolist(), tokens.tolist(), strict=True):
        bar = "█" * max(round(_BAR_CHARACTERS * count / counts.max()), count > 0)
        lines.append(f"{name:>{width}} {count:>11,} {total / lengths.sum():>13.1%} {bar}".rstrip())
    median = int(np.median(lengths))
    lines.append(
        f"{len(lengths):,} documents, {int(lengths.sum()):,} tokens; median {median:,}, "
        f"mean {lengths.mean():,.0f}, longest {int(lengths.max()):,}"
    )
    return "\n".join(lines)


def plot_lengths(lengths: np.ndarray, path: Path) -> None:
    """Draws the same as a PNG: documents and tokens by length.

    Args:
        lengths: Tokens of each document, int64 (documents,); at least one.
        path: The picture; its folder must be there.
    """
    # The object interface: pyplot keeps state for the whole process and may open windows.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    edges, counts, tokens = _bins(lengths)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    widths = np.diff(edges)
    axes.bar(edges[:-1], 100 * counts / counts.sum(), widths, align="edge", alpha=0.6, label="documents")
    axes.bar(edges[:-1], 100 * tokens / tokens.sum(), widths, align="edge", alpha=0.4, label="tokens")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("length of the document (tokens)")
    axes.set_ylabel("share (%)")
    axes.set_title(f"{len(lengths):,} documents, {int(lengths.sum()):,} tokens")
    axes.legend()
    scratch = path.with_name(f".{path.stem}-{os.getpid()}.png")
    figure.savefig(scratch, dpi=120)
    os.replace(scratch, path)


def _bins(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Powers of two as edges (bins + 1,), and the documents and tokens between them (bins,)."""
    # frexp is exact, where a rounded log2 may put 2**k below its own edge.
    exponents = np.frexp(lengths.astype(np.float64))[1].astype(np.int64) - 1
    low, high = int(exponents.min()), int(exponents.max())
    edges = 2 ** np.arange(low, high + 2, dtype=np.int64)
    counts = np.bincount(exponents - low)
    tokens = np.bincount(exponents - low, weights=lengths).astype(np.int64)
    return edges, counts, tokens


def _name(low: int, high: int) -> str:
    return f"{low:,}" if high - low == 1 else f"{low:,} to {high - 1:,}"
