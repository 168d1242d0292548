"""States as runs of elements: cut anywhere, put together again, of every rule."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longseq.apollo import Apollo
from longseq.apollo.layout import Layout, Range
from longseq.apollo.placement import FlatPart, Placed, place_flat
from longseq.apollo.portable import StatePart, restore_state, state_parts

SHAPES = {"tall": (11, 4), "wide": (4, 9), "batch": (3, 5, 4), "norm": (7,), "number": (), "narrow": (9, 2)}
SIZES = (1, 2, 3, 5)
Saved = dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]
"""By parameter: states whole, and single numbers."""


def stepped(dtype: torch.dtype = torch.float32, steps: int = 2, **options: Any) -> Apollo:
    """Some steps; there are as many in each process that asks."""
    draw = torch.Generator().manual_seed(1)
    params = {
        name: nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for name, shape in SHAPES.items()
    }
    optimizer = Apollo(params.items(), **{"rank": 2, "lr": 0.1, "update_gap": 3, **options})
    for _ in range(steps):
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=draw).to(dtype)
        optimizer.step()
    return optimizer


def collected(optimizers: list[Apollo]) -> Saved:
    """What parts of all ranks are together; none is there twice, and none is missing."""
    saved: Saved = {}
    seen: dict[tuple[str, str], Tensor] = {}
    for optimizer in optimizers:
        for name, parts, numbers in state_parts(optimizer):
            states, known = saved.setdefault(name, ({}, numbers))
            torch.testing.assert_close(numbers, known, rtol=0, atol=0)
            for key, part in parts.items():
                whole = states.setdefault(key, torch.zeros(part.shape))
                count = seen.setdefault((name, key), torch.zeros(whole.numel()))
                count[part.start : part.start + part.values.numel()] += 1
                whole.view(-1)[part.start : part.start + part.values.numel()] = part.values
    for place, count in seen.items():
        assert count.eq(1).all(), place
    return saved


def restore(optimizer: Apollo, saved: Saved) -> None:
    for group, placed in optimizer.placed():
        states, numbers = saved.get(placed.name, ({}, {}))

        def read(key: str, start: int, out: Tensor, states: dict[str, Tensor] = states) -> None:
            out.copy_(states[key].flatten()[start : start + out.numel()])

        shapes = {key: tuple(state.shape) for key, state in states.items()}
        restore_state(optimizer, group, placed, shapes, numbers, read)


def flat(size: int, me: int, end_to_end: bool, **options: Any) -> Apollo:
    """The optimizer of one rank of some, to which each weight is a part of one flat tensor."""
    optimizer = stepped(steps=0, **options)
    step = -(-sum(torch.Size(shape).numel() for shape in SHAPES.values()) // size)
    parts, before, offset = [], 0, 0
    for name, shape in SHAPES.items():
        numel = torch.Size(shape).numel()
        each, first = (step, before) if end_to_end else (-(-numel // size), 0)
        ends = [min(max(rank * each - first, 0), numel) for rank in range(size + 1)]
        bounds = tuple(itertools.starmap(Range, itertools.pairwise(ends)))
        parts.append(FlatPart(name, Layout(shape, bounds), offset))
        before, offset = before + numel, offset + bounds[me].size
    tensor = nn.Parameter(torch.zeros(offset))
    [group] = optimizer.param_groups
    group["params"] = [tensor]

    def placed() -> Any:
        for part in parts:
            yield group, place_flat(part, tensor, None, me, optimizer.state)

    optimizer.placed = placed  # type: ignore[method-assign]  # of a rank, where there are no processes
    return optimizer


@pytest.mark.parametrize("end_to_end", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["channel", "tensor"])
def test_states_are_cut_and_put_together_bit_for_bit(kind: str, size: int, end_to_end: bool) -> None:
    options = {"scale_type": kind, "rank": 2 if kind == "channel" else 1}
    saved = collected([stepped(**options)])
    assert set(saved) == set(SHAPES)
    for states, numbers in saved.values():
        assert {**states, **numbers}.keys() >= {"exp_avg", "exp_avg_sq", "step"}
        assert all(state.abs().max() > 0 for state in states.values())
    ranks = [flat(size, me, end_to_end, **options) for me in range(size)]
    for optimizer in ranks:
        restore(optimizer, saved)
    again = collected(ranks)
    torch.testing.assert_close(again, saved, rtol=0, atol=0)
    whole = stepped(steps=0, **options)
    restore(whole, again)
    found, wanted = (one.state_dict()["state"] for one in (whole, stepped(**options)))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("rule", ["adamw", "adamw_8bit", "factored"])
def test_other_rules_go_on_bit_for_bit(rule: str) -> None:
    """`factored` is of matrices, and of batches as one that has all their rows."""
    first, second = (stepped(steps=0) for _ in range(2))
    for optimizer in (first, second):
        kept = [
            (n, p) for n, p in zip(SHAPES, optimizer.param_groups[0]["params"], strict=True) if p.dim() >= 2
        ]
        optimizer.param_groups[0].update(names=[n for n, _ in kept], params=[p for _, p in kept], rule=rule)
    for _ in range(2):
        for param in first.param_groups[0]["params"]:
            param.grad = torch.randn_like(param)
        first.step()
    restore(second, collected([first]))
    for mine, other in zip(first.state.values(), second.state.values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_8_bit_moments_are_carried_as_float32_into_other_blocks() -> None:
    whole = stepped(steps=0)
    whole.param_groups[0]["rule"] = "adamw_8bit"
    for param in whole.param_groups[0]["params"]:
        param.grad = torch.randn(param.shape)
    whole.step()
    saved = collected([whole])
    ranks = [flat(3, me, True) for me in range(3)]
    for optimizer in ranks:
        optimizer.param_groups[0]["rule"] = "adamw_8bit"
        restore(optimizer, saved)
        for state in optimizer.state.values():
            assert state["exp_avg"].dtype == torch.uint8
    again = collected(ranks)
    for name, (states, _) in saved.items():
        for key, state in states.items():
            assert state.dtype == torch.float32
            error = (again[name][0][key] - state).abs().max()
            assert error <= 0.05 * state.abs().max(), f"{key} of {name}"


def test_8_bit_moments_of_float64_weights_go_on() -> None:
    first, second = stepped(torch.float64, steps=0), stepped(torch.float64, steps=0)
    for optimizer in (first, second):
        optimizer.param_groups[0]["rule"] = "adamw_8bit"
    grads = [torch.randn_like(param) for param in first.param_groups[0]["params"]]
    for optimizer in (first, first, second):
        if optimizer is second:
            restore(second, collected([first]))
        for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
            param.grad = grad
        optimizer.step()
    first.step()
    pairs = zip(first.param_groups[0]["params"], second.param_groups[0]["params"], strict=True)
    for mine, other in ((first.state[one], second.state[two]) for one, two in pairs):
        assert all(value.view(-1).equal(other[key].view(-1)) for key, value in mine.items())
        assert other["exp_avg_scale"].dtype == torch.float32


@pytest.mark.parametrize("name", SHAPES)
def test_all_of_a_weight_on_one_rank_is_the_weight_itself(name: str) -> None:
    """It then takes the step, and the kernels, of one process."""
    [placed] = [one for _, one in flat(1, 0, False).placed() if one.name == name]
    assert placed.layout == Layout.whole(SHAPES[name])
    assert placed.weight.shape == SHAPES[name]
    assert placed.weight._base is not None


@pytest.mark.parametrize(
    ("saved_with", "goes_on_with"), itertools.product(["master", "stochastic"], repeat=2)
)
def test_masters_are_carried_where_both_have_them(saved_with: str, goes_on_with: str) -> None:
    first = stepped(torch.bfloat16, rounding=saved_with)
    second = stepped(torch.bfloat16, rounding=goes_on_with)
    second.reset()
    restore(second, collected([first]))
    for (param, state), mine in zip(second.state.items(), first.state.values(), strict=True):
        assert ("master" in state) == (saved_with == goes_on_with == "master")
        if "master" in state:
            assert state["master"].equal(mine["master"])
        param.grad = torch.ones_like(param)
    second.step()
    # A run that had none goes on with one from now on.
    assert all(("master" in state) == (goes_on_with == "master") for state in second.state.values())
    for param, state in second.state.items():
        if "master" in state:
            assert param.equal(state["master"].bfloat16())


def test_without_states_a_weight_is_as_before_its_first_step() -> None:
    optimizer = stepped()
    restore(optimizer, {})
    assert not optimizer.state


def test_states_of_another_rank_or_optimizer_are_refused() -> None:
    optimizer = stepped()
    for other in (stepped(rank=3), stepped(rank=1)):
        with pytest.raises(
            ValueError, match=r"the saved states of \w+ are .*, and rule '\w+' of rank 2 keeps"
        ):
            restore(optimizer, collected([other]))
    other = stepped(steps=0)
    other.param_groups[0]["rule"] = "adamw"
    for param in other.param_groups[0]["params"]:
        param.grad = torch.randn(param.shape)
    other.step()
    with pytest.raises(
        ValueError, match=r"they are of another optimizer or of another rank\. Set it as it was"
    ):
        restore(optimizer, collected([other]))
    # The same the other way round: low-rank states are none of AdamW's.
    with pytest.raises(ValueError, match=r"rule 'adamw' of rank 2 keeps"):
        restore(other, collected([optimizer]))


def test_parts_know_their_place() -> None:
    """Of a wide weight of 4 x 9 whose channels are columns, cut into thirds of its elements."""
    ranks = [flat(3, me, False) for me in range(3)]
    saved = collected([stepped()])
    found: list[StatePart] = []
    for optimizer in ranks:
        restore(optimizer, saved)
        found += [parts["exp_avg"] for name, parts, _ in state_parts(optimizer) if name == "wide"]
    assert [(part.shape, part.start, part.values.numel()) for part in found] == [
        ((9, 2), 6 * i, 6) for i in range(3)
    ]
    one = Placed("w", torch.zeros(0), None, Layout((4, 9), (Range(0, 12), Range(12, 36))), me=1)
    assert one.first == 12
