"""Forward + backward of a Llama-3-8B-shaped model on one GPU: speed and memory, ours and others'.

python benchmarks/decoder.py --out benchmarks/results                   # everything, an hour on an H200
python benchmarks/decoder.py --variants liger longseq-host --lengths 16384 65536 --minutes 9 --add --out DIR
python benchmarks/decoder.py --shape tiny --lengths 64 128              # on a CPU too, to see that it works
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
from importlib import metadata
from pathlib import Path
from typing import Any

import decoder_plot
import report
import torch
from decoder_anchors import MissingError
from decoder_model import (
    NUM_LAYERS,
    SHAPES,
    Budget,
    Prepared,
    attempt,
    build,
    draw_tokens,
    free,
    held_gib,
    hold_gradients,
    host_gib,
    run_step,
)
from decoder_variants import Variant, choose, place
from torch import nn
from transformers import LlamaConfig

from longseq.launch.flops import ModelShape, model_flops

LENGTHS = [16384, 32768, 65536, 131072]
LOSS_TOLERANCE = 2e-3
GRADIENT_TOLERANCE = 0.02
LONG_SLOPE = (16384, 65536)
START_S = 15.0  # of a variant: the weights are drawn, kernels are compiled
LEFT_OVER_GIB = 0.5  # workspaces of libraries stay, and are less
Row = dict[str, Any]

NOTE = """One forward and one backward: the median of the repeats after one that warms up. bfloat16, batch 1,
random weights and tokens, all weights and all gradients (bfloat16, allocated before) on the GPU throughout,
no optimizer. "Model TFLOP/s" counts causal attention once and nothing that is recomputed. Peaks are of what
is allocated, weights and gradients included; "forward GiB" is the peak up to the loss. "KiB/token" is the
slope of the peak from the next shorter length. "Host GiB" is what is pinned for checkpoints.

Attention is cuDNN's kernel for everyone, but where "fa4" says otherwise. A variant whose loss, or a norm of
whose gradients (layer 0's q_proj, the last layer's down_proj, the head's), is not the first variant's has no
numbers.

"mini-s's scheme" is the MST paper's own way written anew: MLPs in chunks of 4,096 tokens under layer
checkpoints, the head in 64 chunks whose gradients are made in forward. Only what makes a wrong loss or
gradient is other than in its code: the last tokens are not dropped, and a chunk's gradient has the mean's
factor from the start instead of scaling all that `.grad` holds. DeepSpeed's tiled loss takes the mean inside
of the tile for the same reason: its backward scales the hidden states' gradient, not the weights'."""


class Bench:
    """Runs the variants one after the other and keeps the rows; what was measured is written at once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.num_layers = args.layers or NUM_LAYERS[args.shape]
        shape = ModelShape.from_hf_config(
            LlamaConfig(**SHAPES[args.shape], num_hidden_layers=self.num_layers)
        )
        self.budget = Budget(args.minutes, lambda num_tokens: model_flops(shape, [num_tokens]))
        self.left_out: Row = {}
        self.refused: list[str] = []
        self.facts: Row = {
            "shape": args.shape,
            "layers": self.num_layers,
            "model": SHAPES[args.shape],
            "repeats": args.repeats,
            "flash-attn-4": version_of("flash-attn-4"),
            "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        }
        self.rows: list[Row] = kept_rows(args.out, self.facts) if args.add else []
        for row in self.rows:
            self.budget.add(row["tokens"], row.get("s", 0.0))

    def run(self, variant: Variant) -> None:
        """All lengths of a variant, up to the first that it cannot do."""
        lengths = [tokens for tokens in sorted(self.args.lengths) if self.has_time(variant, tokens)]
        if not lengths:
            return
        held = held_gib()  # by what an earlier variant left behind: these peaks would not be this one's alone
        left_over = {"left over GiB": held} if held > LEFT_OVER_GIB else {}
        model = build(self.args.shape, self.num_layers, self.device)
        prepared = self.prepared(variant, model)
        if prepared is not None:
            hold_gradients(model)
            for num_tokens in lengths:
                if not self.has_time(variant, num_tokens, start_s=0.0):
                    continue
                row = {"key": variant.key, "variant": variant.label, "tokens": num_tokens}
                work = functools.partial(self.measure, model, prepared, num_tokens)
                row |= left_over | attempt(work)
                del work
                self.keep(self.checked(row))
                if "note" in row:
                    break
            prepared.undo()
        del model, prepared
        free()

    def prepared(self, variant: Variant, model: nn.Module) -> Prepared | None:
        """The model as the variant has it; None, with a reason printed, where it cannot be had."""
        try:
            return variant.prepare(model)
        except Exception as error:  # not installed, of another version, or an option that does not fit
            reason = str(error) if isinstance(error, MissingError) else f"{type(error).__name__}: {error}"
        print(f"left out: {variant.key} ({reason})", flush=True)
        self.left_out[variant.key] = reason
        return None

    def has_time(self, variant: Variant, num_tokens: int, start_s: float = START_S) -> bool:
        if self.budget.allows(num_tokens, self.args.repeats + 1, start_s):
            return True
        print(f"no time left: {variant.key} at {num_tokens:,}", flush=True)
        self.left_out[f"{variant.key} at {num_tokens}"] = "no time left"
        return False

    def measure(self, model: nn.Module, prepared: Prepared, num_tokens: int) -> Row:
        """One row's numbers."""
        prepared.forget()
        free()
        ids = draw_tokens(model, num_tokens)
        hold_gradients(model)
        first = run_step(prepared, ids)
        norms = gradient_norms(model)
        steps = [run_step(prepared, ids) for _ in range(self.args.repeats)]
        seconds = statistics.median(step.seconds for step in steps)
        self.budget.add(num_tokens, max(seconds, first.seconds))
        flops = model_flops(ModelShape.from_hf_config(model.config), [num_tokens])
        return {
            "s": seconds,
            "tokens/s": num_tokens / seconds,
            "model TFLOP/s": flops / seconds / 1e12,
            "peak GiB": largest(step.peak_gib for step in steps),
            "forward GiB": largest(step.forward_peak_gib for step in steps),
            "reserved GiB": largest(step.reserved_gib for step in steps),
            "host GiB": host_gib(),
            "loss": first.loss,
            "gradient norms": norms,
        }

    def checked(self, row: Row) -> Row:
        """The row, without its numbers if they are not those of the first variant at this length."""
        truth = next(
            (other for other in self.rows if other["tokens"] == row["tokens"] and "loss" in other), None
        )
        if "note" in row or truth is None:
            return row
        wrong = disagreement(row, truth)
        if wrong is None:
            return row
        self.refused.append(f"{row['key']} at {row['tokens']:,}: {wrong}")
        # In place: who called stops at the note.
        for name in [name for name in row if name not in ("key", "variant", "tokens")]:
            del row[name]
        row["note"] = f"refused: {wrong}"
        return row

    def keep(self, row: Row) -> None:
        self.rows = [other for other in self.rows if not same_case(other, row)]
        self.rows.append(row)
        print({name: value for name, value in row.items() if name != "gradient norms"}, flush=True)
        self.write(show=False)

    def write(self, *, show: bool) -> None:
        """Keep what there is so far; a run that is cut short has kept its rows."""
        rows = with_slopes(self.rows)
        report.write(
            "decoder",
            f"A model of the shape {self.args.shape} ({self.num_layers} layers), forward + backward",
            rows,
            self.args.out,
            tables=tables(rows),
            note=NOTE,
            show=show,
            **self.facts,
            left_out=self.left_out,
        )


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def gradient_norms(model: nn.Module) -> Row:
    """Of a weight at the bottom, one at the top, and the head's."""
    layers = model.model.layers
    weights = {
        "layer 0 q_proj": layers[0].self_attn.q_proj.weight,
        f"layer {len(layers) - 1} down_proj": layers[-1].mlp.down_proj.weight,
        "lm_head": model.lm_head.weight,
    }
    # The dtype is that of the sum; a copy of a gradient would be 2 GiB for the head.
    norms = {
        name: torch.linalg.vector_norm(weight.grad, dtype=torch.float32) for name, weight in weights.items()
    }
    return {name: norm.item() for name, norm in norms.items()}


def disagreement(row: Row, truth: Row) -> str | None:
    """What differs from the first variant's, by more than roundings; a NaN does."""
    if not abs(row["loss"] - truth["loss"]) <= LOSS_TOLERANCE:
        return f"the loss is {row['loss']:.5f}, that of {truth['key']} {truth['loss']:.5f}"
    for name, norm in row["gradient norms"].items():
        wanted = truth["gradient norms"][name]
        if not abs(norm - wanted) <= GRADIENT_TOLERANCE * wanted:
            return f"the norm of {name}'s gradient is {norm:.5g}, with {truth['key']} {wanted:.5g}"
    return None


def largest(values: Any) -> float | None:
    """None where there are no peaks, on a CPU."""
    found = [value for value in values if value is not None]
    return max(found, default=None)


def same_case(one: Row, other: Row) -> bool:
    return (one["key"], one["tokens"]) == (other["key"], other["tokens"])


def kept_rows(out: Path | None, facts: Row) -> list[Row]:
    """Rows of an earlier run in `out`, as they were measured.

    Raises:
        SystemExit: They are of another model, device or version.
    """
    path = None if out is None else out / "decoder.json"
    if path is None or not path.exists():
        return []
    earlier = json.loads(path.read_text())
    here = {**facts, **report.environment()}
    there = {**earlier, **earlier["environment"]}
    for name in ("shape", "layers", "allocator", "device", "versions"):
        if here[name] != there[name]:
            raise SystemExit(f"--add: {path} has {name}={there[name]!r}, here it is {here[name]!r}.")
    return earlier["rows"]


def with_slopes(rows: list[Row]) -> list[Row]:
    """Copies with the slopes of each variant's peaks, its lengths together and rising."""
    found: list[Row] = []
    for key in dict.fromkeys(row["key"] for row in rows):
        peaks: dict[int, float] = {}
        for row in sorted((row for row in rows if row["key"] == key), key=lambda row: row["tokens"]):
            row = {name: value for name, value in row.items() if not name.startswith("KiB/token")}
            tokens, peak = row["tokens"], row.get("peak GiB")
            if peak is not None:
                if peaks:
                    row["KiB/token"] = slope(max(peaks), tokens, peaks[max(peaks)], peak)
                if tokens == LONG_SLOPE[1] and LONG_SLOPE[0] in peaks:
                    name = f"KiB/token from {LONG_SLOPE[0]:,}"
                    row[name] = slope(LONG_SLOPE[0], tokens, peaks[LONG_SLOPE[0]], peak)
                peaks[tokens] = peak
            found.append(row)
    return found


def slope(tokens_before: int, tokens: int, gib_before: float, gib: float) -> float:
    """KiB a token."""
    return (gib - gib_before) * 2**20 / (tokens - tokens_before)


def tables(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """A table for each length, its variants in their usual order, no column of nothing."""
    order = ["variant", "s", "tokens/s", "model TFLOP/s", "peak GiB", "forward GiB", "KiB/token"]
    order += [f"KiB/token from {LONG_SLOPE[0]:,}", "host GiB", "left over GiB", "loss", "note"]
    found = []
    for num_tokens in sorted({row["tokens"] for row in rows}):
        of_length = sorted(
            (row for row in rows if row["tokens"] == num_tokens), key=lambda row: place(row["key"])
        )
        columns = [name for name in order if any(row.get(name) is not None for row in of_length)]
        shown = [{name: row.get(name) for name in columns} for row in of_length]
        found.append((f"{num_tokens:,} tokens", shown))
    return found


def parser() -> argparse.ArgumentParser:
    options = report.arguments(__doc__.splitlines()[0])
    options.add_argument("--variants", nargs="+", metavar="NAME", help="names, or beginnings of names")
    options.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    options.add_argument("--layers", type=int, help="default: the shape's")
    options.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    options.add_argument("--repeats", type=int, default=1)
    options.add_argument("--minutes", type=float, help="begin nothing that would end later")
    options.add_argument("--add", action="store_true", help="keep the other rows that are in --out already")
    return options


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if not torch.cuda.is_available() and args.shape != "tiny":
        raise SystemExit("A model of this size needs a CUDA GPU; on a CPU give --shape tiny.")
    try:
        variants = choose(args.variants)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    bench = Bench(args)
    for variant in variants:
        bench.run(variant)
    bench.write(show=True)
    if args.out is not None:
        decoder_plot.draw(with_slopes(bench.rows), args.out / "decoder.png")
    if bench.refused:
        raise SystemExit("refused:\n" + "\n".join(bench.refused))


if __name__ == "__main__":
    main()
