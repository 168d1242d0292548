"""Pre-training a Llama of 58M parameters on real text: AdamW, APOLLO and APOLLO-Mini, on the same tokens.

python benchmarks/optimizer_corpus.py --sdists DIR --out CORPUS                      # once, the text
python benchmarks/optimizer_pretraining.py --corpus CORPUS --out DIR                 # all runs
python benchmarks/optimizer_pretraining.py --corpus CORPUS --out DIR --runs apollo-lr-0.01 --time-limit-s 500
python benchmarks/optimizer_pretraining.py --corpus CORPUS --out DIR --runs          # the table alone
python benchmarks/optimizer_pretraining.py --corpus CORPUS --shape tiny --batch 8 --micro-batch 4 --steps 20

A run is METHOD-lr-RATE, or METHOD-alpha-ALPHA-lr-RATE. Each leaves `runs/NAME.json` in --out when it ends,
and one that is there is not run again: calls may share a folder, or their `runs` be put together.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optimizer_corpus
import optimizer_plot
import report
import torch
from optimizer_pretraining_model import SHAPES, Llama, head_loss
from torch import Tensor, nn
from torch.optim import Optimizer

from longseq.apollo import Apollo, parameter_groups
from longseq.launch.config import ScheduleConfig
from longseq.launch.schedule import learning_rate

BETAS = (0.9, 0.999)
MAX_NORM = 1.0
WARMUP = 0.1  # of the steps
FINAL_RATIO = 0.1
NUM_POINTS = 10  # of a curve
METHODS = ("adamw", "apollo", "mini", "mini-bf16")
RUNS = [
    *("adamw-lr-1e-3", "apollo-lr-0.005", "mini-lr-0.005", "adamw-lr-2e-3", "adamw-lr-4e-3"),
    *("apollo-lr-0.01", "mini-lr-0.01", "mini-bf16-lr-0.005", "adamw-lr-5e-4", "apollo-lr-0.0025"),
    *("apollo-lr-0.007", "mini-lr-0.0025", "mini-lr-0.02", "mini-bf16-lr-0.01"),
    # Matrices as far as AdamW's at this rate (the root of width / rank), and twice as far.
    *("apollo-alpha-2-lr-2e-3", "apollo-alpha-4-lr-2e-3"),
    *("mini-alpha-22.63-lr-2e-3", "mini-alpha-45.25-lr-2e-3"),
]
PAPER = [
    {"optimizer": "AdamW", "perplexity": 34.06, "/ AdamW": 1.0},
    {"optimizer": "GaLore", "perplexity": 34.88, "/ AdamW": 34.88 / 34.06},
    {"optimizer": "APOLLO", "perplexity": 31.55, "/ AdamW": 31.55 / 34.06},
    {"optimizer": "APOLLO-Mini", "perplexity": 31.93, "/ AdamW": 31.93 / 34.06},
]
NOTE = """All runs have the same first weights, the same batches in the same order, float32 weights under
bfloat16 autocast (`mini-bf16`: bfloat16 weights, stochastic rounding), betas 0.9 and 0.999, no weight
decay, gradients clipped to a norm of 1, and a learning rate that rises for a tenth of the steps and falls
by a cosine to a tenth. APOLLO's rank is a quarter of the width; embeddings, output head and norms have
AdamW with its learning rate, as in the paper. Alpha is the paper's, 1 and the root of 128 (Mini), but in runs
that set their own, whose matrices and other weights have steps of other sizes. "/ best AdamW" divides
perplexities. "State MiB" are the tensors of the optimizer's `state_dict`. The text is documentation in
English, out of source packages from PyPI.

GaLore was not run: its place is the paper's, in the second table, of the same model on C4 over a billion
tokens, where AdamW's row is an earlier paper's. The two tables are not of one experiment."""
Row = dict[str, Any]


class Data:
    """Sequences of the corpus on the device, and the order that every run takes them in."""

    def __init__(self, corpus: optimizer_corpus.Corpus, args: argparse.Namespace, device: str) -> None:
        self.length, self.micro_batch, self.device = args.length, args.micro_batch, device
        self.train, self.heldout = (
            torch.from_numpy(part.astype(np.int32)).to(device) for part in (corpus.train, corpus.heldout)
        )
        available = (len(corpus.train) - 1) // args.length
        if available < args.batch:
            raise SystemExit(f"--batch: {args.batch} sequences, the corpus has {available}.")
        self.order = batch_order(available, args.batch, args.steps, args.seed)
        self.epochs = self.order.size / available
        num_heldout = min((len(corpus.heldout) - 1) // args.length, args.heldout_tokens // args.length)
        self.num_heldout = num_heldout // args.micro_batch * args.micro_batch
        if not self.num_heldout:
            raise SystemExit(f"--micro-batch: {args.micro_batch} sequences, {num_heldout} are held out.")

    def batches(self, part: Tensor, sequences: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids and labels `(micro_batch, length)` of these sequences."""
        places = torch.arange(self.length + 1, device=self.device)
        for start in range(0, len(sequences), self.micro_batch):
            starts = torch.from_numpy(sequences[start : start + self.micro_batch]).to(self.device)
            tokens = part[starts[:, None] * self.length + places].long()
            yield tokens[:, :-1], tokens[:, 1:]


def batch_order(available: int, batch: int, steps: int, seed: int) -> np.ndarray:
    """Which sequences each step has, `(steps, batch)`; an epoch is a permutation without its remainder."""
    per_epoch = available // batch
    epochs = [
        np.random.default_rng([seed, epoch]).permutation(available)[: per_epoch * batch].reshape(-1, batch)
        for epoch in range(-(-steps // per_epoch))
    ]
    return np.concatenate(epochs)[:steps]


class Bench:
    """Runs one after the other; the file of each and the table are written when it ends."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.started = args, time.perf_counter()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        corpus = optimizer_corpus.load(args.corpus)
        self.vocab_size = corpus.facts["vocab_size"]
        self.data = Data(corpus, args, self.device)
        self.micro_s: dict[torch.dtype, float] = {}
        self.done: list[Row] = []
        self.head_loss = torch.compile(head_loss, dynamic=False) if self.compiles else head_loss
        parameters = sum(param.numel() for param in self.build(torch.float32).parameters())
        self.settings: Row = {
            "shape": args.shape,
            "parameters": parameters,
            "length": args.length,
            "batch": args.batch,
            "steps": args.steps,
            "tokens": args.steps * args.batch * args.length,
            "epochs": self.data.epochs,
            "heldout_tokens": self.data.num_heldout * args.length,
            "seed": args.seed,
            "betas": list(BETAS),
            "order": hashlib.sha256(self.data.order.tobytes()).hexdigest(),
            "corpus": {part: corpus.facts[part]["sha256"] for part in ("train", "heldout")},
        }

    @property
    def compiles(self) -> bool:
        return self.device == "cuda"

    def build(self, dtype: torch.dtype) -> Llama:
        """The same first weights at each call; layers share what was compiled."""
        torch.manual_seed(self.args.seed)
        model = Llama(SHAPES[self.args.shape], self.vocab_size, self.args.length).to(self.device, dtype)
        model.turns = tuple(turn.to(self.device) for turn in model.turns)
        if self.compiles:
            for layer in model.layers:
                layer.compile(dynamic=False)
        return model

    def loss(self, model: Llama, ids: Tensor, labels: Tensor) -> Tensor:
        mixed = model.lm_head.weight.dtype == torch.float32
        around = torch.autocast(self.device, torch.bfloat16) if mixed else contextlib.nullcontext()
        with around:
            return self.head_loss(model(ids), model.lm_head.weight, labels)

    def gradients(self, model: Llama, step: int) -> Tensor:
        """Backward over a step's batch; its mean NLL, on the device."""
        sequences = self.data.order[step]
        num_micro = -(-len(sequences) // self.args.micro_batch)
        total = torch.zeros((), device=self.device)
        for ids, labels in self.data.batches(self.data.train, sequences):
            loss = self.loss(model, ids, labels) / num_micro
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        return total

    @torch.no_grad()
    def heldout_nll(self, model: Llama) -> float:
        batches = self.data.batches(self.data.heldout, np.arange(self.data.num_heldout))
        return torch.stack([self.loss(model, *batch) for batch in batches]).double().mean().item()

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile, and see how long a micro-batch takes."""
        if dtype in self.micro_s:
            return
        model = self.build(dtype)
        sequences = np.arange(self.args.micro_batch)
        for repeat in range(4):  # the first compiles
            if repeat == 1:
                started = self.now()
            for batch in self.data.batches(self.data.train, sequences):
                self.loss(model, *batch).backward()
        self.micro_s[dtype] = (self.now() - started) / 3
        with torch.no_grad():
            for batch in self.data.batches(self.data.train, sequences):
                self.loss(model, *batch)

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def expected_s(self, dtype: torch.dtype) -> float:
        """Of a run: what the slowest took so far, or by its micro-batches, a forward being a third of one."""
        if self.done:
            return max(run["seconds"] for run in self.done)
        train = self.args.steps * self.args.batch / self.args.micro_batch
        heldout = NUM_POINTS * self.data.num_heldout / self.args.micro_batch
        return 1.1 * self.micro_s[dtype] * (train + heldout / 3)

    def train(self, name: str) -> Row:
        """One run."""
        method, alpha, lr = parse(name)
        dtype = dtype_of(method)
        model = self.build(dtype)
        optimizer = make_optimizer(method, lr, alpha, model, SHAPES[self.args.shape].width)
        steps, tokens_a_step = self.args.steps, self.args.batch * self.args.length
        schedule = ScheduleConfig(name="cosine", warmup_steps=int(WARMUP * steps), final_ratio=FINAL_RATIO)
        points = sorted({round(steps * point / NUM_POINTS) for point in range(1, NUM_POINTS + 1)} - {0})
        curve: list[Row] = []
        speeds: list[float] = []
        losses: list[Tensor] = []
        started = since = self.now()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, lr, schedule)
            losses.append(self.gradients(model, step))
            optimizer.step()
            optimizer.zero_grad()
            if step + 1 in points:
                speeds.append(len(losses) * tokens_a_step / (self.now() - since))
                point = {
                    "tokens": (step + 1) * tokens_a_step,
                    "train nll": torch.stack(losses).mean().item(),
                    "heldout nll": self.heldout_nll(model),
                }
                print(f"{name}: {point}, {speeds[-1]:,.0f} tokens/s", flush=True)
                if not math.isfinite(point["heldout nll"]):
                    break
                curve.append(point)
                losses, since = [], self.now()
        finished = len(curve) == len(points)
        return {
            "name": name,
            "method": method,
            "lr": lr,
            "alpha": alpha,
            "perplexity": math.exp(curve[-1]["heldout nll"]) if finished else None,
            "note": None if finished else "diverged",
            "state bytes": state_bytes(optimizer),
            "tokens/s": statistics.median(speeds),
            "seconds": self.now() - started,
            "environment": report.environment(),
            "curve": curve,
            "settings": self.settings,
        }

    def run(self, names: list[str]) -> None:
        """Those that are not there yet, as long as there is time."""
        missing = [name for name in names if name not in {run["name"] for run in self.kept()}]
        for place, name in enumerate(missing):
            dtype = dtype_of(parse(name)[0])
            self.warm_up(dtype)
            expected = self.expected_s(dtype)
            if not place:
                print(f"{len(missing)} runs of about {expected:,.0f} s", flush=True)
            spent = time.perf_counter() - self.started
            if self.args.time_limit_s is not None and spent + expected > self.args.time_limit_s:
                print(
                    f"no time left for {name} ({expected:,.0f} s after {spent:,.0f} s) and later", flush=True
                )
                return
            result = self.train(name)
            self.done.append(result)
            if self.args.out is not None:
                folder = self.args.out / "runs"
                folder.mkdir(parents=True, exist_ok=True)
                optimizer_corpus.write(folder / f"{name}.json", json.dumps(result, indent=1).encode())
                self.report(show=False)

    def kept(self) -> list[Row]:
        """Runs that lie in --out; without one, those of this call.

        Raises:
            SystemExit: One of them had other settings.
        """
        found = self.done
        if self.args.out is not None:
            found = [json.loads(path.read_text()) for path in (self.args.out / "runs").glob("*.json")]
        for run in found:
            for key, value in self.settings.items():
                if run["settings"].get(key) != value:
                    there = run["settings"].get(key)
                    raise SystemExit(f"--out: {run['name']} has {key}={there!r}, here it is {value!r}.")
        return sorted(found, key=lambda run: (METHODS.index(run["method"]), run["alpha"] or 0, run["lr"]))

    def report(self, *, show: bool) -> None:
        """The table; the picture too when all runs are done."""
        runs = self.kept()
        if not runs:
            return
        rows = table(runs)
        title = f"Pre-training a Llama of {self.settings['parameters'] / 1e6:.0f}M parameters"
        tokens = f"{self.settings['tokens']:,} tokens, {self.settings['epochs']:.2f} epochs"
        tables = [(f"Held out after {tokens}", rows), ("Of the paper (arXiv 2412.05270, Table 2)", PAPER)]
        report.write(
            "optimizer_pretraining",
            title,
            rows,
            self.args.out,
            tables=tables,
            note=NOTE,
            show=show,
            measured_on=runs[0]["environment"],
            settings=self.settings,
            paper=PAPER,
            curves={run["name"]: run["curve"] for run in runs},
        )
        if show and self.args.out is not None:
            optimizer_plot.draw(runs, self.args.out / "optimizer_pretraining.png")


def parse(name: str) -> tuple[str, float | None, float]:
    """Method, alpha if it is not the paper's, and learning rate of a run.

    Raises:
        SystemExit: It is not METHOD-lr-RATE or METHOD-alpha-ALPHA-lr-RATE.
    """
    start, _, rate = name.partition("-lr-")
    method, _, alpha = start.partition("-alpha-")
    with contextlib.suppress(ValueError):
        if (
            method in METHODS
            and float(rate) > 0
            and float(alpha or 1) > 0
            and not (alpha and method == "adamw")
        ):
            return method, float(alpha) if alpha else None, float(rate)
    raise SystemExit(
        f"--runs: {name!r} is not METHOD-lr-RATE or METHOD-alpha-ALPHA-lr-RATE with one of "
        f"{', '.join(METHODS)}; AdamW has no alpha."
    )


def dtype_of(method: str) -> torch.dtype:
    return torch.bfloat16 if method.endswith("bf16") else torch.float32


def make_optimizer(method: str, lr: float, alpha: float | None, model: nn.Module, width: int) -> Optimizer:
    """Each with its paper's constants, and none with weight decay."""
    if method == "adamw":
        fused = next(model.parameters()).is_cuda
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=BETAS, weight_decay=0.0, fused=fused)
    options: Row = {"rank": width // 4, "scale_type": "channel", "alpha": alpha or 1.0}
    if method.startswith("mini"):
        options = {"rank": 1, "scale_type": "tensor", "alpha": alpha or math.sqrt(128)}
    return Apollo(parameter_groups(model, embeddings="adamw"), lr=lr, betas=BETAS, **options)


def state_bytes(optimizer: Optimizer) -> int:
    """Of all tensors that the optimizer would save."""
    states = optimizer.state_dict()["state"].values()
    found = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    return sum(value.numel() * value.element_size() for value in found)


def table(runs: list[Row]) -> list[Row]:
    """A row a run."""
    adamw = [run["perplexity"] for run in runs if run["method"] == "adamw" and run["perplexity"]]
    rows = []
    for run in runs:
        ratio = run["perplexity"] / min(adamw) if adamw and run["perplexity"] else None
        row = {
            "run": run["method"],
            "lr": run["lr"],
            "alpha": run["alpha"],
            "held-out perplexity": run["perplexity"],
            "/ best AdamW": ratio,
            "state MiB": run["state bytes"] / 2**20,
            "state bytes": run["state bytes"],
            "tokens/s": run["tokens/s"],
            "device": run["environment"]["device"],
        }
        rows.append(row | ({"note": run["note"]} if run["note"] else {}))
    return rows


def parser() -> argparse.ArgumentParser:
    options = report.arguments(__doc__.splitlines()[0])
    options.add_argument("--corpus", type=Path, required=True, help="folder that optimizer_corpus.py wrote")
    options.add_argument("--runs", nargs="*", default=RUNS, metavar="RUN", help="or commas between")
    options.add_argument("--shape", choices=SHAPES, default="60m")
    options.add_argument("--steps", type=int, default=800)
    options.add_argument("--batch", type=int, default=512, help="sequences of a step")
    options.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    options.add_argument("--micro-batch", type=int, default=128, help="sequences of a forward")
    options.add_argument("--heldout-tokens", type=int, default=2**20)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--time-limit-s", type=float, help="begin no run that would end later")
    return options


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if args.batch % args.micro_batch:
        raise SystemExit(f"--micro-batch: {args.micro_batch} does not divide --batch {args.batch}.")
    names = [name for given in args.runs for name in given.split(",") if name]
    for name in names:
        parse(name)
    bench = Bench(args)
    bench.run(names)
    bench.report(show=True)


if __name__ == "__main__":
    main()
