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

PACKAGES = (
    *("torch", "triton", "transformers", "deepspeed", "liger-kernel", "cut-cross-entropy"),
    *("bitsandbytes", "apollo-torch"),
)


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


def write(
    name: str,
    title: str,
    rows: list[dict[str, Any]],
    out: Path | None,
    *,
    tables: list[tuple[str, list[dict[str, Any]]]] | None = None,
    note: str = "",
    show: bool = True,
    measured_on: dict[str, Any] | None = None,
    **facts: Any,
) -> None:
    """Print the rows; with `out`, keep them there as JSON and as Markdown.

    Args:
        name: The files are `name.json` and `name.md`.
        title: The heading of the Markdown.
        rows: All that was measured.
        out: Folder for the files.
        tables: Heading and rows of each table to read instead of the one of all rows.
        note: What a reader needs to know before the tables.
        show: Print it.
        measured_on: The `environment` of rows that are kept from another machine; None is this one's.
        facts: Further keys of the JSON.
    """
    where = measured_on or environment()
    versions = ", ".join(f"{package} {version}" for package, version in where["versions"].items())
    parts = [f"# {title}", f"{where['device']}, {where['date']}; {versions}", *([note] if note else [])]
    if tables is None:
        parts.append(markdown(rows))
    for heading, shown in tables or ():
        parts += [f"## {heading}", markdown(shown)]
    text = "\n\n".join(parts) + "\n"
    if show:
        print(text)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    payload = json.dumps({"name": name, "environment": where, **facts, "rows": rows}, indent=2)
    for suffix, content in ((".json", payload), (".md", text)):
        draft = out / f".{name}{suffix}.partial"
        draft.write_text(content)
        os.replace(draft, out / f"{name}{suffix}")


def save_figure(figure: Any, path: Path) -> None:
    """Write one of pyplot's figures as PNG, whole or not at all, and close it."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.partial")
    figure.savefig(draft, format="png", dpi=130)
    pyplot.close(figure)
    os.replace(draft, path)


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
