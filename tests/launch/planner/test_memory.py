"""Peaks of steps that were measured on GPUs, retrodicted; and what a plan must never get backwards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from memory_samples import EVERYTHING, GIB, HOPPER, HOST, NOTHING, measured_knobs, measured_work

from longseq.launch.planner.machine import Machine
from longseq.launch.planner.memory import MemoryEstimate, estimate_memory
from longseq.launch.planner.memory_layers import LayerMemory
from longseq.launch.planner.memory_sizes import Sizes, kernel_workspace
from longseq.mst.layer_memory import SavedAttention
from longseq.mst.placement import Placement

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
NEAR = 0.002
"""What a plan may be off by, so that every part of it shows; what a user is promised is 5 %."""
LESS_NEAR = {"1b adamw, 4k, not streamed": 0.006, "1b adamw, 8k, not streamed": 0.006}
LESS_NEAR["1b apollo, 16k, two micro-batches"] = 0.006
"""transformers' own layers, and temporary tensors of APOLLO's step, are counted less closely."""
NO_STREAM = {"stream": False, "head_groups": 1}
ZERO_3 = {"zero_stage": 3, "ulysses_degree": 4, "data_degree": 1}

# Peaks in bytes of a step's forward, backward and optimizer step, measured on 26 November 2026 on one with
# four H100s (benchmarks/plan.py), with tiles and groups of heads as the layers themselves choose them.
PHASES: dict[str, tuple[tuple[Any, ...], int, dict[str, Any], tuple[int, int, int]]] = {
    "8b mini, 8k, gpu": (("8b", "mini"), 8192, {}, (29207293952, 30189877248, 24554881024)),
    "8b mini, 16k, gpu, all saved": (
        ("8b", "mini"),
        16384,
        {"attention": EVERYTHING},
        (47609999360, 47508256256, 24559140864),
    ),
    "8b mini, 32k, gpu": (("8b", "mini"), 32768, {}, (37217300480, 37115033088, 24567660544)),
    "8b mini, 32k, every 4th on gpu": (
        ("8b", "mini"),
        32768,
        {"inputs": Placement(gpu_layers=0, every=4, host=False)},
        (30774849536, 30964102656, 24567660544),
    ),
    "8b mini, 64k, gpu": (("8b", "mini"), 65536, {}, (46630892032, 46527575552, 24584699904)),
    "8b mini, 64k, host": (
        ("8b", "mini"),
        65536,
        {"inputs": HOST},
        (29987893760, 29884577280, 24584699904),
    ),
    "8b mini, 64k, host, output saved": (
        ("8b", "mini"),
        65536,
        {"inputs": HOST, "attention": SavedAttention(gpu_layers=32)},
        (47436198400, 47332881920, 24584699904),
    ),
    "1b adamw, 8k, gpu": (("1b",), 8192, {}, (18855039488, 21036544512, 19846893056)),
    "1b adamw, 8k, not streamed": (("1b",), 8192, NO_STREAM, (26522259456, 25767621120, 19842632704)),
    "1b adamw, 4k, not streamed": (("1b",), 4096, NO_STREAM, (21165314048, 21114558464, 19842632704)),
    "1b adamw, 64k, host": (("1b",), 65536, {"inputs": HOST}, (19758519296, 22815021056, 19876711936)),
    "3b adamw, 16k, gpu": (("3b",), 16384, {}, (48374353920, 53493063168, 51498863104)),
    "3b adamw, 64k, host": (("3b",), 65536, {"inputs": HOST}, (45406657536, 56084963328, 51549488640)),
    "1b apollo, 16k, two micro-batches": (
        ("1b", "apollo"),
        16384,
        {"accumulation": 2},
        (18374521856, 17915277312, 13210188288),
    ),
    "1b lora, 64k, gpu": (("1b", "adamw", True), 65536, {}, (8622529024, 9831669760, 2737677824)),
    "1b ZeRO-1, optimizer on the host, 32k": (
        ("1b",),
        32768,
        {"zero_stage": 1, "offload_optimizer": True},
        (7778311680, 15305720832, 8018159104),
    ),
    "3b ZeRO-2, four GPUs, 8k": (
        ("3b",),
        8192,
        {"zero_stage": 2, "data_degree": 4},
        (19950137856, 22636024320, 22501478912),
    ),
    "8b ZeRO-3, sp 4, 64k, gpu": (("8b",), 65536, ZERO_3, (45221739008, 45119996416, 40235068416)),
    "8b ZeRO-3, sp 4, 64k, all saved": (
        ("8b",),
        65536,
        ZERO_3 | {"attention": EVERYTHING},
        (60321233408, 60219490816, 40235068416),
    ),
}


HELD_THEN = {"3b adamw, 64k, host": 65536 * 5120 * 2 // 2}
"""Bytes at the peak of backward that were held when it was measured, and are no more: of the first of two
groups, the gradients of queries, keys and values."""


def by_phase(estimate: MemoryEstimate) -> tuple[int, int, int]:
    """The largest moment of a step's forward, backward, and what is behind it."""
    moments = dict(estimate.moments)
    step = moments.pop("optimizer step")
    forward = [moments.pop(name) for name in list(moments) if name in ("forward of a layer", "LM head")]
    return max(forward), max(moments.values()), step


@pytest.mark.parametrize("name", PHASES)
def test_each_phase_takes_what_was_measured(name: str) -> None:
    model, length, values, measured = PHASES[name]
    work = measured_work(*model)
    estimate = estimate_memory(work, measured_knobs(work, length, **values), HOPPER)
    forward, backward, step = by_phase(estimate)
    found = forward, backward + HELD_THEN.get(name, 0), step
    assert found == pytest.approx(measured, rel=LESS_NEAR.get(name, NEAR))


def rows_of(name: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


DECODER = {
    "longseq-gpu-auto-save-4": ({"attention": SavedAttention(gpu_layers=4)}, None),
    "longseq-gpu-auto-save-all": ({"attention": EVERYTHING}, None),
    "longseq-host-g8": ({"inputs": HOST}, 8),
    "longseq-host-auto": ({"inputs": HOST}, None),
    "longseq-host-auto-save-5": ({"inputs": HOST, "attention": SavedAttention(gpu_layers=5)}, None),
    "longseq-host-g4-save-gpu": ({"inputs": HOST, "attention": SavedAttention(gpu_layers=32)}, 4),
    "longseq-gpu-auto-save-all-fa4": ({"attention": EVERYTHING}, None),
    "longseq-gpu-g4": ({}, 4),
    "longseq-gpu-g8": ({}, 8),
    "longseq-host-g8-save-gpu": ({"inputs": HOST, "attention": SavedAttention(gpu_layers=32)}, 8),
}
"""Variants of benchmarks/decoder.py that are ours: knobs, and groups where they were asked for."""


def test_the_decoder_benchmark_is_retrodicted() -> None:
    """On an H200: bf16 weights, all gradients there before, no optimizer; Liger's rows are not ours."""
    bare = replace(measured_work("8b", "mini"), in_backward=False, state_bytes=0)
    found = 0
    for row in rows_of("decoder"):
        if row["key"] not in DECODER:
            continue
        values, groups = DECODER[row["key"]]
        knobs = measured_knobs(bare, row["tokens"], accumulation=2, **values)
        knobs = replace(knobs, head_groups=groups or knobs.head_groups)
        estimate = estimate_memory(replace(bare, adapts_groups=groups is None), knobs, HOPPER)
        assert estimate.peak_bytes / GIB == pytest.approx(row["peak GiB"], rel=NEAR), row["key"]
        # What the process itself takes was not counted there.
        process = next(part.host_bytes for part in estimate.parts if part.name == "the process itself")
        assert (estimate.host_bytes - process) / GIB == pytest.approx(row["host GiB"], abs=1e-6)
        found += 1
    assert found == 12


AT_LAYERS = {f"backward of a layer's {part}" for part in ("attention", "MLP", "projections")}
LAYER_BYTES = 218112000 * 2
SEQUENCE_PARALLEL = {
    "host+groups2": {"inputs": HOST, "head_groups": 2},
    "gpu+all": {"attention": EVERYTHING, "head_groups": 2},
    "gpu+groups1+all": {"attention": EVERYTHING, "head_groups": 1},
    # What "auto" chose on that machine, by the inputs on the host that the row has.
    "auto+auto": {"attention": SavedAttention(gpu_layers=30, host=True), "head_groups": 2},
}


def test_the_sequence_parallel_benchmark_is_retrodicted() -> None:
    """ZeRO-3 and AdamW on four H200s. ALST's rows are not ours."""
    work, found = measured_work("8b"), 0
    for row in rows_of("sequence_parallel"):
        if row["system"] != "ours" or "peak GiB" not in row or row["optimizer"] != "adamw":
            continue
        knobs = measured_knobs(work, row["tokens"], **ZERO_3 | SEQUENCE_PARALLEL[row["key"]])
        moments = estimate_memory(work, knobs, HOPPER).moments
        # Then a hook of DeepSpeed's held the gradient of a layer's output through the layer's backward, and
        # beside the last layer no other was sent for.
        held_then = row["tokens"] // 4 * 4096 * 2
        held_then -= LAYER_BYTES if row["key"] == "auto+auto" else 0
        peak = max(size + held_then * (name in AT_LAYERS) for name, size in moments.items())
        assert peak / GIB == pytest.approx(row["peak GiB"], rel=NEAR), row["key"]
        found += 1
    assert found == 10


LOW_RANK = {"state_bytes": 19388436}
"""Of APOLLO-Mini with `embeddings: low_rank`."""

BENCH = {
    "8b-adamw-zero3-sp2-64k": (2, {}),
    "8b-adamw-zero3-sp4-128k": (4, {}),
    "8b-adamw-zero3-sp2-128k": (
        2,
        {
            "inputs": Placement(gpu_layers=1),
            "attention": SavedAttention(gpu_layers=29, host=True, everything=True),
        },
    ),
}
"""Runs of `longseq bench` whose peak is beside the last layer: ranks of a sequence, and knobs."""


def bench_runs() -> dict[str, dict[str, Any]]:
    rows = json.loads((RESULTS / "end_to_end.json").read_text())["bench"]
    return {row["file"]: row for row in rows}


def test_the_last_layer_over_several_gpus_is_retrodicted() -> None:
    work = measured_work("8b")
    measured = bench_runs()
    for name, (degree, values) in BENCH.items():
        asked = {"ulysses_degree": degree, "head_groups": 1, "tile_tokens": 32768, "attention": EVERYTHING}
        zero = ZERO_3 | asked | values
        knobs = measured_knobs(work, measured[name]["tokens"], **zero)
        moments = estimate_memory(work, knobs, HOPPER).moments
        # Then the layer below was whole already, and still in the buffer that it had come in.
        peak = max(size + LAYER_BYTES * (moment in AT_LAYERS) for moment, size in moments.items())
        assert peak / GIB == pytest.approx(measured[name]["peak_gib"], rel=NEAR), name


SINCE = {
    "8b-adamw-zero3-sp4-16k-h100": (4, 1, 4096),
    "8b-adamw-zero3-sp4-64k-h100": (4, 1, 16384),
    "8b-adamw-zero3-sp4-64k-groups2-h100": (4, 2, 16384),
    "8b-adamw-zero3-sp4-128k-groups2-h100": (4, 2, 4096),
    "8b-adamw-zero3-sp4-128k-groups8-h100": (4, 8, 4096),
    "8b-mini-1gpu-32k-groups4-h100": (1, 4, 32768),
}
"""Runs in which the layer below the last came in its turn, which would be 0.2 % of the largest peak: GPUs,
groups of heads, tokens of a tile."""


@pytest.mark.parametrize("name", SINCE)
def test_all_saved_by_groups_of_heads_is_retrodicted(name: str) -> None:
    """With more than two groups no queries, keys and values are kept."""
    row = bench_runs()[name]
    num_gpus, head_groups, tile_tokens = SINCE[name]
    values = {"head_groups": head_groups, "tile_tokens": tile_tokens, "attention": EVERYTHING}
    if num_gpus > 1:
        work, values = measured_work("8b"), values | ZERO_3
    else:
        work = replace(measured_work("8b", "mini"), **LOW_RANK)
    knobs = measured_knobs(work, row["tokens"], **values)
    peak = estimate_memory(work, knobs, HOPPER).peak_bytes
    assert peak / GIB == pytest.approx(row["peak_gib"], rel=1e-4)


OPTIMIZER_MEMORY = {
    "bf16-mini-in-backward": ({"inputs": HOST}, {"in_backward": True}),
    "bf16-mini-in-backward-gpu": ({}, {"in_backward": True}),
    "bf16-mini": ({}, {"in_backward": False}),
    "bf16-adamw": ({}, {"in_backward": False, "state_bytes": 4 * 8030261248}),
}
"""Of benchmarks/optimizer_memory.py: AdamW's moments were bf16 there. A plan knows no int8 weights."""


def test_the_steps_of_the_optimizer_benchmark_are_retrodicted() -> None:
    bare, found = measured_work("8b", "mini"), 0
    for row in rows_of("optimizer_memory"):
        if row["key"] not in OPTIMIZER_MEMORY:
            continue
        values, changes = OPTIMIZER_MEMORY[row["key"]]
        work = replace(bare, loss_memory_mib=128, **LOW_RANK | changes)
        knobs = measured_knobs(work, 4096, **values)
        moments = estimate_memory(work, knobs, HOPPER).moments
        at_layers = [moments[f"backward of a layer's {part}"] for part in ("attention", "MLP", "projections")]
        phases = {
            "forward": max(moments["forward of a layer"], moments["LM head"]),
            "head": moments["backward of the LM head"],
            "layers": max(at_layers),
            "embedding": moments["backward of the embedding"],
            "finish": moments["optimizer step"],
        }
        for name, size in phases.items():
            assert size / GIB == pytest.approx(row["phases"][name], rel=0.003), (row["key"], name)
        found += 1
    assert found == 4


def test_the_longest_probe_is_retrodicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000,000 tokens on an H200, every fourth input kept."""
    # Nothing that reached far was copied then.
    monkeypatch.setattr("longseq.launch.planner.memory_layers.MOST_OFFSET", 2**62)
    (row,) = rows_of("decoder_probe")
    work = replace(measured_work("8b", "mini"), state_bytes=0, adapts_groups=False)
    places = Placement(gpu_layers=4, every=4)
    knobs = measured_knobs(work, row["tokens"], inputs=places, head_groups=8)
    estimate = estimate_memory(work, knobs, HOPPER)
    assert estimate.peak_bytes / GIB == pytest.approx(row["peak GiB"], rel=NEAR)
    assert estimate.moments["forward of a layer"] / GIB == pytest.approx(row["forward GiB"], rel=0.03)


def test_parts_add_up_on_both_sides() -> None:
    work = measured_work("3b")
    knobs = measured_knobs(
        work, 65536, zero_stage=2, data_degree=2, offload_optimizer=True, inputs=HOST, attention=NOTHING
    )
    estimate = estimate_memory(work, knobs, HOPPER)
    assert sum(part.gpu_bytes for part in estimate.parts) == estimate.peak_bytes
    assert sum(part.host_bytes for part in estimate.parts) == estimate.host_bytes
    assert estimate.peak_bytes == estimate.moments[estimate.moment] == max(estimate.moments.values())
    assert estimate.reserved_bytes > estimate.peak_bytes


LESS = {
    "inputs on the host": ({}, {"inputs": HOST}),
    "every second input": ({}, {"inputs": Placement(gpu_layers=0, every=2, host=False)}),
    "eight groups of heads": ({"head_groups": 1}, {"head_groups": 8}),
    "nothing saved": ({"attention": EVERYTHING}, {}),
    "output alone saved": ({"attention": EVERYTHING}, {"attention": SavedAttention(gpu_layers=32)}),
    "output saved on the host": (
        {"attention": SavedAttention(gpu_layers=32)},
        {"attention": SavedAttention(host=True)},
    ),
    "smaller tiles": ({"inputs": HOST, "tile_tokens": 262144}, {"inputs": HOST, "tile_tokens": 16384}),
    "streamed layers": (NO_STREAM, {}),
    "ZeRO-3 over ZeRO-2": ({"zero_stage": 2, "data_degree": 4}, {"zero_stage": 3, "data_degree": 4}),
    "more GPUs a sequence": ({"inputs": HOST}, {"inputs": HOST, "ulysses_degree": 2}),
    "weights on the host": (
        {"zero_stage": 3, "data_degree": 4},
        {"zero_stage": 3, "data_degree": 4, "offload_parameters": True},
    ),
    "optimizer on the host": (
        {"zero_stage": 3, "data_degree": 4},
        {"zero_stage": 3, "data_degree": 4, "offload_optimizer": True},
    ),
}


@pytest.mark.parametrize("what", LESS)
def test_what_is_meant_to_spare_memory_does(what: str) -> None:
    work = measured_work("8b")
    more, less = (
        estimate_memory(work, measured_knobs(work, 262144, **values), HOPPER).peak_bytes
        for values in LESS[what]
    )
    assert less < more


@pytest.mark.parametrize(("degree", "queries", "keys"), [(8, 24, 8), (16, 32, 16), (5, 30, 10)])
def test_heads_are_those_of_the_busiest_rank(degree: int, queries: int, keys: int) -> None:
    # 24 query heads and 8 of keys and values: 16 ranks have 2 at most, and each one of keys; 5 ranks 6 and 2.
    work = measured_work("3b")
    knobs = measured_knobs(work, degree * 32768, ulysses_degree=degree, head_groups=1)
    moment = LayerMemory(work, knobs, Sizes.of(work, knobs), 1).attention("nothing")
    head = 32768 * 128 * 2
    assert moment.exchange == head * (4 * queries + 4 * keys)
    assert moment.kernel == head * (2 * queries + 2 * queries) + 4 * 32768 * queries


def test_what_waits_on_the_host_is_counted_there() -> None:
    work = measured_work("8b")
    on_host = SavedAttention(host=True)
    knobs = measured_knobs(work, 65536, inputs=HOST, attention=on_host)
    estimate = estimate_memory(work, knobs, HOPPER)
    plain = estimate_memory(work, measured_knobs(work, 65536), HOPPER)
    # 31 inputs in float32, 32 outputs in bf16, and their log-sum-exp.
    wanted = 65536 * (31 * 4096 * 4 + 32 * (4096 * 2 + 32 * 4))
    assert estimate.host_bytes - plain.host_bytes == pytest.approx(wanted, abs=64 * 2**20)


def test_memory_of_the_loss_follows_what_it_is_asked_for() -> None:
    work = measured_work("8b", "mini")
    knobs = measured_knobs(work, 65536, inputs=HOST)
    heads = {
        mib: estimate_memory(replace(work, loss_memory_mib=mib), knobs, HOPPER).moments["LM head"]
        for mib in (None, 4096, 512)
    }
    assert heads[512] < heads[None] < heads[4096]
    tiled, whole = (
        estimate_memory(replace(work, loss=loss), knobs, HOPPER).moments["LM head"]
        for loss in ("mini_sequence", "logits")
    )
    assert whole - tiled > 65536 * 128256 * 8


def test_a_card_without_the_loss_kernels_is_known() -> None:
    work = measured_work("8b", "mini")
    knobs = measured_knobs(work, 65536, inputs=HOST)
    ampere = replace(HOPPER, gpu=replace(HOPPER.gpu, name="NVIDIA A100-SXM4-80GB"))
    one, other = (estimate_memory(work, knobs, machine).moments["LM head"] for machine in (HOPPER, ampere))
    assert one != other
    for name in ("NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA H20", "NVIDIA B200", "NVIDIA GB300"):
        like = replace(HOPPER, gpu=replace(HOPPER.gpu, name=name))
        assert estimate_memory(work, knobs, like).moments["LM head"] == one, name


def test_what_others_keep_of_a_card_is_reserved() -> None:
    """The driver's context is the machine's; each group of processes has buffers of NCCL's."""
    work = measured_work("8b")

    def beside(machine: Machine = HOPPER, **values: Any) -> float:
        found = estimate_memory(work, measured_knobs(work, 65536, **values), machine)
        return found.reserved_bytes / GIB - 1.02 * found.peak_bytes / GIB

    alone = beside()
    assert alone == pytest.approx(0, abs=1e-6)
    assert beside(data_degree=2) == pytest.approx(1.2, abs=1e-6)
    assert beside(ulysses_degree=2, data_degree=1) == pytest.approx(2.4, abs=1e-6)
    assert beside(**ZERO_3) > 2.4 + 1
    context = replace(HOPPER, gpu=replace(HOPPER.gpu, context_bytes=GIB))
    assert beside(context) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("tokens", [2**18, 2**19 + 512, 2**21])
def test_what_a_kernel_cannot_count_through_is_copied(tokens: int) -> None:
    """Llama-3-8B, eight groups: attention's output is columns of rows of 4,096 elements."""
    work = replace(measured_work("8b", "mini"), adapts_groups=False)
    knobs = measured_knobs(work, tokens, head_groups=8)
    sizes = Sizes.of(work, knobs)
    plain = kernel_workspace("cudnn", sizes, 8, 4, 2)
    # Of the output; and the gradients of a key/value head's piece beside the group's.
    more = 0 if tokens * 4096 < 2**31 else (2 * sizes.queries + sizes.key_values) // 8
    assert work.layer.kernel == "cudnn"
    assert LayerMemory(work, knobs, sizes, 8).kernel_workspace() == plain + more
