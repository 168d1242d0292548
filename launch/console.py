"""The console's share of the metrics: a line a step, and below the lines a progress bar on a terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from .metric_records import Evaluation, Note, Record, StepMetrics


def format_duration(seconds: float) -> str:
    """`3.2s`, `42s`, `1m02s`, `2h05m` or `3d04h`."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d{hours % 24:02d}h"


def format_rate(per_second: float) -> str:
    """Three digits with a decimal prefix: `87.5`, `12.3k`, `1.23M`."""
    for factor, suffix in ((1e6, "M"), (1e3, "k")):
        # 999.95 would round to `1e+03`.
        if per_second >= 0.9995 * factor:
            return _three_digits(per_second / factor) + suffix
    return _three_digits(per_second)


def _three_digits(value: float) -> str:
    """`412`, `12.3`, `0.00123`, and no exponent for a rate of 1,000 or more."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def format_step(metrics: StepMetrics) -> str:
    """The line of one step; what is not known, or no time that is left, has no place in it."""
    parts = [
        f"step {metrics.step}/{metrics.total_steps}",
        f"loss {metrics.loss:.4f}",
        f"lr {metrics.lr:.1e}",
    ]
    if metrics.nonfinite_steps:
        parts.insert(2, f"{metrics.nonfinite_steps} skipped so far")
    if metrics.grad_norm is not None:
        parts.append(f"grad norm {metrics.grad_norm:.2f}")
    parts.append(f"{format_rate(metrics.tokens_per_second)} tok/s")
    if metrics.model_tflops_per_gpu is not None:
        rate = f"{_three_digits(metrics.model_tflops_per_gpu)} TFLOP/s"
        parts.append(rate if metrics.mfu is None else f"{rate} (MFU {100 * metrics.mfu:.1f}%)")
    parts.append(f"{metrics.peak_memory_gib:.2f} GiB")
    if metrics.eta_s:
        parts.append(f"ETA {format_duration(metrics.eta_s)}")
    return " | ".join(parts)


def format_record(record: Record) -> str:
    """The line of any record."""
    if isinstance(record, StepMetrics):
        return format_step(record)
    if isinstance(record, Evaluation):
        return (
            f"eval at step {record.step} | loss {record.eval_loss:.4f} | {record.eval_tokens:,} tokens | "
            f"{format_duration(record.seconds)}"
        )
    if isinstance(record, Note):
        return record.text
    return f"{record.name}: {record.value:.4f}"


class ConsoleSink:
    """Prints records; every `every`-th step, and the first and the last one besides."""

    def __init__(
        self,
        every: int,
        resume_step: int = 0,
        total_steps: int | None = None,
        *,
        console: Console | None = None,
        bar: bool | None = None,
    ) -> None:
        """Starts the bar where there is a terminal.

        Args:
            every: steps between two lines (log.every).
            resume_step: steps that are done already.
            total_steps: steps of the whole run; None until the first step tells.
            console: where to print; None is standard output.
            bar: whether to draw a bar; None draws it if standard output is a terminal.
        """
        self._every = every
        self._console = console or Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
        self._any_step = False
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        # rich takes FORCE_COLOR for a terminal; in the log file of a batch job a bar is noise.
        if self._console.is_interactive and sys.stdout.isatty() if bar is None else bar:
            self._progress = _progress(self._console)
            self._task = self._progress.add_task(
                "training", total=total_steps, completed=resume_step, status="waiting for the first step"
            )
            self._progress.start()

    def write(self, record: Record) -> None:
        if not isinstance(record, StepMetrics):
            self._print(format_record(record))
            return
        if self._progress is not None and self._task is not None:
            left = f" · {format_duration(record.eta_s)} left" if record.eta_s else ""
            self._progress.update(
                self._task,
                total=record.total_steps,
                completed=record.step,
                status=f"loss {record.loss:.4f}{left}",
            )
        is_last = record.step == record.total_steps
        if record.step % self._every == 0 or is_last or not self._any_step:
            self._print(format_step(record))
        self._any_step = True

    def _print(self, line: str) -> None:
        if self._progress is None:
            print(line, file=self._console.file, flush=True)
        else:
            self._console.print(line, soft_wrap=True, highlight=False, markup=False, emoji=False)

    def close(self, failed: bool) -> None:
        if self._progress is not None:
            self._progress.stop()


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("· {task.fields[status]}", markup=False),
        console=console,
        refresh_per_second=4,
        expand=True,
    )
