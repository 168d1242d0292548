"""One setting of `end_to_end.py`, in a process of its own: it writes its row after each number."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import end_to_end_rungs as rungs
import report
import torch
from decoder_anchors import MissingError
from decoder_model import NUM_LAYERS, SHAPES, Budget, attempt, free
from end_to_end_memory import LADDER, Memory, Search, placed, probe, saved, steer
from end_to_end_row import Kept, Row, gib, is_over, process_age_s, write_row
from end_to_end_step import GIB, LR, Card, Taken, Training, finite
from transformers import LlamaConfig

from longseq.launch.flops import ModelShape, model_flops

EXPANDABLE = "expandable_segments:True"
WARM_UP_TOKENS = 4096


class Worker(Kept):
    """A setting's phases, one after the other."""

    def __init__(self, args: argparse.Namespace, setting: rungs.Setting, row: Row) -> None:
        super().__init__(args.out / f"{setting.name}.json", row)
        self.args, self.setting, self.rung = args, setting, setting.rung
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.num_layers = args.layers or NUM_LAYERS[args.shape]
        config = LlamaConfig(**SHAPES[args.shape], num_hidden_layers=self.num_layers)
        self.shape = ModelShape.from_hf_config(config)
        minutes = None if args.deadline_s is None else (args.deadline_s - process_age_s()) / 60
        self.budget = Budget(minutes, lambda tokens: model_flops(self.shape, [tokens]))
        self.probe_budget = Budget(minutes, lambda tokens: tokens)
        self.card = Card(setting.card_gib if args.gpu_gib is None else args.gpu_gib, self.device)
        self.row |= {
            "name": setting.name,
            "label": self.rung.label,
            "card_gib": setting.card_gib if args.gpu_gib is None else args.gpu_gib,
            "host_gib": args.host_gib,
            "shape": args.shape,
            "layers": self.num_layers,
            "optimizer": "APOLLO-Mini in backward" if self.rung.mini else "AdamW",
            "allocator": os.environ.get("PYTORCH_ALLOC_CONF"),
            "environment": self.checked(report.environment()),
        }
        self.is_warm = False
        self.seen: dict[int, float] = {}
        for row in self.row.setdefault("times", []):
            if "seconds" in row:
                self.see(row["tokens"], row["seconds"])
        self.row["left_out"] = []
        self.row.setdefault("done", [])

    def run(self) -> None:
        """All that is asked for and not there yet."""
        self.training = Training(
            self.rung, self.args.shape, self.num_layers, self.device, round(self.args.host_gib * GIB)
        )
        self.say(f"ready, {gib(self.card.room_bytes())} of room")
        hidden_bytes = 2 * self.training.model.config.hidden_size
        self.memory = Memory(
            self.card,
            round(self.args.host_gib * GIB),
            self.num_layers,
            hidden_bytes,
            anchor_host_bytes=self.rung.host_bytes,
            on_host=self.rung.on_host,
        )
        points = self.row.setdefault("points", {})
        self.memory.points = {int(tokens): peak for tokens, peak in points.items()}
        phases: dict[str, Callable[[], bool]] = {
            "times": self.times,
            "longest": self.longest,
            "train": self.train,
        }
        for name in self.args.phases:
            if name in self.setting.phases and not is_over(self.row, name, self.args.lengths):
                self.row["done"] = [one for one in self.row["done"] if one != name]
                if phases[name]():
                    self.row["done"].append(name)
                self.write()
        self.row.pop("note", None)
        self.write()

    def times(self) -> bool:
        """Steps at each length, up to the first that has no room; no weight moves until they are over."""
        self.warm_up()
        is_whole = True
        for tokens in sorted(self.args.lengths):
            earlier = [row for row in self.row["times"] if row["tokens"] == tokens]
            if any("note" in row for row in earlier):
                break
            if earlier:
                continue
            repeats = self.args.repeats if tokens < rungs.LONG_TOKENS else 1
            warm_ups = 1 if self.rung.host_bytes is not None else 0
            if not self.budget.allows(tokens, repeats + warm_ups):
                self.leave_out(f"times at {tokens:,}: no time left")
                is_whole = False
                break
            row = {"tokens": tokens} | self.timed(tokens, repeats)
            self.row["times"].append(row)
            self.write()
            self.say(
                f"{tokens:,} tokens: {row.get('note') or self.summary(row)}, loss {row.get('loss')}, "
                f"norm {row.get('norm')}"
            )
            if "note" in row:
                break
        if is_whole:
            self.row["moves"] = attempt(self.moves)
        return is_whole

    def warm_up(self) -> None:
        """Compile what there is to compile, and make the optimizer's states."""
        self.is_warm = True
        tokens = min(WARM_UP_TOKENS, min(self.args.lengths))
        found = attempt(lambda: {"tokens": tokens, "peak_bytes": self.training.step(tokens).peak_bytes})
        if "note" in found:
            self.training.recover()
        else:
            found["peak_bytes"] = self.training.step(tokens).peak_bytes  # with the states from the start
            self.add_point(found)
            self.row["state_bytes"] = self.training.state_bytes()

    def timed(self, tokens: int, repeats: int) -> Row:
        """A length's numbers; where all that is saved has no room after all, with as much as has."""
        self.save_what_fits(tokens)
        found = attempt(lambda: self.steps(tokens, repeats))
        if found.get("note") == "out of memory" and self.save_less():
            self.training.recover()
            found = attempt(lambda: self.steps(tokens, repeats))
        if "note" in found:
            self.training.recover()
        else:
            self.add_point({"tokens": tokens} | found)
        return found

    def steps(self, tokens: int, repeats: int) -> Row:
        """Steps of a length, after one through a single layer."""
        free()
        self.training.warm_up(tokens)
        free()
        taken = [finite(self.training.step(tokens)) for _ in range(repeats)]
        seconds = statistics.median(step.seconds for step in taken)
        self.see(tokens, max(step.seconds for step in taken))
        last = taken[-1]
        found = {
            "seconds": seconds,
            "steps_s": [step.seconds for step in taken],
            "tokens_per_second": tokens / seconds,
            "model_tflops": model_flops(self.shape, [tokens]) / seconds / 1e12,
            "peak_bytes": last.peak_bytes,
            "reserved_bytes": last.reserved_bytes,
            "host_pinned_bytes": last.host_bytes,
            "loss": taken[0].loss,
            "norm": taken[0].norm,
            "inputs": placed(self.training.ready.chooser, self.num_layers),
        }
        return found | (
            {"saved": saved(self.training.ready.chooser, self.num_layers)} if self.rung.saves else {}
        )

    def moves(self) -> Row:
        """That a step at the rate of training changes the loss."""
        tokens = min(WARM_UP_TOKENS, min(self.args.lengths))
        before = self.training.step(tokens, LR).loss
        after = self.training.step(tokens).loss
        return {"tokens": tokens, "loss_before": before, "loss_after": after}

    def save_what_fits(self, tokens: int) -> None:
        """All of attention while a line through the peaks says that it fits."""
        knows_peak = self.rung.saves and len(self.memory.points) > 1
        if knows_peak and self.memory.peak_bytes(tokens) > self.memory.most_bytes():
            self.save_less()

    def save_less(self) -> bool:
        """From here on as much of attention as has room; whether that is a change."""
        chooser = self.training.ready.chooser
        if not self.rung.saves or chooser is None or chooser.attention == "auto":
            return False
        chooser.attention = "auto"
        return True

    def add_point(self, row: Row) -> None:
        """A peak of the rung's own placement, and of all that it saves."""
        chooser = self.training.ready.chooser
        if self.rung.saves and (chooser is None or chooser.attention == "auto"):
            return
        if not row.get("saved", "all").startswith("outputs"):
            self.memory.add(row)
            self.row["points"] = self.memory.points

    def longest(self) -> bool:
        """The longest sequence that has room."""
        if self.rung.longest_as is not None:
            self.row["longest"] = {"as": self.rung.longest_as}
            return True
        found = self.row.setdefault("longest", {})
        probes: list[Row] = found.setdefault("probes", [])
        search = Search(self.memory, self.args.tries, self.args.first_tokens)
        for row in [*self.row["times"], *probes]:
            search.took(row)
        if not self.is_warm and "note" in attempt(self.warm):
            self.training.recover()
        self.compare(found)
        if len(self.memory.points) < 2:
            self.climb(search, probes)
        steer(self.training.ready.chooser, self.memory, on_host=self.rung.on_host)
        is_whole = True
        while (tokens := search.next()) is not None:
            if not self.probe_budget.allows(tokens, 1):
                self.leave_out(f"longest: {tokens:,} not tried, no time left")
                is_whole = False
                break
            row = self.tried(tokens, probes)
            search.took(row)
            if self.rung.on_host:
                self.memory.add_steered(row)
                self.row["points"] = self.memory.points
            else:
                self.add_point(row)
            found |= {"tokens": search.fits, "fails_tokens": search.fails, "why": search.why}
            self.write()
        found |= {"tokens": search.fits, "fails_tokens": search.fails, "why": search.why}
        found |= {"slope_bytes": self.memory.slope(), "spare_share": self.memory.spare_share}
        ran = [row["tokens"] for row in self.row["times"] if "note" not in row]
        found["state"] = "trained" if search.fits in ran else "memory-verified"
        return is_whole

    def warm(self) -> Row:
        """A short real step: the states are there, and libraries have what they keep."""
        self.is_warm = True
        return {"seconds": self.training.step(LADDER[0]).seconds}

    def compare(self, found: Row) -> None:
        """A probe at a length that was run: how far its peak is off."""
        measured = [row for row in self.row["times"] if row.get("peak_bytes") and not self.rung.saves]
        measured = [row for row in measured if row["tokens"] <= 2 * rungs.LONG_TOKENS]
        if measured:
            real = max(measured, key=lambda row: row["tokens"])
            row = self.tried(real["tokens"], [])
            found["check"] = {
                "tokens": real["tokens"],
                "real_peak_bytes": real["peak_bytes"],
                "probe_peak_bytes": row.get("peak_bytes"),
            }

    def climb(self, search: Search, probes: list[Row]) -> None:
        """Short lengths first, and then those that are timed: two peaks make a line."""
        for tokens in sorted({*LADDER, *self.args.lengths}):
            if not self.memory.host_fits(tokens) or not self.probe_budget.allows(tokens, 1):
                return
            if tokens in self.memory.points or tokens >= (search.fails or tokens + 1):
                continue
            row = self.tried(tokens, probes)
            search.took(row)
            self.add_point(row)
            if "note" in row:
                return

    def tried(self, tokens: int, probes: list[Row]) -> Row:
        """A probe, kept."""
        started = time.monotonic()
        row = probe(self.training, tokens)
        row["wall_s"] = time.monotonic() - started
        row["inputs"] = placed(self.training.ready.chooser, self.num_layers)
        self.probe_budget.add(tokens, row["wall_s"])
        probes.append(row)
        self.write()
        self.say(f"probe of {tokens:,}: {row.get('note') or self.summary(row)}")
        return row

    def train(self) -> bool:
        """A real step at the longest length, if there is time for it."""
        longest = self.row.get("longest", {})
        tokens = longest.get("tokens")
        if tokens is None:
            return self.rung.longest_as is not None
        self.timed_once(min(self.args.lengths[0], tokens))
        if not self.budget.allows(tokens, 1) or self.step_s(tokens) > 60 * self.args.train_minutes:
            self.leave_out(f"train at {tokens:,}: no time for {self.step_s(tokens):.0f} s")
            return False
        self.memory.spare_share = longest.get("spare_share", self.memory.spare_share)
        steer(self.training.ready.chooser, self.memory, on_host=self.rung.on_host)
        found = attempt(lambda: vars(finite(self.after_warm_up(tokens))))
        self.row["trained"] = {"tokens": tokens} | found
        if "note" in found:
            self.training.recover()
        else:
            longest["state"] = "trained"
        self.say(f"trained at {tokens:,}: {found}")
        return "note" not in found

    def after_warm_up(self, tokens: int) -> Taken:
        """A step at the rate of training."""
        free()
        self.training.warm_up(tokens)
        free()
        return self.training.step(tokens, LR)

    def timed_once(self, tokens: int) -> None:
        """A short step's seconds, to know a long one's, after one that makes the optimizer's states."""
        self.training.step(tokens)
        self.see(tokens, self.training.step(tokens).seconds)

    def see(self, tokens: int, seconds: float) -> None:
        """A step over so many tokens took so long."""
        self.budget.add(tokens, seconds)
        self.seen[tokens] = seconds

    def step_s(self, tokens: int) -> float:
        """Seconds of a step, from those that were timed."""
        seen = max(self.seen)
        return self.seen[seen] * model_flops(self.shape, [tokens]) / model_flops(self.shape, [seen])


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("setting", choices=[one.name for one in rungs.SETTINGS])
    options.add_argument("--out", type=Path, required=True)
    rungs.add_options(options)
    options.add_argument("--deadline-s", type=float, help="of this process, from its start")
    options.add_argument("--again", action="store_true", help="what is there is forgotten")
    return options


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if torch.cuda.is_available() and os.environ.get("PYTORCH_ALLOC_CONF") is None:
        raise SystemExit(f"set PYTORCH_ALLOC_CONF={EXPANDABLE}, as end_to_end.py does.")
    (setting,) = [one for one in rungs.SETTINGS if one.name == args.setting]
    path = args.out / f"{setting.name}.json"
    row = json.loads(path.read_text()) if path.exists() and not args.again else {}
    row["note"] = "did not finish"
    try:
        Worker(args, setting, row).run()
    except MissingError as missing:
        write_row(path, row | {"note": f"left out: {missing}"})
    except BaseException as error:
        write_row(path, row | {"note": f"did not finish: {type(error).__name__}: {error}"[:300]})
        raise


if __name__ == "__main__":
    main()
