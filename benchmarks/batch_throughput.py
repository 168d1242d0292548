"""The largest micro-batch of a Llama-7B on a card of 80 GB, and its tokens/s: AdamW, APOLLO-Mini, and ours.

python benchmarks/batch_throughput.py --out benchmarks/results          # all cases, minutes on an H200
python benchmarks/batch_throughput.py --out DIR --cases adamw mini --lengths 256 --minutes 2.5 --add
python benchmarks/batch_throughput.py --shape tiny --lengths 16 --max-tokens 128      # on a CPU too
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import report
import torch
from batch_throughput_training import CASES, GIB, YARDSTICK, Case, Training, draw
from decoder_model import NUM_LAYERS, SHAPES, Budget, attempt, free, held_gib

from longseq.launch.bench.limits import hold_allocator

EXPANDABLE = "expandable_segments:True"
FIRST_TOKENS = 1024  # of the smallest batch that is tried
LOSS_TOLERANCE = 2e-3
LEFT_OVER_GIB = 0.5  # libraries' workspaces stay, and are less
START_S = 10.0  # of a case: weights are drawn
Row = dict[str, Any]

NOTE = """A model of random weights and tokens in bfloat16, one GPU, one micro-batch a step: forward, backward
and the optimizer's step are timed, the median of three. "AdamW" is PyTorch's fused one, with moments in
bfloat16 as the weights are. "APOLLO-Mini" updates in backward, so that gradients are there one at a time;
embeddings and head have AdamW's moments, in float32, and weights are rounded stochastically. Attention is
cuDNN's kernel for everyone. The memory is that of an 80 GB card: PyTorch's allocator is given what
"limit GiB" says less what the process holds beside it, its context and its libraries.

The batch is doubled until it does not fit, then batches between are tried. "Largest" is the largest that
took its steps; "stopped by" says why a larger one was not tried: --max-tokens, or no time. "Fastest" are the
tokens/s of the batch that had the most of all that were tried, by one step each. "Backward alone" leaves
AdamW's step out, which is what accumulation over very many micro-batches comes to. Ratios are to AdamW
without checkpoints at the same length, each at its own largest batch. In arXiv 2412.05270, eight A100 of
80 GB train in data parallel; here it is one card, so what batches do to communication is not in these
numbers."""


class Bench:
    """Runs the cases one after the other; a row is written as soon as it is there."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.started = args, time.monotonic()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.num_layers = args.layers or NUM_LAYERS[args.shape]
        self.budget = Budget(args.minutes, lambda num_tokens: num_tokens)
        self.facts: Row = {
            "shape": args.shape,
            "layers": self.num_layers,
            "model": SHAPES[args.shape],
            "limit GiB": args.gpu_gib if self.device == "cuda" else None,
            "max tokens": args.max_tokens,
        }
        self.rows: list[Row] = kept_rows(args.out, self.facts) if args.add else []
        self.refused: list[str] = []

    def run(self, case: Case) -> None:
        """All lengths of a case by one model, made anew where an attempt has left memory behind."""
        training, held = None, 0.0
        for length in self.args.lengths:
            first = max(1, self.args.first_tokens // length)
            if not self.budget.allows(first * length, 2, START_S):
                self.say(f"no time left for {case.key} at {length}")
                continue
            if training is not None and held_gib() > held + LEFT_OVER_GIB:
                self.say(f"{case.key}: {held_gib() - held:.2f} GiB are left over, the model is made anew")
                training.undo()
                training = None
                free()
            if training is None:
                left_over = held_gib()
                if self.device == "cuda":
                    hold_allocator(round(self.args.gpu_gib * GIB))
                made = attempt(lambda: {"training": Training(case, *self.model_args())})
                if "note" in made:
                    self.keep({"key": case.key, "case": case.label, "length": length, **made})
                    return
                training = made.pop("training")
                self.say(f"{case.key}: ready with {held_gib():.2f} GiB, {left_over:.2f} of them before")
            row: Row = {"key": case.key, "case": case.label, "length": length}
            row |= self.search(case, training, length, first)
            free()
            held = held or held_gib()  # with the optimizer's states, which the first step makes
            self.keep(self.checked(row | {"left over GiB": left_over if left_over > LEFT_OVER_GIB else None}))
        if training is not None:
            training.undo()
        del training
        free()

    def model_args(self) -> tuple[str, int, str]:
        return self.args.shape, self.num_layers, self.device

    def search(self, case: Case, training: Training, length: int, batch: int) -> Row:
        """The largest batch and its numbers, and what all that were tried have taken."""
        tried: dict[int, Row] = {}
        too_large: int | None = None
        stopped_by = None
        while True:
            if batch * length > self.args.max_tokens:
                stopped_by = "--max-tokens"
            elif not self.budget.allows(batch * length, 2 + self.args.repeats):
                stopped_by = "no time"
            if stopped_by is not None:
                break
            found = self.attempted(case, training, batch, length, repeats=1)
            if "note" in found:
                if found["note"] != "out of memory":
                    return found | {"tried": tried}
                too_large = batch
            else:
                tried[batch] = found
            following = next_batch(max(tried, default=0), too_large)
            if following is None:
                break
            batch = following
        if not tried:
            return {"note": stopped_by or "out of memory", "tried": tried}
        largest = max(tried)
        found = self.attempted(case, training, largest, length, repeats=self.args.repeats)
        return {
            "largest": largest,
            "stopped by": stopped_by,
            "too large": too_large,
            **(tried[largest] if "note" in found else found),
            "fastest tokens/s": max(one["tokens/s"] for one in tried.values()),
            "tried": tried,
        }

    def attempted(self, case: Case, training: Training, batch: int, length: int, repeats: int) -> Row:
        """What `measure` finds, or a note; nothing of a step that failed is held."""
        found = attempt(lambda: self.measure(training, batch, length, repeats))
        training.forget()
        self.say(f"{case.key} {batch} x {length}: {found}")
        return found

    def measure(self, training: Training, batch: int, length: int, repeats: int) -> Row:
        """Numbers of a batch: after a step that warms up and makes the optimizer's states."""
        if self.device == "cuda":
            free()
            hold_allocator(round(self.args.gpu_gib * GIB))  # libraries may have come since
            torch.cuda.reset_peak_memory_stats()
        ids = draw(training.model, batch, length)
        first = training.step(ids)
        retries = self.retries()
        steps = [training.step(ids) for _ in range(repeats)]
        seconds = statistics.median(step["s"] for step in steps)
        self.budget.add(batch * length, max(seconds, 0.5 * first["s"]))
        row: Row = {"tokens": batch * length, "s": seconds, "tokens/s": batch * length / seconds}
        row["steps timed"] = repeats
        row["first loss"], row["last loss"] = first["loss"], steps[-1]["loss"]
        if steps[0]["optimizer s"] is not None:
            behind = statistics.median(step["optimizer s"] for step in steps)
            row["optimizer s"] = behind
            row["backward alone tokens/s"] = batch * length / (seconds - behind)
        if self.device == "cuda":
            left, total = torch.cuda.mem_get_info()
            row["peak GiB"] = torch.cuda.max_memory_allocated() / GIB
            row["device GiB"] = (total - left) / GIB
            row["allocator retries"] = self.retries() - retries
        return row

    def retries(self) -> int:
        """How often memory had to be given back to be had in another shape, which stalls a step."""
        return torch.cuda.memory_stats()["num_alloc_retries"] if self.device == "cuda" else 0

    def checked(self, row: Row) -> Row:
        """The row, without its numbers if its losses are no losses or not those of the others."""
        wrong = self.wrong(row)
        if wrong is None:
            return row
        self.refused.append(f"{row['key']} at {row['length']}: {wrong}")
        return {name: row[name] for name in ("key", "case", "length")} | {"note": f"refused: {wrong}"}

    def wrong(self, row: Row) -> str | None:
        """Each case's smallest batch comes first: its first loss is that of the same weights and tokens."""
        tried = list(row.get("tried", {}).values())
        losses = [loss for one in tried for loss in (one["first loss"], one["last loss"])]
        if not all(map(math.isfinite, losses)):
            return f"losses {losses}"
        if not tried or row["length"] != self.args.lengths[0]:
            return None  # at later lengths the weights have taken steps
        for other in self.rows:
            first = next(iter(other.get("tried", {}).values()), None)
            if first is None or (other["length"], first["tokens"]) != (row["length"], tried[0]["tokens"]):
                continue
            found, should = tried[0]["first loss"], first["first loss"]
            if abs(found - should) > LOSS_TOLERANCE * should:
                return f"the first loss is {found:.5f}, that of {other['key']} {should:.5f}"
        return None

    def keep(self, row: Row) -> None:
        same = ("key", "length")
        self.rows = [other for other in self.rows if any(other[name] != row[name] for name in same)]
        self.rows.append(row)
        self.write(show=False)

    def write(self, *, show: bool) -> None:
        """All rows so far, with their ratios."""
        rows = with_ratios(self.rows)
        lengths = sorted({row["length"] for row in rows})
        tables = [
            (f"Sequences of {length:,} tokens", [shown(row) for row in rows if row["length"] == length])
            for length in lengths
        ]
        title = f"The largest micro-batch of the shape {self.args.shape}, and its speed"
        options: Row = {"tables": tables, "note": NOTE, "show": show}
        report.write("batch_throughput", title, rows, self.args.out, **options, **self.facts)

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", flush=True)


def next_batch(largest: int, too_large: int | None) -> int | None:
    """What to try after the largest that fits and the smallest that does not; None where that is near enough.

    Doubled as long as all fits, then the middle, until it is known to an eighth.
    """
    if too_large is None:
        return 2 * largest
    if too_large - largest <= max(1, largest // 8):
        return None
    return (largest + too_large) // 2


def with_ratios(rows: list[Row]) -> list[Row]:
    """Copies with each case's speed over that of the yardstick at the same length."""
    yardsticks = {row["length"]: row for row in rows if row["key"] == YARDSTICK and "tokens/s" in row}
    found = []
    for row in rows:
        yardstick = yardsticks.get(row["length"])
        if yardstick is not None and "tokens/s" in row:
            row = row | {
                "batch / AdamW": row["largest"] / yardstick["largest"],
                "tokens/s / AdamW": row["tokens/s"] / yardstick["tokens/s"],
            }
        found.append(row)
    return found


def shown(row: Row) -> Row:
    """A row of the table."""
    columns = ("case", "largest", "stopped by", "tokens", "s", "tokens/s", "backward alone tokens/s")
    columns += ("fastest tokens/s", "peak GiB", "device GiB", "allocator retries", "left over GiB")
    columns += ("batch / AdamW", "tokens/s / AdamW")
    return {name: row.get(name) for name in columns} | ({"note": row["note"]} if "note" in row else {})


def kept_rows(out: Path | None, facts: Row) -> list[Row]:
    """Rows of an earlier run in `out`.

    Raises:
        SystemExit: They are of another model, limit or device.
    """
    path = None if out is None else out / "batch_throughput.json"
    if path is None or not path.exists():
        return []
    earlier = json.loads(path.read_text())
    there = earlier | earlier["environment"]
    for name, here in (facts | {"device": report.environment()["device"]}).items():
        if there.get(name) != here:
            raise SystemExit(f"--add: {path} has {name}={there.get(name)!r}, here it is {here!r}.")
    return earlier["rows"]


def parser() -> argparse.ArgumentParser:
    options = report.arguments(__doc__.splitlines()[0])
    keys = [case.key for case in CASES]
    options.add_argument("--cases", nargs="+", choices=keys, default=keys[:-1], metavar="CASE")
    options.add_argument("--lengths", type=int, nargs="+", default=[1024, 256])
    options.add_argument("--shape", choices=SHAPES, default="llama-7b")
    options.add_argument("--layers", type=int, help="default: the shape's")
    options.add_argument("--gpu-gib", type=float, default=79.1, help="memory of the card, context included")
    options.add_argument("--max-tokens", type=int, default=32768, help="of a micro-batch: try no more")
    options.add_argument("--first-tokens", type=int, default=FIRST_TOKENS, help="of the smallest micro-batch")
    options.add_argument("--repeats", type=int, default=3, help="steps that are timed")
    options.add_argument("--minutes", type=float, help="begin nothing that would end later")
    options.add_argument("--add", action="store_true", help="keep the other rows that are in --out already")
    return options


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if not torch.cuda.is_available() and args.shape != "tiny":
        raise SystemExit("A model of this size needs a CUDA GPU; on a CPU give --shape tiny.")
    if torch.cuda.is_available():
        # The variable may be read as early as torch is imported; what sets it later is public nowhere.
        torch._C._accelerator_setAllocatorSettings(EXPANDABLE)
    bench = Bench(args)
    for case in [case for case in CASES if case.key in args.cases]:
        bench.run(case)
    bench.write(show=True)
    if bench.refused:
        raise SystemExit("refused:\n" + "\n".join(bench.refused))


if __name__ == "__main__":
    main()
