"""Training curves of a Llama of 58M parameters on real text: plain cross-entropy of logits, and cut ones.

python benchmarks/loss_curves.py --out benchmarks/results                # all runs, minutes on an H200
python benchmarks/loss_curves.py --out DIR --text DIR/text.npz --runs plain cce --time-limit-s 140
python benchmarks/loss_curves.py --out DIR --runs                        # table and picture alone
python benchmarks/loss_curves.py --shape tiny --steps 6 --batch 4 --micro-batch 4 --length 32 --vocab-size 700

Each run leaves `loss_curves_runs/NAME.json` in --out when it ends, and one that is there is not run again:
calls may share a folder. --text keeps the tokens between them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import loss_curves_plot
import numpy as np
import report
import torch
from loss_curves_table import SMOOTH_STEPS, table
from loss_curves_text import VOCAB_SIZE, Text, load_or_make
from optimizer_corpus import write
from optimizer_pretraining_model import SHAPES, Llama
from torch import Tensor, nn
from torch.nn import functional as F

from longseq.cce import linear_cross_entropy
from longseq.launch.config import ScheduleConfig
from longseq.launch.schedule import learning_rate

LR, BETAS, MAX_NORM = 2e-3, (0.9, 0.95), 1.0
WARMUP, FINAL_RATIO = 0.1, 0.1
COMPILE_S = 10.0  # and the held-out loss: what a run is expected to take beside its steps
UNCOUNTED_STEPS = 10  # of the speed: kernels are compiled in the first ones
RUNS_FOLDER = "loss_curves_runs"
Row = dict[str, Any]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From hidden states, the head's weight and labels."""

NOTE = """All runs have the same first weights and the same batches in the same order: float32 weights under
bfloat16 autocast, AdamW (betas 0.9 and 0.95, no weight decay), gradients clipped to a norm of 1, a learning
rate that rises for a tenth of the steps and falls by a cosine to a tenth. They differ in the loss's head
alone: "plain" makes all logits in bfloat16, as float32, for `F.cross_entropy`; the others call
`linear_cross_entropy`. The yardsticks are plain too: two have micro-batches of half and a quarter of the
size, whose roundings are others, one is the first run once again, which parts from it where the GPU adds in
any order, and one has logits that are not rounded to bfloat16.

Differences are to the run "plain", step by step, after the warm-up; "largest" is of moving means of 20
steps, and the standard error of the mean is that of blocks of 20 steps. The held-out loss is computed by the
plain head for all runs, so that weights alone differ; its difference has the standard error of pairs of
sequences. Training spreads any rounding, so two runs part: "told apart" says whether the largest difference,
or that of the held-out loss, is over twice the yardsticks'. The text is Python sources."""


def plain_loss(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Of all logits, in float32."""
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction)


def float32_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Of logits that are never rounded to bfloat16; the factors are those of `plain_loss`."""
    rounded = [tensor.to(torch.get_autocast_dtype(hidden.device.type)).float() for tensor in (hidden, weight)]
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(*rounded)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@dataclass(frozen=True)
class Kind:
    """One line of the picture."""

    label: str
    loss: Loss
    micro_share: int = 1
    """Into how many parts the usual micro-batch is cut."""
    yardstick: bool = False


KINDS = {
    "plain": Kind("plain, float32 logits", plain_loss),
    "cce": Kind("longseq, method=auto", linear_cross_entropy),
    "plain-micro": Kind("plain, half the micro-batch", plain_loss, 2, yardstick=True),
    "cce-filtered": Kind("longseq, method=filtered", partial(linear_cross_entropy, method="filtered")),
    "plain-again": Kind("plain, once again", plain_loss, yardstick=True),
    "plain-quarter": Kind("plain, a quarter of the micro-batch", plain_loss, 4, yardstick=True),
    "plain-float32": Kind("plain, the product in float32", float32_loss, yardstick=True),
    "cce-recompute": Kind("longseq, method=recompute", partial(linear_cross_entropy, method="recompute")),
}


class Data:
    """Batches of the text on the device."""

    def __init__(self, text: Text, args: argparse.Namespace, device: str) -> None:
        self.length, self.device = args.length, device
        self.train, self.heldout = (
            torch.from_numpy(part.astype(np.int32)).to(device) for part in (text.train, text.heldout)
        )
        available = (len(text.train) - 1) // args.length
        if available < args.batch:
            raise SystemExit(f"--batch: {args.batch} sequences, the text has {available}.")
        per_epoch = available // args.batch
        orders = [
            np.random.default_rng([args.seed, epoch]).permutation(available)[: per_epoch * args.batch]
            for epoch in range(-(-args.steps // per_epoch))
        ]
        self.order = np.concatenate(orders).reshape(-1, args.batch)[: args.steps]
        self.epochs = self.order.size / available
        num_heldout = min((len(text.heldout) - 1) // args.length, args.heldout_tokens // args.length)
        self.num_heldout = num_heldout // args.micro_batch * args.micro_batch
        if not self.num_heldout:
            raise SystemExit(f"--micro-batch: {args.micro_batch} sequences, {num_heldout} are held out.")

    def rows(self, part: Tensor, sequences: np.ndarray) -> tuple[Tensor, Tensor]:
        """Ids and labels `(sequences, length)`."""
        starts = torch.from_numpy(sequences).to(self.device)
        tokens = part[starts[:, None] * self.length + torch.arange(self.length + 1, device=self.device)]
        return tokens[:, :-1].long(), tokens[:, 1:].long()


class Bench:
    """Runs one after the other; the file of each and the table are written when it ends."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.started = args, time.perf_counter()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        text = load_or_make(args.text, args.steps * args.batch * args.length, args.vocab_size)
        self.data = Data(text, args, self.device)
        self.text_facts, self.vocab_size = text.facts, text.facts["vocab_size"]
        self.expected_s: list[float] = []
        self.failures: list[str] = []
        self.unwritten: list[Row] = []
        names = ("shape", "length", "batch", "micro_batch", "steps", "seed", "lr")
        self.settings: Row = {name: getattr(args, name) for name in names} | {
            "vocab_size": self.vocab_size,
            "parameters": sum(param.numel() for param in self.build().parameters()),
            "tokens": args.steps * args.batch * args.length,
            "epochs": self.data.epochs,
            "heldout_tokens": self.data.num_heldout * args.length,
            "sha256": {part: text.facts[part]["sha256"] for part in ("train", "heldout")},
        }

    def build(self) -> Llama:
        """The same first weights at each call; layers share what was compiled."""
        torch.manual_seed(self.args.seed)
        model = Llama(SHAPES[self.args.shape], self.vocab_size, self.args.length).to(self.device)
        model.turns = tuple(turn.to(self.device) for turn in model.turns)
        if self.device == "cuda":
            for layer in model.layers:
                layer.compile(dynamic=False)
        return model

    def mixed(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device, torch.bfloat16)

    def gradients(self, model: Llama, kind: Kind, step: int) -> Tensor:
        """Backward over a step's batch; its mean loss, on the device."""
        micro_batch = self.args.micro_batch // kind.micro_share
        micro_batches = self.data.order[step].reshape(-1, micro_batch)
        total = torch.zeros((), device=self.device)
        for sequences in micro_batches:
            ids, labels = self.data.rows(self.data.train, sequences)
            with self.mixed():
                loss = kind.loss(model(ids), model.lm_head.weight, labels) / len(micro_batches)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        return total

    @torch.no_grad()
    def heldout_losses(self, model: Llama) -> list[float]:
        """Mean loss of each held-out sequence, by the plain head."""
        found = []
        for sequences in np.arange(self.data.num_heldout).reshape(-1, self.args.micro_batch):
            ids, labels = self.data.rows(self.data.heldout, sequences)
            with self.mixed():
                losses = plain_loss(model(ids), model.lm_head.weight, labels, reduction="none")
            found.append(losses.view(labels.shape).double().mean(1))
        return torch.cat(found).tolist()

    def train(self, name: str) -> Row:
        """One run."""
        kind, steps = KINDS[name], self.args.steps
        model = self.build()
        fused = self.device == "cuda"
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=self.args.lr, betas=BETAS, weight_decay=0.0, fused=fused
        )
        schedule = ScheduleConfig(name="cosine", warmup_steps=int(WARMUP * steps), final_ratio=FINAL_RATIO)
        losses: list[Tensor] = []
        started = since = self.now()
        uncounted = min(UNCOUNTED_STEPS, steps // 2)
        for step in range(steps):
            if step == uncounted:
                since = self.now()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, self.args.lr, schedule)
            losses.append(self.gradients(model, kind, step))
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % max(1, steps // 10) == 0:
                seconds = self.now() - started
                print(f"{name}: step {step + 1}, loss {losses[-1].item():.4f}, {seconds:.1f} s", flush=True)
        ended = self.now()
        return {
            "name": name,
            "label": kind.label,
            "yardstick": kind.yardstick,
            "losses": torch.stack(losses).tolist(),
            "heldout losses": self.heldout_losses(model),
            "tokens/s": (steps - uncounted) * self.args.batch * self.args.length / (ended - since),
            "seconds": ended - started,
            "environment": report.environment(),
            "settings": self.settings,
        }

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def run(self, names: list[str]) -> None:
        """Those that are not there yet, as long as there is time; one that fails stops no other."""
        there = {run["name"] for run in self.kept()}
        for name in [name for name in names if name not in there]:
            spent, expected = time.perf_counter() - self.started, max(self.expected_s, default=0.0)
            if self.args.time_limit_s is not None and spent + expected > self.args.time_limit_s:
                print(f"no time left for {name} and later ({spent:,.0f} s are gone)", flush=True)
                return
            print(f"{name}: begins after {spent:,.0f} s", flush=True)
            try:
                found = self.train(name)
            except Exception as error:
                self.failed(name, f"{type(error).__name__}: {error}")
                continue
            # The first run compiled what later ones have, up to another size of micro-batch.
            self.expected_s.append(COMPILE_S + 1.1 * self.settings["tokens"] / found["tokens/s"])
            self.keep(found)

    def failed(self, name: str, why: str) -> None:
        print(f"{name} failed: {why}", flush=True)
        self.failures.append(name)

    def keep(self, found: Row) -> None:
        """The run's file, and the table with it."""
        if self.args.out is None:
            self.unwritten.append(found)
            return
        folder = self.args.out / RUNS_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / f"{found['name']}.json", json.dumps(found).encode())
        self.report(show=False)

    def kept(self) -> list[Row]:
        """Runs that lie in --out; without one, those of this call.

        Raises:
            SystemExit: One of them had other settings.
        """
        found = self.unwritten
        if self.args.out is not None:
            found = [json.loads(path.read_text()) for path in (self.args.out / RUNS_FOLDER).glob("*.json")]
        for run in found:
            for key, value in self.settings.items():
                if run["settings"].get(key) != value:
                    there = run["settings"].get(key)
                    raise SystemExit(f"--out: {run['name']} has {key}={there!r}, here it is {value!r}.")
        return sorted(found, key=lambda run: list(KINDS).index(run["name"]))

    def report(self, *, show: bool) -> None:
        runs = self.kept()
        if not runs:
            return
        settings = self.settings
        rows = table(runs, int(WARMUP * settings["steps"]))
        tokens = f"{settings['tokens']:,} tokens, {settings['epochs']:.2f} epochs"
        report.write(
            "loss_curves",
            f"Loss curves of a Llama of {settings['parameters'] / 1e6:.0f}M parameters",
            rows,
            self.args.out,
            tables=[(f"{tokens}, sequences of {settings['length']:,}", rows)],
            note=NOTE,
            show=show,
            measured_on=runs[0]["environment"],
            settings=settings,
            text=self.text_facts,
            curves={run["name"]: run["losses"] for run in runs},
        )
        if show and self.args.out is not None:
            loss_curves_plot.draw(runs, self.args.out / "loss_curves.png", SMOOTH_STEPS)


def parser() -> argparse.ArgumentParser:
    options = report.arguments(__doc__.splitlines()[0])
    options.add_argument("--runs", nargs="*", default=list(KINDS), choices=KINDS, metavar="RUN")
    options.add_argument("--text", type=Path, help="file of the tokens; made where it is not there")
    options.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    options.add_argument("--shape", choices=SHAPES, default="60m")
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--batch", type=int, default=32, help="sequences of a step")
    options.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    options.add_argument("--micro-batch", type=int, default=16, help="sequences of a forward")
    options.add_argument("--heldout-tokens", type=int, default=2**18)
    options.add_argument("--lr", type=float, default=LR)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--time-limit-s", type=float, help="begin no run that would end later")
    return options


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    shares = [KINDS[name].micro_share for name in args.runs]
    if args.batch % args.micro_batch or any(args.micro_batch % share for share in shares):
        raise SystemExit(
            f"--micro-batch: {args.micro_batch} must divide --batch {args.batch}, and be a multiple of "
            f"{max(shares, default=1)} for the runs that cut it."
        )
    bench = Bench(args)
    bench.run(args.runs)
    bench.report(show=True)
    if bench.failures:
        raise SystemExit(f"failed: {', '.join(bench.failures)}")


if __name__ == "__main__":
    main()
