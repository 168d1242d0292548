"""What a plan chooses: it fits, it is the fastest that does, and what a config fixes is kept."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from plan_samples import AUTO, GIB, machine_with, plan_config, work_of

from longseq.launch.config import RunConfig
from longseq.launch.config_errors import ConfigError
from longseq.launch.planner.choose import Search
from longseq.launch.planner.inside import NOTHING, head_groups, most, tiles
from longseq.launch.planner.knobs import Knobs
from longseq.launch.planner.layouts import layouts, most_processes
from longseq.launch.planner.machine import Machine
from longseq.mst.layer_memory import SavedAttention
from longseq.mst.placement import Placement, spread_inputs
from longseq.mst.segments import fewest_waiting

FREE = {"save_attention": "auto"}


def search(config: RunConfig, machine: Machine) -> Search:
    return Search(config, work_of(config), machine)


def every_way(start: Knobs, layers: int) -> list[Knobs]:
    """All that a plan could choose inside a GPU around some knobs, one by one."""
    placements = [Placement(0, every, host=False) for every in (1, 2, 4)]
    placements += [Placement(n, every) for n, every in product(range(1, layers), (1, 2, 4))]
    for count in range(fewest_waiting(layers), layers):
        placements += [spread_inputs(layers, n, count - n) for n in range(count + 1)]
    saved = [NOTHING, SavedAttention(host=True)]
    saved += [
        SavedAttention(n, host and n < layers, everything)
        for n, host, everything in product(range(1, layers + 1), (False, True), (False, True))
    ]
    streamed = [
        replace(start, stream=True, inputs=inputs, attention=attention, head_groups=groups)
        for inputs, attention, groups in product(placements, saved, (1, 2, 4, 8))
    ]
    plain = replace(start, stream=False, inputs=placements[0], attention=NOTHING, head_groups=1)
    return [*streamed, plain]


@pytest.mark.parametrize("gpu_gib", [11, 14, 18, 30])
def test_the_choice_is_the_cheapest_of_all_that_fit(gpu_gib: float) -> None:
    # Apollo-mini in bf16, so that four layers and their activations are of one size.
    config = plan_config(
        4,
        sequence={**FREE, "length": "64k", "tile_tokens": 8192},
        optimizer={"name": "apollo-mini", "weights": "bf16", "apollo": {"embeddings": "low_rank"}},
    )
    looked = search(config, machine_with(gpu_gib, host_gib=9))
    found = looked.fastest(65536)
    assert found is not None
    costs = looked.costs
    fitting = [knobs for knobs in every_way(found.knobs, 4) if costs.fits(knobs)]
    assert fitting
    assert costs.price(found.knobs) == min(costs.price(knobs) for knobs in fitting)
    assert costs.fits(found.knobs)


def test_more_memory_never_gives_a_dearer_plan_and_what_is_chosen_fits() -> None:
    config = plan_config(8, sequence={**FREE, "length": "128k"}, parallel=AUTO, train={"precision": "bf16"})
    prices = []
    for gpu_gib in (10, 18, 27, 80):
        looked = search(config, machine_with(gpu_gib, host_gib=160, num_gpus=2))
        found = looked.fastest(131072)
        assert (found is None) == (looked.costs.fullness(looked.least(131072).knobs) > 1)
        if found is not None:
            memory = looked.costs.memory(found.knobs)
            assert memory.reserved_bytes <= looked.machine.gpu.memory_bytes
            assert 2 * memory.host_bytes <= looked.machine.host_bytes
            prices.append(looked.costs.price(found.knobs))
    assert len(prices) >= 3
    assert prices == sorted(prices, reverse=True)
    assert prices[0] > prices[-1]


def test_card_and_host_are_both_filled_for_the_longest() -> None:
    """Neither with all that waits on the card nor with all of it on the host: both are too small for that."""
    config = plan_config(
        32,
        sequence={"length": "max"},
        optimizer={"name": "apollo-mini", "weights": "bf16", "in_backward": True},
    )
    looked = search(config, machine_with(139.8, host_gib=97.8))
    longest = looked.longest()
    found = looked.fastest(longest).knobs
    costs, inputs = looked.costs, found.inputs
    assert costs.fullness(found) > 0.97
    assert inputs.rebuilds
    assert min(inputs.count("gpu", 32), inputs.count("host", 32)) > 1
    for other in (spread_inputs(32, 0, 7), spread_inputs(32, 7, 0), Placement(1, every=4)):
        assert not costs.fits(replace(found, inputs=other))
    # Layers are rebuilt as often as with every fourth input kept, which takes far more.
    assert inputs.count("rebuild", 32) == Placement(1, every=4).count("rebuild", 32)
    most_before = most(1, longest // 1024, lambda n: fits_every_fourth(looked, found, n * 1024))
    assert longest > 1.15 * most_before * 1024


def fits_every_fourth(looked: Search, knobs: Knobs, length: int) -> bool:
    """Whether that length fits with every fourth input kept, some of them on the GPU."""
    ways = [replace(knobs, length=length, inputs=Placement(layers, every=4)) for layers in range(32)]
    return any(map(looked.costs.fits, ways))


def test_longer_sequences_never_take_less_memory_or_time() -> None:
    config = plan_config(4, sequence={"save_attention": "none"}, parallel=AUTO, train={"precision": "bf16"})
    looked = search(config, machine_with(79, num_gpus=2))
    lengths = [1024 * count for count in (8, 9, 33, 128, 512)]
    least = [looked.costs.fullness(looked.least(length).knobs) for length in lengths]
    assert least == sorted(least)
    seconds = [looked.costs.seconds(looked.fastest(length).knobs).seconds for length in lengths]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("num_gpus", [1, 3])
def test_the_longest_fits_and_one_step_more_does_not(num_gpus: int) -> None:
    config = plan_config(2, parallel=AUTO, train={"global_batch_sequences": 3})
    looked = search(config, machine_with(40, host_gib=60, num_gpus=num_gpus))
    longest = looked.longest()
    assert longest is not None
    found = looked.fastest(longest)
    assert found is not None
    assert longest % found.knobs.ulysses_degree == 0
    assert longest % 1024 == 0
    # Every degree that the batch allows has its own step: 1,024 tokens and 3,072.
    for step in (1024, 3072):
        assert looked.fastest((longest // step + 1) * step) is None


def test_nothing_fits_a_card_that_the_weights_fill() -> None:
    looked = search(plan_config(32), machine_with(8))
    assert looked.longest() is None
    assert looked.fastest(4096) is None
    assert looked.costs.fullness(looked.least(4096).knobs) > 1


def test_all_processes_of_a_node_share_its_memory() -> None:
    config = plan_config(
        4, sequence={"length": "32k", "checkpoints": "host"}, train={"global_batch_sequences": 4}
    )
    alone = search(config, machine_with(79, host_gib=16, num_gpus=4, gpus_per_node=1))
    of_one = alone.costs.memory(alone.least(32768).knobs).host_bytes / GIB
    together = search(config, machine_with(79, host_gib=3.9 * of_one, num_gpus=4))
    enough = search(config, machine_with(79, host_gib=4.1 * of_one, num_gpus=4))
    assert alone.fastest(32768) is not None
    assert enough.fastest(32768) is not None
    assert together.fastest(32768) is None


@pytest.mark.parametrize(
    ("sequence", "kept"),
    [
        ({"checkpoints": "gpu"}, {"inputs": Placement(0, 1, host=False), "stream": True}),
        ({"checkpoints": "host"}, {"inputs": Placement(1)}),
        ({"checkpoints": "host", "checkpoint_every": 4}, {"inputs": Placement(1, 4)}),
        ({"checkpoints": "none"}, {"stream": False, "attention": NOTHING}),
        ({"save_attention": "none"}, {"attention": NOTHING}),
        ({"save_attention": "host"}, {"attention": SavedAttention(host=True), "stream": True}),
        ({"save_attention": "gpu"}, {"attention": SavedAttention(4)}),
        ({"save_attention": "all"}, {"attention": SavedAttention(4, everything=True)}),
        ({"head_groups": 4}, {"head_groups": 4, "stream": True}),
        ({"tile_tokens": 1000}, {"tile_tokens": 1000}),
        ({"mini_sequence": False}, {"tile_tokens": None}),
    ],
)
def test_what_is_fixed_is_kept(sequence: dict, kept: dict) -> None:
    config = plan_config(4, sequence={"length": "16k", **sequence})
    found = search(config, machine_with(140)).fastest(16384)
    assert found is not None
    assert {name: getattr(found.knobs, name) for name in kept} == kept


@pytest.mark.parametrize(
    "parallel",
    [
        {"ulysses_degree": 4, "zero_stage": "auto"},
        {"zero_stage": 2, "ulysses_degree": "auto"},
        {"offload_optimizer": "cpu", "zero_stage": "auto"},
        {"offload_parameters": "cpu", "zero_stage": "auto", "offload_optimizer": "auto"},
    ],
)
def test_what_is_fixed_of_processes_is_kept(parallel: dict) -> None:
    config = plan_config(
        4, sequence={"length": "16k"}, parallel=parallel, train={"global_batch_sequences": 4}
    )
    found = search(config, machine_with(79, num_gpus=4)).fastest(16384)
    assert found is not None
    for key, value in parallel.items():
        assert value in ("auto", getattr(found.config.parallel, key))
    assert found.knobs.num_gpus == 4
    assert found.knobs.accumulation * found.knobs.data_degree * found.knobs.micro_batch == 4


def test_adapters_that_drop_out_are_not_streamed() -> None:
    config = plan_config(4, sequence={"length": "4k"})
    lora = {"lora": type(config.model)(lora={"dropout": 0.1}).lora}
    config = config.model_copy(update={"model": config.model.model_copy(update=lora)})
    looked = Search(config, work_of(plan_config(4)), machine_with(140))
    found = looked.fastest(4096)
    assert found is not None
    assert not found.knobs.stream


def test_layouts_are_those_that_the_rules_allow_simplest_first() -> None:
    config = plan_config(4, parallel=AUTO, train={"global_batch_sequences": 2})
    found = [way.parallel for way in layouts(config, 4, 4096)]
    # One sequence for each of four groups are more than the batch has.
    assert {way.ulysses_degree for way in found} == {2, 4}
    assert (found[0].ulysses_degree, found[0].zero_stage, found[0].offload_optimizer) == (2, 0, "none")
    assert all(way.zero_stage >= 1 for way in found if way.offload_optimizer == "cpu")
    assert all(way.zero_stage == 3 for way in found if way.offload_parameters == "cpu")
    assert {way.parallel.ulysses_degree for way in layouts(config, 4, 4096, num_heads=2)} == {2}


def test_one_gpu_may_move_things_to_the_host() -> None:
    found = [way.parallel for way in layouts(plan_config(4, parallel=AUTO), 1, 4096)]
    assert (found[0].zero_stage, found[0].ulysses_degree) == (0, 1)
    assert any(way.offload_optimizer == "cpu" for way in found)


def test_weights_in_bf16_leave_zero_out() -> None:
    config = plan_config(4, parallel=AUTO, optimizer={"name": "apollo-mini", "weights": "bf16"})
    assert {way.parallel.zero_stage for way in layouts(config, 1, 4096)} == {0}


def test_what_cannot_go_together_is_said_as_the_rules_say_it() -> None:
    fixed = {"zero_stage": 0, "offload_optimizer": "cpu", "offload_parameters": "auto"}
    with pytest.raises(ConfigError, match=r"offload_optimizer='cpu' needs parallel\.zero_stage 1, 2 or 3"):
        layouts(plan_config(4, parallel=fixed), 1, 4096)
    config = plan_config(4, parallel={"ulysses_degree": 8})
    with pytest.raises(ConfigError, match=r"ulysses_degree=8 is above the model's 4 query heads.*use 4 or"):
        layouts(config, 8, 4096, num_heads=4)


@pytest.mark.parametrize(("available", "batch", "count"), [(8, 1, 8), (7, 2, 7), (0, 4, 1), (1, 1, 1)])
def test_as_many_gpus_are_used_as_some_degree_can_share(available: int, batch: int, count: int) -> None:
    config = plan_config(
        4, parallel=AUTO, train={"global_batch_sequences": batch}, sequence={"length": "max"}
    )
    assert most_processes(config, available) == count


def test_gpus_that_no_degree_can_use_stay_idle() -> None:
    few_heads = {**plan_config(4).model.config, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = plan_config(4, model={"config": few_heads}, parallel=AUTO)
    # Seven GPUs are one sequence over seven or seven sequences: too few heads, too small a batch.
    assert most_processes(config, 7) == 4


def test_tiles_and_groups_are_cut_evenly() -> None:
    config = plan_config(4)
    assert tiles(config, 65536) == [32768, 16384, 8192, 4096]
    assert tiles(config, 33000) == [16512, 11008, 6656, 3712]
    assert tiles(config, 1000) == [1024]
    work = work_of(config)
    assert head_groups(config, work, 1) == [1, 2, 4, 8]
    assert head_groups(config, work, 4) == [1, 2, 4, 8]
    assert head_groups(config, work, 8) == [1, 2, 4]  # a query head of a group for each rank


def test_groups_of_shared_key_value_heads_are_for_what_has_no_room_without() -> None:
    config = plan_config(
        4,
        sequence={**FREE, "length": "512k", "tile_tokens": 4096},
        parallel={"ulysses_degree": 4, "zero_stage": 3},
        train={"precision": "bf16"},
    )
    for gpu_gib, fits_evenly in ((80, True), (32, True), (26, False)):
        looked = search(config, machine_with(gpu_gib, host_gib=200, num_gpus=4))
        found = looked.fastest(524288)
        assert found is not None
        assert (found.knobs.head_groups <= 2) == fits_evenly
        fitting = [knobs for knobs in every_way(found.knobs, 4) if looked.costs.fits(knobs)]
        assert fits_evenly == any(knobs.head_groups <= 2 for knobs in fitting)
        assert looked.costs.price(found.knobs) == min(map(looked.costs.price, fitting))


def test_most_is_the_last_that_holds() -> None:
    for last in range(-1, 9):
        assert most(0, 7, lambda n, last=last: n <= last) == (None if last < 0 else min(last, 7))
    assert most(3, 2, lambda n: True) is None
