"""Settings of a benchmark, each a process of its own: side by side on the GPUs there are, in time."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

GRACE = 2.5
"""A setting that takes so many times what it was thought to is stuck, and is stopped."""
KILL_AFTER_S = 8


class Setting(Protocol):
    """What is known of a setting before it runs."""

    @property
    def name(self) -> str:
        """Of its files."""
        ...

    @property
    def gpus(self) -> int:
        """It takes."""
        ...

    @property
    def about_s(self) -> float:
        """Wall time from the start of its processes to their end, roughly."""
        ...


def add_options(options: argparse.ArgumentParser) -> None:
    """What every benchmark of settings is told."""
    options.add_argument("--out", type=Path, help="folder for the results")
    options.add_argument("--only", nargs="+", metavar="NAME", help="settings, or the start of names and `*`")
    options.add_argument("--lanes", type=int, default=1, help="one-GPU settings at once, each its own GPU")
    options.add_argument("--deadline-s", type=float, help="start nothing that would end later")
    options.add_argument("--again", action="store_true", help="those that are measured already, too")
    options.add_argument("--list", action="store_true", help="the settings, and nothing else")


def named(names: list[str], every: tuple[Any, ...]) -> list[Any]:
    """Settings by name, or by the start of it followed by `*`, in the order of the list.

    Raises:
        ValueError: There is none of a name.
    """
    chosen: list[Any] = []
    for name in names:
        found = [
            one
            for one in every
            if one.name == name or (name.endswith("*") and one.name.startswith(name[:-1]))
        ]
        if not found:
            raise ValueError(f"--only {name} is no setting; they are {', '.join(one.name for one in every)}.")
        chosen += [one for one in found if one not in chosen]
    return chosen


class Lanes(ABC):
    """Starts settings, each when a GPU is free for it and it can be over in time."""

    def __init__(self, out: Path, lanes: int, deadline_s: float | None) -> None:
        self.out, self.lanes = out, lanes
        self.deadline = None if deadline_s is None else time.monotonic() + deadline_s
        self.lock = threading.Lock()
        self.waiting: list[Any] = []
        self.running: list[subprocess.Popen] = []
        self.is_over = False

    @abstractmethod
    def words(self, setting: Any) -> list[str]:
        """The command of a setting."""

    @abstractmethod
    def told(self, setting: Any, status: int | str) -> str:
        """What a setting found, in a line."""

    def run(self, settings: list[Any]) -> None:
        """All of them: those of several GPUs one after the other, then those of one, side by side.

        A signal that ends this process (`timeout` sends one) ends what it has started first: each is in a
        session of its own, and would go on holding its GPU.
        """
        # The longest first: what is left for the end is short, and lanes end together.
        self.waiting = sorted((one for one in settings if one.gpus == 1), key=lambda one: -one.about_s)
        threads = [threading.Thread(target=self.lane, args=(number,)) for number in range(self.lanes)]
        with signals_raised():
            try:
                for setting in [one for one in settings if one.gpus > 1]:
                    self.start(setting, None)
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            finally:
                self.end()
                for thread in threads:
                    if thread.ident is not None:
                        thread.join()

    def end(self) -> None:
        """Stop what still runs, all at once, and start nothing more."""
        with self.lock:
            self.is_over = True
            running = list(self.running)
        stops = [threading.Thread(target=self.stop, args=(process,)) for process in running]
        for thread in stops:
            thread.start()
        for thread in stops:
            thread.join()

    def lane(self, number: int) -> None:
        """Settings one after the other on one GPU."""
        while (setting := self.next()) is not None:
            self.start(setting, number)

    def next(self) -> Any:
        """The longest that can be over in time; those that cannot stay where they are."""
        with self.lock:
            for setting in self.waiting if not self.is_over else ():
                if self.has_time(setting):
                    self.waiting.remove(setting)
                    return setting
        return None

    def has_time(self, setting: Any) -> bool:
        """Before the deadline."""
        return self.deadline is None or time.monotonic() + setting.about_s <= self.deadline

    def left_s(self) -> float | None:
        """Until the deadline; None without one."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    def start(self, setting: Any, lane: int | None) -> None:
        """One setting, to its end."""
        if not self.has_time(setting):
            print(f"left out: {setting.name} (about {setting.about_s:.0f} s)", flush=True)
            return
        limit_s = GRACE * setting.about_s
        if (left_s := self.left_s()) is not None:
            limit_s = min(limit_s, left_s)
        started = time.monotonic()
        with (self.out / f"{setting.name}.log").open("w") as log, self.lock:
            if self.is_over:
                return
            process = subprocess.Popen(
                self.words(setting),
                env=self.environment(setting, lane),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.running.append(process)
        try:
            status: int | str = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = "stopped"
            self.stop(process)
        with self.lock:  # of a signal it stays in the list, for `end`
            self.running.remove(process)
        print(f"{setting.name}: {time.monotonic() - started:.0f} s, {self.told(setting, status)}", flush=True)

    def environment(self, setting: Any, lane: int | None) -> dict[str, str]:
        """A lane sees one GPU, of those that are visible here."""
        environment = dict(os.environ)
        # torchrun gives each process one thread, and an optimizer on the host wants all.
        at_once = self.lanes if lane is not None else setting.gpus
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))
        if lane is not None and self.lanes > 1:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            environment["CUDA_VISIBLE_DEVICES"] = visible[lane] if len(visible) > lane else str(lane)
        return environment

    def stop(self, process: subprocess.Popen) -> None:
        """It and what it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):  # another thread has seen its end
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KILL_AFTER_S)
                return

    def last_lines(self, setting: Any, status: int | str, note: str) -> str:
        """Of a failure's log."""
        last = (self.out / f"{setting.name}.log").read_text().strip().splitlines()[-6:]
        return "\n  ".join([f"status {status}: {note}", *last])


@contextlib.contextmanager
def signals_raised() -> Iterator[None]:
    """SIGTERM, and SIGHUP unless `nohup` has it ignored, are exceptions of the main thread, as Ctrl-C is."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is not signal.SIG_IGN]
    earlier = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
