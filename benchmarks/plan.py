"""What runs of `longseq train` take, measured, beside what `longseq plan` says they take.

python benchmarks/plan.py --list
python benchmarks/plan.py --out DIR --lanes 4 --deadline-s 540            # one-GPU settings, four at once
python benchmarks/plan.py --out DIR --gpus 4 --deadline-s 540             # settings of four GPUs, in order
python benchmarks/plan.py --out DIR --only 8b-mini-64k-gpu '1b-*'
python benchmarks/plan.py --out DIR --only 'tiny-*'                       # on a CPU
python benchmarks/plan.py --table DIR --out benchmarks/results            # beside their plans, on any machine

Each setting is a run of its own processes and writes DIR/SETTING.json as it goes, so what is cut off loses
no other. Settings that are there already are left out, unless --again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import lanes
import plan_settings
from lanes import Lanes
from plan_settings import SETTINGS, Setting

WORKER = Path(__file__).with_name("plan_run.py")


class Manager(Lanes):
    """Runs of `plan_run.py`."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args.out, args.lanes, args.deadline_s)
        self.args = args

    def words(self, setting: Setting) -> list[str]:
        """The command of a setting."""
        words = [str(WORKER), setting.name, "--out", str(self.out), "--work", str(self.args.work)]
        words += ["--steps", str(self.args.steps), *(["--profile"] if self.args.profile else [])]
        if setting.gpus == 1:
            return [sys.executable, *words]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*launcher, "--nproc-per-node", str(setting.gpus), *words]

    def told(self, setting: Setting, status: int | str) -> str:
        """What a setting found, in a line; of a failure the log's last lines."""
        path = self.out / f"{setting.name}.json"
        row: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if "seconds" in row:
            peak = row.get("peak_bytes", 0) / 2**30
            note = f" ({row['note']})" if "note" in row else ""
            return f"{row['seconds']:.3f} s a step, peak {peak:.2f} GiB{note}"
        return self.last_lines(setting, status, row.get("note", "nothing"))


def measured(folder: Path, setting: Setting) -> bool:
    """Whether a setting's numbers are there, or that it has no room."""
    path = folder / f"{setting.name}.json"
    if not path.exists():
        return False
    note = json.loads(path.read_text()).get("note")
    return note is None or note.startswith("out of memory")


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    lanes.add_options(options)
    options.add_argument("--work", type=Path, default=Path("/tmp/longseq-plan"), help="folder for scratch")
    options.add_argument("--gpus", type=int, help="settings that take so many")
    options.add_argument("--steps", type=int, default=2, help="timed, after one that warms up")
    options.add_argument("--profile", action="store_true", help="the last step, under the profiler")
    options.add_argument(
        "--table", type=Path, nargs="+", metavar="DIR", help="what is measured there, beside its plans"
    )
    args = options.parse_args(arguments)
    if args.table is not None:
        from plan_table import collect

        collect(args.table, args.out)
        return
    try:
        settings = plan_settings.named(args.only) if args.only else list(SETTINGS)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if args.gpus is not None:
        settings = [one for one in settings if one.gpus == args.gpus]
    if args.list:
        for one in settings:
            print(f"{one.name:32} {one.gpus} GPU, about {one.about_s:.0f} s: {' '.join(one.overrides)}")
        return
    if args.out is None:
        raise SystemExit("--out is missing: a folder for the results.")
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    Manager(args).run([one for one in settings if args.again or not measured(args.out, one)])


if __name__ == "__main__":
    main()
