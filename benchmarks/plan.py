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
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import plan_settings
from plan_settings import SETTINGS, Setting

WORKER = Path(__file__).with_name("plan_run.py")
GRACE = 2.5
"""A setting that takes so many times what it was thought to is stuck, and is stopped."""
KILL_AFTER_S = 8


class Manager:
    """Starts settings, each when a GPU is free for it and it can be over in time."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.deadline = None if args.deadline_s is None else time.monotonic() + args.deadline_s
        self.lock = threading.Lock()
        self.waiting: list[Setting] = []

    def run(self, settings: list[Setting]) -> None:
        """All of them: those of several GPUs one after the other, then those of one, side by side."""
        for setting in [one for one in settings if one.gpus > 1]:
            self.start(setting, None)
        # The longest first: what is left for the end is short, and lanes end together.
        self.waiting = sorted((one for one in settings if one.gpus == 1), key=lambda one: -one.about_s)
        lanes = [threading.Thread(target=self.lane, args=(number,)) for number in range(self.args.lanes)]
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()

    def lane(self, number: int) -> None:
        """Settings one after the other on one GPU."""
        while (setting := self.next()) is not None:
            self.start(setting, number)

    def next(self) -> Setting | None:
        """The longest that can be over in time; those that cannot stay where they are."""
        with self.lock:
            for setting in self.waiting:
                if self.has_time(setting):
                    self.waiting.remove(setting)
                    return setting
        return None

    def has_time(self, setting: Setting) -> bool:
        """Before the deadline."""
        return self.deadline is None or time.monotonic() + setting.about_s <= self.deadline

    def start(self, setting: Setting, lane: int | None) -> None:
        """One setting, to its end."""
        if not self.has_time(setting):
            print(f"left out: {setting.name} (about {setting.about_s:.0f} s)", flush=True)
            return
        limit_s = GRACE * setting.about_s
        if self.deadline is not None:
            limit_s = min(limit_s, self.deadline - time.monotonic())
        started = time.monotonic()
        with (self.args.out / f"{setting.name}.log").open("w") as log:
            process = subprocess.Popen(
                self.words(setting),
                env=self.environment(setting, lane),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                status = "stopped"
                self.stop(process)
        print(f"{setting.name}: {time.monotonic() - started:.0f} s, {self.told(setting, status)}", flush=True)

    def words(self, setting: Setting) -> list[str]:
        """The command of a setting."""
        words = [str(WORKER), setting.name, "--out", str(self.args.out), "--work", str(self.args.work)]
        words += ["--steps", str(self.args.steps), *(["--profile"] if self.args.profile else [])]
        if setting.gpus == 1:
            return [sys.executable, *words]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*launcher, "--nproc-per-node", str(setting.gpus), *words]

    def environment(self, setting: Setting, lane: int | None) -> dict[str, str]:
        """A lane sees one GPU, of those that are visible here."""
        environment = dict(os.environ)
        # torchrun gives each process one thread, and an optimizer on the host wants all.
        at_once = self.args.lanes if lane is not None else setting.gpus
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))
        if lane is not None and self.args.lanes > 1:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            environment["CUDA_VISIBLE_DEVICES"] = visible[lane] if len(visible) > lane else str(lane)
        return environment

    def stop(self, process: subprocess.Popen) -> None:
        """It and what it started."""
        import signal

        for number in (signal.SIGTERM, signal.SIGKILL):
            os.killpg(process.pid, number)
            try:
                process.wait(KILL_AFTER_S)
                return
            except subprocess.TimeoutExpired:
                continue

    def told(self, setting: Setting, status: int | str) -> str:
        """What a setting found, in a line; of a failure the log's last lines."""
        path = self.args.out / f"{setting.name}.json"
        row: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if "seconds" in row:
            peak = row.get("peak_bytes", 0) / 2**30
            note = f" ({row['note']})" if "note" in row else ""
            return f"{row['seconds']:.3f} s a step, peak {peak:.2f} GiB{note}"
        last = (self.args.out / f"{setting.name}.log").read_text().strip().splitlines()[-6:]
        return "\n  ".join([f"status {status}: {row.get('note', 'nothing')}", *last])


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
    options.add_argument("--out", type=Path, help="folder for the results")
    options.add_argument("--work", type=Path, default=Path("/tmp/longseq-plan"), help="folder for scratch")
    options.add_argument("--only", nargs="+", metavar="NAME", help="settings, or the start of names and `*`")
    options.add_argument("--gpus", type=int, help="settings that take so many")
    options.add_argument("--lanes", type=int, default=1, help="one-GPU settings at once, each its own GPU")
    options.add_argument("--deadline-s", type=float, help="start nothing that would end later")
    options.add_argument("--steps", type=int, default=2, help="timed, after one that warms up")
    options.add_argument("--profile", action="store_true", help="the last step, under the profiler")
    options.add_argument("--again", action="store_true", help="those that are measured already, too")
    options.add_argument(
        "--table", type=Path, nargs="+", metavar="DIR", help="what is measured there, beside its plans"
    )
    options.add_argument("--list", action="store_true", help="the settings, and nothing else")
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
