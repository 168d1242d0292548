"""`loss.png`: the curves of one run, or of several laid over each other, from their metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .images import refuse_other_formats, save
from .metric_records import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_runs", "read_metrics"]

LowerPanel = Literal["tokens_per_second", "grad_norm"]

_LOWER_LABELS = {"tokens_per_second": "tokens/s", "grad_norm": "gradient norm"}
_GREY = "#6b6b6b"
# Fewer points than this show their own course; smoothing them would only hide it.
_SMOOTH_FROM_STEPS = 40


@dataclass(frozen=True)
class _Run:
    """One run's curves; arrays over its steps, NaN where a value was not finite or not known."""

    label: str
    step: np.ndarray  # (steps,)
    loss: np.ndarray  # (steps,), nats a token
    lower: np.ndarray  # (steps,)
    eval_step: np.ndarray  # (evaluations,)
    eval_loss: np.ndarray  # (evaluations,), nats a token
    references: dict[str, float]


def plot_runs(
    run_dirs: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    lower: LowerPanel = "tokens_per_second",
) -> Path:
    """Draws loss over steps, and below it the speed or the gradient norm.

    Args:
        run_dirs: folders of the runs, or their metrics.jsonl.
        out: the image (.png, .svg or .pdf); None is `loss.png` in the run's folder, or here for several.
        lower: what the lower panel shows.

    Returns:
        The path of the image.

    Raises:
        ValueError: all at once, for every run without metrics or without a step; or for another ending.
    """
    paths = [Path(run_dir) for run_dir in run_dirs]
    target = _target(paths, out)
    runs = _load_all(paths, lower)

    # Not pyplot: it keeps every figure in a process-wide list and may look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    upper_axes, lower_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.2))
    for index, run in enumerate(runs):
        _draw_run(upper_axes, lower_axes, run, f"C{index % 10}", single=len(runs) == 1)
    _draw_references(upper_axes, runs)
    _dress(upper_axes, lower_axes, runs, lower)
    save(figure, target)
    return target


def _target(paths: list[Path], out: str | Path | None) -> Path:
    if not paths:
        raise ValueError("no run to plot; give the folder of at least one (log.run_dir).")
    if out is None:
        first = paths[0] if paths[0].is_dir() else paths[0].parent
        return first / "loss.png" if len(paths) == 1 else Path("loss.png")
    target = Path(out)
    refuse_other_formats(target)
    return target


def _load_all(paths: list[Path], lower: LowerPanel) -> list[_Run]:
    runs: list[_Run] = []
    errors: list[str] = []
    for path, label in zip(paths, _labels(paths), strict=True):
        try:
            runs.append(_load(path, label, lower))
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError("\n".join(errors))
    return runs


def _labels(paths: list[Path]) -> list[str]:
    """Folder names, or whole paths where two folders share a name."""
    folders = [path.parent if path.is_file() else path for path in paths]
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) == len(names):
        return names
    return [str(folder) for folder in folders]


def _load(path: Path, label: str, lower: LowerPanel) -> _Run:
    records = read_metrics(path)
    steps = [record for record in records if record["kind"] == "step"]
    evaluations = [record for record in records if record["kind"] == "eval"]
    if not steps:
        raise ValueError(f"{path}: holds no step yet; plot it once the run has taken one.")
    _check_numbers(path, steps, ("step", "loss", lower))
    _check_numbers(path, evaluations, ("step", "eval_loss"))
    return _Run(
        label=label,
        step=_column(steps, "step"),
        loss=_column(steps, "loss"),
        lower=_column(steps, lower),
        eval_step=_column(evaluations, "step"),
        eval_loss=_column(evaluations, "eval_loss"),
        references={
            r["name"]: r["value"] for r in records if r["kind"] == "reference" and r["value"] is not None
        },
    )


def _check_numbers(path: Path, records: list[dict[str, Any]], keys: tuple[str, ...]) -> None:
    """A value may be null, where it was not finite or not known; a step has a number."""
    for record in records:
        for key in keys:
            value = record.get(key)
            if not isinstance(value, (int, float) if key == "step" else (int, float, type(None))):
                raise ValueError(
                    f"{path}: a record of kind {record['kind']} has {key}={value!r}, which is no number; "
                    "delete its line of metrics.jsonl."
                )


def _column(records: list[dict[str, Any]], key: str) -> np.ndarray:
    values = [record.get(key) for record in records]
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred mean over a fortieth of the curve; a mean that looks back alone would lag a falling loss.

    Towards both ends the window shrinks and stays centred. NaN is left out of the means and stays a gap.

    Args:
        values: (steps,).

    Returns:
        (steps,).
    """
    index = np.arange(len(values))
    half = np.minimum(max(1, len(values) // 80), np.minimum(index, len(values) - 1 - index))
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    total = sums[index + half + 1] - sums[index - half]
    count = counts[index + half + 1] - counts[index - half]
    return np.where(finite, total / np.maximum(count, 1), np.nan)


def _draw_run(upper: Axes, lower: Axes, run: _Run, color: str, single: bool) -> None:
    label = "training" if single else run.label
    # A line through one point is invisible.
    marker = "." if len(run.step) == 1 else None
    if len(run.step) < _SMOOTH_FROM_STEPS:
        upper.plot(run.step, run.loss, color=color, linewidth=1.6, marker=marker, label=label)
    else:
        upper.plot(run.step, run.loss, color=color, linewidth=0.8, alpha=0.28)
        smoothed = f"{label} (smoothed)" if single else label
        upper.plot(run.step, smooth(run.loss), color=color, linewidth=1.6, label=smoothed)
    if len(run.eval_step):
        upper.plot(
            run.eval_step,
            run.eval_loss,
            color="C1" if single else color,
            linestyle="--",
            linewidth=1.0,
            marker="o",
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            zorder=3,
            label="held-out" if single else None,
        )
    lower.plot(run.step, run.lower, color=color, linewidth=1.0, marker=marker)


def _draw_references(axes: Axes, runs: list[_Run]) -> None:
    """One dashed line for each level, however many runs share it."""
    seen: set[tuple[str, float]] = set()
    for run in runs:
        for name, value in run.references.items():
            level = (name, round(value, 4))
            if level in seen:
                continue
            seen.add(level)
            axes.axhline(value, color=_GREY, linestyle=":", linewidth=1.2, zorder=1)
            axes.annotate(
                f"{name}: {value:.2f}",
                xy=(1, value),
                xycoords=("axes fraction", "data"),
                xytext=(-4, 3),
                textcoords="offset points",
                ha="right",
                va="bottom",
                fontsize=9,
                color=_GREY,
            )


def _dress(upper: Axes, lower_axes: Axes, runs: list[_Run], lower: LowerPanel) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    upper.set_title(title, loc="left", fontsize=13, fontweight="bold")
    upper.set_ylabel("loss (nats per token)")
    lower_axes.set_ylabel(_LOWER_LABELS[lower])
    lower_axes.set_xlabel("step")
    lower_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if lower == "tokens_per_second":
        lower_axes.set_ylim(bottom=0)
        lower_axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        _log_scale(lower_axes, np.concatenate([run.lower for run in runs]))
    steps = np.concatenate([run.step for run in runs])
    if steps.min() == steps.max():
        lower_axes.set_xlim(steps[0] - 1, steps[0] + 1)
    for axes in (upper, lower_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.margins(x=0.01)
    if len(runs) > 1 and any(len(run.eval_step) for run in runs):
        upper.plot(
            [], [], color=_GREY, linestyle="--", linewidth=1.0, marker="o", markersize=4.5, label="held-out"
        )
    upper.legend(loc="upper right", edgecolor="none", framealpha=0.8)


def _log_scale(axes: Axes, values: np.ndarray) -> None:
    """Gradient norms span decades; their ticks read `0.5`, `1`, `2`, not powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    positive = values[values > 0]
    if not len(positive):
        return
    axes.set_yscale("log")
    within_two_decades = positive.max() < 100 * positive.min()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if within_two_decades else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
