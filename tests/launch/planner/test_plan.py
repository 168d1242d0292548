"""Whole plans: what they say of a run that fits, of one that does not, and why."""

from __future__ import annotations

from typing import Any

import pytest
from plan_samples import AUTO, SHAPE, machine_with, plan_config, work_of

from longseq.launch.config import RunConfig
from longseq.launch.config_changes import with_values
from longseq.launch.config_file import parse_config
from longseq.launch.planner.machine import Machine
from longseq.launch.planner.plan import Plan, make_plan


def planned(config: RunConfig, machine: Machine, positions: int | None = None) -> Plan:
    return make_plan(config, machine, work=work_of(config), positions=positions)


def reasons(plan: Plan) -> dict[str, str]:
    return {reason.key: reason.why for reason in plan.reasons}


def test_a_plan_adds_up_and_says_why() -> None:
    config = plan_config(
        8,
        sequence={"length": "64k", "save_attention": "auto", "head_groups": 2},
        parallel={"zero_stage": "auto"},
        train={"global_batch_sequences": 2},
    )
    plan = planned(config, machine_with(50, num_gpus=2))
    assert plan.fits
    assert sum(part.gpu_bytes for part in plan.memory.parts) == plan.memory.peak_bytes
    assert sum(part.host_bytes for part in plan.memory.parts) == plan.memory.host_bytes
    assert sum(seconds for _, seconds in plan.seconds.parts) == pytest.approx(plan.seconds.seconds)
    assert plan.longest_tokens is not None
    assert plan.longest_tokens >= 65536
    why = reasons(plan)
    assert why["sequence.head_groups"] == "set by you"
    assert why["sequence.length"] == f"set by you; the longest that fits is {plan.longest_tokens:,}"
    assert why["parallel.ulysses_degree"].startswith("the default")
    # The simplest that there is room for, told by what the next simpler one would take.
    assert plan.knobs.zero_stage > 0
    assert why["parallel.zero_stage"].startswith(f"{plan.knobs.zero_stage - 1} would")
    assert set(why) == {
        "sequence.length",
        "parallel.ulysses_degree",
        "parallel.zero_stage",
        "parallel.offload_optimizer",
        "parallel.offload_parameters",
        "sequence.checkpoints",
        "sequence.save_attention",
        "sequence.head_groups",
        "sequence.tile_tokens",
    }


def test_what_does_not_fit_leaves_the_most_room_and_tells_the_longest_that_does() -> None:
    config = plan_config(4, sequence={"length": "2M", "checkpoints": "gpu"}, parallel={"zero_stage": 0})
    plan = planned(config, machine_with(60))
    assert not plan.fits
    assert plan.memory.reserved_bytes > plan.card_room
    assert "leaves the most room" in reasons(plan)["sequence.tile_tokens"]
    assert plan.longest_tokens is not None
    longer = plan.longest_tokens + 1024
    assert planned(with_values(config, {"sequence.length": plan.longest_tokens}), machine_with(60)).fits
    assert not planned(with_values(config, {"sequence.length": longer}), machine_with(60)).fits


def test_max_is_the_longest_or_the_models_positions() -> None:
    config = plan_config(4, sequence={"length": "max"}, parallel={"zero_stage": 0})
    plan = planned(config, machine_with(60, host_gib=64))
    assert plan.fits
    assert plan.knobs.length == plan.longest_tokens == plan.config.sequence.length
    capped = planned(config, machine_with(60, host_gib=64), positions=100_000)
    assert capped.knobs.length == 97 * 1024
    assert capped.longest_tokens == plan.longest_tokens
    assert f"there is room for {plan.longest_tokens:,} tokens" in capped.notes[0]
    assert planned(config, machine_with(60), positions=256).knobs.length == 256


def test_max_with_a_free_degree_shares_the_sequence() -> None:
    config = plan_config(4, sequence={"length": "max"}, parallel=AUTO)
    alone = planned(config, machine_with(40, host_gib=100))
    shared = planned(config, machine_with(40, host_gib=200, num_gpus=2))
    assert shared.knobs.ulysses_degree == 2
    assert shared.knobs.length > alone.knobs.length


def test_a_length_above_the_models_positions_is_noted() -> None:
    config = plan_config(4, sequence={"length": "64k"})
    assert not planned(config, machine_with(140)).notes
    (note,) = planned(config, machine_with(140), positions=8192).notes
    assert note.startswith("sequence.length=65,536 is above the model's 8,192 positions")


@pytest.mark.parametrize(("groups", "degree", "use"), [(3, 1, "1, 2, 4, 8 or"), (8, 8, "1, 2, 4 or")])
def test_groups_that_the_layers_would_refuse_are_refused(groups: int, degree: int, use: str) -> None:
    config = plan_config(2, sequence={"head_groups": groups}, parallel={"ulysses_degree": degree})
    with pytest.raises(ValueError, match=rf"head_groups={groups} does not divide .* use {use} auto"):
        planned(config, machine_with(num_gpus=degree))


def test_a_free_degree_leaves_each_group_a_query_head_for_each_rank() -> None:
    config = plan_config(
        2, sequence={"head_groups": 8, "length": "max"}, parallel=AUTO, train={"global_batch_sequences": 8}
    )
    assert planned(config, machine_with(12, num_gpus=8)).knobs.ulysses_degree <= 4


def test_a_plan_reads_the_model_that_the_config_makes() -> None:
    small: dict[str, Any] = {**SHAPE, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    config = parse_config({"model": {"config": small}, "data": {"tokenizer": "bytes"}})
    plan = make_plan(config, machine_with())
    assert plan.work.shape.hidden_size == 256
    assert plan.knobs.length == 4096
    # A plan hands each layer its groups; what adapts by itself is for library users.
    assert not plan.work.adapts_groups
