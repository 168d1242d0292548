"""Lengths that fit in memory: all layers of the model, with attention computed in few of them.

A step at a million tokens is three quarters of an hour of attention. Its memory can be had without: a stub
takes attention's place in all but the last layers, and allocates what the kernel would. So the allocator
sees a whole step, forward and backward through all layers, and its peak is that of a real run. The loss is
of no use, and nothing is trained: a length found here is "memory-verified".
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
import torch
from decoder_model import (
    NUM_LAYERS,
    SHAPES,
    Budget,
    Prepared,
    attempt,
    build,
    draw_tokens,
    free,
    hold_gradients,
    host_gib,
    run_step,
)
from torch import nn

from longseq.launch.bench.stub_attention import StubAttention
from longseq.mst import apply_mini_sequence
from longseq.mst.pinned_slab import PinnedSlab
from longseq.mst.placement import Placement

WARM_UP_TOKENS = 4096
STEP_SIZE = 1e-6
Row = dict[str, Any]

NOTE = """Memory-verified, not trained: one forward and one backward through all layers, in which attention is
computed in the last "real" layers alone. In the others a stub returns zeros and takes the memory that the
kernel would, for as long: float32 sums of dq and dk, dv of every query head (cuDNN), or float32 dq, dk, dv
(fa4), beside the three gradients. At 131,072 tokens of 32 query and 8 key/value heads of 128 that is to the
MiB what was measured of both kernels on an H200 on 22 November 2026: 5,648 and 4,640. Where only some of the
model's layers are run ("8 of 32"), the weights of the others and what they would keep for backward are held
beside the step, on the GPU and in pinned host memory; a layer's own work is the same in each. Seconds are of
the layers run, without the stubbed attention and with the pinning of new host memory: no training time.
bfloat16, batch 1, random weights and tokens. "Reserved" is what PyTorch's allocator held at its peak, "host"
what is pinned for checkpoints."""


def stub_attention(model: nn.Module, num_real: int, kernel: str) -> None:
    """Put the stub into all but the last layers; before mini-sequences are applied or after."""
    layers = model.model.layers
    for layer in layers[: max(0, len(layers) - num_real)]:
        layer.self_attn.longseq_attention = StubAttention(kernel)


def step_in_backward(model: nn.Module) -> None:
    """Each weight is stepped as soon as its gradient is there, which is then gone: plain descent."""

    def step(param: torch.Tensor) -> None:
        param.data.add_(param.grad, alpha=-STEP_SIZE)
        param.grad = None

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step)


@dataclass(frozen=True)
class OtherLayers:
    """Layers that the whole model has and the probe does not run: their bytes are held all the same."""

    count: int
    places: Placement

    def held(self, model: nn.Module, num_tokens: int, *, gradients: bool) -> list[Any]:
        """Weights (and gradients) on the GPU, and layer inputs where the whole model would keep them."""
        layers, embedding = model.model.layers, model.get_input_embeddings().weight
        if self.count == 0:
            return []
        layer_bytes = sum(param.nbytes for param in layers[0].parameters()) * (2 if gradients else 1)
        input_bytes = num_tokens * embedding.shape[1] * embedding.itemsize
        kept = {
            where: self.places.count(where, len(layers) + self.count) - self.places.count(where, len(layers))
            for where in ("gpu", "host")
        }
        sizes = [layer_bytes] * self.count + [input_bytes] * kept["gpu"]
        held: list[Any] = [torch.empty(size, dtype=torch.uint8, device=embedding.device) for size in sizes]
        if kept["host"]:
            held.append(PinnedSlab(embedding.device).take(input_bytes * kept["host"]))
        return held


def probe(
    model: nn.Module, prepared: Prepared, num_tokens: int, others: OtherLayers, *, holds_gradients: bool
) -> Row:
    """One step, after a short one that compiles what there is to compile."""
    for tokens in (min(WARM_UP_TOKENS, num_tokens), num_tokens):
        free()
        if holds_gradients:
            hold_gradients(model)
        held = others.held(model, tokens, gradients=holds_gradients)
        step = run_step(prepared, draw_tokens(model, tokens))
        host = host_gib()
        del held
    return {
        "s": step.seconds,
        "peak GiB": step.peak_gib,
        "forward GiB": step.forward_peak_gib,
        "reserved GiB": step.reserved_gib,
        "host GiB": host,
    }


def placement(args: argparse.Namespace) -> Placement:
    """Where layers' inputs wait, from the options."""
    return Placement(args.gpu_layers, args.every, host=args.checkpoints == "host")


def add_options(options: argparse.ArgumentParser) -> None:
    """The options of a probe."""
    group = options.add_argument_group("memory probe")
    group.add_argument("--probe", type=int, nargs="+", metavar="TOKENS", help="lengths to verify, alone")
    group.add_argument("--real-layers", type=int, default=1, help="the last so many layers attend")
    group.add_argument(
        "--of-layers", type=int, help="--layers are run of so many, the rest are held as bytes"
    )
    group.add_argument("--checkpoints", choices=("gpu", "host"), default="host")
    group.add_argument("--every", type=int, default=1, help="keep each so many-th layer's input")
    group.add_argument("--gpu-layers", type=int, default=1, help="of the last so many on the GPU")
    group.add_argument("--head-groups", default="auto", help="a number, or auto")
    group.add_argument("--save-attention", type=int, default=0, help="of the last so many layers, on the GPU")
    group.add_argument("--attention-kernel", choices=("cudnn", "fa4"), default="cudnn")
    group.add_argument(
        "--step-in-backward", action="store_true", help="no gradient outlives its weight's step"
    )


def main(args: argparse.Namespace) -> None:
    """Probe one length after the other, up to the first that does not fit."""
    on_gpu = torch.cuda.is_available()
    num_layers = args.layers or NUM_LAYERS[args.shape]
    all_layers = args.of_layers or num_layers
    if all_layers < num_layers:
        raise SystemExit(f"--of-layers {all_layers} is fewer than the {num_layers} that are run.")
    groups = args.head_groups if args.head_groups == "auto" else int(args.head_groups)
    places = placement(args)
    model = build(args.shape, num_layers, "cuda" if on_gpu else "cpu")
    stub_attention(model, args.real_layers, args.attention_kernel)
    handle = apply_mini_sequence(
        model,
        head_groups=groups,
        checkpoints=places,
        save_attention=args.save_attention,
        attention_kernel=args.attention_kernel if on_gpu else "auto",
    )
    if args.step_in_backward:
        step_in_backward(model)
    prepared = Prepared(lambda ids: model(input_ids=ids, labels=ids).loss, undo=handle.undo)
    settings = {
        "layers": str(num_layers) if all_layers == num_layers else f"{num_layers} of {all_layers}",
        "real": min(args.real_layers, num_layers),
        "checkpoints": text_of(places, all_layers),
        "head groups": args.head_groups,
        "attention saved": args.save_attention,
        "kernel": args.attention_kernel,
        "gradients": "one at a time" if args.step_in_backward else "held",
    }
    rows = kept_rows(args.out, args.shape) if args.add else []
    budget = Budget(args.minutes)
    others = OtherLayers(all_layers - num_layers, places)
    for num_tokens in sorted(args.probe):
        if not budget.allows(num_tokens, 1):
            print(f"no time left: {num_tokens:,} tokens", flush=True)
            break
        held = not args.step_in_backward
        found = attempt(functools.partial(probe, model, prepared, num_tokens, others, holds_gradients=held))
        budget.add(num_tokens, found.get("s", 0.0))
        case = {"tokens": num_tokens, **settings}
        rows = [other for other in rows if any(other.get(name) != case[name] for name in case)]
        rows.append(case | found)
        write(rows, args, show=False)
        print(rows[-1], flush=True)
        if "note" in found:
            break
    prepared.undo()
    write(rows, args, show=True)


def text_of(places: Placement, num_layers: int) -> str:
    """How many layers' inputs are kept where."""
    counts = [(places.count(where, num_layers), where) for where in ("gpu", "host", "rebuild")]
    return ", ".join(f"{count} {where}" for count, where in counts if count)


def kept_rows(out: Path | None, shape: str) -> list[Row]:
    """Rows of earlier probes in `out`; each says its own settings.

    Raises:
        SystemExit: They are of another model or device.
    """
    path = None if out is None else out / "decoder_probe.json"
    if path is None or not path.exists():
        return []
    earlier = json.loads(path.read_text())
    if (earlier["shape"], earlier["environment"]["device"]) != (shape, report.environment()["device"]):
        raise SystemExit(f"--add: {path} is of another shape or device.")
    return earlier["rows"]


def write(rows: list[Row], args: argparse.Namespace, *, show: bool) -> None:
    """Keep what there is so far."""
    report.write(
        "decoder_probe",
        f"Memory-verified lengths, {args.shape}, forward + backward",
        rows,
        args.out,
        note=NOTE,
        show=show,
        shape=args.shape,
        model=SHAPES[args.shape],
        allocator=os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
    )
