"""What came of the rounds: for programs as JSON, for people as a page."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@dataclass
class Round:
    """What happened in one round.

    Attributes:
        index: Its number; with the seed it says what is drawn.
        setting: Name of the setting.
        events: What was done, and how it was taken, in order.
        injuries: Kinds that hit a run that was going on.
        damages: Kinds of what was damaged while the run lay still.
        refusals: Times that the run asked for a checkpoint to be moved away.
        problems: Why the round failed; none where it ended as the truth.
        complaints: What was wrong with what the run said when it had no room.
    """

    index: int
    setting: str
    events: list[str] = field(default_factory=list)
    injuries: list[str] = field(default_factory=list)
    damages: list[str] = field(default_factory=list)
    refusals: int = 0
    problems: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    seconds: float = 0.0


INJURIES = {
    "kill": "SIGKILL to a process, at a random moment",
    "crash": "SIGKILL before a random change of the file system (open, rename, remove, make a folder)",
    "cut": "a write that stops at a random byte, and the process dies of it",
    "fill": "no room on the disk, from a random change or byte on",
    "stop": "SIGTERM to a process, at a random moment",
}
DAMAGES = {
    "checkpoint": "a file of a checkpoint flipped, cut, emptied, zeroed or deleted",
    "cache": "a file of the token cache treated so",
    "latest": "`latest` removed, or naming what is not there",
    "draft": "a half-written draft left behind",
    "half a copy": "a folder of a higher step with a part of its files",
    "metrics": "half a line at the end of metrics.jsonl",
}


def write_report(rounds: list[Round], seed: int, seconds: float, out: Path | None) -> None:
    """Print what came of the rounds; with a folder, keep it there as faults.json and faults.md."""
    failed = [one.index for one in rounds if one.problems]
    refusals = sum(one.refusals for one in rounds)
    note = (
        f"`python tests/faults/rounds.py --rounds {len(rounds)} --seed {seed}`, {seconds:.0f} s "
        f"on {os.cpu_count()} cores.\n\n"
        f"**{len(rounds) - len(failed)} of {len(rounds)} rounds ended bit for bit as a run that nothing "
        "happened to**: weights, optimizer states, random states, place in the data, and loss, gradient norm "
        "and learning rate of every step. A round trains a Llama of 20 thousand weights for 8 steps. One to "
        "three times the run is injured, and half the time something of it is damaged while it lies still; "
        f"then the same command goes on. {refusals} times it refused to, from a damaged checkpoint without "
        "another beside it, which was then moved away as it asked."
    )
    if failed:
        note += f"\n\nNot equal: rounds {', '.join(map(str, failed))}."
    if any(one.complaints for one in rounds):
        said = sum(len(one.complaints) for one in rounds)
        note += f"\n\nWithout room it gave {said} times no message that says what to do."
    tables = [
        (
            "Injuries of a run that is going on",
            _counts(INJURIES, [kind for one in rounds for kind in one.injuries]),
        ),
        ("Damage while it lies still", _counts(DAMAGES, [kind for one in rounds for kind in one.damages])),
        ("Settings", _counts({one.setting: one.setting for one in rounds}, [one.setting for one in rounds])),
    ]
    _benchmarks_report().write(
        "faults",
        "Runs that are interrupted and damaged at random",
        [_row(one) for one in rounds],
        out,
        tables=tables,
        note=note,
        seed=seed,
        equal=len(rounds) - len(failed),
        failed=failed,
        seconds=round(seconds),
    )


def _row(one: Round) -> dict[str, object]:
    """Of problems the first line: behind it stands what the run printed."""
    firsts = {
        key: [text.partition("\n")[0] for text in getattr(one, key)] for key in ("problems", "complaints")
    }
    return {**asdict(one), **firsts}


def _benchmarks_report() -> ModuleType:
    """What the benchmarks write by; they are a folder of scripts and no package."""
    spec = importlib.util.spec_from_file_location("benchmarks_report", BENCHMARKS / "report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _counts(words: dict[str, str], found: list[str]) -> list[dict[str, object]]:
    counts = Counter(found)
    return [{"what": text, "times": counts[kind]} for kind, text in words.items()]
