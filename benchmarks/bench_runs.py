"""What a row of `longseq bench --json` was held to, and the command that has it again."""

from __future__ import annotations

from typing import Any

GIB = 2**30
OPTIMIZERS = {"apollo-mini": "APOLLO-Mini", "apollo": "APOLLO", "adamw": "AdamW"}
HELD_TO = {"card_gib": "--gpu-memory", "host_gib": "--host-memory"}
Row = dict[str, Any]


def conditions(row: Row) -> Row:
    """Memory that it was held to, its optimizer, and what its plan said; None where it is not said."""
    options, plan = row.get("options", {}), row.get("plan") or {}
    optimizer = row.get("keys", {}).get("optimizer", {})
    name = OPTIMIZERS.get(optimizer.get("name"))
    return {
        "card_gib": in_gib(options.get("gpu_bytes")),
        "host_gib": in_gib(options.get("host_bytes")),
        "optimizer": f"{name} in backward" if name and optimizer.get("in_backward") else name,
        # Of a step without attention and products the seconds are none that a plan is of.
        "planned_s": None if row.get("memory_only") else plan.get("seconds"),
        "planned_gib": plan.get("peak_gib"),
    }


def command(row: Row) -> str:
    """As it is typed, of a row with its conditions."""
    words = ["longseq bench", row["config"], *row["overrides"]]
    words += ["--memory-only"] if row.get("memory_only") else []
    words += [f"{option} {row[name]:.4g}G" for name, option in HELD_TO.items() if row.get(name)]
    return " ".join(words)


def in_gib(num_bytes: float | None) -> float | None:
    """Bytes for a table."""
    return None if num_bytes is None else num_bytes / GIB
