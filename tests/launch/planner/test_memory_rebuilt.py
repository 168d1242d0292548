"""Where inputs wait that are rebuilt: a plan's moments beside what is really alive on a CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from memory_samples import NOTHING, LiveBytes, measured_knobs, measured_work

from longseq.launch.config_file import parse_config
from longseq.launch.planner.memory_host import slab_bytes
from longseq.launch.planner.memory_layers import LayerMemory
from longseq.launch.planner.memory_sizes import Sizes
from longseq.launch.planner.memory_step import TOKEN_BYTES, Step
from longseq.launch.planner.memory_streamed import MLP, REBUILDING, StreamedLayers
from longseq.launch.planner.workload import Workload
from longseq.mst import apply_mini_sequence, mlp_half
from longseq.mst.layer_memory import SavedAttention
from longseq.mst.pinned_slab import BLOCK_BYTES
from longseq.mst.placement import Placement, spread_inputs
from longseq.mst.rebuilt_inputs import RebuiltInputs, Rerun

TOKENS, NUM_LAYERS = 1024, 7
NEAR = 0.02
FIELDS = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 64,
}
PLACES = {
    "all on the device": spread_inputs(NUM_LAYERS, 3, 0),
    "all on the host": spread_inputs(NUM_LAYERS, 0, 3),
    "on both": spread_inputs(NUM_LAYERS, 1, 2),
    "two segments": Placement(0, kept=(0, 5)),
    "one segment": Placement(1, kept=(0,)),
    "every fourth": Placement(1, every=4),
}


def alive(
    groups: int, places: Placement, monkeypatch: pytest.MonkeyPatch, save_attention: str | bool = False
) -> dict[str, list[int]]:
    """Bytes beside the weights as a layer's tiles begin their MLP's backward, and as a layer is run again.

    Of a layer's tiles the most, and of the layers that one rebuilding runs.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = AutoConfig.for_model("llama", **FIELDS)
    model = AutoModelForCausalLM.from_config(architecture, attn_implementation="eager").train()
    apply_mini_sequence(
        model,
        tile_tokens=TOKENS // 4,
        head_groups=groups,
        checkpoints=places,
        save_attention=save_attention,
        attention_kernel="cpu",
    )
    live = LiveBytes([*model.parameters(), *model.buffers()])
    found: dict[str, list[int]] = {MLP: [], REBUILDING: []}
    make, rerun, backward = RebuiltInputs.make, Rerun.__call__, mlp_half.gated_activation_backward_

    def watched_make(*args: Any) -> None:
        found[REBUILDING].append(0)
        make(*args)

    def watched_rerun(*args: Any) -> Any:
        found[REBUILDING][-1] = max(found[REBUILDING][-1], live.now)
        return rerun(*args)

    def watched_backward(*args: Any, **kwargs: Any) -> Any:
        found[MLP].append(live.now)
        return backward(*args, **kwargs)

    monkeypatch.setattr(RebuiltInputs, "make", watched_make)
    monkeypatch.setattr(Rerun, "__call__", watched_rerun)
    monkeypatch.setattr(mlp_half, "gated_activation_backward_", watched_backward)
    ids = torch.arange(TOKENS)[None] % FIELDS["vocab_size"]
    with live:
        model.model(input_ids=ids).last_hidden_state.sum().backward()
    tiles = len(found[MLP]) // NUM_LAYERS
    found[MLP] = [max(found[MLP][start : start + tiles]) for start in range(0, len(found[MLP]), tiles)]
    return found


def planned(groups: int, places: Placement, attention: SavedAttention = NOTHING) -> dict[str, list[int]]:
    """The same by the plan."""
    values = {
        "model": {"config": {"model_type": "llama", **FIELDS}},
        "data": {"tokenizer": "bytes"},
        "train": {"precision": "float32"},
    }
    work = Workload.from_config(parse_config(values))
    work = replace(work, adapts_groups=False, layer=replace(work.layer, kernel="cpu"))
    knobs = measured_knobs(
        work, TOKENS, head_groups=groups, inputs=places, attention=attention, tile_tokens=TOKENS // 4
    )
    step = Step(work, knobs, "none")
    # The head is not run, nor has the decoder labels and what is made of them.
    not_run = work.numel("head") * 4 + (TOKEN_BYTES - 8) * TOKENS
    # A forward's own are there when it is under way.
    to_come = {MLP: 0, REBUILDING: LayerMemory(work, knobs, step.sizes, groups).forward("nothing").total}
    found: dict[str, list[int]] = {MLP: [], REBUILDING: []}
    for moment in StreamedLayers(step).moments():
        if moment.name in found:
            batch = dict(step.throughout(moment))["batch and rotary embedding"]
            total = batch + sum(size for _, size in moment.parts) - not_run
            found[moment.name].append(total - to_come[moment.name])
    return found


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("groups", [2, 4])
def test_inputs_are_on_the_device_when_the_plan_says(
    where: str, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, plan = alive(groups, PLACES[where], monkeypatch), planned(groups, PLACES[where])
    assert found[MLP] == pytest.approx(plan[MLP], rel=NEAR)
    assert found[REBUILDING] == pytest.approx(plan[REBUILDING], rel=NEAR)


@pytest.mark.parametrize("where", PLACES)
def test_attention_from_the_host_is_there_before_layers_are_rebuilt(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a layer that keeps it there: it comes into the memory of the layer above."""
    found = alive(4, PLACES[where], monkeypatch, "host")
    plan = planned(4, PLACES[where], SavedAttention(host=True))
    assert found[REBUILDING] == pytest.approx(plan[REBUILDING], rel=NEAR)


def test_what_is_rebuilt_takes_no_host_memory_of_its_own() -> None:
    work = measured_work("8b", "mini")
    for on_gpu in range(8):
        knobs = measured_knobs(work, 65536, inputs=spread_inputs(32, on_gpu, 7 - on_gpu), attention=NOTHING)
        wanted = (7 - on_gpu) * 65536 * 4096 * 2
        assert slab_bytes(work, knobs, Sizes.of(work, knobs)) == -(-wanted // BLOCK_BYTES) * BLOCK_BYTES
