"""A streamed layer's moments, beside what is really alive on a CPU when its kernels are called."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from gloo import run_cases
from memory_samples import GPU, HOST, NOTHING, LiveBytes, exchanges_of_copies, measured_knobs

from longseq.distributed import ProcessGroups, apply_ulysses, shard_batch
from longseq.distributed import attention as attention_module
from longseq.launch.config_file import parse_config
from longseq.launch.planner.memory_plain import PlainLayers
from longseq.launch.planner.memory_sizes import attending, kernel_workspace
from longseq.launch.planner.memory_step import TOKEN_BYTES, Step
from longseq.launch.planner.memory_streamed import ATTENTION, MLP, StreamedLayers
from longseq.launch.planner.workload import Workload
from longseq.mst import apply_mini_sequence, mlp_half
from longseq.mst.layer_memory import SavedAttention
from longseq.mst.placement import Placement

TOKENS, NUM_LAYERS = 1024, 3
EXCHANGE = "exchange"
RANKS = 2
NEAR = 0.02
FIELDS = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 64,
}
SAVED = {
    False: NOTHING,
    "gpu": SavedAttention(gpu_layers=NUM_LAYERS),
    "host": SavedAttention(host=True),
    "all": SavedAttention(gpu_layers=NUM_LAYERS, everything=True),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "one group": ("llama", {"head_groups": 1}),
    "two groups": ("llama", {"head_groups": 2}),
    "four groups": ("llama", {"head_groups": 4}),
    "inputs on the host": ("llama", {"head_groups": 2, "checkpoints": HOST}),
    "every second input": ("llama", {"head_groups": 2, "checkpoints": Placement(gpu_layers=0, every=2)}),
    "output saved": ("llama", {"head_groups": 2, "save_attention": "gpu"}),
    "output saved, four groups": ("llama", {"head_groups": 4, "save_attention": "gpu"}),
    "output on the host": ("llama", {"head_groups": 4, "save_attention": "host", "checkpoints": HOST}),
    "all saved": ("llama", {"head_groups": 2, "save_attention": "all"}),
    "all saved, four groups": ("llama", {"head_groups": 4, "save_attention": "all"}),
    "all saved, four groups, norms around": ("gemma2", {"head_groups": 4, "save_attention": "all"}),
    "norms of heads": ("qwen3", {"head_groups": 2}),
    "fused maps": ("phi3", {"head_groups": 2}),
    "norms around": ("gemma2", {"head_groups": 2}),
    "norms over all heads": ("olmo2", {"head_groups": 2}),
}

SHARED: dict[str, dict[str, Any]] = {
    "two groups": {"head_groups": 2},
    "a key/value head to both": {"head_groups": 4},
    "a key/value head to both, output saved": {"head_groups": 4, "save_attention": "gpu"},
    "a key/value head to both, all saved": {"head_groups": 4, "save_attention": "all"},
}
"""Of ranks that share a sequence: the groups of the first are exchanged beside each other."""


def fields_of(family: str) -> dict[str, Any]:
    own = {
        "qwen3": {"head_dim": 8},
        "phi3": {"pad_token_id": 0},
        "olmo2": {"eos_token_id": 1},
        "gemma2": {"head_dim": 8, "attn_logit_softcapping": None, "sliding_window": 2 * TOKENS},
    }
    return FIELDS | own.get(family, {})


def watched_backward(
    family: str,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    groups: ProcessGroups | None = None,
) -> dict[str, list[int]]:
    """Bytes alive in backward, beside the weights, as each attention and each MLP kernel is entered.

    Where ranks share the sequence, as each exchange of attention's backward is, too.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = AutoConfig.for_model(family, **fields_of(family))
    model = AutoModelForCausalLM.from_config(architecture, attn_implementation="eager").train()
    batch = {"input_ids": torch.arange(TOKENS)[None] % FIELDS["vocab_size"]}
    if groups is not None:
        apply_ulysses(model, groups)
        shard = shard_batch(batch | {"labels": batch["input_ids"]}, groups)
        batch = {name: value for name, value in shard.items() if name != "shift_labels"}
    tokens = batch["input_ids"].numel()
    apply_mini_sequence(model, tile_tokens=tokens // 4, attention_kernel="cpu", **options)
    live = LiveBytes([*model.parameters(), *model.buffers()])
    found: dict[str, list[int]] = {ATTENTION: [], MLP: [], EXCHANGE: []}

    def watched(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            found[name].append(live.now)
            return function(*args, **kwargs)

        return call

    kernel = attention_module.KERNELS["cpu"]
    stand_in = kernel._replace(backward=watched(ATTENTION, kernel.backward))
    monkeypatch.setitem(attention_module.KERNELS, "cpu", stand_in)
    own = mlp_half.gated_activation_backward_
    monkeypatch.setattr(mlp_half, "gated_activation_backward_", watched(MLP, own))
    with live:
        loss = model.model(**batch).last_hidden_state.sum()
        with exchanges_of_copies(lambda: found[EXCHANGE].append(live.now)):
            loss.backward()
    return found


def estimated(
    family: str, options: dict[str, Any], ranks: int = 1
) -> tuple[dict[str, list[int]], dict[str, int]]:
    """The most of each layer, from the last to the first, and what of it is not there yet in a kernel."""
    tokens = TOKENS // ranks
    values = {
        "model": {"config": {"model_type": family, **fields_of(family)}},
        "data": {"tokenizer": "bytes"},
        "train": {"precision": "float32"},
    }
    work = Workload.from_config(parse_config(values))
    work = replace(work, adapts_groups=False, layer=replace(work.layer, kernel="cpu"))
    knobs = measured_knobs(
        work,
        TOKENS,
        head_groups=options["head_groups"],
        inputs=options.get("checkpoints", GPU),
        attention=SAVED[options.get("save_attention", False)],
        tile_tokens=tokens // 4,
        ulysses_degree=ranks,
    )
    groups = knobs.head_groups
    step = Step(work, knobs, "none")
    sizes = attending(step.sizes, work.layer.heads, ranks, groups)
    # Not there yet when a kernel is entered: its own sums, and the gradients that it gives.
    to_come = kernel_workspace("cpu", sizes, groups, 2, 4) + sizes.heads // groups
    # No LM head is run, nor a cuBLAS; of the final norm there is a gradient.
    # The head is not run, nor has the decoder labels and what is made of them.
    not_run = work.numel("head") * 4 + (TOKEN_BYTES - 8) * tokens
    found: dict[str, list[int]] = {ATTENTION: [], MLP: []}
    for moment in StreamedLayers(step).moments():
        if moment.name in found:
            batch = dict(step.throughout(moment))["batch and rotary embedding"]
            total = batch + sum(size for _, size in moment.parts) - not_run
            found[moment.name].append(total)
    return found, {ATTENTION: to_come, MLP: 0, EXCHANGE: 0}


@pytest.mark.parametrize("case", CASES)
def test_a_layers_backward_holds_what_the_plan_says(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, options = CASES[case]
    plan, to_come = estimated(family, options)
    alive = watched_backward(family, monkeypatch, options)
    for name, of_layers in plan.items():
        assert most_of_layers(alive, to_come, name) == pytest.approx(of_layers, rel=NEAR), name


def most_of_layers(alive: dict[str, list[int]], to_come: dict[str, int], name: str) -> list[int]:
    calls = len(alive[name]) // NUM_LAYERS
    of_layers = [max(alive[name][start : start + calls]) for start in range(0, len(alive[name]), calls)]
    return [size + to_come[name] for size in of_layers]


def shared_case(options: dict[str, Any]) -> dict[str, list[int]]:
    groups = ProcessGroups.create(RANKS)
    with pytest.MonkeyPatch.context() as monkeypatch:
        return watched_backward("llama", monkeypatch, options, groups)


@pytest.fixture(scope="module")
def shared() -> dict[str, list[dict[str, list[int]]]]:
    return run_cases(RANKS, {name: (shared_case, {"options": options}) for name, options in SHARED.items()})


@pytest.mark.slow  # two processes are started
@pytest.mark.parametrize("case", SHARED)
def test_ranks_of_a_sequence_hold_what_the_plan_says(case: str, shared: dict[str, list]) -> None:
    plan, to_come = estimated("llama", SHARED[case], RANKS)
    for alive in shared[case]:
        in_kernels = most_of_layers(alive, to_come, ATTENTION)
        in_exchanges = most_of_layers(alive, to_come, EXCHANGE)
        found = [max(both) for both in zip(in_kernels, in_exchanges, strict=True)]
        assert found == pytest.approx(plan[ATTENTION], rel=NEAR)
        assert most_of_layers(alive, to_come, MLP) == pytest.approx(plan[MLP], rel=NEAR)


@pytest.mark.parametrize("tile_tokens", [None, TOKENS // 4])
@pytest.mark.parametrize("numbers", ["float32", "bf16 autocast", "bf16"])
def test_layers_that_are_not_streamed_keep_what_the_plan_says(numbers: str, tile_tokens: int | None) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {
        "model": {"config": {"model_type": "llama", **FIELDS}},
        "data": {"tokenizer": "bytes"},
        "train": {"precision": "float32" if numbers == "float32" else "bf16"},
        "optimizer": {"name": "apollo-mini", "weights": "bf16"} if numbers == "bf16" else {},
    }
    work = Workload.from_config(parse_config(values))
    knobs = measured_knobs(work, TOKENS, stream=False, head_groups=1, tile_tokens=tile_tokens)
    step = Step(work, knobs, "none")
    batch = dict(step.throughout(next(PlainLayers(step).moments())))["batch and rotary embedding"]
    kept = sum(size for _, size in PlainLayers(step).kept_by_all)
    # What comes in, and the normalised output that the head would take.
    kept += batch - (TOKEN_BYTES - 8) * TOKENS + 2 * step.sizes.hidden

    dtype = torch.bfloat16 if numbers == "bf16" else torch.float32
    architecture = AutoConfig.for_model("llama", **FIELDS)
    model = AutoModelForCausalLM.from_config(architecture, dtype=dtype, attn_implementation="eager").train()
    apply_ulysses(model, ProcessGroups())
    apply_mini_sequence(model, tile_tokens=tile_tokens, checkpoints="none")
    live = LiveBytes([*model.parameters(), *model.buffers()])
    ids = torch.arange(TOKENS)[None] % FIELDS["vocab_size"]
    with live, torch.autocast("cpu", torch.bfloat16, enabled=numbers == "bf16 autocast"):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    assert live.now == pytest.approx(kept, rel=0.03)
