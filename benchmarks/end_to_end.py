"""Whole training steps of a Llama-3-8B on one GPU: technique by technique, beside what others do.

python benchmarks/end_to_end.py --list
python benchmarks/end_to_end.py --out DIR --lanes 4 --deadline-s 550 --phases times longest   # on four GPUs
python benchmarks/end_to_end.py --out DIR --lanes 4 --deadline-s 550 --phases train           # then
python benchmarks/end_to_end.py --out DIR --only groups 'mini*'
python benchmarks/end_to_end.py --out DIR --only 80gb-mini --phases longest --first-tokens 1550000
python benchmarks/end_to_end.py --out DIR --shape tiny --lengths 64 128 --tries 1   # on a CPU, to see it work
python benchmarks/end_to_end.py --out DIR --earlier benchmarks/results/end_to_end.json --lengths 131072
python benchmarks/end_to_end.py --table DIR --bench benchmarks/results/end_to_end.json NEW.json --out DIR

A setting is a process of its own. It writes DIR/SETTING.json after each number, and goes on from there when
it is asked for again; what is there is left out, unless --again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import end_to_end_worker
import lanes
from decoder_model import NUM_LAYERS, SHAPES
from end_to_end_row import is_over, write_row
from end_to_end_rungs import PHASES, SETTINGS, Setting, add_options, timed
from lanes import Lanes
from transformers import LlamaConfig

from longseq.launch.flops import ModelShape, model_flops

WORKER = Path(end_to_end_worker.__file__)
ABOUT_TFLOPS = 440
"""Of the model's, as steps of 65,536 tokens in decoder.json attain: what a schedule counts on."""
END_S = 6
"""Before the deadline a worker is to have ended by itself."""


class Manager(Lanes):
    """Settings on the GPUs there are."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args.out, args.lanes, args.deadline_s)
        self.args = args

    def has_time(self, setting: Setting) -> bool:
        """For its first numbers: it leaves out by itself what cannot end in time."""
        left_s = self.left_s()
        return left_s is None or min(setting.about_s, setting.least_s) + END_S <= left_s

    def words(self, setting: Setting) -> list[str]:
        """The command of a setting."""
        args = self.args
        words = [sys.executable, str(WORKER), setting.name, "--out", str(self.out), "--phases", *args.phases]
        words += ["--lengths", *map(str, args.lengths), "--repeats", str(args.repeats)]
        words += ["--tries", str(args.tries), "--train-minutes", str(args.train_minutes)]
        words += ["--host-gib", str(args.host_gib), "--shape", args.shape]
        for name in ("layers", "gpu_gib", "first_tokens"):
            value = getattr(args, name)
            words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
        left_s = self.left_s()
        words += [] if left_s is None else ["--deadline-s", f"{left_s - END_S:.0f}"]
        return [*words, *(["--again"] if args.again else [])]

    def environment(self, setting: Setting, lane: int | None) -> dict[str, str]:
        """Segments that grow: others' memory would be lost in fragments, as ours."""
        return {"PYTORCH_ALLOC_CONF": end_to_end_worker.EXPANDABLE} | super().environment(setting, lane)

    def told(self, setting: Setting, status: int | str) -> str:
        """What a setting found, in a line; of a failure the log's last lines."""
        path = self.out / f"{setting.name}.json"
        row: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if "note" in row or not row:
            return self.last_lines(setting, status, row.get("note", "nothing"))
        speeds = [
            f"{one['tokens'] // 1024}k {one.get('note') or round(one['tokens_per_second'])}"
            for one in row["times"]
        ]
        longest = row.get("longest", {})
        parts = [f"tokens/s {', '.join(speeds)}"] if speeds else []
        if longest.get("tokens"):
            parts.append(f"longest {longest['tokens']:,} ({longest.get('state', 'not ended')})")
        return "; ".join([*parts, *row["left_out"]]) or "nothing"


def step_seconds(shape: str, num_layers: int) -> Callable[[int], float]:
    """About what a step takes, by its tokens."""
    model = ModelShape.from_hf_config(LlamaConfig(**SHAPES[shape], num_hidden_layers=num_layers))
    return lambda tokens: model_flops(model, [tokens]) / (ABOUT_TFLOPS * 1e12)


def is_done(folder: Path, setting: Setting, phases: list[str], lengths: list[int]) -> bool:
    """Whether all phases that it has are in its file, or that it cannot be had."""
    path = folder / f"{setting.name}.json"
    if not path.exists():
        return False
    row = json.loads(path.read_text())
    if row.get("note", "").startswith("left out"):
        return True
    return all(is_over(row, phase, lengths) for phase in phases if phase in setting.phases)


def put_earlier(path: Path, folder: Path) -> None:
    """Rows of an earlier table as settings' files, where there are none, to go on from.

    Raises:
        SystemExit: It is no such table.
    """
    rows = json.loads(path.read_text()).get("rows", [])
    if not rows or not all("name" in row for row in rows):
        raise SystemExit(f"--earlier {path} has no rows of settings; give an end_to_end.json.")
    for row in rows:
        target = folder / f"{row['name']}.json"
        if not target.exists():
            write_row(target, row)


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    lanes.add_options(options)
    add_options(options)
    options.add_argument("--earlier", type=Path, metavar="FILE", help="an end_to_end.json to go on from")
    options.add_argument("--table", type=Path, nargs="+", metavar="DIR", help="what is measured there")
    options.add_argument(
        "--bench",
        type=Path,
        nargs="+",
        metavar="FILE",
        default=[],
        help="`longseq bench --json`, or an earlier table",
    )
    args = options.parse_args(arguments)
    if args.table is not None:
        from end_to_end_table import collect

        collect(args.table, args.bench, args.out)
        return
    try:
        settings = lanes.named(args.only, SETTINGS) if args.only else list(SETTINGS)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    phases = [phase for phase in PHASES if phase in args.phases]
    step_s = step_seconds(args.shape, args.layers or NUM_LAYERS[args.shape])
    train_s = 60 * args.train_minutes
    settings = [
        timed(one, phases, step_s, args.lengths, repeats=args.repeats, train_s=train_s) for one in settings
    ]
    settings = [one for one in settings if any(phase in one.phases for phase in phases)]
    if args.list:
        for one in settings:
            print(f"{one.name:28} about {one.about_s:.0f} s: {one.rung.label}")
        return
    if args.out is None:
        raise SystemExit("--out is missing: a folder for the results.")
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.earlier is not None:
        put_earlier(args.earlier, args.out)
    todo = [one for one in settings if args.again or not is_done(args.out, one, phases, args.lengths)]
    Manager(args).run(todo)


if __name__ == "__main__":
    main()
