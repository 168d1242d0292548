"""Where metrics go: metrics.jsonl, tensorboard, Weights & Biases. Each sink takes the same records."""

from __future__ import annotations

import importlib
import json
import math
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from .metric_records import (
    METRICS_FILE,
    Evaluation,
    Note,
    Record,
    Reference,
    StepMetrics,
    read_metrics,
    to_json,
)


class Sink(Protocol):
    """Takes records until it is closed."""

    def write(self, record: Record) -> None:
        """Writes one record, or leaves out a kind that it has no place for."""

    def close(self, failed: bool) -> None:
        """Ends the sink; `failed` says that the run ends by an exception."""


class JsonlSink:
    """`metrics.jsonl`: every record, each handed to the system at once, so that a crash keeps the lines."""

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        """Opens the file for a run that goes on after `resume_step` (0: a new one).

        Lines of later steps are dropped, because those steps will be done again. A new run sets the file
        of an earlier one aside as metrics.previous-N.jsonl.

        Raises:
            ValueError: if the file to go on with has a line that cannot be read.
        """
        path = run_dir / METRICS_FILE
        self._references: dict[str, Any] = {}
        if path.exists() and resume_step == 0:
            _set_aside(path)
        elif path.exists():
            kept = _rewind(path, resume_step)
            self._references = {r["name"]: r["value"] for r in kept if r["kind"] == "reference"}
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def write(self, record: Record) -> None:
        if isinstance(record, Reference):
            # A resumed run measures its references anew; the same line twice says nothing more.
            if self._references.get(record.name) == record.value:
                return
            self._references[record.name] = record.value
        self._file.write(to_json(record, time_unix_s=round(time.time(), 3)) + "\n")

    def close(self, failed: bool) -> None:
        self._file.close()


def _set_aside(path: Path) -> None:
    if path.stat().st_size == 0:
        return
    number = 1
    while (aside := path.with_name(f"{path.stem}.previous-{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)


def _rewind(path: Path, resume_step: int) -> list[dict[str, Any]]:
    """Drops the records after `resume_step`, and a torn last line that the next one would stick to."""
    kept = [record for record in read_metrics(path) if record.get("step", 0) <= resume_step]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept), encoding="utf-8"
    )
    os.replace(temporary, path)
    return kept


def scalars(record: Record) -> dict[str, float]:
    """The curves that a record adds a point to, by tag; a value that is not known has no point."""
    if isinstance(record, Evaluation):
        return {"eval/loss": record.eval_loss}
    if not isinstance(record, StepMetrics):
        return {}
    values = {
        "train/loss": record.loss,
        "train/lr": record.lr,
        "train/grad_norm": record.grad_norm,
        "train/epoch": record.epoch,
        "train/tokens_seen": record.tokens_seen,
        "speed/step_seconds": record.seconds,
        "speed/tokens_per_second": record.tokens_per_second,
        "speed/model_tflops_per_gpu": record.model_tflops_per_gpu,
        "speed/mfu": record.mfu,
        "memory/peak_gib": record.peak_memory_gib,
        "train/nonfinite_steps": record.nonfinite_steps or None,
    }
    # A skipped step has no loss; trackers draw a NaN as zero or drop the curve with it.
    known = {tag: float(value) for tag, value in values.items() if value is not None}
    return {tag: value for tag, value in known.items() if not math.isnan(value)}


class TensorboardSink:
    """Tensorboard events in `RUN/tensorboard`."""

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        """Opens an event file that hides what an earlier one says of steps that will be done again."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            log_dir=str(run_dir / "tensorboard"),
            purge_step=resume_step + 1 if resume_step else 0,
            flush_secs=30,
        )
        self._resume_step = resume_step

    def write(self, record: Record) -> None:
        if isinstance(record, Note):
            self._writer.add_text("notes", record.text, record.step)
        elif isinstance(record, Reference):
            self._writer.add_scalar(f"reference/{record.name}", record.value, self._resume_step)
        for tag, value in scalars(record).items():
            self._writer.add_scalar(tag, value, record.step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class WandbSink:
    """A Weights & Biases run that a resumed run goes on with. The key comes from wandb's own login."""

    def __init__(
        self, run_dir: Path, resume_step: int, project: str, config: Mapping[str, Any] | None
    ) -> None:
        """Continues the run's own wandb run, or starts one if `resume_step` is 0.

        Raises:
            ValueError: if the package is not there.
        """
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ValueError(
                f"log.wandb_project={project!r} needs the package wandb, which cannot be imported ({error}); "
                "pip install 'longseq[wandb]', or leave log.wandb_project out."
            ) from error
        self._run = wandb.init(
            project=project,
            name=run_dir.resolve().name,
            dir=str(run_dir),
            id=_wandb_id(run_dir, resume_step),
            resume="allow",
            config=dict(config or {}),
            save_code=False,
        )
        # wandb drops points whose step goes back, as after a resume; a step of our own is only an axis.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        if isinstance(record, Reference):
            self._run.summary[f"reference/{record.name}"] = record.value
        elif points := scalars(record):
            self._run.log({**points, "step": record.step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


def _wandb_id(run_dir: Path, resume_step: int) -> str:
    """The run's id at wandb, kept in its folder so that a resumed run is the same run."""
    path = run_dir / "wandb_id.txt"
    if resume_step == 0 or not path.exists():
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    return path.read_text(encoding="utf-8").strip()
