"""What a row of `longseq bench --json` was held to, and the command that has it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GIB = 2**30
OPTIMIZERS = {"apollo-mini": "APOLLO-Mini", "apollo": "APOLLO", "adamw": "AdamW"}
HELD_TO = {"card_gib": "--gpu-memory", "host_gib": "--host-memory"}
Row = dict[str, Any]


def read(paths: list[Path]) -> list[Row]:
    """Runs of files, each with the file's name; of one name the last counts.

    Args:
        paths: What `longseq bench --json` wrote, or a table of such runs, which so goes on.

    Raises:
        SystemExit: A file has no run.
    """
    rows: dict[str, Row] = {}
    for path in paths:
        found = json.loads(path.read_text())
        found = found.get("bench", found.get("rows", [found]))
        if not found or not all("tokens" in row for row in found):
            raise SystemExit(f"{path} has no rows with `tokens`; give what `longseq bench --json` wrote.")
        rows |= {name: {"file": name} | row for row in found for name in [row.get("file", path.stem)]}
    return list(rows.values())


def conditions(row: Row) -> Row:
    """Memory that it was held to, its optimizer, and what its plan said; None where it is not said.

    Args:
        row: As `longseq bench` wrote it, or of a table, with what is asked here in it.
    """
    options, plan = row.get("options", {}), row.get("plan") or {}
    optimizer = row.get("keys", {}).get("optimizer", {})
    name = OPTIMIZERS.get(optimizer.get("name"))
    found = {
        "card_gib": in_gib(options.get("gpu_bytes")),
        "host_gib": in_gib(options.get("host_bytes")),
        "optimizer": f"{name} in backward" if name and optimizer.get("in_backward") else name,
        # Of a step without attention and products the seconds are none that a plan is of.
        "planned_s": None if row.get("memory_only") else plan.get("seconds"),
        "planned_gib": plan.get("peak_gib"),
    }
    return {name: row.get(name, value) for name, value in found.items()}


def command(row: Row) -> str:
    """As it is typed, of a row with its conditions."""
    words = ["longseq bench", row["config"], *row["overrides"]]
    words += ["--memory-only"] if row.get("memory_only") else []
    words += [f"{option} {row[name]:.4g}G" for name, option in HELD_TO.items() if row.get(name)]
    return " ".join(words)


def in_gib(num_bytes: float | None) -> float | None:
    """Bytes for a table."""
    return None if num_bytes is None else num_bytes / GIB
