"""Steps with tied weights on ranks that share rows and sequences, and what must stop them or must not.

test_invariance.py has the rest: other heads, lengths, masks and reducers.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from gloo import run_cases
from torch import Tensor
from training_samples import (
    MICRO_BATCHES,
    engine_training,
    plain_training,
    prepared_llama,
    tiny_llama,
    weights_of,
)

from longseq.distributed import ProcessGroups
from longseq.distributed.engine import LocalEngine, NonFiniteGradientError

# Two processes are started, and train models by several engines.
pytestmark = pytest.mark.slow

LAYOUTS = {
    f"{world_size} processes, sp {sp_size}, {'tied' if tie else 'untied'}": (world_size, sp_size, tie)
    for world_size, sp_size, tie in [(1, 1, True), (2, 1, True), (2, 2, True), (2, 2, False)]
}


def training_case(sp_size: int, tie: bool) -> dict:
    """Losses, norms and final weights of one rank."""
    groups = ProcessGroups.create(sp_size)
    model = prepared_llama(groups, dtype=torch.float64, tie_word_embeddings=tie)
    optimizer = torch.optim.SGD(model.parameters(), lr=9.0)
    engine = LocalEngine(model, optimizer, groups, accumulation_steps=MICRO_BATCHES // groups.dp_size)
    return {**engine_training(engine, groups), "weights": weights_of(model)}


def lonely_nan_case() -> list[str]:
    """One rank's gradient is NaN: both must raise, and neither may have stepped."""
    groups = ProcessGroups.create()
    model = torch.nn.Linear(3, 2)
    engine = LocalEngine(model, torch.optim.SGD(model.parameters(), lr=1.0), groups)
    before = copy.deepcopy(model.state_dict())
    loss = model(torch.ones(1, 3)).sum()
    engine.backward(loss * (torch.nan if dist.get_rank() == 1 else 1.0))
    with pytest.raises(NonFiniteGradientError):
        engine.step(1.0)
    return [name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])]


def unreached_weight_case() -> list:
    """A weight that only rank 0 reaches must not keep the ranks from summing alike."""
    groups = ProcessGroups.create()
    model = torch.nn.ModuleList([torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(3, 2, bias=False)])
    engine = LocalEngine(model, torch.optim.SGD(model.parameters(), lr=1.0), groups)
    before = [param.detach().clone() for param in model.parameters()]
    engine.backward(model[dist.get_rank()](torch.ones(1, 3)).sum())
    engine.step(1.0)
    return [(old - new).detach() for old, new in zip(before, model.parameters(), strict=True)]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list]:
    by_size: dict[int, dict] = {1: {}, 2: {}}
    for name, (world_size, sp_size, tie) in LAYOUTS.items():
        by_size[world_size][name] = (training_case, {"sp_size": sp_size, "tie": tie})
    by_size[2] |= {fn.__name__: (fn, {}) for fn in (lonely_nan_case, unreached_weight_case)}
    results = {name: [fn(**kwargs)] for name, (fn, kwargs) in by_size.pop(1).items()}
    for world_size, cases in by_size.items():
        results |= run_cases(world_size, cases)
    return results


@pytest.fixture(scope="module")
def truths() -> dict[bool, tuple[list[float], dict[str, Tensor]]]:
    found = {}
    for tie in (False, True):
        model = tiny_llama(torch.float64, tie_word_embeddings=tie)
        losses = plain_training(model, torch.optim.SGD(model.parameters(), lr=9.0))
        found[tie] = losses, weights_of(model)
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_takes_the_steps_of_plain_pytorch(
    outcomes: dict[str, list], truths: dict[bool, tuple], name: str
) -> None:
    losses, weights = truths[LAYOUTS[name][2]]
    start = weights_of(tiny_llama(torch.float64, tie_word_embeddings=LAYOUTS[name][2]))
    for rank in outcomes[name]:
        assert rank["losses"] == pytest.approx(losses, rel=1e-10)
        assert rank["weights"].keys() == weights.keys()
        for weight_name, weight in rank["weights"].items():
            moved = float((weights[weight_name] - start[weight_name]).abs().max())
            assert moved > 1e-4, f"{weight_name} must move for the comparison to mean something"
            torch.testing.assert_close(
                weight, weights[weight_name], rtol=0, atol=1e-10 * max(1.0, moved), msg=weight_name
            )


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_ends_with_the_same_weights(outcomes: dict[str, list], name: str) -> None:
    first, *others = outcomes[name]
    for rank in others:
        assert rank["norms"] == first["norms"]
        assert all(torch.equal(rank["weights"][key], weight) for key, weight in first["weights"].items())


def test_a_nan_on_one_rank_stops_every_rank_before_the_update(outcomes: dict[str, list]) -> None:
    assert outcomes["lonely_nan_case"] == [[], []]


def test_a_weight_that_one_rank_does_not_reach_is_summed(outcomes: dict[str, list]) -> None:
    for rank in outcomes["unreached_weight_case"]:
        for moved in rank:
            torch.testing.assert_close(moved, torch.ones(2, 3))
