"""The claims that `claims.py` goes through: what a paper says, on what, and what makes our number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import claims_numbers as numbers
from claims_results import Found, Results


@dataclass(frozen=True)
class Claim:
    """One line of the table.

    Attributes:
        technique: What it is of.
        arxiv: The paper.
        key: Its name in `claims.json`, with the paper's.
        text: What is claimed.
        number: The paper's.
        machine: On which it was had; empty where the claim depends on none.
        command: Which makes our number.
        find: Our number; raises `MissingError` where there is none.
    """

    technique: str
    arxiv: str
    key: str
    text: str
    number: str
    machine: str
    command: str
    find: Callable[[Results], Found]


mst = partial(Claim, "MST", "2407.15892")
cce = partial(Claim, "Cut Cross-Entropy", "2411.09009")
apollo = partial(Claim, "APOLLO", "2412.05270")
ulysses = partial(Claim, "DeepSpeed-Ulysses", "2309.14509")

A100 = "one A100 of 80 GB"
GEMMA = "Gemma 2 2B, 8,192 tokens, 256,000 words, A100-SXM4-80GB"
RESULTS = "--out benchmarks/results"
LONGEST = "python benchmarks/end_to_end.py --only '80gb-*' --phases longest train --out DIR"
TIMES = "python benchmarks/end_to_end.py --only plain mst --phases times --out DIR"
LM_HEAD = f"python benchmarks/lm_head.py {RESULTS}"
OPTIMIZER = f"python benchmarks/optimizer.py {RESULTS}"
BENCH = "longseq bench CONFIG sequence.length=max --json FILE"

CLAIMS = (
    mst(
        "longer-than-plain",
        "Llama-3-8B trains on sequences 12 times as long as without",
        "12 times; 18 and 24 times for Qwen2-7B and Gemma-2-9B",
        A100,
        LONGEST,
        numbers.longer_than_plain,
    ),
    mst(
        "longer-than-checkpoints",
        "and several times as long as with layer checkpoints",
        "4 times",
        A100,
        LONGEST,
        numbers.longer_than_checkpoints,
    ),
    mst("60k", "60k tokens of Llama-3-8B on one GPU", "60k", A100, LONGEST, numbers.sixty_thousand),
    mst(
        "throughput-kept",
        "At the speed of layer checkpoints",
        "3,195 against 3,271 tokens/s at 8,192 tokens, batch 2 (-2.4 %)",
        A100,
        TIMES,
        numbers.throughput_kept,
    ),
    mst(
        "head-memory",
        "The LM head's memory at 80k tokens",
        "59.92 GB -> 9.12 GB in 16 parts (-84.8 %; -89.8 % in 32)",
        A100,
        LM_HEAD,
        numbers.head_memory,
    ),
    mst(
        "linear-in-gpus",
        "With Ulysses, the longest sequence grows with the GPUs",
        "linearly",
        "A100 of 80 GB",
        BENCH,
        numbers.linear_in_gpus,
    ),
    cce("loss-memory", "Memory of the loss", "24,000 MB -> 1 MB", GEMMA, LM_HEAD, numbers.loss_memory),
    cce(
        "gradient-memory",
        "Memory of loss and gradient",
        "28,000 MB -> 1,164 MB, of which 1,161 are the gradients",
        GEMMA,
        LM_HEAD,
        numbers.gradient_memory,
    ),
    cce(
        "loss-speed",
        "Time of loss and gradient, filtered",
        "145 ms against 208 ms of plain PyTorch",
        GEMMA,
        LM_HEAD,
        numbers.loss_speed,
    ),
    cce(
        "loss-curves",
        "Training curves that cannot be told apart from plain ones",
        "no difference to be seen; pre-training needs exact gradients",
        "",
        f"python benchmarks/loss_curves.py {RESULTS}",
        numbers.loss_curves,
    ),
    apollo(
        "state-memory",
        "States of an m x n matrix, m <= n",
        "2 n r + 2 numbers, 2 n + 2 with Mini (AdamW 2 m n)",
        "",
        OPTIMIZER,
        numbers.state_memory,
    ),
    apollo(
        "under-12gb",
        "A 7B model trains under 12 GB with 8-bit weights",
        "under 12 GB; 11 GB by its README",
        "LLaMA-7B, batch 1, A100",
        f"python benchmarks/optimizer_memory.py --shape llama-7b {RESULTS}",
        numbers.under_twelve,
    ),
    apollo(
        "three-times",
        "About 3 times AdamW's throughput, by larger batches",
        "about 3 times; micro-batch 16 against 4",
        "LLaMA-7B, 8 A100 of 80 GB",
        f"python benchmarks/batch_throughput.py {RESULTS}",
        numbers.three_times,
    ),
    apollo(
        "step-time",
        "An optimizer step no slower than AdamW's",
        "0.159 s (Mini 0.142) against 0.173 s for 7B",
        "A100",
        OPTIMIZER,
        numbers.step_time,
    ),
    apollo(
        "perplexity",
        "Perplexity as AdamW's or better in pre-training",
        "31.55 (Mini 31.93) against 34.06: 60M parameters, C4, AdamW's row of an earlier paper",
        "",
        f"python benchmarks/optimizer_pretraining.py --corpus CORPUS {RESULTS}",
        numbers.perplexity,
    ),
    ulysses(
        "linear-in-gpus",
        "The longest sequence grows linearly with the GPUs",
        "linearly",
        "",
        BENCH,
        numbers.linear_in_gpus,
    ),
    ulysses(
        "volume",
        "What a rank sends falls with the number of ranks",
        "4 N h / P numbers a layer forward: N tokens, h wide, P ranks",
        "",
        f"python benchmarks/sequence_parallel.py {RESULTS}",
        numbers.volume,
    ),
)
