"""Runs that are killed, cut, left without room and damaged at random, and end as if nothing had happened.

    python tests/faults/rounds.py --rounds 100 --seed 0 --out benchmarks/results

A round trains a tiny model on the CPU. One to three times the run is stopped by an injury, and half the time
something of it is damaged while it lies still; then the same command goes on. What a refusal asks for is
done: the checkpoint that it names is moved away. In the end weights, optimizer states, random states and
the metrics of every step must be bit for bit those of a run that nothing happened to.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bad_inputs import OUR_BUG, WAY_OUT
from faults.injuries import DURING, Injury, damage, draw_injury
from faults.report import Round, write_report
from faults.runs import SETTINGS, STEPS, Attempt, Setting, attempt, differences, good_step, warm_up, yaml_of
from tiny_run import Workshop

MOST_TRIES = 4
DAMAGED_TOKENS = "the same command makes them anew"
"""What a run says that has found the cache's tokens damaged in the midst of a step."""


@dataclass(frozen=True)
class Truth:
    """A run of a setting that nothing happened to.

    Attributes:
        run_dir: Its folder.
        changes: Of the file system, by rank 0.
    """

    run_dir: Path
    changes: int


class Rounds:
    """Rounds over some settings, in a folder of their own."""

    def __init__(self, folder: Path, seed: int, settings: tuple[Setting, ...] = SETTINGS) -> None:
        warm_up(settings)
        self._folder = folder
        self._seed = seed
        self._settings = settings
        self._shop = Workshop(folder)
        self._truths: dict[str, Truth] = {}
        if any("{shop}" in override for setting in settings for override in setting.overrides):
            self._pretrain()

    def round(self, index: int) -> Round:
        """One round; its folder stays if it failed."""
        started = time.monotonic()
        draw = random.Random(f"{self._seed}/{index}")
        setting = self._settings[index % len(self._settings)]
        done = Round(index, setting.name)
        truth = self._truth(setting)
        folder = self._folder / f"round-{index}"
        folder.mkdir()
        os.environ["LONGSEQ_CACHE"] = str(folder / "cache")
        run_dir = folder / "run"
        yaml = yaml_of(setting, self._shop, run_dir)
        for _ in range(draw.randrange(1, 4)):
            self._hurt(done, draw, yaml, run_dir, folder / "cache", setting, truth)
            if done.problems or good_step(run_dir) == STEPS:
                break
        if not done.problems:
            self._go_on_to_the_end(done, yaml, run_dir, setting)
        if not done.problems:
            done.problems += differences(run_dir, truth.run_dir)
        done.seconds = round(time.monotonic() - started, 2)
        if not done.problems and not done.complaints:
            shutil.rmtree(folder)
        return done

    def _pretrain(self) -> None:
        os.environ["LONGSEQ_CACHE"] = str(self._folder / "pretrained-cache")
        setting = Setting("pretrained", ("train.steps=2", "checkpoint.export_at_end=true"))
        made = attempt(yaml_of(setting, self._shop, self._folder / "pretrained"), 1)
        assert made.is_done, made.printed

    def _truth(self, setting: Setting) -> Truth:
        if setting.name not in self._truths:
            run_dir = self._folder / f"truth-{len(self._truths)}"
            os.environ["LONGSEQ_CACHE"] = str(run_dir) + "-cache"
            made = attempt(yaml_of(setting, self._shop, run_dir), setting.processes)
            assert made.is_done, made.printed
            self._truths[setting.name] = Truth(run_dir, made.changes)
        return self._truths[setting.name]

    def _hurt(
        self,
        done: Round,
        draw: random.Random,
        yaml: Path,
        run_dir: Path,
        cache: Path,
        setting: Setting,
        truth: Truth,
    ) -> None:
        injury = draw_injury(
            draw.choice(DURING),
            draw,
            # A run that goes on makes no more than its share of them.
            changes=max(9, truth.changes * (STEPS - good_step(run_dir)) // STEPS),
            processes=setting.processes,
        )
        before = good_step(run_dir)
        ended = attempt(yaml, setting.processes, in_child=injury.in_child, meanwhile=injury.meanwhile)
        after = good_step(run_dir)
        done.events.append(f"{injury.detail}: {ended.statuses}, from step {before} to {after}")
        done.problems += problems_of(injury, ended)
        done.complaints += complaints_of(injury, ended)
        if after < before:
            done.problems.append(f"{injury.detail}: the newest checkpoint went from step {before} to {after}")
        if not ended.is_done or injury.kind == "stop":
            done.injuries.append(injury.kind)
        if draw.random() < 0.5:
            said = damage(run_dir, cache, draw)
            if said is not None:
                done.damages.append(said.partition(":")[0])
                done.events.append(said)

    def _go_on_to_the_end(self, done: Round, yaml: Path, run_dir: Path, setting: Setting) -> None:
        for _ in range(MOST_TRIES):
            ended = attempt(yaml, setting.processes)
            done.events.append(f"went on: {ended.statuses}, to step {good_step(run_dir)}")
            if ended.is_done:
                return
            named = [path for path in (run_dir / "checkpoints").glob("step-*") if path.name in ended.printed]
            if {*ended.statuses} - {-9} == {2} and named and not OUR_BUG.search(ended.printed):
                for path in named:
                    path.rename(run_dir / f"moved-{done.refusals}-{path.name}")
                done.refusals += 1
            elif not found_damaged_tokens(ended):
                break
        done.problems.append(f"it did not go on: {ended.statuses}\n{ended.printed[-3000:]}")


def problems_of(injury: Injury, ended: Attempt) -> list[str]:
    """What is wrong with how a run ended by an injury."""
    if "hung for" in ended.printed:
        return [f"{injury.detail}: {ended.printed[-2000:]}"]
    # Before a run listens it dies of the signal, and the other processes of its death; or it is refused.
    as_it_should = (
        ended.is_done or -15 in ended.statuses or 2 in ended.statuses or found_damaged_tokens(ended)
    )
    if injury.kind == "stop" and not as_it_should:
        return [f"{injury.detail}: asked to stop it ended with {ended.statuses}\n{ended.printed[-2000:]}"]
    return []


def found_damaged_tokens(ended: Attempt) -> bool:
    """Whether the run ended for that, and will make them anew."""
    return DAMAGED_TOKENS in " ".join(ended.printed.split())


def complaints_of(injury: Injury, ended: Attempt) -> list[str]:
    """What is wrong with what a run said that had no room."""
    if injury.kind != "fill" or ended.is_done or min(ended.statuses) <= 0:
        return []
    if OUR_BUG.search(ended.printed):
        return [f"{injury.detail}: out of room it said\n{ended.printed[-2000:]}"]
    if not WAY_OUT.search(ended.printed):
        return [f"{injury.detail}: out of room it gave no way out\n{ended.printed[-2000:]}"]
    return []


def main() -> int:
    """Run the rounds and write what came of them; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", type=int, help="take the first so many ways to train alone")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of single rounds")
    parser.add_argument("--out", type=Path, help="folder for faults.json and faults.md")
    parser.add_argument("--keep", type=Path, help="folder to work in, which stays")
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="longseq-faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    rounds, done = Rounds(folder, args.seed, SETTINGS[: args.settings]), []
    for index in args.only or range(args.rounds):
        one = rounds.round(index)
        done.append(one)
        ended = "NOT EQUAL" if one.problems else "equal"
        print(f"{index:4} {one.seconds:5.1f} s {ended:9} {one.setting}: {'; '.join(one.events)}", flush=True)
        for problem in (*one.problems, *one.complaints):
            print(f"     {problem}", flush=True)
    write_report(done, args.seed, time.monotonic() - started, args.out)
    failed = any(one.problems or one.complaints for one in done)
    if not failed and args.keep is None:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
