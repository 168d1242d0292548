"""The optimizer's step on all decoder matrices of a Llama-3-8B, on one GPU: time, state and memory.

python benchmarks/optimizer.py --out benchmarks/results      # some two minutes on an H200
python benchmarks/optimizer.py --systems longseq-apollo longseq-mini --profile --out DIR
python benchmarks/optimizer.py --layers 8                    # a quarter of the memory
python benchmarks/optimizer.py --shapes tiny                 # on a CPU too, to see that it works
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import time
from itertools import pairwise
from typing import Any

import report
import torch
from decoder_model import NUM_LAYERS, SHAPES, attempt, free
from optimizer_systems import (
    SYSTEM_PACKAGES,
    System,
    choose,
    disagreement,
    draw_weights,
    systems_of,
    tensors_in,
)
from torch.optim import Optimizer

Row = dict[str, Any]
LR = 1e-5
WARM_UPS = 3
HOST_STEPS = 3

NOTE = """Weights and gradients are bf16 and stay where they are; gradients are the same at each step. A time
is the median of steps back to back, on the GPU's clock, after warm-up. Fused AdamW, whose states are bf16, is
timed right before and right after each system; "/ AdamW" divides by the mean of the two, and "AdamW before"
and "after" are they. "Host ms" is the time until step() returns when the GPU is idle before it. "GB/s" are
the bytes that must move over the time: weights read and written, moments read and written, gradients read
once, or twice where an update needs the norm of all of it. State is counted in `state_dict()`, objects in it
included, beside the formula (AdamW 2mn + 1 a matrix; projected 2 max(m, n) r + 2). "Extra MiB" is the peak
of a step over weights, gradients and states. Before its time is taken, a system steps small odd matrices and
one of each timed shape, and must agree with plain PyTorch in float64: torch's AdamW in float32, ours in bf16
too, other packages not at all, whose numbers are their own. "First s" is the first step after that."""


def matrices_of(shape: str, num_layers: int) -> dict[str, tuple[int, int]]:
    """Names and shapes of the decoder layers' linear weights, seven a layer."""
    model = SHAPES[shape]
    hidden, inner, heads = model["hidden_size"], model["intermediate_size"], model["num_attention_heads"]
    head_dim = model.get("head_dim", hidden // heads)
    query, key = heads * head_dim, model["num_key_value_heads"] * head_dim
    of_layer = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {
        f"model.layers.{layer}.{name}.weight": size
        for layer in range(num_layers)
        for name, size in of_layer.items()
    }


class Bench:
    """Times one system after the other, and keeps what it has at once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.num_layers = args.layers or NUM_LAYERS[args.shapes]
        self.shapes = matrices_of(args.shapes, self.num_layers)
        self.systems = systems_of(args.shapes)
        self.started = time.monotonic()
        self.rows: list[Row] = []
        self.refused: list[str] = []

    def run(self) -> None:
        """Those that were asked for, the yardstick between them."""
        named = draw_weights(self.shapes, torch.bfloat16, self.device)
        elements = sum(param.numel() for _, param in named)
        self.say(f"{len(named)} matrices of {elements:,} weights on {self.device}")
        yardstick = self.systems[0]
        before = self.unit(yardstick, named)
        for system in choose(self.systems, self.args.systems, "--systems"):
            row: Row = {"key": system.key, "system": system.label}
            row |= attempt(lambda system=system: self.checked(system))
            if "note" not in row:
                row |= attempt(lambda system=system: self.measure(system, named))
            free()
            after = self.unit(yardstick, named)
            self.keep(system, row, before, after)
            before = after

    def checked(self, system: System) -> Row:
        """Nothing, or what is wrong as a note."""
        wrong = disagreement(system, self.shapes, self.device)
        if wrong is None:
            return {}
        self.refused.append(f"{system.key}: {wrong}")
        return {"note": f"refused: {wrong}"}

    def unit(self, system: System, named: list) -> float:
        """Milliseconds of the yardstick's step."""
        optimizer = system.make(named, LR)
        for _ in range(WARM_UPS):
            optimizer.step()
        ms = self.step_ms(optimizer)
        del optimizer
        free()
        return statistics.median(ms)

    def measure(self, system: System, named: list) -> Row:
        """One system's numbers."""
        optimizer = system.make(named, LR)
        self.sync()
        started = time.perf_counter()
        optimizer.step()
        self.sync()
        first_s = time.perf_counter() - started
        for _ in range(WARM_UPS - 1):
            optimizer.step()
        extra_mib = self.extra_mib(optimizer)
        ms = self.step_ms(optimizer)
        host_ms = self.host_ms(optimizer)
        found = list(tensors_in(optimizer.state_dict()["state"]))
        median = statistics.median(ms)
        row = {
            "ms": median,
            "/ AdamW": None,
            "host ms": host_ms,
            "GB/s": system.moved_bytes(self.shapes) / median / 1e6,
            "state GiB": sum(tensor.nbytes for tensor in found) / 2**30,
            "state elements": sum(tensor.numel() for tensor in found),
            "formula": system.state_formula(self.shapes),
            "extra MiB": extra_mib,
            "first s": first_s,
            "times": ms,
        }
        if system.ours and row["state elements"] != row["formula"]:
            self.refused.append(f"{system.key}: {row['state elements']} numbers of state")
            return {"note": f"refused: {row['state elements']} numbers of state, not {row['formula']}"}
        # Sums in float32, which a NaN or an infinity passes through.
        if not all(bool(param.detach().sum(dtype=torch.float32).isfinite()) for _, param in named):
            self.refused.append(f"{system.key}: weights are not finite")
            return {"note": "refused: weights are not finite"}
        if self.args.profile and system.ours:
            failed = attempt(lambda: self.profile(system, optimizer) or {})
            if failed:
                self.say(f"{system.key}: no profile ({failed['note']})")
        return row

    def step_ms(self, optimizer: Optimizer) -> list[float]:
        """Of steps back to back; on a GPU by its own clock, from the end of one to the end of the next."""
        if self.device == "cpu":
            return [1e3 * _seconds(optimizer.step) for _ in range(self.args.repeats)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self.args.repeats + 1)]
        optimizer.step()  # the clock starts on a busy GPU
        events[0].record()
        for event in events[1:]:
            optimizer.step()
            event.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) for start, stop in pairwise(events)]

    def host_ms(self, optimizer: Optimizer) -> float:
        """Until step() returns."""
        taken = []
        for _ in range(HOST_STEPS):
            self.sync()
            taken.append(1e3 * _seconds(optimizer.step))
        self.sync()
        return statistics.median(taken)

    def extra_mib(self, optimizer: Optimizer) -> float | None:
        """Peak of a step over what is held before it; None on a CPU."""
        if self.device == "cpu":
            return None
        self.sync()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        optimizer.step()
        self.sync()
        return (torch.cuda.max_memory_allocated() - held) / 2**20

    def profile(self, system: System, optimizer: Optimizer) -> None:
        """The kernels of one step, as text."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        key = "self_cpu_time_total"
        if self.device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            key = "self_device_time_total"
        with torch.profiler.profile(activities=activities) as profiler:
            optimizer.step()
            self.sync()
        table = profiler.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=80)
        if self.args.out is None:
            print(table, flush=True)
            return
        self.args.out.mkdir(parents=True, exist_ok=True)
        (self.args.out / f"optimizer_profile_{system.key}.txt").write_text(f"{system.label}\n\n{table}\n")

    def keep(self, system: System, row: Row, before: float, after: float) -> None:
        """A row, written at once."""
        if "note" not in row:
            row["/ AdamW"] = row["ms"] / ((before + after) / 2)
        row |= {"AdamW before": before, "AdamW after": after}
        self.rows.append(row)
        shown = row.get("note") or f"{row['ms']:.2f} ms, {row['/ AdamW']:.3f} of fused AdamW"
        self.say(f"{system.key}: {shown}")
        self.write(show=False)

    def write(self, *, show: bool) -> None:
        """All rows so far."""
        hidden = ("key", "times")
        table = [{name: value for name, value in row.items() if name not in hidden} for row in self.rows]
        facts = {
            "shape": self.args.shapes,
            "layers": self.num_layers,
            "matrices": len(self.shapes),
            "elements": sum(rows * columns for rows, columns in self.shapes.values()),
            "packages": _versions(),
        }
        heading = ", ".join(f"{name} {value}" for name, value in facts.items() if name != "packages")
        title = "One optimizer step on the decoder's matrices"
        shown = {"tables": [(heading, table)], "note": NOTE, "show": show}
        report.write("optimizer", title, self.rows, self.args.out, **shown, **facts)

    def sync(self) -> None:
        """Wait for the GPU, if there is one."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", flush=True)


def _seconds(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _versions() -> dict[str, str]:
    found = {}
    for name in SYSTEM_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """What was asked for."""
    parser = report.arguments(__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="decoder layers; default: all of the model's")
    parser.add_argument("--systems", nargs="+", help="keys, or beginnings of them; default: all")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps")
    parser.add_argument("--profile", action="store_true", help="write a table of kernels of each of ours")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    """Measure, write, and fail if a system was refused."""
    bench = Bench(arguments(given))
    bench.run()
    bench.write(show=True)
    if bench.refused:
        raise SystemExit("refused: " + "; ".join(bench.refused))


if __name__ == "__main__":
    main()
