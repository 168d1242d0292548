"""`Apollo` takes one process's steps however weights lie over ranks, and sends what it must; in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from apollo_samples import KINDS, SIZES, STEPS, assert_near, options_of
from gloo import Case, run_cases
from torch import Tensor, nn

from longseq.apollo import Apollo
from longseq.apollo.layout import Layout, Range
from longseq.apollo.placement import FlatPart

# Nine processes are started, in which DTensor meets every operation for the first time.
pytestmark = pytest.mark.slow

SHAPES: dict[str, tuple[int, ...]] = {
    "tall": (17, 5),
    "wide": (5, 13),
    "square": (8, 8),
    "few rows": (4, 9),
    "narrow": (2, 7),  # APOLLO-Mini projects it, and three ranks share two rows
    "norm": (7,),
    "number": (),
    "batch": (3, 4, 6),
    "other batch": (5, 7, 4),
    "kernel": (3, 2, 2, 2),
    "one": (1,),
}


def given() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Weights, and their gradients in each step: of sizes that make the limit of growth act."""
    draw = torch.Generator().manual_seed(3)

    def drawn(size: float) -> dict[str, Tensor]:
        return {
            name: size * torch.randn(shape, generator=draw, dtype=torch.float64)
            for name, shape in SHAPES.items()
        }

    return drawn(1.0), [drawn(size) for size in (1.0, 0.01, 0.01, 3.0, 0.5, 2.0)]


def given_on_one(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights after all steps, and the projected ones' first moments."""
    weights, steps = given()
    params = {name: nn.Parameter(weight) for name, weight in weights.items()}
    optimizer = Apollo(params.items(), **options_of(kind))
    for grads in steps:
        for name, param in params.items():
            param.grad = grads[name]
        optimizer.step()
    moments = {name: optimizer.state[param]["exp_avg"] for name, param in params.items()}
    return {name: param.detach() for name, param in params.items()}, moments


@contextmanager
def counted(calls: list[tuple[str, int]]) -> Iterator[None]:
    """Adds the name of each collective of torch.distributed, and the bytes that this rank sends to others."""
    names = [
        name for name in dir(dist) if name.startswith(("all_", "reduce", "broadcast", "gather", "scatter"))
    ]
    earlier = {name: getattr(dist, name) for name in [*names, "send", "recv", "isend", "irecv", "barrier"]}

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent = args[1] if name == "all_to_all_single" else args[0]
            calls.append((name, sent.nbytes if isinstance(sent, Tensor) else -1))
            return function(*args, **kwargs)

        return call

    for name, function in earlier.items():
        setattr(dist, name, counting(name, function))
    try:
        yield
    finally:
        for name, function in earlier.items():
            setattr(dist, name, function)


def given_steps(
    optimizer: Apollo, set_grads: Callable[[dict[str, Tensor]], None]
) -> list[list[tuple[str, int]]]:
    calls: list[list[tuple[str, int]]] = []
    for grads in given()[1]:
        set_grads(grads)
        calls.append([])
        with counted(calls[-1]):
            optimizer.step()
    return calls


def dtensor_case(kind: str, dim: int) -> dict[str, Any]:
    """Sharded along a dimension, evenly or not; batches along their first one."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))

    def laid_out(value: Tensor) -> Tensor:
        shard = Shard(dim if value.dim() == 2 else 0)
        return distribute_tensor(value, mesh, [shard if value.dim() else Replicate()])

    params = {name: nn.Parameter(laid_out(weight)) for name, weight in given()[0].items()}
    optimizer = Apollo(params.items(), **options_of(kind))

    def set_grads(grads: dict[str, Tensor]) -> None:
        for name, param in params.items():
            param.grad = laid_out(grads[name])

    calls = given_steps(optimizer, set_grads)
    states = {name: optimizer.state[param] for name, param in params.items()}
    return {
        "weights": {name: param.detach().full_tensor() for name, param in params.items()},
        "moments": {
            name: state["exp_avg"].full_tensor() for name, state in states.items() if name != "number"
        },
        "kept": {
            name: state["exp_avg"].to_local().numel() for name, state in states.items() if name != "number"
        },
        "calls": calls,
    }


def cut(how: str, num_ranks: int) -> dict[str, tuple[Range, ...]]:
    """Elements of each weight on each rank: of all laid end to end (ZeRO 1 and 2), or of each (ZeRO 3)."""
    sizes = {name: math.prod(shape) for name, shape in SHAPES.items()}
    step, before, bounds = -(-sum(sizes.values()) // num_ranks), 0, {}
    for name, size in sizes.items():
        if how == "each":
            step, before = -(-size // num_ranks), 0
        ends = [min(max(rank * step - before, 0), size) for rank in range(num_ranks + 1)]
        bounds[name] = tuple(itertools.starmap(Range, itertools.pairwise(ends)))
        before += size
    return bounds


def flat_case(kind: str, how: str) -> dict[str, Any]:
    """As in ZeRO's flat tensors, of which the optimizer is told what they are made of."""
    me, bounds = dist.get_rank(), cut(how, dist.get_world_size())
    weights, _ = given()
    optimizer = Apollo([(name, nn.Parameter(weight)) for name, weight in weights.items()], **options_of(kind))

    def mine(values: dict[str, Tensor]) -> Tensor:
        padding = torch.full((3,), 7.0, dtype=torch.float64)
        return torch.cat([*(values[name].flatten()[slice(*bounds[name][me])] for name in SHAPES), padding])

    parts, offset = [], 0
    for name, shape in SHAPES.items():
        parts.append(FlatPart(name, Layout(shape, bounds[name]), offset))
        offset += bounds[name][me].size
    flat = nn.Parameter(mine(weights))
    optimizer.param_groups[0]["params"] = [flat]
    optimizer.lay_out({flat: (optimizer.param_groups[0], parts)}, dist.group.WORLD)

    def set_grads(grads: dict[str, Tensor]) -> None:
        flat.grad = mine(grads)

    calls = given_steps(optimizer, set_grads)

    def whole(shape: Iterable[int], place: slice, values: Tensor) -> Tensor:
        total = torch.zeros(math.prod(shape), dtype=torch.float64)
        total[place] = values.flatten()
        dist.all_reduce(total)
        return total.view(tuple(shape))

    found: dict[str, Any] = {"weights": {}, "moments": {}, "kept": {}, "calls": calls}
    for part in parts:
        here = part.layout.bounds[me]
        values = flat.detach()[part.offset : part.offset + here.size]
        found["weights"][part.name] = whole(part.layout.shape, slice(*here), values)
        shape, place = part.layout.shape, slice(*here)
        rank = options_of(kind)["rank"]
        if len(shape) in (2, 3) and min(shape[-2:]) > rank:
            shape = (*shape[:-2], max(shape[-2:]), rank)
            place = slice(*(channel * rank for channel in part.layout.owned[me]))
        moment = optimizer.state[part.name]["exp_avg"] if part.name in optimizer.state else torch.zeros(0)
        found["kept"][part.name] = moment.numel()
        found["moments"][part.name] = whole(shape, place, moment)
    assert flat.detach()[-3:].eq(7).all(), "padding is nobody's"
    return found


def layouts_of(how: str, num_ranks: int) -> dict[str, Layout]:
    if how.startswith("dim"):
        return {
            name: Layout.chunked(shape, int(how[-1]) if len(shape) == 2 else 0, num_ranks)
            for name, shape in SHAPES.items()
            if shape
        }
    return {name: Layout(SHAPES[name], bounds) for name, bounds in cut(how, num_ranks).items()}


def bytes_of_a_step(kind: str, how: str, num_ranks: int, me: int) -> list[tuple[str, int]]:
    """Statistics of the channels that others own, and then scales of shared ones and a norm a matrix."""
    rank, sent, reduced, is_any_shared = options_of(kind)["rank"], 0, 0, False
    for layout in layouts_of(how, num_ranks).values():
        if len(layout.shape) not in (2, 3) or layout.matrices.width <= rank:
            continue
        owned = layout.owned
        sent += sum((rank + 1) * (layout.touched[me] & owned[q]).size for q in range(num_ranks) if q != me)
        shared = sum(one.size for one in layout.shared)
        is_any_shared |= shared > 0
        reduced += layout.matrices.count * (1 if kind == "channel" else 3) + (
            shared if kind == "channel" else 0
        )
    together = [("all_reduce", 8 * reduced)]
    return [("all_to_all_single", 8 * sent), *together] if is_any_shared else together


CUTS: dict[str, tuple[Callable[..., dict], dict[str, Any]]] = {
    "dim 0": (dtensor_case, {"dim": 0}),
    "dim 1": (dtensor_case, {"dim": 1}),
    "end to end": (flat_case, {"how": "end to end"}),
    "each": (flat_case, {"how": "each"}),
}


@pytest.fixture(scope="module")
def found() -> dict[int, dict[str, list[Any]]]:
    cases: dict[str, Case] = {
        f"{name} {kind}": (case, {"kind": kind, **kwargs})
        for kind in KINDS
        for name, (case, kwargs) in CUTS.items()
    }
    return {size: run_cases(size, cases) for size in SIZES}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("size", SIZES)
def test_given_gradients(found: dict, size: int, how: str, kind: str) -> None:
    weights, moments = given_on_one(kind)
    ranks = found[size][f"{how} {kind}"]
    for me, rank in enumerate(ranks):
        assert_near(rank["weights"], weights)
        there = {name: value for name, value in moments.items() if name in rank["moments"]}
        assert_near(rank["moments"], there)
        assert len(there) >= len(SHAPES) - 1
        calls = bytes_of_a_step(kind, how, size, me)
        assert rank["calls"] == [calls] * STEPS, "at most two collectives a step, of so many bytes"
    for name in ranks[0]["kept"]:
        assert sum(rank["kept"][name] for rank in ranks) == moments[name].numel(), "no moment twice"


def test_bytes_of_one_weight() -> None:
    """A wide weight of 5 x 13 sharded by rows: everyone has a part of all channels, and owns half of them."""
    layout = Layout.chunked((5, 13), 0, 2)
    assert [one.size for one in layout.owned] == [7, 6]
    total = bytes_of_a_step("channel", "dim 0", 2, 0)
    # tall: rows are channels, none shared. square, too. wide, few rows and the batches of whole matrices.
    sent = 4 * (6 + 4)
    reduced = 4 + 3 + 5 + 13 + 9
    assert total == [("all_to_all_single", 8 * sent), ("all_reduce", 8 * reduced)]
