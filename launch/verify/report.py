"""The findings as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .compare import Row

ADVICE = {
    "float64 truth": "transformers' own model is not what this check takes it for; please report it.",
    "mini-sequence MLPs": "sequence.mini_sequence=false leaves it out.",
    "streamed layers": "sequence.checkpoints=none leaves it out.",
    "LM head": "sequence.loss=logits leaves it out.",
    "packed documents": "data.pack=false leaves it out.",
    "gradient accumulation": "train.global_batch_sequences as large as one micro-batch leaves it out.",
    "updates in backward": "optimizer.in_backward=false leaves it out.",
    "LoRA adapters": "model.lora=null leaves it out.",
    "Ulysses": "parallel.ulysses_degree=1 leaves it out.",
    "ZeRO": "parallel.zero_stage=0 leaves it out.",
    "bf16": "train.precision=float32 leaves it out.",
}


@dataclass(frozen=True)
class Findings:
    """All that was found.

    Attributes:
        model: What the clone is like, in words.
        rows: One a case.
        notes: What was not verified, or otherwise than it will run.
        seconds: How long it took.
    """

    model: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def is_right(self) -> bool:
        """Whether every case of every technique is."""
        return bool(self.rows) and all(row.is_right for row in self.rows)

    def worst(self) -> list[tuple[Row, int]]:
        """The worst case of each technique, and how many there were, in the order of the techniques."""
        found = []
        for technique in dict.fromkeys(row.technique for row in self.rows):
            cases = [row for row in self.rows if row.technique == technique]
            found.append((max(cases, key=lambda row: row.severity), len(cases)))
        return found


def as_json(findings: Findings) -> str:
    """Every case, for programs."""
    values: dict[str, Any] = {
        "ok": findings.is_right,
        "model": findings.model,
        "seconds": round(findings.seconds, 1),
        "techniques": [row.as_json() | {"cases": count} for row, count in findings.worst()],
        "cases": [row.as_json() for row in findings.rows],
        "notes": findings.notes,
    }
    return json.dumps(values, indent=2)


def as_text(findings: Findings) -> str:
    """A line for each technique, then what is wrong and what was left out."""
    header = ("", "technique", "cases", "worst error", "of", "allowed")
    lines = [
        (
            "ok" if row.is_right else "WRONG",
            row.technique,
            str(count),
            _number(row.error),
            row.tensor,
            _number(row.tolerance),
        )
        for row, count in findings.worst()
    ]
    parts = [findings.model, "", *_aligned([header, *lines])]
    wrong = [row for row, _ in findings.worst() if not row.is_right]
    for row in wrong:
        parts += ["", *_explained(row)]
    if findings.notes:
        parts += ["", *findings.notes]
    verdict = (
        f"{len(wrong)} of {len(lines)} techniques are WRONG: do not train with them."
        if wrong
        else "Every gradient is that of plain PyTorch."
    )
    return "\n".join([*parts, "", f"{verdict} ({findings.seconds:.0f} s)"])


def _explained(row: Row) -> Iterable[str]:
    yield f"WRONG {row.technique}: {row.case}"
    said = f" ({row.note})" if row.note else ""
    yield f"  {row.tensor}: relative error {_number(row.error)}, allowed {_number(row.tolerance)}{said}"
    for start, advice in ADVICE.items():
        if row.technique.startswith(start):
            yield f"  {advice}"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2g}" if value else "0"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
