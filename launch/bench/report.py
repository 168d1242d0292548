"""What a bench says as it goes, and keeps: lines, a table beside the plan, and JSON."""

from __future__ import annotations

import json
import os
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ... import __version__
from ...distributed.groups import ProcessGroups
from ..config import RunConfig
from ..console import format_rate
from ..flops import ModelShape, model_flops
from ..planner.plan import Plan
from ..planner.report import print_tables, table_of

if TYPE_CHECKING:
    from .command import Options
    from .measure import Measurement, Row

PACKAGES = ("torch", "triton", "transformers", "deepspeed")
TRAINED, MEMORY_ONLY = "trained", "memory-verified, not trained"
UNFINISHED = "did not finish"
OF_TRAINING = ("losses", "norms", "tokens_per_second", "model_tflops_per_gpu")
"""What attention is missing from where it is left out."""
SIZES = ("peak", "reserved", "device_used", "host_pinned", "host_resident", "host_peak")


class Report:
    """Of one bench; rank 0 speaks and writes."""

    def __init__(
        self, config: RunConfig, options: Options, groups: ProcessGroups, device: torch.device
    ) -> None:
        self.config, self.options, self.groups, self.device = config, options, groups, device
        self.kind = MEMORY_ONLY if options.memory_only else TRAINED
        self.facts = {
            "config": options.config,
            "overrides": list(options.overrides),
            "options": _plain(options),
            "keys": config.model_dump(),
            "environment": environment(device),
            "gpus": groups.world_size,
            "tokens": config.sequence.length,
            "tokens_a_step": config.sequence.length * config.train.global_batch_sequences,
            "document_tokens": options.document_tokens,
            "memory_only": options.memory_only,
            "kind": self.kind,
        }

    def tell(self, line: str) -> None:
        """At once."""
        if self.groups.is_main:
            print(line, flush=True)

    def begin(self, notes: Any) -> None:
        """What is benched."""
        facts, model = self.facts, self.config.model.config
        self.tell(
            f"bench: {self.options.config}, {self.config.sequence.length:,} tokens a sequence, "
            f"{facts['tokens_a_step']:,} a step, on {facts['gpus']} x {facts['environment']['device']}"
        )
        lines = list(notes)
        if "max_position_embeddings" in model:
            lines.append(
                f"random weights and made-up documents; max_position_embeddings="
                f"{model['max_position_embeddings']:,}"
            )
        if self.options.memory_only:
            lines.append(f"attention is left out, its memory is not: {MEMORY_ONLY}; seconds say nothing")
        for line in lines:
            self.tell(f"note: {line}")
        self._write({"note": UNFINISHED})

    def keep(self, row: Row, plan: Plan | None, note: str | None = UNFINISHED) -> None:
        """Write what there is so far.

        Args:
            row: A measurement's.
            plan: By which it was run.
            note: What to know of it; None where it ended as it should.
        """
        note = row.get("note") if note is None else note
        self._write(self._found(row, plan) | ({} if note is None else {"note": note}))

    def failed(self, row: Row, plan: Plan | None, error: BaseException) -> None:
        """Memory ran out, on this rank."""
        first, *_ = str(error).strip().splitlines() or [type(error).__name__]
        found = self._found(row, plan) | {"note": f"out of memory: {first}"[:300]}
        # Not rank 0 alone: it may be another that has no more, and ends all.
        self._write(found, by_anyone=True)

    def end(self, measurement: Measurement) -> None:
        """The table, and the file as it stays."""
        row, plan = measurement.row, measurement.plan
        self.keep(row, plan, note=None)
        if not self.groups.is_main:
            return
        print_tables([self.table(row, plan)])
        for line in measurement.profile_lines:
            print(line)
        if "note" in row:
            print(f"note: {row['note']}")
        if self.options.json is not None:
            print(f"kept in {self.options.json}")

    def table(self, row: Row, plan: Plan | None) -> Any:
        """What was measured, beside what was planned."""
        table = table_of((self.kind, "left"), ("measured", "right"), ("planned", "right"), ("off", "right"))

        def add(name: str, measured: float | None, planned: float | None, digits: int = 2) -> None:
            if measured is None:
                return
            off = "" if not planned else f"{100 * (measured / planned - 1):+.1f} %"
            told = "" if planned is None else f"{planned:,.{digits}f}"
            table.add_row(name, f"{measured:,.{digits}f}", told, off)

        found, said = in_gib(row), None if plan is None else of_plan(plan)
        said = said or {}
        if not self.options.memory_only:
            add("seconds a step", row["seconds"], said.get("seconds"), 3)
            rate = row["tokens_per_second"]
            table.add_row("tokens/s", format_rate(rate), "", "")
            tflops = self._tflops(row["seconds"])
            if tflops is not None:
                table.add_row("model TFLOP/s a GPU", f"{tflops:,.1f}", "", "")
            table.add_row("loss", f"{row['losses'][-1]:.4f}", "", "")
            if row["norms"][-1] is not None:
                table.add_row("gradient norm, before clipping", f"{row['norms'][-1]:.4g}", "", "")
        add("peak GiB, allocated", found.get("peak_gib"), said.get("peak_gib"))
        add("reserved GiB", found.get("reserved_gib"), None)
        add("GiB of the device, with context", found.get("device_used_gib"), said.get("reserved_gib"))
        add("host GiB a process, resident", found.get("host_resident_gib"), said.get("host_gib"))
        add("host GiB a process, pinned", found.get("host_pinned_gib"), None)
        for name, size in found.get("phase_peak_gib", {}).items():
            add(f"peak GiB, {name}", size, None)
        for name, seconds in found.get("phase_s", {}).items():
            if not self.options.memory_only:
                add(f"seconds, {name}", seconds, None, 3)
        return table

    def _found(self, row: Row, plan: Plan | None) -> dict[str, Any]:
        found = in_gib(row)
        if "seconds" in row:
            found["model_tflops_per_gpu"] = self._tflops(row["seconds"])
        if self.options.memory_only:
            for name in (*OF_TRAINING, "loss", "norm"):
                found.pop(name, None)
        return {**found, "plan": None if plan is None else of_plan(plan)}

    def _tflops(self, seconds: float) -> float | None:
        """Of the model, each GPU; None for a family whose operations cannot be counted."""
        from ..model import hf_config

        try:
            shape = ModelShape.from_hf_config(hf_config(self.config.model))
        except ValueError:
            return None
        length, sequences = self.config.sequence.length, self.config.train.global_batch_sequences
        each = self.options.document_tokens or length
        frozen = self.config.model.lora is not None
        flops = model_flops(shape, [each] * (sequences * length // each), frozen_weights=frozen)
        return flops / seconds / self.groups.world_size / 1e12

    def _write(self, found: dict[str, Any], *, by_anyone: bool = False) -> None:
        path = self.options.json
        if path is None or not (self.groups.is_main or by_anyone):
            return
        write_whole(path, json.dumps(self.facts | found, indent=1))


def of_plan(plan: Plan) -> dict[str, Any]:
    """What a plan had said."""
    from ..planner.report import as_json

    told = as_json(plan)
    memory = told["memory"]
    return {
        "seconds": told["seconds"]["step"],
        "peak_gib": memory["peak_bytes"] / 2**30,
        "reserved_gib": memory["reserved_bytes"] / 2**30,
        "host_gib": memory["host_bytes"] / 2**30,
        "card_gib": plan.machine.gpu.memory_bytes / 2**30,
        "fits": told["fits"],
        "knobs": told["knobs"],
        "settings": told["settings"],
    }


def in_gib(row: Row) -> dict[str, Any]:
    """A measurement's row with sizes in GiB."""
    found = {name: value for name, value in row.items() if not name.endswith("_bytes")}
    found.pop("said", None)
    found |= {f"{name}_gib": row[f"{name}_bytes"] / 2**30 for name in SIZES if f"{name}_bytes" in row}
    peaks = row.get("phase_peak_bytes")
    if peaks is not None:
        found["phase_peak_gib"] = {name: size / 2**30 for name, size in peaks.items()}
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """When, on what, with which versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    versions = {"longseq": __version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d %H:%M"), "device": name, "versions": versions}
    if device.type == "cuda":
        found["device_gib"] = torch.cuda.mem_get_info(device)[1] / 2**30
    return found


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    draft.write_text(text)
    draft.replace(path)


def _plain(options: Options) -> dict[str, Any]:
    names = ("steps", "warms_up", "memory_only", "gpu_bytes", "host_bytes", "document_tokens", "profile")
    return {name: getattr(options, name) for name in names}
