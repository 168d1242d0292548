"""One full-parameter training step of a Llama on one GPU: its peak of memory, and where that is.

python benchmarks/optimizer_memory.py --out benchmarks/results      # 4,096 tokens; some minutes on an H200
python benchmarks/optimizer_memory.py --variants int8 --loss-memory-mib 256
python benchmarks/optimizer_memory.py --shape llama-7b --out benchmarks/results     # APOLLO's paper's model
python benchmarks/optimizer_memory.py --shape tiny                  # on a CPU too, to see that it works
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

import report
import torch
from decoder_model import NUM_LAYERS, SHAPES, attempt, build, draw_tokens, free, held_gib, host_gib
from optimizer_systems import choose, tensors_in
from torch import Tensor, nn
from torch.optim import Optimizer

from longseq.apollo import Apollo, parameter_groups
from longseq.apollo.in_backward import InBackwardHandle, step_in_backward
from longseq.apollo.quantized import quantize_linears
from longseq.mst import apply_mini_sequence

Row = dict[str, Any]
GIB = 2**30
MAIN_SHAPE = "llama-3-8b"
EXPANDABLE = "expandable_segments:True"
MINI_LR, ADAMW_LR = 3e-5, 3e-5
"""Small: a first step along random weights' gradients takes all matrices one way, and may not overshoot."""
PHASES = ("forward", "head", "layers", "embedding", "finish")
LOSS_TOLERANCE = {16: 2e-3, 8: 2e-2}
"""Of the first step's loss, relative to the first variant's: 8 bits have other weights."""
NORM_TOLERANCE = {16: 2e-2, 8: 0.3}
LOSS_MEMORY_MIB = 128
"""The least for 4,096 tokens of 4,096 numbers: the float32 sum of the hidden states' gradient, and logits of
8,192 words."""

NOTE = """Random weights, made on the device in bf16; int8 ones are rounded there, layer by layer, before
memory is counted. All steps take the same random tokens. Peaks are of the steps after the first, and are what
PyTorch's allocator has given out ("peak") and holds ("reserved", expandable segments); "device" is what the
GPU has in use at the end, kernels and libraries included. The second table says where a peak is: in forward;
in backward until the head's weight is done, then the layers', then the embedding's, each with its update
where updates are in backward; and in what follows backward (the gradients' norm, and the update where it is
not in backward). The third table is arithmetic: weights, states as measured, layer inputs that wait on the
GPU, and gradients (in backward: the largest one); "rest" is what the peak has beyond them. A variant counts
if its losses are finite and fall, and its first loss and gradient norm are the first variant's."""


@dataclass(frozen=True)
class Variant:
    """One way to take the step."""

    key: str
    label: str
    bits: int = 16
    optimizer: str = "mini"
    in_backward: bool = True
    checkpoints: str = "host"
    bar_gib: float | None = None


VARIANTS = (
    Variant("bf16-mini-in-backward", "bf16, Apollo-Mini in backward, inputs on the host", bar_gib=20.0),
    Variant("bf16-mini-in-backward-gpu", "bf16, Apollo-Mini in backward", checkpoints="gpu", bar_gib=20.0),
    Variant(
        "int8-mini-in-backward",
        "int8, Apollo-Mini in backward, inputs on the host",
        bits=8,
        bar_gib=12.5,
    ),
    Variant(
        "int8-mini-in-backward-gpu",
        "int8, Apollo-Mini in backward",
        bits=8,
        checkpoints="gpu",
        bar_gib=12.5,
    ),
    Variant("bf16-mini", "bf16, Apollo-Mini after backward", in_backward=False, checkpoints="gpu"),
    Variant(
        "bf16-adamw",
        "bf16, fused AdamW after backward",
        optimizer="adamw",
        in_backward=False,
        checkpoints="gpu",
    ),
)


class Peaks:
    """Peaks of allocated and reserved memory between marks; nothing on a CPU."""

    def __init__(self, *, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self.allocated: dict[str, float] = {}
        self.reserved = 0.0

    def mark(self, name: str) -> None:
        """A phase ends; one that ends several times has the largest peak."""
        if not self._on_gpu:
            return
        # Memory is counted where it is asked for, on the host: the GPU need not have come so far.
        peak = torch.cuda.max_memory_allocated() / GIB
        self.allocated[name] = max(peak, self.allocated.get(name, 0.0))
        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved() / GIB)
        torch.cuda.reset_peak_memory_stats()

    def reset(self) -> None:
        """Forget what was."""
        self.allocated.clear()
        self.reserved = 0.0
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def mark_backward(self, model: nn.Module) -> None:
        """Have backward's phases marked; to be called after `step_in_backward`, whose hooks then come first.

        Layer 0's gradients are handed out together, and before the embedding's is begun.
        """
        marked = {
            "head": [model.get_output_embeddings().weight],
            "layers": model.get_decoder().layers[0].parameters(),
            "embedding": [model.get_input_embeddings().weight],
        }
        for name, params in marked.items():
            for param in params:
                param.register_post_accumulate_grad_hook(lambda _, name=name: self.mark(name))


class Training:
    """A model and its optimizer, ready for steps."""

    def __init__(self, variant: Variant, args: argparse.Namespace, device: str) -> None:
        self.variant, self.device = variant, device
        self.model = build(args.shape, args.layers or NUM_LAYERS[args.shape], device)
        if variant.bits == 8:
            print(quantize_linears(self.model), flush=True)
        self.ids = draw_tokens(self.model, args.tokens or (96 if args.shape == "tiny" else 4096))
        self.mini_sequence = apply_mini_sequence(
            self.model,
            checkpoints=variant.checkpoints,
            tile_tokens=args.tile_tokens or "auto",
            loss_memory_mib=args.loss_memory_mib,
        )
        self.optimizer = _optimizer(variant, self.model)
        self.in_backward: InBackwardHandle | None = None
        if variant.in_backward:
            self.in_backward = step_in_backward(self.optimizer, self.model)
        self.peaks = Peaks(on_gpu=device == "cuda")
        self.peaks.mark_backward(self.model)
        free()  # the bf16 weights that were rounded
        self.peaks.reset()

    def step(self) -> tuple[float, float, float]:
        """Loss, gradient norm and seconds of a step."""
        self._sync()
        started = time.perf_counter()
        loss = self.model(input_ids=self.ids, labels=self.ids).loss
        self.peaks.mark("forward")
        loss.backward()
        norm = self._finish()
        self.peaks.mark("finish")
        self._sync()
        return loss.item(), norm.item(), time.perf_counter() - started

    def _finish(self) -> Tensor:
        if self.in_backward is not None:
            return self.in_backward.finish_step()
        grads = [param.grad for param in self.model.parameters() if param.grad is not None]
        norms = torch._foreach_norm(grads, 2, dtype=torch.float32)  # not rounded to the gradients' bf16
        norm = torch.linalg.vector_norm(torch.stack(norms))
        del grads
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def undo(self) -> None:
        """Let go of what the model's layers keep for another step."""
        self.mini_sequence.undo()

    def components(self) -> dict[str, float]:
        """GiB by arithmetic, and the states as they are."""
        sizes = [param.numel() * param.element_size() for param in self.model.parameters()]
        weights = sum(_weight_bytes(param) for param in self.model.parameters())
        hidden, num_layers = self.model.config.hidden_size, self.model.config.num_hidden_layers
        inputs = 2 * self.ids.numel() * hidden * num_layers if self.variant.checkpoints == "gpu" else 0
        states = sum(tensor.nbytes for tensor in tensors_in(self.optimizer.state_dict()["state"]))
        gradients = max(sizes) if self.variant.in_backward else sum(sizes)
        found = {"weights": weights, "states": states, "layer inputs": inputs, "gradients": gradients}
        return {name: size / GIB for name, size in found.items()}

    def _sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def _optimizer(variant: Variant, model: nn.Module) -> Optimizer:
    if variant.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), ADAMW_LR, weight_decay=0.0, fused=True)
    groups = parameter_groups(model, embeddings="low_rank")
    return Apollo(groups, MINI_LR, scale_type="tensor", rounding="stochastic")


def _weight_bytes(param: nn.Parameter) -> int:
    quantized = getattr(param, "quantized", None)
    return param.numel() * param.element_size() if quantized is None else quantized.nbytes


class Bench:
    """Runs the variants one after the other; what was measured is written at once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.started = time.monotonic()
        self.rows: list[Row] = []
        self.refused: list[str] = []

    def run(self) -> None:
        """All that were asked for."""
        for variant in choose(VARIANTS, self.args.variants, "--variants"):
            self.say(f"{variant.key}: begins with {held_gib():.2f} GiB held")
            row: Row = {"key": variant.key, "variant": variant.label}
            row |= attempt(functools.partial(self.measure, variant))
            free()
            wrong = None if "note" in row else self.wrong(variant, row)
            if wrong is not None:
                self.refused.append(f"{variant.key}: {wrong}")
                row = {"key": variant.key, "variant": variant.label, "note": f"refused: {wrong}"}
            self.rows.append(row)
            self.say(f"{variant.key}: {row.get('note') or self.summary(row)}")
            self.write(show=False)

    def measure(self, variant: Variant) -> Row:
        """A variant's numbers."""
        training = Training(variant, self.args, self.device)
        self.say(f"{variant.key}: ready with {held_gib():.2f} GiB held")
        steps = []
        for number in range(self.args.steps):
            steps.append(training.step())
            loss, norm, seconds = steps[-1]
            self.say(f"{variant.key}: step {number + 1}, {seconds:.2f} s, loss {loss:.4f}, norm {norm:.4g}")
            if number == 0:
                training.peaks.reset()
        used_gib, waiting_gib = self.used_gib(), host_gib() if self.device == "cuda" else None
        training.undo()
        peaks, components = training.peaks, training.components()
        peak = max(peaks.allocated.values(), default=None)
        seconds = statistics.median(seconds for _, _, seconds in steps[1:])
        return {
            "peak GiB": peak,
            "reserved GiB": peaks.reserved or None,
            "device GiB": used_gib,
            "bar GiB": variant.bar_gib,
            "host GiB": waiting_gib,
            "tokens/s": training.ids.numel() / seconds,
            "s": seconds,
            "losses": [loss for loss, _, _ in steps],
            "norms": [norm for _, norm, _ in steps],
            "phases": {name: peaks.allocated.get(name) for name in PHASES},
            "components": components,
            "rest GiB": None if peak is None else peak - sum(components.values()),
        }

    def wrong(self, variant: Variant, row: Row) -> str | None:
        """Why a row is not to be believed."""
        losses, norms = row["losses"], row["norms"]
        if not all(map(math.isfinite, (*losses, *norms))):
            return f"losses {losses}, norms {norms}"
        if losses[-1] >= losses[0]:
            return f"the loss does not fall: {losses}"
        first = next((one for one in self.rows if "losses" in one), row)
        for name, tolerance in (("losses", LOSS_TOLERANCE), ("norms", NORM_TOLERANCE)):
            found, should = row[name][0], first[name][0]
            bits = min(variant.bits, 8 if first["key"].startswith("int8") else 16)
            if abs(found - should) > tolerance[bits] * abs(should):
                return f"first of {name} {found:.6g}, of {first['key']} {should:.6g}"
        return None

    def used_gib(self) -> float | None:
        """All that is in use on the GPU."""
        if self.device == "cpu":
            return None
        left, total = torch.cuda.mem_get_info()
        return (total - left) / GIB

    @staticmethod
    def summary(row: Row) -> str:
        """A line of progress."""
        peak = "no peak" if row["peak GiB"] is None else f"peak {row['peak GiB']:.2f} GiB"
        return f"{peak}, {row['tokens/s']:,.0f} tokens/s, phases {row['phases']}"

    def write(self, *, show: bool) -> None:
        """All rows so far."""
        nested = ("key", "losses", "norms", "phases", "components", "rest GiB")
        main, phases, parts = [], [], []
        for row in self.rows:
            shown = {name: value for name, value in row.items() if name not in nested}
            if "losses" in row:
                name = {"variant": row["variant"]}
                shown |= {"loss": " ".join(f"{loss:.3f}" for loss in row["losses"])}
                shown |= {"norm": row["norms"][-1]}
                phases.append(name | row["phases"])
                parts.append(name | row["components"] | {"rest": row["rest GiB"]})
            main.append(shown)
        tables = [("The step", main), ("Peak GiB by phase", phases), ("Peak GiB by arithmetic", parts)]
        facts = {
            "shape": self.args.shape,
            "layers": self.args.layers,
            "tokens": self.args.tokens,
            "loss_memory_mib": self.args.loss_memory_mib,
            "tile_tokens": self.args.tile_tokens,
            "allocator": _allocator() or (EXPANDABLE if self.device == "cuda" else None),
        }
        table = "optimizer_memory"
        if self.args.shape != MAIN_SHAPE:
            table += f"_{self.args.shape.replace('-', '_')}"
        title = f"Memory of a full-parameter training step of the shape {self.args.shape}"
        shown = {"tables": tables, "note": NOTE, "show": show}
        report.write(table, title, self.rows, self.args.out, **shown, **facts)

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", flush=True)


def _allocator() -> str | None:
    """The allocator's settings by environment."""
    return os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """What was asked for."""
    parser = report.arguments(__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", help="keys, or beginnings of them; default: all")
    parser.add_argument("--shape", choices=SHAPES, default=MAIN_SHAPE)
    parser.add_argument("--layers", type=int, help="decoder layers; default: all of the model's")
    parser.add_argument("--tokens", type=int, help="default: 4,096, or 96 if tiny")
    parser.add_argument("--steps", type=int, default=3, help="the first is not measured")
    parser.add_argument("--tile-tokens", type=int, help="of the MLP; default: as many as pay, 4,096 or more")
    parser.add_argument("--loss-memory-mib", type=int, default=LOSS_MEMORY_MIB)
    args = parser.parse_args(given)
    if args.steps < 2:
        parser.error("--steps must be at least 2: the first is not measured.")
    return args


def main(given: list[str] | None = None) -> None:
    """Measure, write, and fail if a variant was refused."""
    args = arguments(given)
    if torch.cuda.is_available() and _allocator() is None:
        # The variable may be read as early as torch is imported; what sets it later is public nowhere.
        torch._C._accelerator_setAllocatorSettings(EXPANDABLE)
    bench = Bench(args)
    bench.run()
    bench.write(show=True)
    if bench.refused:
        raise SystemExit("refused: " + "; ".join(bench.refused))


if __name__ == "__main__":
    main()
