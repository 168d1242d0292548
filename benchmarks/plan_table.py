"""What `plan.py` measured, beside what a plan says of the same runs. Needs no GPU."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import plan_settings
import report

from longseq.launch.config import RunConfig
from longseq.launch.config_file import load_config
from longseq.launch.model import hf_config
from longseq.launch.planner.machine import Machine, gpu_of
from longseq.launch.planner.plan import Plan, make_plan
from longseq.launch.planner.seconds import estimate_seconds

GIB = 2**30
HOST_BYTES_A_GPU = 100 * GIB
"""Of the machines that were measured on, what a process may take: each had more than its run needed."""
KEPT = (
    *("name", "gpus", "keys", "tokens", "document_tokens", "gpu_bytes", "began", "note"),
    *("steps_s", "seconds", "phase_s", "peak_bytes", "first_step_peak_bytes", "phase_peak_bytes"),
    *("reserved_bytes", "outside_allocator_bytes", "host_pinned_bytes", "said"),
)
NOTE = """\
Each row is a run of `longseq train`'s own set-up and steps with random weights: one that warms up and then
those that are timed. Seconds are their median; a peak is what torch's allocator gave out at most in one of
them, on the rank that took most; "held" is what was gone of the card by then: peak, fragments, CUDA's own and
NCCL's (an allocator that has room gives little back). "plan" is what `longseq plan` says of the same config
on such a machine, with the catalogue's rates and nothing of the run itself; ratios are plan over measured.

The plan's constants were chosen with the H100 rows in sight, and with sequence_parallel.json, decoder.json,
optimizer_memory.json and lm_head.json. They were settled before the H200 rows were measured. When the H100
rows were, the allocator had segments of fixed size, and runs did not yet do as the plan chooses: tiles at 64k
tokens, and whether layers are streamed in 1b-zero1-offload, were others than in "plan", and so are peaks."""


def collect(folders: list[Path], out: Path | None) -> list[dict[str, Any]]:
    """Put all rows of folders beside their plans; print them, and keep them as `plan.json` and `plan.md`.

    Args:
        folders: What `plan.py --out` was given, for each machine.
        out: For the two files; None prints.
    """
    rows, tables, places = [], [], []
    for folder in folders:
        found, where = _of_machine(folder)
        rows += found
        heading = f"{where['device']}, {where['date']}"
        tables += [(heading, [_shown(row) for row in found]), (f"{heading}: how far off", _off(found))]
        places.append(where)
    report.write("plan", "Runs and their plans", rows, out, tables=tables, note=NOTE, measured_on=places[0])
    return rows


def _of_machine(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    settings = (*plan_settings.SETTINGS, *plan_settings.TINY)
    rows, where = [], None
    for setting in settings:
        path = folder / f"{setting.name}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        if "seconds" not in found and not found.get("note", "").startswith("out of memory"):
            continue
        where = where or found["environment"]
        row = {name: found[name] for name in KEPT if name in found} | {
            "device": found["environment"]["device"]
        }
        row["plan"] = planned(setting, row, folder)
        rows.append(row)
    if where is None:
        raise SystemExit(f"{folder} holds no measured setting.")
    return rows, where


def _off(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How far plans are off, in percent of what was measured; peaks where the run did as the plan chose."""
    off: dict[str, list[float]] = {"seconds": [], "peak_bytes": []}
    for row in rows:
        for name, found in off.items():
            if row.get(name) and (name == "seconds" or row.get("said")):
                found.append(100 * abs(row["plan"][name] / row[name] - 1))
    return [
        {"of": what, "runs": len(found), "mean %": statistics.mean(found), "worst %": max(found)}
        for what, found in (("seconds a step", off["seconds"]), ("peak memory", off["peak_bytes"]))
        if found
    ]


def planned(setting: plan_settings.Setting, row: dict[str, Any], work: Path) -> dict[str, Any]:
    """What a plan says of a run that was measured."""
    plan = plan_of(configured(setting, work), row["device"], row["gpu_bytes"], setting.gpus)
    lengths = None
    if setting.document_tokens:
        lengths = [setting.document_tokens] * (row["tokens"] // setting.document_tokens)
    seconds = estimate_seconds(plan.work, plan.knobs, plan.machine, lengths)
    memory = plan.memory
    return {
        "seconds": seconds.seconds,
        "parts_s": dict(seconds.parts),
        "peak_bytes": memory.peak_bytes,
        "reserved_bytes": memory.reserved_bytes,
        "host_bytes": memory.host_bytes,
        "moment": memory.moment,
        "moments": memory.moments,
        "parts_bytes": {part.name: part.gpu_bytes for part in memory.parts},
        "fits": plan.fits,
    }


def plan_of(config: RunConfig, device: str, gpu_bytes: int, gpus: int) -> Plan:
    """The plan of a config on a GPU by its name, with the catalogue's rates."""
    gpu = gpu_of(device, gpu_bytes, calibrated=False)
    return make_plan(config, Machine(gpu, gpus, gpus, gpus * HOST_BYTES_A_GPU))


def configured(setting: plan_settings.Setting, work: Path) -> RunConfig:
    """The setting's config; of a checkpoint only its config.json is needed, and is written."""
    empty = work / ".empty.yaml"
    empty.write_text("")
    keys = setting.keys(str(work / "data.jsonl"), str(work / ".models"))
    if setting.saved:
        base = [key for key in keys if not key.startswith(("model.name=", "model.lora"))]
        hf_config(load_config(str(empty), base).model).save_pretrained(work / ".models" / setting.shape)
    return load_config(str(empty), keys)


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    plan, took = row["plan"], row.get("seconds")
    peak, pinned = row.get("peak_bytes"), row.get("host_pinned_bytes")
    return {
        "run": row["name"],
        "GPUs": row["gpus"],
        "s": took,
        "plan s": plan["seconds"],
        "s ratio": None if took is None else round(plan["seconds"] / took, 3),
        "peak GiB": None if peak is None else peak / GIB,
        "plan GiB": plan["peak_bytes"] / GIB,
        "GiB ratio": None if not peak else round(plan["peak_bytes"] / peak, 3),
        "held GiB": None if not peak or "reserved_bytes" not in row else _held(row) / GIB,
        "plan held GiB": plan["reserved_bytes"] / GIB,
        "host GiB": None if pinned is None else pinned / GIB,
        "plan host GiB": plan["host_bytes"] / GIB,
        "note": row.get("note"),
    }


def _held(row: dict[str, Any]) -> int:
    return row["reserved_bytes"] + row["outside_allocator_bytes"]
