"""One place that a training loop tells what it measured; every file, bar and tracker hears it from here."""

from __future__ import annotations

import statistics
import sys
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from .config import LogConfig
from .console import ConsoleSink
from .metric_records import Evaluation, Note, Record, Reference, StepMetrics, read_metrics
from .metric_sinks import JsonlSink, Sink, TensorboardSink, WandbSink

__all__ = ["EtaEstimate", "MetricsWriter", "StepMetrics", "peak_memory_gib", "read_metrics"]


class MetricsWriter:
    """Writes a run's metrics: JSONL always, the console, tensorboard and wandb as the config asks.

    A context manager; on a rank that is not the main one every method does nothing.

        with MetricsWriter(run_dir, config.log, is_main=rank == 0, resume_step=step) as metrics:
            metrics.step(StepMetrics(...))
    """

    def __init__(
        self,
        run_dir: str | Path,
        log: LogConfig,
        is_main: bool = True,
        *,
        resume_step: int = 0,
        total_steps: int | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens everything, so that what cannot be written to fails before the first step.

        Args:
            run_dir: folder of the run; made if it is not there.
            log: section `log` of the config.
            is_main: whether this rank writes.
            resume_step: last step that is done; what was written of later ones is dropped, since they will
                be done again. 0 starts anew and sets the metrics of an earlier run aside.
            total_steps: steps of the whole run, for the bar before the first step.
            config: the run's config, for wandb.

        Raises:
            ValueError: if log.wandb_project is set without wandb, or metrics.jsonl cannot be continued.
        """
        assert resume_step >= 0, resume_step
        self._last_step = resume_step
        self._sinks: list[Sink] = []
        self._closing = ExitStack()
        if not is_main:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            # wandb first: of all it is the likeliest to refuse, and then no file was touched.
            if log.wandb_project is not None:
                self._open(opened, WandbSink(run_dir, resume_step, log.wandb_project, config))
            self._open(opened, JsonlSink(run_dir, resume_step))
            if log.tensorboard:
                self._open(opened, TensorboardSink(run_dir, resume_step))
            self._open(opened, ConsoleSink(log.every, resume_step, total_steps))
            self._closing = opened.pop_all()

    def _open(self, stack: ExitStack, sink: Sink) -> None:
        self._sinks.append(sink)
        stack.push(lambda exception_type, *_: sink.close(failed=exception_type is not None))

    def step(self, metrics: StepMetrics) -> None:
        """Writes one optimizer step; steps must rise."""
        assert metrics.step > self._last_step, f"step {metrics.step} follows step {self._last_step}"
        self._last_step = metrics.step
        self._write(metrics)

    def evaluation(self, step: int, loss: float, tokens: int, seconds: float) -> None:
        """Writes the loss on held-out text: mean NLL over `tokens` valid tokens, in nats a token."""
        self._write(Evaluation(step, loss, tokens, seconds))

    def note(self, text: str) -> None:
        """Writes a remark, beside the last step written."""
        self._write(Note(self._last_step, text))

    def reference(self, name: str, value: float) -> None:
        """Writes a level that the loss is compared with and that the plot draws, in nats a token."""
        self._write(Reference(name, value))

    def _write(self, record: Record) -> None:
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        """Closes all; `with` does it by itself and tells wandb whether the run failed."""
        self._closing.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing.__exit__(exception_type, exception, traceback)


class EtaEstimate:
    """Seconds that are left, by the median of recent steps: compilation and saves do not disturb it."""

    def __init__(self, window_steps: int = 20) -> None:
        """Looks at the last `window_steps` steps."""
        self._recent_s: deque[float] = deque(maxlen=window_steps)

    def update(self, step_seconds: float, remaining_steps: int) -> float:
        """Takes one step's wall time and returns the seconds for the remaining ones."""
        self._recent_s.append(step_seconds)
        return statistics.median(self._recent_s) * remaining_steps


def peak_memory_gib(device_type: str) -> float:
    """Most memory held so far, in GiB (2**30 bytes).

    Args:
        device_type: `cuda`: what torch allocated on the current GPU, without its cache, NCCL's buffers and
            the CUDA context. Anything else: the resident set of this process.
    """
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    # Linux counts in KiB, macOS in bytes (getrusage(2) of each).
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
