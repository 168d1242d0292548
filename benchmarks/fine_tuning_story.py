"""A story of commands in one folder, for `fine_tuning.py`: each is typed, watched, timed and written down."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fine_tuning_results
from fine_tuning_shapes import BASE, SHAPES, Shape

STAGES = ("corpus", *BASE, "long", "probe")
NEVER_S = 150  # a run without a step after these will not get going
STOP_S = 60  # to save and stop, for a run that was asked to
POLL_S = 0.05
Row = dict[str, Any]
Watch = Callable[[subprocess.Popen], str | None]


class NeverStartedError(Exception):
    """A run took no step in a time in which it should have."""


class Story:
    """What has been done so far; it is in `story.json` of the folder, so that stages can be run apart."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.shape: Shape = SHAPES[args.shape]
        for name in ("base_lr", "long_steps", "long_lr"):
            if (given := getattr(args, name)) is not None:
                self.shape = replace(self.shape, **{name: given})
        if args.base_steps is not None:
            runs = zip(self.shape.base, args.base_steps, strict=True)
            self.shape = replace(self.shape, base=tuple(run._replace(steps=steps) for run, steps in runs))
        self.work, self.out, self.deadline_s = args.work.resolve(), args.out.resolve(), args.deadline_s
        self.started = time.perf_counter()
        self.work.mkdir(parents=True, exist_ok=True)
        self.path, self.stage = self.work / "story.json", STAGES[0]
        self.facts: Row = {"shape": args.shape, "commands": []}
        if self.path.exists():
            self.facts = json.loads(self.path.read_text())
            if self.facts["shape"] != args.shape:
                raise SystemExit(
                    f"--shape {args.shape}: {self.work} is of {self.facts['shape']}; take another."
                )

    def begin(self, stage: str) -> None:
        """Forget what the stage did in an earlier call, and what rests on it."""
        print(f"== {stage}: {self.left_s:.0f} s are left", flush=True)
        self.stage = stage
        for later in STAGES[STAGES.index(stage) :]:
            self.facts.pop(later, None)
            self.facts["commands"] = [row for row in self.facts["commands"] if row["stage"] != later]
            for path in (self.work / "runs" / later, self.work / f"{later}-model"):
                shutil.rmtree(path, ignore_errors=True)
        if stage != "probe":
            for path in self.work.glob("probe-*.jsonl"):
                path.unlink()

    @property
    def left_s(self) -> float:
        """Until the deadline."""
        return self.deadline_s - (time.perf_counter() - self.started)

    def keep(self) -> None:
        """Write down what is there."""
        draft = self.path.with_name(".story.json.partial")
        draft.write_text(json.dumps(self.facts, indent=2))
        os.replace(draft, self.path)
        fine_tuning_results.write(self.facts, self.work, self.out, show=False)

    def longseq(self, *words: str, watch: Watch | None = None) -> str:
        """Type a command of `longseq`, and wait for it; what it printed to stdout."""
        command = [sys.executable, "-m", "longseq.launch.cli", *words]
        return self.run(" ".join(["longseq", *words]), command, words[0], watch)

    def run(self, typed: str, command: Sequence[str], kind: str, watch: Watch | None) -> str:
        """Start a command in the folder of the files, and wait for it; what it printed to stdout.

        Args:
            typed: As a user types it.
            command: The same, for the system.
            kind: Its log's name.
            watch: Is called again and again while it runs, until it says how it ended the command. One that
                has not ended `STOP_S` later is killed.
        """
        name = f"{self.stage}-{len(self.facts['commands']) + 1}-{kind}"
        printed, log = (self.work / f"{name}.{suffix}" for suffix in ("out", "log"))
        print(f"$ {typed}", flush=True)
        started = time.perf_counter()
        with printed.open("w") as out, log.open("w") as err:
            process = subprocess.Popen(
                command,
                **{"cwd": self.work, "env": environment(), "stdout": out, "stderr": err},
                start_new_session=True,
            )
            how, failed = None, False
            try:
                how = wait(process, watch)
            except NeverStartedError as error:
                how, failed = str(error), True
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        seconds = round(time.perf_counter() - started, 1)
        ended = how or ("done" if process.returncode == 0 else f"status {process.returncode}")
        print(f"{ended}, {seconds} s", flush=True)
        self.facts["commands"].append(
            {"stage": self.stage, "command": typed, "seconds": seconds, "ended": ended}
        )
        self.keep()
        if failed or (process.returncode and how is None):
            said = "\n".join((printed.read_text() + log.read_text()).splitlines()[-25:])
            raise SystemExit(f"{typed}: {ended}; the end of what it said:\n{said}")
        return printed.read_text()


def wait(process: subprocess.Popen, watch: Watch | None) -> str | None:
    """Until the command ends, or has not for too long after it was asked to; how `watch` ended it, if so."""
    how, asked_at = None, math.inf
    while process.poll() is None:
        if time.perf_counter() - asked_at > STOP_S:
            return f"{how}, and killed {STOP_S} s later"
        if how is None and watch is not None and (how := watch(process)) is not None:
            asked_at = time.perf_counter()
        time.sleep(POLL_S)
    return how


def stop_when(run: Path, is_over: Callable[[float], bool], never_s: float = NEVER_S) -> Watch:
    """Asks a run to save and stop when its time is over; one that takes no step at all is given up.

    Args:
        run: Its folder. Steps that are there already, of a run that goes on, do not count.
        is_over: Is told the seconds since the first step was seen.
        never_s: From now until the first step.
    """
    started, first = time.perf_counter(), math.inf
    metrics = run / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.exists() else 0

    def stop(process: subprocess.Popen) -> str | None:
        nonlocal first
        now = time.perf_counter()
        if first == math.inf:
            if metrics.exists() and metrics.stat().st_size != size:
                first = now
            elif now - started > never_s:
                raise NeverStartedError(f"took no step in {never_s:.0f} s and was killed (SIGKILL)")
        elif is_over(now - first):
            process.send_signal(signal.SIGTERM)
            return f"asked to save and stop (SIGTERM) after {now - first:.0f} s of steps"
        return None

    return stop


def environment() -> dict[str, str]:
    """The command's: its folder is another one, so that paths must be whole."""
    paths = [str(Path(path).resolve()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "true"}
