"""Forward + backward of a Llama-3-8B-shaped model on one GPU: tokens/s, peak memory, and its slope.

python benchmarks/llama_step.py --lengths 16384 32768 65536 --out benchmarks/results
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import report
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from longseq.distributed import apply_ulysses
from longseq.launch.flops import ModelShape, model_flops
from longseq.mst import apply_mini_sequence

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 1048576,
    "rope_theta": 500000.0,
}
LOSS_TOLERANCE = 2e-3


def build(num_layers: int, attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA_3_8B, num_hidden_layers=num_layers)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    model.config.use_cache = False
    return model.train()


def checkpoint_layers(model: LlamaForCausalLM) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def plain(model: LlamaForCausalLM) -> None:
    checkpoint_layers(model)


def liger(model: LlamaForCausalLM) -> None:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(model=model)
    checkpoint_layers(model)


def longseq(model: LlamaForCausalLM) -> None:
    apply_ulysses(model)
    apply_mini_sequence(model)


VARIANTS: dict[str, Callable[[LlamaForCausalLM], None]] = {
    "transformers, layer checkpoints": plain,
    "Liger, layer checkpoints": liger,
    "longseq (MST + CCE), layer checkpoints": longseq,
}


def measure(model: nn.Module, num_tokens: int, repeats: int) -> dict[str, float]:
    torch.manual_seed(1)
    ids = torch.randint(0, LLAMA_3_8B["vocab_size"], (1, num_tokens), device="cuda")
    times, loss = [], 0.0
    for _ in range(repeats + 1):
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        started = time.perf_counter()
        value = model(input_ids=ids, labels=ids).loss
        value.backward()
        loss = value.item()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        del value  # gradients stay, as they do under accumulation
    return {
        "s": statistics.median(times[1:]),
        "loss": loss,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
    }


def main() -> None:
    parser = report.arguments(__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 32768, 65536])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    rows: list[dict] = []
    losses: dict[int, float] = {}
    for name, prepare in VARIANTS.items():
        model = build(args.layers, "sdpa")
        try:
            prepare(model)
        except ImportError as error:
            print(f"left out: {name} ({error})")
            continue
        rows += run_lengths(name, model, args, losses)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    title = f"Llama-3-8B shape ({args.layers} layers), forward + backward, bf16, batch 1, random tokens"
    report.write("llama_step", title, rows, args.out, layers=args.layers, model=LLAMA_3_8B)


def run_lengths(name: str, model: LlamaForCausalLM, args, losses: dict[int, float]) -> list[dict]:
    shape = ModelShape.from_hf_config(model.config)
    rows: list[dict] = []
    for num_tokens in sorted(args.lengths):
        row: dict = {"variant": name, "tokens": num_tokens}
        try:
            found = measure(model, num_tokens, args.repeats)
        except torch.cuda.OutOfMemoryError:
            rows.append({**row, "s": "out of memory"})
            break
        if abs(found["loss"] - losses.setdefault(num_tokens, found["loss"])) > LOSS_TOLERANCE:
            raise SystemExit(
                f"{name} at {num_tokens}: loss {found['loss']} is not {losses[num_tokens]}; nothing is kept."
            )
        row |= found
        row["tokens/s"] = num_tokens / found["s"]
        row["model TFLOP/s"] = model_flops(shape, [num_tokens]) / found["s"] / 1e12
        if rows:
            earlier = rows[-1]
            row["slope KiB/token"] = (
                (row["peak GiB"] - earlier["peak GiB"]) * 2**20 / (num_tokens - earlier["tokens"])
            )
        rows.append(row)
        print(row, flush=True)
    return rows


if __name__ == "__main__":
    main()
