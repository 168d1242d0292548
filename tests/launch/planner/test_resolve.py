"""Numbers for `auto` and `max` before a run begins: the same on every rank, and those of the checkpoint."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_samples import AUTO, GIB, SHAPE, machine_with, plan_config
from tiny_run import Workshop, records, train_here

from longseq.distributed import ProcessGroups, groups
from longseq.launch import setup
from longseq.launch.config import RunConfig
from longseq.launch.config_errors import ConfigError
from longseq.launch.config_file import check_count, check_world, dump_config, load_config, parse_config
from longseq.launch.config_rules import undecided
from longseq.launch.model import build_model
from longseq.launch.planner import at_start, machine
from longseq.launch.planner.at_start import least_of, machine_now, plan_for_run
from longseq.launch.planner.memory import COMMUNICATOR_BYTES
from longseq.launch.planner.plan import make_plan
from longseq.launch.planner.resolve import is_resolved, resolve, resolve_for_run
from longseq.mst.layer_memory import SavedAttention
from longseq.mst.placement import Placement

SMALL = {**SHAPE, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 300}


def small_config(**sections: dict[str, Any]) -> RunConfig:
    return plan_config(model={"config": SMALL}, **sections)


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        machine, "this_machine", lambda num_gpus: machine_with(6, host_gib=64, num_gpus=num_gpus)
    )


def test_what_is_decided_comes_back_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "this_machine", lambda num_gpus: pytest.fail("nothing is to be decided"))
    config = small_config()
    assert resolve_for_run(config, 1) is config
    assert resolve(config, machine_with()) is config


def test_auto_and_max_become_the_plans_numbers(four_gpus: None) -> None:
    config = small_config(sequence={"length": "max"}, parallel=AUTO)
    assert not is_resolved(config)
    resolved = resolve_for_run(config, 4)
    assert is_resolved(resolved)
    plan = make_plan(config, machine_with(6, host_gib=64, num_gpus=4))
    assert resolved.sequence.length == plan.longest_tokens == plan.knobs.length
    assert resolved.parallel.ulysses_degree == plan.knobs.ulysses_degree == 4
    assert check_world(resolved, 4).accumulation_steps == 1
    # What is not for a plan is not touched, and the numbers are what a checkpoint's config.yaml keeps.
    assert resolved.optimizer == config.optimizer
    assert resolve_for_run(resolved, 4) is resolved


def test_max_where_nothing_fits_is_refused() -> None:
    config = plan_config(32, sequence={"length": "max"})
    with pytest.raises(ConfigError, match=r"sequence\.length=max: not even 1,024 tokens fit 1 x h100-80g"):
        resolve(config, machine_with(8))


def test_without_a_gpu_processes_share_in_the_simplest_way_and_max_is_refused() -> None:
    config = small_config(parallel=AUTO, train={"global_batch_sequences": 2})
    resolved = resolve_for_run(config, 4)
    parallel = resolved.parallel
    assert (parallel.ulysses_degree, parallel.zero_stage, parallel.offload_optimizer) == (2, 0, "none")
    assert resolve_for_run(config, 2).parallel.ulysses_degree == 1
    with pytest.raises(ConfigError, match=r"sequence\.length=max is found by a plan for GPUs"):
        resolve_for_run(small_config(sequence={"length": "max"}), 1)


def test_the_least_of_all_machines_decides() -> None:
    one = machine_with(79, host_gib=500, num_gpus=4)
    slow = replace(one.gpu, memory_bytes=int(60 * GIB), matmul_tflops=100.0, context_bytes=2 * GIB)
    other = replace(one, gpu=slow, host_bytes=600 * GIB, gpus_per_node=1)
    both = least_of([one, other])
    assert both == replace(least_of([other, one]), gpu=replace(both.gpu))
    assert (both.gpu.memory_bytes, both.gpu.context_bytes) == (int(60 * GIB), 2 * GIB)
    assert (both.gpu.matmul_tflops, both.gpu.host_gb_s) == (100.0, one.gpu.host_gb_s)
    assert (both.host_bytes, both.gpus_per_node, both.num_gpus) == (500 * GIB, 4, 4)
    assert least_of([one]) == one


def test_a_run_is_planned_by_what_is_free_when_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = machine_with(79, host_gib=500)
    monkeypatch.setattr(at_start, "this_machine", lambda num_gpus: whole)
    monkeypatch.setattr(at_start, "free_host_bytes", lambda: 100 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: GIB)
    own = GIB + whole.gpu.context_bytes
    for others, left in ((0, 79 * GIB), (9 * GIB, 70 * GIB)):
        free = 79 * GIB - own - others
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 79 * GIB))
        now = machine_now(1, torch.device("cuda", 0))
        assert now.gpu.memory_bytes == left
        assert now.host_bytes == 85 * GIB
    # The group that several ranks have met in has buffers by now, which every plan for several counts itself.
    buffers = 79 * GIB - own - COMMUNICATOR_BYTES
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (buffers, 79 * GIB))
    assert machine_now(4, torch.device("cuda", 0)).gpu.memory_bytes == 79 * GIB
    assert machine_now(1, torch.device("cuda", 0)).gpu.memory_bytes == 79 * GIB - COMMUNICATOR_BYTES
    # A context that is smaller than the catalogue's is no gift.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79 * GIB, 79 * GIB))
    assert machine_now(1, torch.device("cuda", 0)).gpu.memory_bytes == 79 * GIB
    monkeypatch.setattr(at_start, "machine_now", lambda world_size, device: machine_with(20))
    plan = plan_for_run(small_config(), ProcessGroups(), torch.device("cuda", 0))
    assert plan.machine == machine_with(20)


def checkpoint_of(run_dir: Path, name: str, length: int) -> Path:
    folder = run_dir / "checkpoints" / name
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    (folder / "config.yaml").write_text(dump_config(small_config(sequence={"length": length})))
    return folder


def test_a_run_that_goes_on_keeps_the_length_of_its_checkpoint(four_gpus: None, tmp_path: Path) -> None:
    config = small_config(sequence={"length": "max"}, log={"run_dir": str(tmp_path / "run")})
    longest = resolve_for_run(config, 1).sequence.length
    # Written before the first checkpoint: there is no place in the data yet.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_config(small_config(sequence={"length": 2048})))
    assert resolve_for_run(config, 1).sequence.length == longest
    checkpoint_of(tmp_path / "run", "step-00000005", 3072)
    assert resolve_for_run(config, 1).sequence.length == 3072
    other = checkpoint_of(tmp_path / "other", "step-00000001", 5120)
    for resume, length in ((str(other), 5120), ("never", longest), ("auto", 3072)):
        going = config.model_copy(
            update={"checkpoint": config.checkpoint.model_copy(update={"resume": resume})}
        )
        assert resolve_for_run(going, 1).sequence.length == length
    # A number of one's own is one's own.
    told = small_config(sequence={"length": 4096}, parallel=AUTO, log={"run_dir": str(tmp_path / "run")})
    assert resolve_for_run(told, 1).sequence.length == 4096


@pytest.mark.parametrize(("seen_by_rank_0", "length"), [(False, None), (True, 3072)])
def test_ranks_with_unequal_machines_and_files_decide_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen_by_rank_0: bool, length: int | None
) -> None:
    checkpoint_of(tmp_path / "seen", "step-00000005", 3072)
    machines = [machine_with(gib, host_gib=8 * gib, num_gpus=2) for gib in (6, 4)]
    free = small_config(sequence={"length": "max"}, parallel=AUTO)
    facts: list[Any] = []

    def resolved() -> list[RunConfig]:
        found = []
        for mine, folder in zip(machines, ("seen" if seen_by_rank_0 else "unseen", "unseen"), strict=True):
            monkeypatch.setattr(machine, "this_machine", lambda num_gpus, mine=mine: mine)
            log = free.log.model_copy(update={"run_dir": str(tmp_path / folder)})
            found.append(resolve_for_run(free.model_copy(update={"log": log}), 2))
        return found

    # Once to hear what each rank says, and once with each hearing all.
    monkeypatch.setattr(groups, "gathered", lambda mine: facts.append(mine) or [mine])
    resolved()
    monkeypatch.setattr(groups, "gathered", lambda mine: facts)
    first, second = resolved()
    assert (first.parallel, first.sequence) == (second.parallel, second.sequence)
    assert first.sequence.length == (length or resolve(free, machines[1]).sequence.length)


@pytest.mark.parametrize(
    "sections",
    [
        {"sequence": {"length": "max"}},
        {"parallel": AUTO},
        {"sequence": {"length": "max"}, "parallel": AUTO, "data": {"pack": True}},
        {"parallel": {"offload_optimizer": "auto"}},
        {"parallel": {"zero_stage": "auto", "offload_parameters": "cpu"}},
        {"optimizer": {"in_backward": True}, "parallel": AUTO},
    ],
)
def test_rules_wait_for_what_is_not_decided_and_configs_survive_being_written(
    sections: dict, tmp_path: Path
) -> None:
    config = small_config(**sections)
    assert undecided(config)
    check_count(config, 1)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(str(path)) == config


def test_rules_that_need_no_plan_are_asked_all_the_same() -> None:
    values = {
        "model": {"config": SMALL},
        "data": {"tokenizer": "bytes", "pack": False},
        "sequence": {"length": "max", "checkpoints": "none", "head_groups": 2},
        "parallel": {"num_gpus": 3, "ulysses_degree": 2, "zero_stage": "auto"},
        "schedule": {"warmup_steps": 9},
        "train": {"steps": 9},
    }
    with pytest.raises(ConfigError) as refused:
        parse_config(values)
    assert [line.partition("=")[0] for line in refused.value.errors] == [
        "sequence.head_groups",
        "parallel.ulysses_degree",
        "schedule.warmup_steps",
    ]


def test_the_rules_are_asked_again_once_numbers_are_there(four_gpus: None) -> None:
    # A stage above 0 is the only way to the host, and weights in bf16 want none.
    config = small_config(
        optimizer={"name": "apollo", "weights": "bf16"},
        parallel={"zero_stage": "auto", "offload_optimizer": "cpu"},
    )
    with pytest.raises(ConfigError, match=r"optimizer\.weights='bf16' does not go with|needs parallel"):
        resolve_for_run(config, 1)


def test_the_plans_knobs_reach_the_layers() -> None:
    config = small_config(sequence={"length": 4096}, train={"precision": "float32"})
    plan = make_plan(config, machine_with())
    knobs = replace(
        plan.knobs,
        stream=True,
        head_groups=4,
        inputs=Placement(1, 2),
        attention=SavedAttention(1, everything=True),
        tile_tokens=640,
    )
    model = build_model(config, ProcessGroups(), torch.device("cpu"), torch.float32, None, knobs)
    # functools.wraps leaves the way back to what was put in a layer's place.
    layer = model.model.layers[0].forward.__closure__[0].cell_contents.__self__
    assert (layer._options.tile_tokens, layer._options.head_groups) == (640, 4)
    places = layer.chain._choose
    assert (places.inputs, places.attention) == (Placement(1, 2), SavedAttention(1, everything=True))
    plain = replace(knobs, stream=False)
    model = build_model(config, ProcessGroups(), torch.device("cpu"), torch.float32, None, plain)
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)


def test_ranks_that_planned_otherwise_are_told_before_they_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = make_plan(small_config(), machine_with())
    other = str(replace(plan.knobs, head_groups=2))
    monkeypatch.setattr(at_start, "plan_for_run", lambda config, groups, device: plan)
    monkeypatch.setattr(
        ProcessGroups, "gathered", lambda self, mine: [mine, {"what the plan chose": other, "host": "b"}]
    )
    with pytest.raises(ValueError, match=r"what the plan chose is .*head_groups=2.* on rank 1 \(b\)"):
        setup._plan(small_config(), ProcessGroups(), torch.device("cuda", 0))


def test_a_run_is_set_up_by_its_plan_and_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shop = Workshop(tmp_path)
    config = shop.config("plain")
    plan = make_plan(config, machine_with())
    streamed = replace(plan, knobs=replace(plan.knobs, stream=True, head_groups=2, tile_tokens=128))
    with caplog.at_level(logging.INFO, logger="longseq"):
        train_here(config)
    assert "plan:" not in caplog.text
    monkeypatch.setattr(setup, "_plan", lambda config, groups, device: streamed)
    kept = []
    original = setup.RunParts

    def parts(*args: Any) -> setup.RunParts:
        kept.append(original(*args))
        return kept[-1]

    monkeypatch.setattr(setup, "RunParts", parts)
    train_here(shop.config("planned"))
    assert kept[0].plan is streamed
    layers = kept[0].engine.module.model.layers
    assert all("forward" in layer.__dict__ for layer in layers)
    losses = [[step["loss"] for step in records(tmp_path / name, "step")] for name in ("plain", "planned")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
