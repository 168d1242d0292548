"""The seconds of a step: against steps of H200s and H100s that were measured, and what must change them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from longseq.launch.config_file import load_config
from longseq.launch.planner.knobs import Knobs
from longseq.launch.planner.machine import Machine, named_machine
from longseq.launch.planner.seconds import TimeEstimate, estimate_seconds
from longseq.launch.planner.workload import Workload
from longseq.mst.layer_memory import SavedAttention
from longseq.mst.placement import Placement, spread_inputs
from longseq.mst.tiling import choose_tile_tokens

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
OFF_BY = 0.12
GPUS = {"NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100-80g"}
LLAMA_3_8B = (
    "model.config={model_type: llama, hidden_size: 4096, intermediate_size: 14336, num_hidden_layers: 32, "
    "num_attention_heads: 32, num_key_value_heads: 8, vocab_size: 128256, max_position_embeddings: 1048576}"
)
BF16_WEIGHTS = ("optimizer.name=apollo-mini", "optimizer.weights=bf16")
ON_GPU = Placement(0, host=False)


@cache
def workload(*keys: str) -> Workload:
    """Of Llama-3-8B's shape."""
    own = ("data.tokenizer=bytes", "data.pack=false", LLAMA_3_8B)
    return Workload.from_config(load_config("tiny-cpu", [*own, "train.precision=bf16", *keys]))


def with_layers(work: Workload, num_layers: int) -> Workload:
    """The first so many layers, and what is outside of layers."""
    weights = tuple(one for one in work.weights if one.layer is None or one.layer < num_layers)
    return replace(work, weights=weights, shape=replace(work.shape, num_layers=num_layers))


def knobs(length: int, *, sp: int = 1, zero: int = 0, **others: Any) -> Knobs:
    """As `longseq train` ran when the rows were measured."""
    plain = {
        "micro_batch": 1,
        "accumulation": 1,
        "data_degree": 1,
        "offload_optimizer": False,
        "offload_parameters": False,
        "stream": True,
        "head_groups": 2,
        "inputs": ON_GPU,
        "attention": SavedAttention(),
        "tile_tokens": choose_tile_tokens(length // sp, 14336, 2, num_intermediates=3),
    }
    return Knobs(length=length, ulysses_degree=sp, zero_stage=zero, **{**plain, **others})


def rows(name: str) -> list[dict[str, Any]]:
    """Of a benchmark's results, those that have a time; with the machine that they are of."""
    found = json.loads((RESULTS / f"{name}.json").read_text())
    gpu = GPUS[found["environment"]["device"]]
    return [
        row | {"machine": named_machine(gpu, row.get("gpus", 1))} for row in found["rows"] if row.get("s")
    ]


def saved(word: str | None, num_layers: int = 32) -> SavedAttention:
    """What `+all`, `-save-4` and the like mean."""
    if word is None:
        return SavedAttention()
    layers = int(word) if word.isdigit() else num_layers
    return SavedAttention(layers, everything=word == "all")


def recorded() -> Iterator[tuple[str, Workload, Knobs, Machine, float, bool]]:
    """What was measured: name, work, knobs, machine, seconds, and whether an optimizer stepped."""
    bf16, under_zero = workload(*BF16_WEIGHTS), workload()
    for row in rows("decoder"):
        match = re.fullmatch(r"longseq-(gpu|host)-(auto|g\d)(-save-(\w+))?", row["key"])
        if match is None:  # others' layers, and a kernel that is no part of torch
            continue
        inputs = Placement(1) if match[1] == "host" else ON_GPU
        groups = 2 if match[2] == "auto" else int(match[2][1:])
        made = knobs(row["tokens"], head_groups=groups, inputs=inputs, attention=saved(match[4]))
        yield f"{row['key']} {row['tokens']}", bf16, made, row["machine"], row["s"], False
    for row in rows("sequence_parallel"):
        match = re.fullmatch(r"(gpu|host|auto)(\+groups(\d))?(\+(\w+))?", row["key"])
        if row["system"] != "ours":  # ALST's
            continue
        with_zero = row["optimizer"] == "adamw"
        made = knobs(
            row["tokens"],
            sp=row["sp"],
            zero=3 if with_zero else 0,
            head_groups=int(match[3] or 2),
            inputs=Placement(1) if match[1] == "host" else ON_GPU,
            attention=saved({"auto": "gpu"}.get(match[5], match[5])),
        )
        name = f"{row['key']} {row['gpus']} GPUs {row['tokens']}"
        yield name, under_zero if with_zero else bf16, made, row["machine"], row["s"], with_zero
    for row in rows("optimizer_memory"):
        if row["key"] in ("bf16-mini", "bf16-mini-in-backward-gpu"):
            work = replace(bf16, in_backward="in-backward" in row["key"])
            yield row["key"], work, knobs(4096, head_groups=1), row["machine"], row["s"], True


def test_steps_that_were_measured_take_what_is_estimated() -> None:
    wrong, count = [], 0
    for name, work, made, machine, seconds, steps in recorded():
        estimate = estimate_seconds(work, made, machine)
        found = sum(part for what, part in estimate.parts if steps or what != "optimizer")
        count += 1
        if abs(found / seconds - 1) > OFF_BY:
            wrong.append(f"{name}: {found:.2f} s estimated, {seconds:.2f} s measured")
    assert not wrong
    assert count == 25


def estimate(work: Workload | None = None, made: Knobs | None = None, gpus: int = 1) -> TimeEstimate:
    """On H100s."""
    return estimate_seconds(work or workload(), made or knobs(65536), named_machine("h100-80g", gpus))


def part(found: TimeEstimate, name: str) -> float:
    """Seconds of a part; 0 where it is not there."""
    return dict(found.parts).get(name, 0.0)


def test_parts_add_up_and_tokens_are_those_of_all_gpus() -> None:
    found = estimate(made=knobs(65536, sp=4, zero=3, data_degree=2, accumulation=3), gpus=8)
    assert sum(seconds for _, seconds in found.parts) == pytest.approx(found.seconds)
    assert found.tokens_per_second == pytest.approx(65536 * 2 * 3 / found.seconds)
    assert all(seconds > 0 for _, seconds in found.parts)
    assert len({name for name, _ in found.parts}) == len(found.parts)


def test_attention_grows_with_the_square_and_products_with_the_length() -> None:
    short, long = estimate(made=knobs(65536)), estimate(made=knobs(262144))
    assert part(long, "products of layers") == pytest.approx(4 * part(short, "products of layers"))
    # A little less than 16 times: short sequences attain a little less.
    assert 15 < part(long, "attention") / part(short, "attention") < 16


def test_what_is_kept_of_attention_is_not_done_again() -> None:
    nothing, output, everything = (
        estimate(made=knobs(65536, attention=saved(word))) for word in (None, "gpu", "all")
    )
    # Two forwards and a backward of 2.5 at a lower rate, against one forward.
    assert part(nothing, "attention") > 1.2 * part(output, "attention")
    assert part(output, "attention") == part(everything, "attention")
    assert part(nothing, "products of layers") == part(output, "products of layers")
    assert part(output, "products of layers") > part(everything, "products of layers")
    half = estimate(made=knobs(65536, attention=saved("16")))
    middle = (part(nothing, "attention") + part(output, "attention")) / 2
    assert part(half, "attention") == pytest.approx(middle)


def test_projections_of_a_group_are_made_again_where_they_can_be_cut_by_heads() -> None:
    cut = workload()
    whole = replace(cut, layer=replace(cut.layer, norms_whole=True))
    (cut_two, cut_four), (whole_two, whole_four) = (
        [part(estimate(work, knobs(65536, head_groups=groups)), "products of layers") for groups in (2, 4)]
        for work in (cut, whole)
    )
    assert cut_four > 1.02 * cut_two
    assert whole_two == whole_four == cut_two


def test_layers_that_keep_no_input_are_run_forward_once_more() -> None:
    every = [estimate(made=knobs(65536, inputs=Placement(0, n, host=False))) for n in (1, 2, 4)]
    assert [part(found, "layers rebuilt") for found in every[:1]] == [0]
    # Half of the layers, then three quarters.
    assert part(every[2], "layers rebuilt") == pytest.approx(1.5 * part(every[1], "layers rebuilt"))
    assert part(every[1], "layers rebuilt") > 0.15 * every[0].seconds / 2


def test_copies_to_the_host_show_where_they_are_longer_than_computing() -> None:
    host = knobs(65536, inputs=Placement(1))
    hidden = part(estimate(made=host), "host copies")
    assert 0 < hidden < 0.01 * estimate(made=host).seconds
    machine = named_machine("h100-80g", 1)
    slow = replace(machine, gpu=replace(machine.gpu, host_gb_s=1.0))
    # 31 layers' inputs of 512 MiB each way, less what is computed meanwhile.
    found = part(estimate_seconds(workload(), host, slow), "host copies")
    assert 2 * 31 * 65536 * 4096 * 4 / 1e9 - estimate(made=host).seconds < found < 70


@pytest.mark.parametrize("on_gpu", [0, 2, 7])
def test_inputs_that_are_rebuilt_are_copied_to_the_host_and_back(on_gpu: int) -> None:
    machine = named_machine("h100-80g", 1)
    slow = replace(machine, gpu=replace(machine.gpu, host_gb_s=1e-3))
    inputs = spread_inputs(32, on_gpu, 7 - on_gpu)
    found = estimate_seconds(workload(), knobs(65536, inputs=inputs), slow)
    # 7 segments: all that is rebuilt but the highest of each waits, as many on the GPU as were kept there.
    on_host = 7 - on_gpu
    rebuilt = inputs.waits(32).count("host") - on_host
    assert rebuilt == {0: 32 - 8 - 7, 7: 0}.get(on_gpu, rebuilt) < 32 - 8
    # What was kept goes and comes, and comes once more for what is rebuilt from it.
    copies = 3 * on_host + 2 * rebuilt
    computed = sum(seconds for name, seconds in found.parts if name not in ("host copies", "optimizer"))
    one = 65536 * 4096 * 4 / 1e6
    assert copies * one - computed <= dict(found.parts).get("host copies", 0) <= copies * one


def test_packed_documents_attend_to_less_by_a_slower_kernel() -> None:
    machine = named_machine("h200", 1)
    one = part(estimate_seconds(workload(), knobs(65536), machine), "attention")
    four = part(estimate_seconds(workload(), knobs(65536), machine, [16384] * 4), "attention")
    assert four == pytest.approx(one / 4 / machine.gpu.flash_share, rel=0.06)


def test_frozen_weights_have_no_gradient_to_multiply() -> None:
    full = workload(*BF16_WEIGHTS)
    frozen = tuple(replace(one, trained=False) for one in full.weights)
    adapted = replace(full, weights=frozen, has_adapters=True, state_bytes=0)
    lora, whole = estimate(adapted), estimate(full)
    assert part(lora, "products of layers") < 0.9 * part(whole, "products of layers")
    assert part(lora, "LM head") < 0.75 * part(whole, "LM head")
    assert part(lora, "attention") == part(whole, "attention")
    assert part(lora, "optimizer") < 0.1 * part(whole, "optimizer")


def test_short_memory_of_the_loss_costs_one_more_product() -> None:
    plain, short = workload(), workload("sequence.loss_memory_mib=256")
    assert part(estimate(short), "LM head") == pytest.approx(
        part(estimate(plain), "LM head") * 4.35 / 3.25, rel=0.03
    )


def test_more_gpus_share_the_work_and_pay_for_sending_it() -> None:
    one = estimate(made=knobs(131072, zero=3))
    four = estimate(made=knobs(131072, sp=4, zero=3), gpus=4)
    assert part(four, "attention") == pytest.approx(part(one, "attention") / 4)
    assert one.seconds / 4 < four.seconds < one.seconds / 3
    assert part(four, "exchanges") > 0
    # 8 key/value heads of 4 query heads each: of 3 ranks two have 3; of 4 of them, one has 2.
    for groups, heads in ((1, 12), (2, 16)):
        three = estimate(made=knobs(131072, sp=3, zero=3, head_groups=groups), gpus=3)
        assert part(three, "attention") == pytest.approx(part(one, "attention") * heads / 32)
    over_nodes = named_machine("h100-80g", 4, gpus_per_node=1)
    slower = estimate_seconds(workload(), knobs(131072, sp=4, zero=3), over_nodes)
    assert part(slower, "exchanges") > 2 * part(four, "exchanges")


def test_key_value_heads_that_go_to_several_ranks_are_sent_to_each_and_waited_for() -> None:
    two, four, eight = (
        estimate(made=knobs(131072, sp=4, zero=3, head_groups=groups), gpus=4) for groups in (2, 4, 8)
    )
    assert part(eight, "attention") == pytest.approx(part(two, "attention"))
    # 32 query heads and 8, 16 or 32 key/value heads on their way; half of the first's time is hidden.
    assert part(eight, "exchanges") == pytest.approx(part(four, "exchanges") * (32 + 32) / (32 + 16))
    assert part(four, "exchanges") > part(two, "exchanges") * (32 + 16) / (32 + 8) * 1.2
    assert two.seconds < four.seconds < eight.seconds


def test_short_sequences_wait_for_weights_that_others_hold() -> None:
    made = knobs(8192, zero=3, data_degree=4)
    found = estimate_seconds(workload(), made, named_machine("h100-80g", 4, gpus_per_node=1))
    # Forward gathers all 16 GB of bf16 weights but its own quarter, backward as much and 16 GB of gradients.
    sent = 3 * 16.06 * 3 / 4
    assert 0.2 * sent / 40 < part(found, "ZeRO") < sent / 40
    assert part(estimate(made=knobs(8192, zero=3)), "ZeRO") == 0


def test_the_optimizer_takes_its_bytes_and_longer_on_the_host() -> None:
    adamw, mini = estimate(), estimate(workload(*BF16_WEIGHTS))
    # 16 bytes of weights, gradients and moments, most of them read and written, at under 3 TB/s.
    assert 0.07 < part(adamw, "optimizer") < 0.2
    assert part(mini, "optimizer") < 0.4 * part(adamw, "optimizer")
    sharded = estimate(made=knobs(65536, zero=1, data_degree=4), gpus=4)
    assert part(sharded, "optimizer") < 0.4 * part(adamw, "optimizer")
    on_host = estimate(made=knobs(65536, zero=1, data_degree=4, offload_optimizer=True), gpus=4)
    assert part(on_host, "optimizer") > 10 * part(sharded, "optimizer")


def test_fewer_layers_are_counted_as_such() -> None:
    few = estimate(with_layers(workload(), 8))
    assert part(few, "attention") == pytest.approx(part(estimate(), "attention") / 4)
    assert part(few, "LM head") == part(estimate(), "LM head")
