"""What every benchmark writes: one table to read, one JSON to keep."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformers", "deepspeed", "liger-kernel")


def environment() -> dict[str, Any]:
    """Versions, device and date, so that a number can be had again."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU ({platform.machine()})",
        "num_gpus": torch.cuda.device_count(),
        "python": platform.python_version(),
        "versions": versions,
    }


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the one option that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="folder for NAME.json and NAME.md; default: print only")
    return parser


def write(name: str, title: str, rows: list[dict[str, Any]], out: Path | None, **facts: Any) -> None:
    """Print the table; with `out`, keep it there as JSON and as Markdown."""
    where = environment()
    table = markdown(rows)
    versions = ", ".join(f"{package} {version}" for package, version in where["versions"].items())
    text = f"# {title}\n\n{where['device']}, {where['date']}; {versions}\n\n{table}\n"
    print(text)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    payload = json.dumps({"name": name, "environment": where, **facts, "rows": rows}, indent=2)
    for suffix, content in ((".json", payload), (".md", text)):
        draft = out / f".{name}{suffix}.partial"
        draft.write_text(content)
        os.replace(draft, out / f"{name}{suffix}")


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10000 else f"{value:.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
