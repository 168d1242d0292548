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
from longseq.launch.config_file import parse_config
from longseq.launch.doctor import Finding, check_sequence_parallelism, report
from longseq.mst.families import FAMILIES

# Processes are started, by the command line too.
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
    right, wrong = (
        SequenceCheck(1.0, 1.0, {"first": 0.0, "other": error}, 1e-4) for error in (1e-9, float("nan"))
    )
    assert right.is_right
    assert not wrong.is_right
    findings = [Finding("float64", 0, right), Finding("bfloat16", 0, right), Finding("float64", 1, wrong)]
    first, second, advice = report(findings, ProcessGroups(0, 4, 2))
    assert first.startswith("error: 2 of 4 processes on one sequence (float64, sequence 1 of 2)")
    assert second.startswith("ok: 2 of 4")
    assert "not a number" in advice


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_small_one(family: str) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    config = parse_config(
        {
            "model": {"config": {"model_type": family, **heads}},
            "data": {"tokenizer": "bytes"},
            "sequence": {"length": 128},
        }
    )
    findings = check_sequence_parallelism(config, ProcessGroups(), torch.device("cpu"))
    assert [finding.title for finding in findings] == ["float64", "float64, streamed layers"]
    for finding in findings:
        assert finding.found.is_right, finding


def test_the_command_runs_on_several_processes() -> None:
    words = ["doctor", "tiny-cpu", "parallel.ulysses_degree=2"]
    found = subprocess.run(
        [sys.executable, "-m", "longseq.launch.cli", *words], capture_output=True, text=True, timeout=200
    )
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert [line.partition("): loss ")[0] for line in lines] == [
        "ok: 2 of 2 processes on one sequence (float64",
        "ok: 2 of 2 processes on one sequence (float64, streamed layers",
    ]
