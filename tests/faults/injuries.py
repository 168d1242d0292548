"""What is done to a run: killed, cut in a write, out of room; and to its files, while it lies still."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.runs import changes_files


@dataclass
class Injury:
    """What is done to one attempt.

    Attributes:
        kind: Of it, in the report.
        detail: What it is and when.
        in_child: Arms it in a process, given its rank.
        meanwhile: Does it from outside, given the pids that live and the changes that rank 0 has made.
    """

    kind: str
    detail: str
    in_child: Callable[[int], None] | None = None
    meanwhile: Callable[[list[int], int], None] | None = None


DURING = ("kill", "stop", "cut", "crash", "fill")


def draw_injury(kind: str, draw: random.Random, *, changes: int, processes: int) -> Injury:
    """An injury of a kind, at a random moment: so many changes of the file system, and some milliseconds.

    Args:
        kind: One of `DURING`.
        draw: Random numbers.
        changes: That rank 0 makes in a run without injuries.
        processes: Of the run.
    """
    number, rank = draw.randrange(1, changes + 1), draw.randrange(processes)
    later_s = draw.choice((0.0, draw.uniform(0.0, 0.05)))
    size = int(10 ** draw.uniform(0, 5.2))
    when = f"change {number} of {changes} by rank 0"
    moment = f"{later_s * 1000:.0f} ms after {when}"
    if kind in ("kill", "stop"):
        sent = signal.SIGKILL if kind == "kill" else signal.SIGTERM
        act = _once(_send(sent, rank), number, later_s)
        return Injury(kind, f"{sent.name} to rank {rank} {moment}", meanwhile=act)
    if kind == "crash":
        return Injury(kind, f"SIGKILL before {when}", _at_change(number, _die))
    if kind == "fill" and draw.random() < 0.5:
        return Injury(kind, f"ENOSPC from {when} on", _at_change(number, _no_room))
    name, arm = ("SIGXFSZ", _die_of_large_files) if kind == "cut" else ("EFBIG", None)
    detail = f"{name} at byte {size} of a file, from {moment} on"
    return Injury(kind, detail, arm, _once(_limit_files(size), number, later_s))


def _send(number: signal.Signals, rank: int) -> Callable[[list[int]], None]:
    return lambda pids: os.kill(pids[rank % len(pids)], number)


def _limit_files(size: int) -> Callable[[list[int]], None]:
    """From then on no file of a process grows beyond that: a write stops at that very byte."""

    def act(pids: list[int]) -> None:
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return act


def _once(act: Callable[[list[int]], None], number: int, later_s: float) -> Callable[[list[int], int], None]:
    reached_at: list[float] = []
    done: list[bool] = []

    def meanwhile(pids: list[int], changes: int) -> None:
        if changes >= number and not reached_at:
            reached_at.append(time.monotonic())
        if reached_at and not done and time.monotonic() >= reached_at[0] + later_s:
            done.append(True)
            act(pids)

    return meanwhile


def _die_of_large_files(rank: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, and has an error instead


def _die(path: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _no_room(path: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def _at_change(number: int, act: Callable[[str], None]) -> Callable[[int], None]:
    """Acts in place of the change of that number by rank 0, and of all that come after it."""

    def in_child(rank: int) -> None:
        if rank == 0:
            count = [0]

            def hook(event: str, arguments: tuple[Any, ...]) -> None:
                if changes_files(event, arguments):
                    count[0] += 1
                    if count[0] >= number:
                        act(str(arguments[0]))

            sys.addaudithook(hook)

    return in_child


def damage(run_dir: Path, cache: Path, draw: random.Random) -> str | None:
    """Damage something of a run that lies still; says what, None if there is nothing to damage."""
    # Damage of a checkpoint comes three times as often as each of the others.
    names = [*LYING_STILL, "checkpoint", "checkpoint"]
    draw.shuffle(names)
    for name in dict.fromkeys(names):
        said = LYING_STILL[name](run_dir, cache, draw)
        if said is not None:
            return f"{name}: {said}"
    return None


def _checkpoints(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("step-*"))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _hurt(path: Path, draw: random.Random) -> str:
    size = path.stat().st_size
    way = draw.choice(("flip", "flip", "cut", "empty", "delete", "replace"))
    if way == "delete" or not size:
        path.unlink()
        return "deleted"
    content = bytearray(path.read_bytes())
    if way == "flip":
        at = draw.randrange(size)
        content[at] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        return f"a bit of byte {at} of {size} flipped"
    if way == "replace":
        start = draw.randrange(size)
        path.write_bytes(content[:start] + bytes(min(4096, size - start)) + content[start + 4096 :])
        return f"zeros from byte {start} of {size} on"
    kept = draw.randrange(size) if way == "cut" else 0
    path.write_bytes(content[:kept])
    return f"cut to {kept} bytes of {size}"


def _a_checkpoints_file(run_dir: Path, cache: Path, draw: random.Random) -> str | None:
    folders = _checkpoints(run_dir)
    if not folders:
        return None
    # Most often what matters most: the newest, and its weights and states.
    folder = draw.choice((folders[-1], draw.choice(folders)))
    files = _files(draw.choice((folder, folder / "engine")))
    if not files:
        return None
    path = draw.choice(files)
    return f"{path.relative_to(run_dir)} {_hurt(path, draw)}"


def _a_file_of_the_cache(run_dir: Path, cache: Path, draw: random.Random) -> str | None:
    files = [path for path in _files(cache) if path.suffix not in (".lock", ".png")]
    if not files:
        return None
    path = draw.choice(files)
    return f"{path.relative_to(cache)} {_hurt(path, draw)}"


def _latest(run_dir: Path, cache: Path, draw: random.Random) -> str | None:
    path = run_dir / "checkpoints" / "latest"
    if not path.exists():
        return None
    if path.is_symlink() or draw.random() < 0.5:
        path.unlink()
        return "removed"
    path.write_text("step-00000777\n")
    return "names a checkpoint there is not"


def _half_drafts(run_dir: Path, cache: Path, draw: random.Random) -> str | None:
    folders = _checkpoints(run_dir)
    if not folders:
        return None
    draft = run_dir / "checkpoints" / f".step-{draw.randrange(1, 20):08d}.partial"
    if draft.exists():
        return None
    shutil.copytree(draw.choice(folders), draft, symlinks=True)
    for path in _files(draft):
        if draw.random() < 0.3:
            path.unlink()
    return f"{draft.name} left behind"


def _a_folder_of_a_higher_step(run_dir: Path, cache: Path, draw: random.Random) -> str | None:
    """What a copy that was interrupted leaves: a checkpoint by its name, with a part of its files."""
    folders = _checkpoints(run_dir)
    if not folders:
        return None
    newest = folders[-1]
    copy = newest.with_name("step-00000099")
    if copy.exists():
        return None
    shutil.copytree(newest, copy, symlinks=True)
    files = _files(copy)
    gone = draw.sample(files, draw.randrange(1, len(files) + 1))
    for path in gone:
        path.unlink()
    return f"{copy.name} with {len(files) - len(gone)} of {len(files)} files"


def _torn_metrics(run_dir: Path, cache: Path, draw: random.Random) -> str | None:
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return None
    with path.open("a") as file:
        file.write('{"kind": "step", "step": 7, "lo')
    return "half a line at the end of metrics.jsonl"


LYING_STILL: dict[str, Callable[[Path, Path, random.Random], str | None]] = {
    "checkpoint": _a_checkpoints_file,
    "cache": _a_file_of_the_cache,
    "latest": _latest,
    "draft": _half_drafts,
    "half a copy": _a_folder_of_a_higher_step,
    "metrics": _torn_metrics,
}
