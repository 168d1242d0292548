"""A fine-tuning run at 131,072 tokens from its text to a model that looks far back, as a user types it.

python benchmarks/fine_tuning.py --work DIR --out benchmarks/results --deadline-s 480
python benchmarks/fine_tuning.py --work DIR --out DIR/results --stages long,probe      # parts of it, later
python benchmarks/fine_tuning.py --work DIR --out benchmarks/results --shape small     # on a CPU, an hour

Stages: `corpus` makes text (`fine_tuning_corpus.py`); `copy` trains a small Llama from random weights to
copy, `look` trains it on to look for what it copies, and `short` in longer documents, all three at 4,096
tokens; `long` prepares, plans and trains it on at 131,072, is killed after a checkpoint, goes on by the same
command, and exports; `probe` asks both models for what stood so many tokens before (`retrieval.py`). Each
leaves what it found in --work, and the tables in --out are written anew after each command. The small shape
does the same with a model of 2M parameters at 1,024 and 16,384 tokens.
"""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fine_tuning_results
import report
import retrieval
import torch
from fine_tuning_configs import base_config, long_config, write_yaml
from fine_tuning_shapes import BASE, LAST_STEPS, PLANNED_GPU, SHAPES
from fine_tuning_story import STAGES, Story, stop_when

from longseq.launch.metric_records import read_metrics

START_S = 25  # of a command that trains, until its first step: taken off what is left for steps
PROBE_S = 60  # the same for the export and the probes of both models
LOOK_EVERY_S = 2  # at the losses: on a CPU, reading them takes from the run that writes them
LONG_S = 120  # the same for the second stage, of what the first may take
GIB = 2**30
Row = dict[str, Any]


def corpus(story: Story) -> None:
    """The text, by a process of its own: those that it starts import what it does, which is little."""
    script = Path(__file__).with_name("fine_tuning_corpus.py")
    options = ("--work", str(story.work), "--shape", story.facts["shape"])
    subprocess.run([sys.executable, str(script), *options], check=True)
    story.facts["corpus"] = json.loads((story.work / "corpus.json").read_text())
    story.keep()


def base(story: Story, allowed_s: float) -> None:
    """The stage's run at short length and its model; one that is cut short is exported as it is."""
    name = story.stage
    run = story.work / "runs" / name
    write_yaml(story.work / f"{name}.yaml", base_config(story.shape, name))
    enough = next(one.enough for one in story.shape.base if one.name == name)
    looked_at = 0.0

    def is_over(seconds: float) -> bool:
        nonlocal looked_at
        if seconds > allowed_s or story.left_s < LONG_S + PROBE_S:
            return True
        if not enough or seconds < looked_at + LOOK_EVERY_S:
            return False
        looked_at = seconds
        return is_learned(step_records(run), enough)

    story.longseq("train", f"{name}.yaml", watch=stop_when(run, is_over))
    found = run_facts(run, story.shape.short_length)
    story.longseq("export", f"runs/{name}", f"{name}-model")
    story.facts[name] = found | {"parameters": count_parameters(story.work / f"{name}-model")}
    story.keep()


def is_learned(steps: Sequence[Row], enough: float) -> bool:
    """Whether the last steps have so little loss."""
    losses = [record["loss"] for record in steps[-LAST_STEPS:]]
    return len(losses) == LAST_STEPS and statistics.fmean(losses) < enough


def long(story: Story) -> None:
    """The fine-tuning: prepare, plan, train, be killed, go on, export."""
    shape, run = story.shape, story.work / "runs/long"
    write_yaml(story.work / "long.yaml", long_config(shape))
    story.longseq("prepare", "long.yaml")
    on_gpu = torch.cuda.is_available()
    gpu = () if on_gpu else ("--gpu", PLANNED_GPU)
    plan = json.loads(story.longseq("plan", "long.yaml", "--json", *gpu))
    planned = {
        "step_s": plan["seconds"]["step"],
        "peak_gib": plan["memory"]["peak_bytes"] / GIB,
        "fits": plan["fits"],
        "gpu": plan["machine"]["gpu"]["name"],
    }
    steps = steps_in_time(story, planned["step_s"]) if on_gpu else shape.long_steps
    words = ["train", "long.yaml", *([f"train.steps={steps}"] if steps != shape.long_steps else [])]
    before: list[Row] = []

    given_up = stop_when(run, lambda _: False)

    def kill(process: subprocess.Popen) -> str | None:
        if not is_past_checkpoint(run, shape.checkpoint_every, shape.kill_after):
            return given_up(process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        before.extend(step_records(run))
        return f"killed (SIGKILL) after step {before[-1]['step']}"

    story.longseq(*words, watch=kill)
    if not before:
        raise SystemExit("the run ended before it could be killed; take more steps.")
    # What the probes need is left, even where steps take longer than planned.
    story.longseq(*words, watch=stop_when(run, lambda _: story.left_s < PROBE_S))
    found = run_facts(run, shape.long_length)
    found |= {"planned": planned, "kill": compare(before, step_records(run))}
    story.longseq("export", "runs/long", "long-model")
    story.facts["long"] = found | {"parameters": count_parameters(story.work / "long-model")}
    story.keep()


def steps_in_time(story: Story, step_s: float) -> int:
    """Of the second stage: all, or as many as the deadline leaves room for."""
    shape = story.shape
    # Steps that are lost by the kill are taken twice, and an evaluation is a third of so many steps.
    evaluations = shape.heldout_documents / 2 * (shape.long_steps // shape.eval_every) / 3
    room = (story.left_s - 2 * START_S - PROBE_S) / step_s - evaluations - shape.kill_after - 2
    return min(shape.long_steps, max(2 * shape.checkpoint_every, int(room)))


def is_past_checkpoint(run: Path, step: int, steps_after: int) -> bool:
    """Whether the checkpoint of a step is whole, and so many steps have been taken since."""
    latest = run / "checkpoints" / "latest"
    if not latest.exists() or not (run / "checkpoints" / f"step-{step:08}").exists():
        return False
    return bool(records := step_records(run)) and records[-1]["step"] >= step + steps_after


def step_records(run: Path) -> list[Row]:
    return [record for record in read_metrics(run) if record["kind"] == "step"]


def compare(before: Sequence[Row], after: Sequence[Row]) -> Row:
    """Losses of the steps that the killed process took: as the one that went on has them.

    Steps that were taken again are those behind the checkpoint; the ones before it are there once, unchanged.
    """
    afterwards = {record["step"]: record for record in after}
    # One that was stopped in turn may not have come as far.
    both = [record for record in before if record["step"] in afterwards]
    again = [record for record in both if record["seconds"] != afterwards[record["step"]]["seconds"]]
    pairs = [(record["step"], record["loss"], afterwards[record["step"]]["loss"]) for record in again]
    return {
        "last_step_before": before[-1]["step"],
        "steps_again": [step for step, _, _ in pairs],
        "losses_before": [loss for _, loss, _ in pairs],
        "losses_after": [loss for _, _, loss in pairs],
        "equal": bool(pairs) and all(one == other for _, one, other in pairs),
        "largest_difference": max((abs(one - other) for _, one, other in pairs), default=None),
    }


def run_facts(run: Path, length: int) -> Row:
    """What the metrics of a run say."""
    steps = step_records(run)
    later = steps[1:] or steps  # the first one compiles
    evals = [record for record in read_metrics(run) if record["kind"] == "eval"]
    return {
        "length": length,
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["tokens_seen"],
        "step_s": statistics.median(record["seconds"] for record in later),
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in later),
        "peak_gib": max(record["peak_memory_gib"] for record in steps),
        "lr": max(record["lr"] for record in steps),
        "first_loss": steps[0]["loss"],
        "last_loss": statistics.fmean(record["loss"] for record in steps[-10:]),
        "evals": [{key: record[key] for key in ("step", "eval_loss", "eval_tokens")} for record in evals],
        "losses": [round(record["loss"], 4) for record in steps[:: max(1, len(steps) // 100)]],
    }


def count_parameters(folder: Path) -> int:
    """Of an exported model; tied ones are there once."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (it is no dict)
                total += torch.Size(weights.get_slice(name).get_shape()).numel()
    return total


def probe(story: Story) -> None:
    """What both models find; and the first one in the end of the documents alone."""
    shape, work = story.shape, story.work
    models = [
        ("short", "short-model", None),
        ("short-end", "short-model", shape.short_length),
        ("long", "long-model", None),
    ]
    for name, folder, last_tokens in models:
        out = work / f"probe-{name}.jsonl"
        retrieval.measure(work / folder, work / "probes.jsonl", out, shape.buckets, last_tokens)
        story.keep()


def main(arguments: list[str] | None = None) -> None:
    options = report.arguments(__doc__.splitlines()[0])
    options.add_argument("--work", type=Path, required=True, help="folder for text, runs and models")
    options.add_argument("--shape", choices=tuple(SHAPES), default="full")
    options.add_argument("--stages", default=",".join(STAGES), help=f"some of {','.join(STAGES)}")
    options.add_argument(
        "--deadline-s", type=float, default=7200, help="the second stage has fewer steps then"
    )
    options.add_argument(
        "--base-s",
        type=float,
        default=math.inf,
        help=f"{', '.join(BASE)} are stopped so long after a first step, each",
    )
    options.add_argument("--base-steps", type=int, nargs=len(BASE), help="in the place of the shape's")
    options.add_argument("--long-steps", type=int, help="in the place of the shape's")
    for stage in ("base", "long"):
        options.add_argument(f"--{stage}-lr", type=float, help="in the place of the shape's")
    args = options.parse_args(arguments)
    stages = args.stages.split(",")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        options.error(f"--stages: {', '.join(unknown)} is none of {', '.join(STAGES)}")
    if args.out is None:
        args.out = args.work
    story = Story(args)
    for stage in STAGES:
        if stage not in stages:
            continue
        story.begin(stage)
        if stage in BASE:
            base(story, args.base_s)
        else:
            {"corpus": corpus, "long": long, "probe": probe}[stage](story)
    fine_tuning_results.write(story.facts, story.work, story.out)


if __name__ == "__main__":
    main()
