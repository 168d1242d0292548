"""Inputs that are rebuilt: the same bits wherever they wait, and no more host memory than forward had."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import pytest
import torch
from layer_problems import HIDDEN, Step, assert_same_step, grads_of, make_batch, make_model, true_step
from simulated_streams import Machine
from torch import Tensor, nn

from longseq.mst import apply_mini_sequence, layer_memory
from longseq.mst.checkpoint_store import CheckpointStore, Kept
from longseq.mst.pinned_slab import PinnedSlab
from longseq.mst.placement import Placement, spread_inputs
from longseq.mst.rebuilt_inputs import RebuiltInputs

NUM_LAYERS = 10
PLACES = {
    "host": spread_inputs(NUM_LAYERS, 0, 3),
    "all on the device": spread_inputs(NUM_LAYERS, 3, 0),
    "one on the device": spread_inputs(NUM_LAYERS, 1, 2),
    "two on the device": spread_inputs(NUM_LAYERS, 2, 1),
    "five": spread_inputs(NUM_LAYERS, 1, 4),
    "every fourth": Placement(1, every=4),
    "first alone": Placement(0, kept=(0,)),
}


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> tuple[list[PinnedSlab], list[str]]:
    """Slabs that models take, and what has gone to the host since the list was cleared."""
    slabs: list[PinnedSlab] = []
    moved: list[str] = []

    def make(device: torch.device) -> PinnedSlab:
        slabs.append(PinnedSlab(device, block_bytes=2**12))
        return slabs[-1]

    keep, fetch = CheckpointStore.keep, CheckpointStore.fetch
    monkeypatch.setattr(layer_memory, "PinnedSlab", make)
    monkeypatch.setattr(CheckpointStore, "keep", lambda *args: (moved.append("keep"), keep(*args))[1])
    monkeypatch.setattr(CheckpointStore, "fetch", lambda *args: (moved.append("fetch"), fetch(*args))[1])
    return slabs, moved


def model_of(dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    model = make_model(dtype=dtype, num_hidden_layers=NUM_LAYERS)
    apply_mini_sequence(model, tile_tokens=10, head_groups=2, **options)
    return model


def packed() -> dict[str, Tensor]:
    batch = make_batch(1, 37)
    return batch | {"position_ids": torch.cat([torch.arange(20), torch.arange(17)])[None]}


def step_of(model: nn.Module, batch: dict[str, Tensor]) -> Step:
    loss = model(**batch).loss
    loss.backward()
    return Step(loss.detach(), grads_of(model))


def assert_equal(found: Step, wanted: Step) -> None:
    assert torch.equal(found.loss, wanted.loss)
    assert found.grads.keys() == wanted.grads.keys()
    assert all(torch.equal(found.grads[name], grad) for name, grad in wanted.grads.items())


@cache
def kept_step(dtype: torch.dtype, is_packed: bool) -> Step:
    """With every input on the GPU."""
    return step_of(model_of(dtype, checkpoints="gpu"), packed() if is_packed else make_batch())


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_bit_changes(where: str, dtype: torch.dtype) -> None:
    for batch, save_attention in ((make_batch(), False), (packed(), "host")):
        model = model_of(dtype, checkpoints=PLACES[where], save_attention=save_attention)
        assert_equal(step_of(model, batch), kept_step(dtype, save_attention == "host"))


def test_no_bit_changes_under_autocast() -> None:
    steps = []
    with torch.autocast("cpu", torch.bfloat16):
        for placed in ("gpu", PLACES["host"], PLACES["two on the device"]):
            steps.append(step_of(model_of(torch.float32, checkpoints=placed), make_batch()))
    for one, other in pairwise(steps):
        assert_equal(one, other)


@pytest.mark.parametrize("where", PLACES)
def test_backward_takes_no_host_memory_that_forward_had_not(where: str, watched) -> None:
    slabs, moved = watched
    placed, rows = PLACES[where], make_batch()["input_ids"].numel()
    model = model_of(checkpoints=placed)
    for _ in range(2):
        loss = model(**make_batch()).loss
        assert bool(slabs) == placed.host
        at_most = placed.count("host", NUM_LAYERS) * (rows * HIDDEN * 8 + 4096)
        moved.clear()
        loss.backward()
        assert sum(slab.total_bytes for slab in slabs) <= at_most
        assert all(slab.free_bytes == slab.total_bytes for slab in slabs)
    # What waits on the host was taken there and brought back, as the plan counts it.
    places, waits = placed.all_places(NUM_LAYERS), placed.waits(NUM_LAYERS)
    rebuilt = sum(place == "rebuild" and wait == "host" for place, wait in zip(places, waits, strict=True))
    again = sum(place == "host" and above == "rebuild" for place, above in pairwise(places))
    assert moved.count("keep") == rebuilt
    assert moved.count("fetch") == rebuilt + again + places.count("host")


@pytest.mark.parametrize("where", PLACES)
def test_a_second_backward_needs_no_room_that_the_first_still_has(where: str, watched) -> None:
    """Where the graph is kept nothing on the host is given back, so what is rebuilt waits on the GPU."""
    slabs, moved = watched
    batch, truth = (
        make_batch(),
        true_step(make_model(num_hidden_layers=NUM_LAYERS), make_batch(), upstream=3.0),
    )
    model = model_of(checkpoints=PLACES[where])
    loss = model(**batch).loss
    forward_bytes = sum(slab.total_bytes for slab in slabs)
    moved.clear()
    loss.backward(retain_graph=True)
    assert "keep" not in moved
    (2.0 * loss).backward()
    assert_same_step(Step(loss.detach(), grads_of(model)), truth)
    assert sum(slab.total_bytes for slab in slabs) == forward_bytes
    assert all(slab.free_bytes == slab.total_bytes for slab in slabs)


@pytest.mark.parametrize("frozen", [1, 4, 6])
@pytest.mark.parametrize("where", ["host", "one on the device", "every fourth"])
def test_a_pass_that_begins_above_the_first_layer(where: str, frozen: int, watched) -> None:
    """Layers below are frozen: the first that is not keeps its input, wherever it is in a segment."""
    slabs, _ = watched
    models = [make_model(num_hidden_layers=NUM_LAYERS) for _ in range(2)]
    for model in models:
        for part in (model.model.embed_tokens, *model.model.layers[:frozen]):
            part.requires_grad_(False)
    truth = true_step(models[0], make_batch())
    apply_mini_sequence(models[1], tile_tokens=10, checkpoints=PLACES[where])
    loss = models[1](**make_batch()).loss
    forward_bytes = sum(slab.total_bytes for slab in slabs)
    loss.backward()
    assert_same_step(Step(loss.detach(), grads_of(models[1])), truth)
    assert sum(slab.total_bytes for slab in slabs) == forward_bytes


@pytest.mark.parametrize("where", ["host", "two on the device"])
def test_a_backward_that_was_broken_off_is_taken_up_again(where: str) -> None:
    """Some of a segment's inputs are made and not used: they are made anew, and nothing is left over."""
    batch, model = make_batch(), model_of(checkpoints=PLACES[where])
    wanted = step_of(model, batch)
    model.zero_grad()
    loss, failures = model(**batch).loss, [True]

    def fail(grad: Tensor) -> None:
        if failures.pop() if failures else False:
            raise MemoryError

    hook = model.model.layers[2].mlp.down_proj.weight.register_hook(fail)
    with pytest.raises(MemoryError):
        loss.backward(retain_graph=True)
    hook.remove()
    model.zero_grad()
    loss.backward()
    assert_equal(Step(loss.detach(), grads_of(model)), wanted)


def test_a_handle_that_is_undone_between_forward_and_backward() -> None:
    batch, model = make_batch(), model_of(checkpoints=PLACES["host"])
    wanted = step_of(model, batch)
    model.zero_grad()
    loss = model(**batch).loss
    model._mini_sequence_handle.undo()
    loss.backward()
    assert_equal(Step(loss.detach(), grads_of(model)), wanted)


def test_two_passes_do_not_take_each_others_room(watched) -> None:
    slabs, _ = watched
    model, first, second = model_of(checkpoints=PLACES["host"]), make_batch(), make_batch(1, 31)
    wanted = step_of(model, first)
    model.zero_grad()
    losses = model(**first).loss, model(**second).loss
    forward_bytes = sum(slab.total_bytes for slab in slabs)
    losses[0].backward()
    assert_equal(Step(losses[0].detach(), grads_of(model)), wanted)
    losses[1].backward()
    assert sum(slab.total_bytes for slab in slabs) == forward_bytes


def test_at_most_one_input_is_on_the_device_beside_those_that_wait_on_the_host() -> None:
    """Of one segment: while a layer runs again its input is there, and what waits on the host is not."""
    store = CheckpointStore(PinnedSlab(block_bytes=2**12))
    rebuilt, alive = RebuiltInputs(store), []

    def first() -> Tensor:
        made = torch.zeros(3, 4)
        alive.append(weakref.ref(made.untyped_storage()))
        return made

    def layer(hidden: Tensor) -> Tensor:
        made = hidden + 1
        counts.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(made.untyped_storage()))
        return made

    def slots(count: int) -> None:
        for _ in range(count):
            rebuilt.add_slot(store.keep(torch.zeros(3, 4)))  # gone at once

    for free, counted in ((0, [1, 1, 2, 3]), (1, [1, 1, 1, 2]), (3, [1, 1, 1, 1])):
        counts: list[int] = []
        slots(free - len(rebuilt._slots))
        rebuilt.make(4, [layer] * 4, first, None)
        assert counts == counted
        for index in range(8, 4, -1):
            taken = rebuilt.take(index)
            assert isinstance(taken, Kept) == (index - 4 <= free and index < 8)
            held = store.fetch(taken).whole() if isinstance(taken, Kept) else taken
            assert torch.equal(held, torch.full((3, 4), index - 4.0))
            del taken, held
        alive.clear()
    assert store.slab.free_bytes == store.slab.total_bytes


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("free", [0, 1, 3])
def test_copies_beside_the_computing_are_waited_for(free: int, seed: int) -> None:
    """On simulated streams: each layer reads its own input, and the device keeps what no slot has."""
    machine, shape = Machine(seed), (23, 60)
    store = CheckpointStore(PinnedSlab(block_bytes=2**12))
    store._copier = machine
    truths = [torch.randn(shape) for _ in range(5)]
    read: list[tuple[Tensor, Tensor]] = []

    def made(index: int) -> Tensor:
        tensor = machine.empty(shape, torch.float32)
        machine.move(tensor, truths[index])
        return tensor

    def reads(index: int, tensor: Tensor) -> None:
        got = torch.empty(shape)
        machine.move(got, tensor)
        read.append((got, truths[index]))

    def layer(index: int) -> Callable[[Tensor], Tensor]:
        return lambda hidden: (reads(index, hidden), made(index + 1))[1]

    rebuilt = RebuiltInputs(store)
    for _ in range(free):
        rebuilt.add_slot(store.keep(made(0)))
    start = store.keep(made(0))
    start.settle()
    rebuilt.make(0, [layer(index) for index in range(4)], lambda: store.fetch(start).whole(), start)
    # The pool, the loop and the call refer to what nobody has.
    assert sum(sys.getrefcount(memory) > 3 for memory in machine.pool) == 4 - free
    for index in range(4, -1, -1):
        kept = rebuilt.take(index) if index else start
        if isinstance(kept, Tensor):
            reads(index, kept)
        else:
            fetched = store.fetch(kept)
            for begin in range(0, 23, 9):
                fetched.wait(min(begin + 9, 23))
            reads(index, fetched.tensor)
            for begin in range(0, 23, 9):
                fetched.release(begin, min(begin + 9, 23))
            del fetched
        del kept
        machine.empty(shape, torch.float32)  # what the layer overwrites
        machine.run(machine.random.randrange(40))
    machine.run()
    assert len(read) == 9
    assert all(torch.equal(got, truth) for got, truth in read)
