"""`longseq doctor`: several processes against one, found right and found wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from gloo import run_cases
from training_samples import packed_rows, tiny_llama

from longseq.distributed import ProcessGroups
from longseq.distributed.check import SequenceCheck, compare_with_one_rank
from longseq.distributed.exchange import Exchange
from longseq.launch.doctor import report

# Processes are started, each of which imports PyTorch and transformers.
pytestmark = pytest.mark.slow


def right_case() -> list:
    model = tiny_llama(torch.float64)
    implementation = model.config._attn_implementation
    found = compare_with_one_rank(model, ProcessGroups.create(2), packed_rows(0)[0])
    left_as_it_was = model.config._attn_implementation == implementation
    clean = all(param.grad is None for param in model.parameters())
    return [found.is_right, found.worst[1], len(found.gradients), left_as_it_was and clean]


def wrong_case(where: str) -> list:
    """An exchange that loses something on one rank alone."""
    groups = ProcessGroups.create(2)
    original = getattr(Exchange, where)

    def broken(self: Exchange, kinds: str, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = original(self, kinds, *tensors)
        return tuple(tensor * (1 - 1e-5 * groups.rank) for tensor in found)

    setattr(Exchange, where, broken)
    try:
        found = compare_with_one_rank(tiny_llama(torch.float64), groups, packed_rows(0)[0])
    finally:
        setattr(Exchange, where, original)
    return [found.is_right, found.worst[1]]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list]:
    cases = {where: (wrong_case, {"where": where}) for where in ("to_heads", "to_tokens")}
    return run_cases(2, {"right": (right_case, {}), **cases})


def test_ranks_that_agree_with_one_are_found_right(outcomes: dict[str, list]) -> None:
    for is_right, difference, num_weights, left_as_it_was in outcomes["right"]:
        assert is_right
        assert difference < 1e-12
        assert num_weights == len(list(tiny_llama().parameters()))
        assert left_as_it_was


@pytest.mark.parametrize("where", ["to_heads", "to_tokens"])
def test_an_exchange_that_loses_something_is_found(outcomes: dict[str, list], where: str) -> None:
    for is_right, difference in outcomes[where]:
        assert not is_right
        assert difference > 1e-7


def test_nan_is_not_right() -> None:
    found = SequenceCheck(1.0, 1.0, {"weight": float("nan")}, 1e-4)
    assert not found.is_right
    lines = report(found, ProcessGroups())
    assert lines[0].startswith("error: sequence parallelism")
    assert "not a number" in lines[1]


def test_the_command_runs_on_several_processes() -> None:
    words = ["doctor", "tiny-cpu", "parallel.ulysses_degree=2"]
    found = subprocess.run(
        [sys.executable, "-m", "longseq.launch.cli", *words], capture_output=True, text=True, timeout=200
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("ok: sequence parallelism over 2 of 2 processes: loss ")
