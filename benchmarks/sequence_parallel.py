"""A training step of a Llama-3-8B-shaped model whose sequence is spread over GPUs: ours and DeepSpeed's ALST.

torchrun --standalone --nproc-per-node 4 benchmarks/sequence_parallel.py --system ours \\
    --lengths 65536 131072 --variants auto gpu+all host --minutes 8 --add --out DIR
torchrun --standalone --nproc-per-node 4 benchmarks/sequence_parallel.py --system alst --add --out DIR
python benchmarks/sequence_parallel.py --optimizer none --add --out DIR     # one GPU, without AdamW
torchrun --nproc-per-node 4 ... --optimizer none ...     # the mean of four such, each by itself, at once
python benchmarks/sequence_parallel.py --shape tiny --lengths 64 128        # on a CPU too
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics
import sys
import time
from dataclasses import replace
from datetime import datetime
from typing import Any

import report
import sequence_parallel_plot
import torch
import torch.distributed as dist
from decoder_anchors import MissingError
from decoder_model import NUM_LAYERS, SHAPES, Budget, free, host_gib
from sequence_parallel_alst import Alst
from sequence_parallel_comm import CollectiveCounter, exchanged_bytes, profiled, times
from sequence_parallel_rows import Row, Rows, disagreement
from sequence_parallel_systems import Ours, Setup, System
from torch import Tensor

from longseq.distributed import ProcessGroups
from longseq.launch.config import ParallelConfig, RunConfig
from longseq.launch.flops import ModelShape, model_flops
from longseq.launch.processes import join, leave, set_up_logging

SYSTEMS: dict[str, type[System]] = {"ours": Ours, "alst": Alst}
DEFAULT_VARIANTS = {"ours": ["auto"], "alst": ["gpu"]}
UNFINISHED = "did not finish"
START_S = 5.0  # of a row: kernels are compiled, memory is found
CHECK_TOKENS = {"llama-3-8b": 2048, "tiny": 96}


class Bench:
    """Measures a launch's variants; every rank has the same rows, and the first one writes them."""

    def __init__(
        self,
        args: argparse.Namespace,
        setup: Setup,
        counter: CollectiveCounter,
        everyone: ProcessGroups,
    ) -> None:
        self.args, self.setup, self.groups, self.counter = args, setup, setup.groups, counter
        self.everyone = everyone
        self.run_date = datetime.now().strftime("%Y-%m-%d %H:%M")
        self.shape = ModelShape.from_hf_config(setup.config)
        self.budget = Budget(args.minutes, lambda num_tokens: model_flops(self.shape, [num_tokens]))
        facts: Row = {
            "shape": args.shape,
            "layers": setup.num_layers,
            "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        }
        self.rows = Rows.of_file(facts, args.out) if args.add else Rows(facts, args.out)
        self.refused: list[str] = []

    def run(self) -> None:
        """Every variant at every length, shortest first."""
        started = time.perf_counter()
        system = SYSTEMS[self.args.system](self.setup)
        plain = self.check_step(system.plain_step, system)
        self.say(f"{self.args.system}: ready after {time.perf_counter() - started:.0f} s; plain: {plain}")
        for key in self.args.variants or DEFAULT_VARIANTS[self.args.system]:
            try:
                system.use(key)
            except MissingError as error:
                self.leave_out(key, self.args.lengths, str(error))
                continue
            self.run_variant(system, key, plain)
            system.leave()
            free()

    def run_variant(self, system: System, key: str, plain: Row) -> None:
        """All lengths of a variant that gives the plain model's numbers."""
        lengths = sorted(self.args.lengths)
        found = self.guarded(self.named(key, lengths[0]), lambda: self.check_step(system.step, system))
        if found is None:
            return
        wrong = disagreement(found, plain, "transformers' own layers")
        for tokens in lengths:
            row = self.named(key, tokens)
            if wrong is not None:
                self.refuse(row, f"at {self.check_tokens} tokens {wrong}")
                return
            if not self.has_time(system, key, tokens):
                continue
            numbers = self.guarded(row, functools.partial(self.measure, system, tokens))
            if numbers is None:
                return
            row |= numbers | {"check": found}
            wrong_row = self.rows.disagreement(row)
            if wrong_row is not None:
                self.refuse(row, wrong_row)
                return
            self.keep(row)

    def named(self, key: str, tokens: int) -> Row:
        """What a row is known by."""
        groups = self.groups
        return {
            "system": self.args.system,
            "key": key,
            "optimizer": self.args.optimizer,
            "gpus": groups.world_size,
            "sp": groups.sp_size,
            "tokens": tokens,
        }

    @property
    def check_tokens(self) -> int:
        """Of the sequence by which a variant is believed."""
        return self.args.check_tokens or CHECK_TOKENS[self.args.shape]

    def check_step(self, step: Any, system: System) -> Row:
        """Loss and norm of a short sequence, the same one on all ranks."""
        ids = draw_tokens(self.setup, self.check_tokens, 0)
        system.clear()
        loss, norm = step(ids)
        return {"loss": loss, "norm": system.norm(norm)}

    def measure(self, system: System, tokens: int) -> Row:
        """One row's numbers, the same on all ranks: of times and peaks the largest."""
        free()
        if isinstance(system, Alst):
            system.forget()
        # GPUs by themselves take the same sequence: their losses are compared with other rows'.
        ids = draw_tokens(self.setup, tokens, self.groups.dp_rank if self.setup.use_zero else 0)
        timed = [self.timed_step(system, ids) for _ in range(self.num_warm_ups(system) + self.args.repeats)]
        steps = timed[self.num_warm_ups(system) :]
        seconds = statistics.median(step["s"] for step in steps)
        self.budget.add(tokens, max(step["s"] for step in timed[-self.args.repeats - 1 :]))
        flops = model_flops(self.shape, [tokens]) * self.groups.dp_size
        row = {
            "s": seconds,
            "tokens/s": tokens * self.groups.dp_size / seconds,
            "model TFLOP/s a GPU": flops / seconds / self.groups.world_size / 1e12,
            **{name: max(step[name] for step in steps) for name in steps[0] if name.endswith("GiB")},
            "times": [step["s"] for step in timed],
            "loss": timed[0]["loss"],
            "norm": timed[0]["norm"],
            **self.exchanged(system, tokens),
            "run": self.run_date,
            "at once": self.everyone.world_size // self.groups.world_size,
            "collectives": dict(self.counter.calls),
            "collective GiB": {name: size / 2**30 for name, size in self.counter.num_bytes.items()},
        }
        if self.args.profile:
            row["profile"] = self.profile(system, ids)
        return row

    def num_warm_ups(self, system: System) -> int:
        """Steps of a row that are not counted."""
        return system.num_warm_ups if self.args.warm_ups is None else self.args.warm_ups

    def timed_step(self, system: System, ids: Tensor) -> Row:
        """One step between two points at which all ranks are done."""
        on_gpu = self.setup.device.type == "cuda"
        system.clear()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        self.everyone.barrier()
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        with self.counter.counting():
            loss, norm = system.step(ids)
        if on_gpu:
            torch.cuda.synchronize()
        mine = {"s": time.perf_counter() - started, "host GiB": host_gib()}
        if on_gpu:
            mine["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
            mine["reserved GiB"] = torch.cuda.max_memory_reserved() / 2**30
        slowest = torch.tensor(list(mine.values()), dtype=torch.float64, device=self.setup.device)
        if self.groups.world_size > 1:
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
        elif self.everyone.world_size > 1:
            slowest = self.everyone.all_sum(slowest) / self.everyone.world_size  # each is its own measurement
        return {**dict(zip(mine, slowest.tolist(), strict=True)), "loss": loss, "norm": system.norm(norm)}

    def exchanged(self, system: System, tokens: int) -> Row:
        """MiB that a rank's all-to-alls send to others, a layer and step: by the formula, and counted."""
        size, layers, rebuilt = self.groups.sp_size, self.setup.num_layers, system.rebuilt_layers()
        if size == 1:
            return {}
        local_tokens = math.ceil(tokens / size)
        sent = (size - 1) / size / 2**20
        row = {"all-to-all MiB a layer": self.counter.num_bytes["all_to_all_single"] / layers * sent}
        if rebuilt is not None:
            often, seldom = (
                exchanged_bytes(self.setup.config, local_tokens, size, rebuilds_attention=rebuilds)
                for rebuilds in (True, False)
            )
            row["predicted"] = (rebuilt * often + (layers - rebuilt) * seldom) / layers * sent
        return row

    def profile(self, system: System, ids: Tensor) -> Row:
        """Where one more step's time goes on the first rank's GPU; every rank does the step."""
        system.clear()
        if not self.groups.is_main or self.setup.device.type != "cuda":
            system.step(ids)
            return {}
        found = times(profiled(lambda: system.step(ids)))
        for kernel in found.get("top", []):
            print(f"{kernel['s']:9.4f} s {kernel['calls']:7} x {kernel['kernel']}", flush=True)
        return found

    def has_time(self, system: System, key: str, tokens: int) -> bool:
        """Whether the first rank's clock leaves time for a row."""
        num_steps = self.num_warm_ups(system) + self.args.repeats + bool(self.args.profile)
        allowed = torch.tensor(float(self.budget.allows(tokens, num_steps, START_S)))
        allowed = allowed.to(self.setup.device)
        if self.everyone.world_size > 1:
            dist.broadcast(allowed, 0)
        if not allowed:
            self.leave_out(key, [tokens], "no time left")
        return bool(allowed)

    def leave_out(self, key: str, lengths: list[int], why: str) -> None:
        """Say of rows why they are not there."""
        for tokens in lengths:
            self.rows.leave_out(self.named(key, tokens), why)
            self.say(f"left out: {key} at {tokens:,} ({why})")
        self.write()

    def guarded(self, row: Row, work: Any) -> Row | None:
        """What `work` finds; a failure is the row's note.

        Of several processes one that fails leaves the others waiting, and under ZeRO the engine half way
        through a step: the launch ends. The row is there before its work, for a process that is killed.
        """
        earlier = self.rows.find(row)
        self.rows.keep({**row, "note": UNFINISHED})
        self.write()
        try:
            numbers = work()
        except torch.OutOfMemoryError:
            note = "out of memory"
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            note = f"{type(error).__name__}: {lines[0]}"[:160]
        else:
            self.rows.drop(row)
            if earlier is not None:
                self.rows.keep(earlier)
            return numbers
        print(f"rank {self.groups.rank}: {row['key']} at {row['tokens']:,}: {note}", flush=True)
        self.rows.keep({**row, "note": note})
        if self.everyone.world_size > 1:
            time.sleep(3 * self.groups.rank)  # the first rank writes, unless it waits for this one
            if self.rows.note_in_file(row) == UNFINISHED:  # else it was another rank that failed first
                self.rows.write()
            sys.stdout.flush()
            os._exit(1)
        self.write()
        free()
        return None

    def refuse(self, row: Row, why: str) -> None:
        """A row without numbers."""
        where = self.named(row["key"], row["tokens"])
        self.refused.append(f"{row['key']} at {row['tokens']:,}: {why}")
        self.keep({**where, "note": f"refused: {why}"})

    def keep(self, row: Row) -> None:
        """Keep a row, show it, write all."""
        self.rows.keep(row)
        self.say(str({name: value for name, value in row.items() if name != "profile"}))
        self.write()

    def write(self) -> None:
        """By the first rank."""
        if self.groups.is_main:
            self.rows.write()

    def say(self, text: str) -> None:
        """By the first rank."""
        if self.groups.is_main:
            print(text, flush=True)


def draw_tokens(setup: Setup, num_tokens: int, number: int) -> Tensor:
    """Token ids `(1, L)` of a sequence by number, the same on all ranks and for each system."""
    draw = torch.Generator().manual_seed(1 + number)
    return torch.randint(0, setup.config.vocab_size, (1, num_tokens), generator=draw)


def parser() -> argparse.ArgumentParser:
    options = report.arguments(__doc__.splitlines()[0])
    options.add_argument("--system", choices=SYSTEMS, default="ours")
    options.add_argument(
        "--variants",
        nargs="+",
        metavar="NAME",
        help="; ".join(f"{name}: {system.rule}" for name, system in SYSTEMS.items()),
    )
    options.add_argument("--lengths", type=int, nargs="+", default=[65536], help="tokens of a whole sequence")
    options.add_argument("--sp", type=int, help="GPUs a sequence; default: all")
    options.add_argument("--optimizer", choices=("adamw", "none"), default="adamw")
    options.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    options.add_argument("--layers", type=int, help="default: the shape's")
    options.add_argument("--repeats", type=int, default=2)
    options.add_argument("--warm-ups", type=int, help="steps before them; default: what the system needs")
    options.add_argument("--minutes", type=float, help="begin nothing that would end later")
    options.add_argument("--check-tokens", type=int, help="of the sequence that variants are checked by")
    options.add_argument("--profile", action="store_true", help="one more step a row, under the profiler")
    options.add_argument("--add", action="store_true", help="keep the other rows that are in --out already")
    return options


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    try:
        for key in args.variants or ():
            SYSTEMS[args.system].named(key)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if not torch.cuda.is_available() and args.shape != "tiny":
        raise SystemExit("A model of this size needs a CUDA GPU; on a CPU give --shape tiny.")
    counter = CollectiveCounter()
    counter.install()
    use_zero = args.optimizer != "none"
    degree = args.sp or (world_size if use_zero else 1)
    parallel = ParallelConfig(ulysses_degree=degree, zero_stage=3 if use_zero else 0)
    _, groups, device = join(RunConfig(parallel=parallel))
    everyone = groups
    if not use_zero:  # each process is one GPU by itself
        groups = replace(groups, world_size=1, sp_size=1, sp=None)
    set_up_logging(groups.is_main)
    num_layers = args.layers or NUM_LAYERS[args.shape]
    bench = Bench(args, Setup(args.shape, num_layers, groups, device, use_zero), counter, everyone)
    bench.run()
    if groups.is_main:
        bench.rows.write(show=True)
        if args.out is not None:
            sequence_parallel_plot.draw(bench.rows.with_slopes(), args.out / "sequence_parallel.png")
    leave()
    if bench.refused:
        raise SystemExit("refused:\n" + "\n".join(bench.refused))


if __name__ == "__main__":
    main()
