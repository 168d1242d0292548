"""What layers keep, where it is kept, and that it is given back."""

from __future__ import annotations

import gc
import logging
import re
import weakref
from types import SimpleNamespace

import pytest
import torch
from layer_problems import HIDDEN, assert_same_step, make_batch, make_model, take_step, true_step
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from longseq.mst import apply_mini_sequence, layer_memory, layer_places
from longseq.mst.gradient_owner import GradientOwner
from longseq.mst.layer_memory import Places, SavedAttention
from longseq.mst.layer_places import ALL_ON_GPU, PlaceChooser, parse_save_attention
from longseq.mst.pinned_slab import PinnedSlab
from longseq.mst.placement import Placement, spread_inputs

NUM_LAYERS = 4
ROW_BYTES = HIDDEN * 8
WHOLE = 74 * ROW_BYTES  # of a batch's hidden states, in float64
ATTENDED = 74 * 64 * 8  # attention's output: 8 heads of 8


class Slabs(list):
    """Host memory that a test's models took."""

    def held(self) -> int:
        return sum(slab.total_bytes - slab.free_bytes for slab in self)


@pytest.fixture
def slabs(monkeypatch: pytest.MonkeyPatch) -> Slabs:
    made = Slabs()

    def make(device: torch.device) -> PinnedSlab:
        made.append(PinnedSlab(device, block_bytes=2**16))
        return made[-1]

    monkeypatch.setattr(layer_memory, "PinnedSlab", make)
    return made


def layered(**fields) -> nn.Module:
    return make_model(num_hidden_layers=NUM_LAYERS, **fields)


def saved_by_autograd(model: nn.Module) -> list[Tensor]:
    """Activations that a forward leaves with autograd, but for those of embedding, norm and head."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model.model(**{"input_ids": make_batch()["input_ids"], "use_cache": False})
    weights = {param.data_ptr() for param in model.parameters()}
    found = [t for t in kept if t.is_floating_point() and t.data_ptr() not in weights]
    # The final norm keeps what the last layer gave.
    return [t for t in found if t.shape != out.last_hidden_state.shape]


# -- what is kept ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "inputs", "attended", "on_host"),
    [
        ({"checkpoints": "gpu"}, 4, 0, 0),
        ({"checkpoints": "gpu", "save_attention": "gpu"}, 4, 4, 0),
        ({"checkpoints": "gpu", "save_attention": 1}, 4, 1, 0),
        ({"checkpoints": "host", "save_attention": "all"}, 1 + 4, 4, 3 * WHOLE),
        ({"checkpoints": "host"}, 1, 0, 3 * WHOLE),
        ({"checkpoints": "host", "save_attention": "host"}, 1, 0, 3 * WHOLE + 4 * ATTENDED),
        ({"checkpoints": Placement(gpu_layers=2)}, 2, 0, 2 * WHOLE),
        ({"checkpoints": Placement(gpu_layers=0, every=2)}, 0, 0, 2 * WHOLE),
        ({"checkpoints": Placement(host=False, every=3)}, 4, 0, 0),  # shared: two tensors, each twice
    ],
    ids=str,
)
def test_a_forward_keeps_what_was_asked_for(
    options: dict, inputs: int, attended: int, on_host: int, slabs: Slabs
) -> None:
    """Of a layer its input alone, and attention's output and log-sum-exp where they are saved."""
    model = layered(attention="sdpa")
    apply_mini_sequence(model, tile_tokens=10, **options)
    kept = saved_by_autograd(model)
    assert sum(tensor.shape == (74, HIDDEN) for tensor in kept) == inputs
    assert sum(tensor.shape == (74, 64) for tensor in kept) == attended
    projected = sum(tensor.shape == (74, 128) for tensor in kept)  # 8 heads of q, 4 of k and v
    assert projected == (attended if options.get("save_attention") == "all" else 0)
    others = [tensor for tensor in kept if tensor.shape not in ((74, HIDDEN), (74, 64), (74, 128))]
    assert sum(tensor.numel() for tensor in others) <= attended * 74 * 8  # the log-sum-exp, a number a head
    assert bool(slabs) == (on_host > 0)


ON_HOST = [
    ({"checkpoints": "host"}, 3 * WHOLE),
    ({"checkpoints": "gpu", "save_attention": "host"}, 4 * ATTENDED),
    ({"checkpoints": "host", "save_attention": "host", "head_groups": 4}, 3 * WHOLE + 4 * ATTENDED),
    ({"checkpoints": Placement(gpu_layers=0, every=2)}, 2 * WHOLE),
]
"""Options, and the bytes that they keep on the host at the least."""


@pytest.mark.parametrize(("options", "least"), ON_HOST, ids=str)
def test_host_memory_goes_with_its_graph(options: dict, least: int, slabs: Slabs) -> None:
    """After a backward or without one, at once: not when the garbage collector comes."""
    model, batch = layered(), make_batch()
    apply_mini_sequence(model, tile_tokens=10, **options)
    gc.disable()
    try:
        loss = model(**batch).loss
        assert least <= slabs.held() <= 1.3 * least + 2**16
        loss.backward()
        del loss
        assert slabs.held() == 0
        first, second = (model(**batch).loss for _ in range(2))
        assert slabs.held() >= 2 * least
        del first
        second.backward()
        del second
        assert slabs.held() == 0
    finally:
        gc.enable()
    assert len(slabs) == 1


@pytest.mark.parametrize(("options", "least"), ON_HOST, ids=str)
def test_host_memory_goes_with_its_backward(options: dict, least: int, slabs: Slabs) -> None:
    """As tensors that autograd saves do: in a plain loop the last step's loss outlives the next forward."""
    model, batch = layered(), make_batch()
    apply_mini_sequence(model, tile_tokens=10, **options)
    loss = model(**batch).loss
    loss.backward()
    assert slabs.held() == 0


@pytest.mark.parametrize("checkpoints", ["gpu", "host", Placement(every=2, host=False)], ids=repr)
def test_nothing_outlives_a_step(checkpoints, slabs: Slabs) -> None:
    """No reference runs in a circle: what hidden states took is free at once."""
    model, batch = layered(), make_batch()
    apply_mini_sequence(model, tile_tokens=10, checkpoints=checkpoints, save_attention="gpu")
    alive: list[weakref.ref] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, out: alive.append(weakref.ref(out)))
    gc.collect()
    gc.disable()
    try:
        loss = model(**batch).loss
        loss.backward()
        del loss
        assert len(alive) >= NUM_LAYERS
        assert not [ref for ref in alive if ref() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize("checkpoints", ["host", Placement(every=2)], ids=repr)
def test_a_forward_that_was_broken_off_is_freed_by_the_next(checkpoints, slabs: Slabs) -> None:
    """As after running out of memory: a shorter sequence is tried, and must find the memory free."""
    model, batch = layered(), make_batch()
    apply_mini_sequence(model, tile_tokens=10, checkpoints=checkpoints)
    gc.collect()
    gc.disable()
    try:
        break_off(model, batch)
        model(**batch).loss.backward()
        assert slabs.held() == 0
    finally:
        gc.enable()


def break_off(model: nn.Module, batch: dict[str, Tensor]) -> None:
    def fail(*args) -> None:
        raise MemoryError

    hook = model.model.layers[2].register_forward_hook(fail)
    with pytest.raises(MemoryError):
        model(**batch)
    hook.remove()


@pytest.mark.parametrize("checkpoints", ["gpu", "host", Placement(every=2)], ids=repr)
def test_a_forward_that_was_broken_off_spoils_no_step(checkpoints) -> None:
    model, batch = layered(), make_batch()
    truth = true_step(model, batch)
    apply_mini_sequence(model, tile_tokens=10, checkpoints=checkpoints)
    break_off(model, batch)
    assert_same_step(take_step(model, batch), truth)


def test_lower_layers_that_are_frozen_do_not_change_where_the_others_keep(slabs: Slabs) -> None:
    """Without a gradient the first layers keep nothing; those above are still to keep theirs on the host."""
    model, batch = layered(), make_batch()
    for part in (model.model.embed_tokens, model.model.layers[0]):
        part.requires_grad_(False)
    truth = true_step(model, batch)
    apply_mini_sequence(model, tile_tokens=10, checkpoints="host")
    assert_same_step(take_step(model, batch), truth)
    assert len(slabs) == 1


def test_layers_that_come_and_go() -> None:
    """Batches of other shapes, one after the other, with the same memory."""
    model = layered()
    apply_mini_sequence(model, tile_tokens=10, checkpoints="host", save_attention="host")
    for rows, length in ((2, 37), (1, 12), (3, 40), (2, 37)):
        batch = make_batch(rows, length)
        found = take_step(model, batch)
        handle = model._mini_sequence_handle
        handle.undo()
        assert_same_step(found, true_step(model, batch))
        apply_mini_sequence(model, tile_tokens=10, checkpoints="host", save_attention="host")


# -- who owns a gradient --------------------------------------------------------------------------------


class Relay(torch.autograd.Function):
    """Owns the gradient that it returns, and says whether it owned the one that it got."""

    @staticmethod
    def forward(ctx, x: Tensor, owner: GradientOwner, found: list[bool]) -> Tensor:
        ctx.owner, ctx.found = owner, found
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        references = GradientOwner.references(grad)
        ctx.found.append(ctx.owner.owns(grad, references))
        made = grad.clone()
        ctx.owner.own(made)
        return made, None, None


def owned(between) -> list[bool]:
    """Whether each of two relays owned its gradient, the later one first, with `between` in between."""
    owner, found = GradientOwner(), []
    x = torch.randn(3, 4, requires_grad=True)
    y = Relay.apply(x, owner, found)
    Relay.apply(between(y), owner, found).sum().backward()
    return found


def with_hook(hook):
    def between(y: Tensor) -> Tensor:
        y.register_hook(hook)
        return y

    return between


def test_a_gradient_from_layer_to_layer_is_owned() -> None:
    assert owned(lambda y: y) == [False, True]
    assert owned(lambda y: y.view(12)) == [False, False]  # another tensor
    assert owned(lambda y: y * 2) == [False, False]


def test_a_gradient_that_somebody_else_has_is_not_owned() -> None:
    kept: list[Tensor] = []
    assert owned(with_hook(lambda grad: kept.append(grad) and None)) == [False, False]
    assert owned(with_hook(lambda grad: grad.mul_(2))) == [False, False]
    assert owned(with_hook(lambda grad: 2 * grad)) == [False, False]


def test_a_gradient_of_two_sides_is_not_owned() -> None:
    early = torch.zeros(3, 4, requires_grad=True).exp()  # whose backward comes after all others
    assert owned(lambda y: y + early) == [False, False]


@pytest.mark.parametrize("keep", [Tensor.detach, lambda grad: grad[0], lambda grad: grad.view(-1)])
def test_a_gradient_whose_memory_somebody_else_has_is_not_owned(keep) -> None:
    kept: list[Tensor] = []
    assert owned(with_hook(lambda grad: kept.append(keep(grad)) and None)) == [False, False]


# -- where it is kept -----------------------------------------------------------------------------------


def test_where_attention_is_kept() -> None:
    assert [SavedAttention().where(i, 3) for i in range(3)] == [None, None, None]
    assert [SavedAttention(gpu_layers=2).where(i, 3) for i in range(3)] == [None, "gpu", "gpu"]
    assert [SavedAttention(gpu_layers=1, host=True).where(i, 3) for i in range(3)] == ["host", "host", "gpu"]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (True, "auto"),
        (False, SavedAttention()),
        ("gpu", SavedAttention(gpu_layers=4)),
        ("host", SavedAttention(host=True)),
        ("all", SavedAttention(gpu_layers=4, everything=True)),
        (0, SavedAttention()),
        (1, SavedAttention(gpu_layers=1)),
        (4, SavedAttention(gpu_layers=4)),
    ],
)
def test_what_save_attention_means(value, wanted) -> None:
    assert parse_save_attention(value, 4) == wanted


@pytest.mark.parametrize("value", ["disk", "auto", 5, -1, 2.0, None])
def test_other_values_of_save_attention_are_refused(value) -> None:
    with pytest.raises(
        ValueError,
        match=rf"save_attention={value!r} must be True, False, 'gpu', 'host', 'all', a number.*at most 4",
    ):
        parse_save_attention(value, 4)


def chooser(inputs, attention, *, gpu: int, host: int, monkeypatch: pytest.MonkeyPatch) -> PlaceChooser:
    """One for ten layers, with so many hidden states' bytes free."""
    monkeypatch.setattr(PlaceChooser, "_free_gpu_bytes", lambda self, hidden: gpu * hidden.nbytes)
    return PlaceChooser(nn.Identity(), 10, inputs, attention, available_host=lambda: host * 2**20)


ON_GPU = SimpleNamespace(device=torch.device("cuda"), shape=(1024, 512), nbytes=2**20, itemsize=2)
"""What a chooser looks at of `(1024, 512)` in bfloat16. Attention's output beside it is 9 / 8 as large, and
everything that can be kept 41 / 8."""


@pytest.mark.parametrize(
    ("asked", "free", "wanted"),
    [
        (("auto", SavedAttention()), (10, 0), Places(Placement(10, host=False), SavedAttention())),
        (("auto", SavedAttention()), (4, 6), Places(Placement(4), SavedAttention())),
        (("auto", SavedAttention()), (4, 3), Places(spread_inputs(10, 3, 3), SavedAttention())),
        (("gpu", "auto"), (21, 0), Places(ALL_ON_GPU, SavedAttention(9))),
        (("gpu", "auto"), (22, 0), Places(ALL_ON_GPU, SavedAttention(10, host=True))),
        (("gpu", "auto"), (15, 99), Places(ALL_ON_GPU, SavedAttention(4, host=True))),
        (("host", "auto"), (2, 99), Places(Placement(1), SavedAttention(0, host=True))),
        (("host", "auto"), (0, 0), Places(Placement(1), SavedAttention())),
        (("gpu", "auto"), (61, 99), Places(ALL_ON_GPU, SavedAttention(10, host=True))),
        (("gpu", "auto"), (62, 0), Places(ALL_ON_GPU, SavedAttention(10, everything=True))),
        (("auto", SavedAttention(2)), (11, 0), Places(spread_inputs(10, 7, 0), SavedAttention(2))),
        (("auto", "auto"), (30, 0), Places(Placement(10, host=False), SavedAttention(10, host=True))),
    ],
)
def test_what_is_chosen_from_the_memory_there_is(asked, free, wanted, monkeypatch) -> None:
    inputs = {"gpu": ALL_ON_GPU, "host": Placement(1)}.get(asked[0], asked[0])
    choose = chooser(inputs, asked[1], gpu=free[0], host=free[1], monkeypatch=monkeypatch)
    assert choose(ON_GPU, 512) == wanted


def test_ranks_that_work_in_lockstep_choose_by_the_least_of_them(monkeypatch) -> None:
    """This one could keep all on the GPU; another, which has more tokens, only every other layer's input."""
    choose = chooser("auto", SavedAttention(), gpu=30, host=30, monkeypatch=monkeypatch)
    assert choose(ON_GPU, 512).inputs == Placement(10, host=False)
    theirs = [4 * 2**20, 3 * 2**20, -(2**20)]
    monkeypatch.setattr(
        layer_places, "least_of_ranks", lambda ours, *rest: list(map(min, zip(ours, theirs, strict=True)))
    )
    assert choose(ON_GPU, 512).inputs == spread_inputs(10, 3, 3)
    theirs[2] = -(3 * 2**20)
    with pytest.raises(ValueError, match=r"10 layers, 3,145,728 bytes each"):
        choose(ON_GPU, 512)


def test_host_memory_is_asked_for_once() -> None:
    """Afterwards, what we pinned ourselves would count as taken."""
    asked: list[int] = []
    choose = PlaceChooser(nn.Identity(), 10, "auto", SavedAttention(), lambda: asked.append(1) or 2**40)
    choose._free_gpu_bytes = lambda hidden: 3 * hidden.nbytes
    assert choose(ON_GPU, 512) == choose(ON_GPU, 512)
    assert asked == [1]


def test_a_choice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = layered(), make_batch()
    apply_mini_sequence(model, checkpoints="host", save_attention=1)
    with caplog.at_level(logging.INFO, logger="longseq.mst.layer_places"):
        for _ in range(2):
            model(**batch).loss.backward()
    said = "inputs of 4 layers.*: 1 on the GPU, 3 in host memory, 0 rebuilt.*output: 1 on the GPU, 0 in host"
    assert len(caplog.messages) == 1
    assert re.search(said, caplog.messages[0])


def test_on_a_cpu_auto_keeps_all() -> None:
    hidden = torch.zeros(10, 4)
    assert PlaceChooser(nn.Identity(), 3, "auto", "auto")(hidden, 4) == Places(ALL_ON_GPU, SavedAttention(3))
    assert PlaceChooser(nn.Identity(), 3, Placement(1), SavedAttention())(hidden, 4).inputs == Placement(1)


def test_a_model_that_is_refused_stays_as_it_was() -> None:
    model = layered()
    before = set(vars(model))
    with pytest.raises(ValueError, match="names layer 99"):
        apply_mini_sequence(model, checkpoints=Placement(0, kept=(0, 99)))
    assert set(vars(model)) == before
    apply_mini_sequence(model, checkpoints="gpu").undo()


def test_what_is_saved_leaves_room_for_inputs_that_are_rebuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 layers, every 8th kept: 4 inputs wait, and 6 rebuilt ones beside them. There is room for 12."""
    room, one = 12, 2**30
    monkeypatch.setattr(PlaceChooser, "_free_gpu_bytes", lambda self, hidden: room * one)
    monkeypatch.setattr(PlaceChooser, "_say", lambda *args: None)
    chooser = PlaceChooser(torch.nn.Linear(1, 1), 32, Placement(0, every=8, host=False), "auto", lambda: 0)
    places = chooser(SimpleNamespace(device=torch.device("cuda"), nbytes=one, shape=(2**17, 4096)), 4096)
    first_saved = 32 - places.attention.gpu_layers
    most = max(
        places.inputs.all_places(32)[: index + 1].count("gpu")
        + places.inputs.rebuilt_beside(32)[index]
        + max(0, index + 1 - first_saved) * 9 / 8  # attention's output and log-sum-exp
        for index in range(32)
    )
    assert places.attention.gpu_layers > 0
    assert most <= room
