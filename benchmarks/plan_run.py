"""One process of one setting of `plan.py`: the run's own set-up and steps, and what they take."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import plan_settings
import report
import torch

from longseq.launch.bench.made_up import documents, random_checkpoint
from longseq.launch.bench.measure import Measurement
from longseq.launch.bench.report import UNFINISHED, write_whole
from longseq.launch.config import RunConfig
from longseq.launch.config_changes import with_values
from longseq.launch.config_file import load_config
from longseq.launch.processes import join, leave, set_up_logging


def configured(setting: plan_settings.Setting, work: Path) -> RunConfig:
    """The setting's config, and the file that it reads."""
    work.mkdir(parents=True, exist_ok=True)
    empty = work / "empty.yaml"
    if not empty.exists():
        empty.write_text("")
    config = load_config(str(empty), setting.keys("documents.jsonl", str(work)))
    return with_values(config, {"data.source": str(documents(config, work, setting.document_tokens))})


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("setting")
    options.add_argument("--out", type=Path, required=True, help="folder for SETTING.json")
    options.add_argument("--work", type=Path, required=True, help="folder for data and scratch")
    options.add_argument("--steps", type=int, default=2)
    options.add_argument("--profile", action="store_true")
    args = options.parse_args(arguments)
    (setting,) = plan_settings.named([args.setting])
    config = configured(setting, args.work)
    config, groups, device = join(config)
    set_up_logging(groups.is_main)
    facts = {
        "name": setting.name,
        "shape": setting.shape,
        "gpus": setting.gpus,
        "keys": list(setting.overrides),
        "tokens": config.sequence.length,
        "document_tokens": setting.document_tokens,
        "environment": report.environment(),
        "began": time.strftime("%Y-%m-%d %H:%M"),
    }
    if device.type == "cuda":
        facts["gpu_bytes"] = torch.cuda.mem_get_info()[1]
    path = args.out / f"{setting.name}.json"

    def keep(row: dict[str, Any]) -> None:
        if groups.is_main:
            write_whole(path, json.dumps(facts | row, indent=1))

    keep({"note": UNFINISHED})
    measurement = Measurement(config, groups, device, setting.document_tokens)
    measurement.row["note"] = UNFINISHED
    try:
        if setting.saved:
            folder = Path(config.model.name)
            groups.main_first(lambda: random_checkpoint(config.model.config, folder, device), "weights")
        measurement.set_up()
        keep(measurement.row)
        measurement.measure(setting.steps or args.steps, keep, profile=args.profile)
    except torch.OutOfMemoryError as error:
        note = f"out of memory: {str(error).splitlines()[0]}"[:300]
        write_whole(path, json.dumps(facts | measurement.row | {"note": note}, indent=1))
        print(f"rank {groups.rank}: {setting.name}: {note}", flush=True)
        os._exit(3)  # the others wait in a collective for this rank
    if measurement.row["note"] == UNFINISHED:
        del measurement.row["note"]
    keep(measurement.row)
    leave()


if __name__ == "__main__":
    main()
