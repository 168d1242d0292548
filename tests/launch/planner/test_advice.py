"""What is advised to run in less memory: it frees what it says, and the rules allow it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan_samples import SHAPE, machine_with, plan_config, work_of

from longseq.launch.config import RunConfig
from longseq.launch.config_file import parse_config
from longseq.launch.model import hf_config
from longseq.launch.planner.advice import WORTH_BYTES, advice, best_changes
from longseq.launch.planner.ideas import apollo_mini_bytes, ideas
from longseq.launch.planner.machine import Machine
from longseq.launch.planner.plan import Plan, make_plan
from longseq.launch.planner.workload import Workload
from longseq.mst.placement import spread_inputs

GIB = 2**30


def planned(config: RunConfig, machine: Machine) -> Plan:
    return make_plan(config, machine, work=work_of(config))


def changed(config: RunConfig, overrides: str) -> RunConfig:
    """As a person would who puts them behind the command: all rules are asked."""
    values = config.model_dump(exclude_unset=True)
    for setting in overrides.split():
        key, _, value = setting.partition("=")
        section, name = key.split(".")
        values.setdefault(section, {})[name] = int(value) if value.isdigit() else value
    return parse_config(values)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return plan_config(
        8,
        sequence={"length": "64k", "save_attention": "gpu", "checkpoints": "gpu", "tile_tokens": "32k"},
        parallel={"num_gpus": 4, "ulysses_degree": 2, "zero_stage": 1},
        train={"global_batch_sequences": 4, "micro_batch_sequences": 2},
    )


@pytest.fixture(scope="module")
def fitting(config: RunConfig) -> Plan:
    plan = planned(config, machine_with(79, num_gpus=4))
    assert plan.fits
    return plan


@pytest.fixture(scope="module")
def too_large(config: RunConfig) -> Plan:
    plan = planned(config, machine_with(34, num_gpus=4))
    assert not plan.fits
    return plan


def test_changes_can_be_pasted_and_free_memory(config: RunConfig, fitting: Plan, too_large: Plan) -> None:
    for plan in (fitting, too_large):
        changes = best_changes(plan)
        assert len({change.overrides for change in changes}) == len(changes) > 5
        for change in changes:
            again = planned(changed(config, change.overrides), plan.machine)
            saved = plan.memory.reserved_bytes - again.memory.reserved_bytes
            # What the plan chooses beside it may free more still, or put what was freed to use.
            assert again.fits if change.fits else saved >= change.gpu_bytes - GIB // 10, change
            assert saved > 0, change


def test_what_frees_most_comes_first_unless_another_makes_it_fit(fitting: Plan, too_large: Plan) -> None:
    freed = [change.gpu_bytes for change in best_changes(fitting)]
    assert freed == sorted(freed, reverse=True)
    assert freed[-1] >= WORTH_BYTES
    changes = best_changes(too_large)
    enough = [change for change in changes if change.fits]
    assert 1 < len(enough) < len(changes)
    assert changes[: len(enough)] == enough
    assert [change.slower for change in enough] == sorted(change.slower for change in enough)
    lines = [line for line in advice(too_large) if " frees " in line]
    assert [line.endswith("; then it fits") for line in lines] == [change.fits for change in changes]
    assert not any("then it fits" in line for line in advice(fitting))


def test_prices_are_told(fitting: Plan) -> None:
    by_name = {change.overrides: change for change in best_changes(fitting)}
    # What is kept of attention saves its forward; what goes to the host takes room there.
    assert by_name["sequence.save_attention=none"].slower > 0
    assert by_name["sequence.checkpoints=host"].host_bytes < 0
    lines = {line.partition(" frees ")[0]: line for line in advice(fitting)}
    assert " % slower" in lines["sequence.save_attention=none"]
    host = -by_name["sequence.checkpoints=host"].host_bytes / GIB
    assert f"takes {host:.1f} GiB more of each process's host memory" in lines["sequence.checkpoints=host"]
    assert "another optimizer" in lines["optimizer.name=apollo-mini"]


def test_every_kind_of_change_is_thought_of(fitting: Plan) -> None:
    families = {idea.family for idea in ideas(fitting)}
    assert families >= {"micro batch", "length", "checkpoints", "attention", "head groups", "tiles", "loss"}
    assert families >= {"ulysses_degree", "zero_stage", "offload_optimizer", "offload_parameters"}
    assert families >= {"in backward", "optimizer"}
    whole = replace(fitting, knobs=replace(fitting.knobs, stream=False))
    tried = {key: idea.knobs for idea in ideas(whole) for key in idea.values}
    assert tried["sequence.checkpoints"].stream
    assert "sequence.head_groups" not in tried


@pytest.mark.parametrize("every", [1, 4])
def test_auto_is_thought_of_where_it_keeps_fewer_inputs(every: int) -> None:
    """With every fourth input kept three that are rebuilt would be on the GPU at once."""
    sequence = {"length": "1700k", "checkpoints": "host", "checkpoint_every": every, "head_groups": 8}
    config = plan_config(
        32, sequence=sequence, optimizer={"name": "apollo-mini", "weights": "bf16", "in_backward": True}
    )
    plan = planned(config, machine_with(139.8, host_gib=97.8))
    assert not plan.fits
    changes = {change.overrides: change for change in best_changes(plan)}
    text = "sequence.checkpoints=auto" + (" sequence.checkpoint_every=1" if every > 1 else "")
    assert changes[text].fits
    again = planned(changed(config, text), plan.machine)
    assert again.fits
    assert again.knobs.inputs.kept is not None
    # Auto has tried what there is; a rule of its own for the inputs would not be better.
    for inputs in (again.knobs.inputs, spread_inputs(32, 8, 0)):
        chosen = replace(again, knobs=replace(again.knobs, inputs=inputs))
        assert "checkpoints" not in {idea.family for idea in ideas(chosen)}


def test_rules_and_what_is_full_forbid_changes(fitting: Plan) -> None:
    texts = {change.overrides for change in best_changes(fitting)}
    assert texts >= {
        "parallel.offload_parameters=cpu parallel.zero_stage=3",
        "parallel.offload_optimizer=cpu",
        "train.micro_batch_sequences=1",
    }
    poor = replace(fitting, host_room=fitting.memory.host_bytes)
    texts = {change.overrides for change in best_changes(poor)}
    assert texts
    assert not any("offload" in text or "checkpoints=host" in text for text in texts)


@pytest.mark.parametrize("count", [1, 2])
def test_what_several_processes_may_not_do_is_not_advised_to_them(count: int) -> None:
    config = plan_config(
        2, sequence={"length": "64k", "checkpoints": "gpu"}, train={"global_batch_sequences": count}
    )
    texts = {change.overrides for change in best_changes(planned(config, machine_with(79, num_gpus=count)))}
    assert ("optimizer.in_backward=true" in texts) == (count == 1)


@pytest.mark.parametrize("degree", [2, 4])
def test_degrees_that_leave_a_rank_without_heads_are_not_advised(degree: int) -> None:
    few_heads = {**SHAPE, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    # As of a checkpoint: the config says nothing of its heads.
    work = work_of(plan_config(model={"config": few_heads}))
    named = plan_config(
        2,
        model={"config": {}, "name": "a/checkpoint"},
        sequence={"length": "512k"},
        parallel={"ulysses_degree": degree},
        train={"global_batch_sequences": 2},
    )
    plan = make_plan(named, machine_with(79, num_gpus=2 * degree), work=work)
    advised = any("ulysses" in change.overrides for change in best_changes(plan))
    assert advised == (degree == 2)


def test_the_longest_that_fits_and_the_card_that_would_do_are_told() -> None:
    config = plan_config(4, sequence={"length": "2M", "checkpoints": "gpu"}, parallel={"zero_stage": 0})
    plan = planned(config, machine_with(60))
    lines = advice(plan)
    assert lines[0] == f"sequence.length={plan.longest_tokens} is the longest that fits as the rest is set"
    assert len(advice(plan, 2)) == 4
    enough = int(lines[-1].removeprefix("GPUs of ").partition(" GiB")[0])
    assert planned(config, machine_with(enough)).fits
    assert not planned(config, machine_with(enough - 2)).fits


def test_a_host_that_is_too_small_is_told_as_such() -> None:
    config = plan_config(
        8,
        sequence={"length": "16k"},
        parallel={"zero_stage": 1, "offload_optimizer": "cpu"},
        train={"global_batch_sequences": 2},
    )
    plan = planned(config, machine_with(79, host_gib=60, num_gpus=2))
    assert not plan.fits
    assert plan.longest_tokens is None
    lines = advice(plan)
    stays = "parallel.offload_optimizer=none frees "
    assert any(line.startswith(stays) and line.endswith("then it fits") for line in lines)
    enough = int(lines[-1].removeprefix("nodes with ").partition(" GiB")[0]) * 0.85
    assert planned(config, machine_with(79, host_gib=enough, num_gpus=2)).fits
    assert not planned(config, machine_with(79, host_gib=enough - 2, num_gpus=2)).fits


@pytest.mark.parametrize("apollo", [{}, {"embeddings": "low_rank", "rank": 4}])
def test_another_optimizers_states_are_those_of_the_model_itself(apollo: dict) -> None:
    config = plan_config(2, optimizer={"name": "apollo-mini", "apollo": apollo})
    counted = Workload.from_config(config, hf_config(config.model))
    assert apollo_mini_bytes(counted.weights, config.optimizer.apollo) == counted.state_bytes
