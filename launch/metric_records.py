"""What a run writes down, one record a line of `metrics.jsonl`, and how it is read back.

Nothing here imports torch: `longseq plot` reads a run on a machine without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step.

    Attributes:
        loss: mean NLL over the step's valid tokens, all ranks, in nats a token; NaN where the step was
            skipped because loss or gradient was not finite.
        grad_norm: global gradient norm before clipping; None where the engine does not tell.
        tokens: tokens of the step over all GPUs.
        seconds: wall time of the step.
        tokens_per_second: over all GPUs.
        model_tflops_per_gpu: model TFLOP/s of one GPU (see flops.py); None if they cannot be counted.
        mfu: share, 0 to 1, of the GPU's dense peak; None if the peak is not known.
        peak_memory_gib: most memory allocated on a GPU so far; on a CPU the process's peak resident set.
        epoch: passes over the data so far, with fraction.
        tokens_seen: tokens of all steps so far, over all GPUs.
        eta_s: seconds that are left.
        nonfinite_steps: steps skipped so far because loss or gradient was not finite.
    """

    kind: ClassVar[str] = "step"
    step: int
    total_steps: int
    loss: float
    lr: float
    grad_norm: float | None
    tokens: int
    seconds: float
    tokens_per_second: float
    model_tflops_per_gpu: float | None
    mfu: float | None
    peak_memory_gib: float
    epoch: float
    tokens_seen: int
    eta_s: float | None
    nonfinite_steps: int = 0


@dataclass(frozen=True)
class Evaluation:
    """Loss on held-out documents after `step`: mean NLL over `eval_tokens` valid tokens, in nats a token."""

    kind: ClassVar[str] = "eval"
    step: int
    eval_loss: float
    eval_tokens: int
    seconds: float


@dataclass(frozen=True)
class Note:
    """Something a reader of the curves should know, said after `step`."""

    kind: ClassVar[str] = "note"
    step: int
    text: str


@dataclass(frozen=True)
class Reference:
    """A level that the loss is compared with, in nats a token, such as an entropy of the text."""

    kind: ClassVar[str] = "reference"
    name: str
    value: float


Record = StepMetrics | Evaluation | Note | Reference


def to_json(record: Record, **extra: Any) -> str:
    """One line of strict JSON; NaN and infinities, which JSON has not, become null."""
    fields = {"kind": record.kind, **dataclasses.asdict(record), **extra}
    for key, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            fields[key] = None
    return json.dumps(fields, allow_nan=False, ensure_ascii=False)


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Reads the metrics of a run.

    A half-written last line, left by a run that was killed, is dropped.

    Args:
        run_dir: folder of the run (log.run_dir), or its metrics.jsonl.

    Returns:
        One dict a line, in the order of the file, each with `kind`.

    Raises:
        ValueError: if there is no such file, or if a line is no JSON object with a kind.
    """
    path = Path(run_dir)
    if path.is_dir():
        path = path / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the folder of a run (log.run_dir) that has trained.")
    lines = path.read_bytes().split(b"\n")
    records = [_parse(line, path, number) for number, line in enumerate(lines[:-1], start=1) if line.strip()]
    # After a whole last line comes the empty string; else what follows is torn, or has lost its end only.
    with contextlib.suppress(ValueError):
        records.append(_parse(lines[-1], path, len(lines)))
    return records


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(
            f"{path}:{number}: not JSON ({error}); delete that line, or move the file away."
        ) from error
    if not isinstance(record, dict) or "kind" not in record:
        raise ValueError(
            f'{path}:{number}: not a record with a "kind"; delete that line, or move the file away.'
        )
    return record
