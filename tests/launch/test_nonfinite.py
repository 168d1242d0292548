"""A step whose loss or gradient is not finite: nothing is updated, and a person finds the text."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from gloo import run_cases
from tiny_run import (
    Workshop,
    assert_close,
    assert_equal_runs,
    at_step,
    checkpoint_names,
    records,
    train_here,
    weights,
)

from longseq.distributed.engine import LocalEngine
from longseq.distributed.groups import ProcessGroups
from longseq.launch import setup as run_setup
from longseq.launch import step as step_module
from longseq.launch.checkpoint import newest_checkpoint, read_state
from longseq.launch.config_file import load_config
from longseq.launch.loop import TrainingError

NAN = float("nan")
SKIP = ("train.on_nonfinite=skip", "train.steps=6", "train.eval_every=1")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("runs"))


@contextmanager
def broken_loss(calls: Callable[[int], bool], added: float = NAN) -> Iterator[None]:
    """Break the loss of those calls of the model for which `calls` says so, counted from 0.

    The gradient of what is added is 0: that of such a loss may well be finite.
    """
    original, count = step_module.summed_nll, 0

    def summed_nll(*args: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        nll = original(*args)
        return nll + added if calls(count - 1) else nll

    with patch.object(step_module, "summed_nll", summed_nll):
        yield


@contextmanager
def broken_gradient(calls: Callable[[int], bool]) -> Iterator[None]:
    """Make a gradient infinite whose loss is fine."""
    original, count = LocalEngine.backward, 0

    def backward(self: LocalEngine, loss: torch.Tensor) -> None:
        nonlocal count
        count += 1
        original(self, loss)
        if calls(count - 1):
            next(self.module.parameters()).grad[3, 3] = float("inf")

    with patch.object(LocalEngine, "backward", backward):
        yield


def built_engines(monkeypatch: pytest.MonkeyPatch) -> list[LocalEngine]:
    """Every engine that a run makes from now on."""
    engines: list[LocalEngine] = []
    build = run_setup.build_engine

    def building(*args: Any, **kwargs: Any) -> LocalEngine:
        engines.append(build(*args, **kwargs))
        return engines[-1]

    monkeypatch.setattr(run_setup, "build_engine", building)
    return engines


def written(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "nonfinite.jsonl").read_text().splitlines()]


BREAKS = {
    "loss": (lambda: broken_loss(lambda call: call == 5), r"loss is nan"),
    "infinite": (lambda: broken_loss(lambda call: call == 5, math.inf), r"loss is inf"),
    "gradient": (lambda: broken_gradient(lambda call: call == 4), r"gradient norm is (nan|inf)"),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_a_skipped_step_touches_nothing_and_the_run_goes_on(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Of two micro batches a step: call 4 is in step 3's first, and call 5 in its second."""
    engines: list[LocalEngine] = []
    build = run_setup.build_engine
    monkeypatch.setattr(
        run_setup, "build_engine", lambda *a, **k: engines.append(build(*a, **k)) or engines[-1]
    )
    kept: dict[int, list[torch.Tensor]] = {}

    def keep(step: int) -> None:
        optimizer = engines[0]._optimizer
        states = [value for state in optimizer.state.values() for value in state.values()]
        tensors = [*engines[0].module.parameters(), *states]
        kept[step] = [tensor.detach().clone() for tensor in tensors]

    context, what = BREAKS[kind]
    with context(), at_step(2, lambda: keep(2)), at_step(3, lambda: keep(3)), at_step(4, lambda: keep(4)):
        run = shop.run(f"skips-{kind}", *SKIP)
    assert all(map(torch.equal, kept[2], kept[3]))
    assert not all(map(torch.equal, kept[3], kept[4]))
    steps = records(run, "step")
    assert [step["nonfinite_steps"] for step in steps] == [0, 0, 1, 1, 1, 1]
    assert [step["grad_norm"] is None for step in steps] == [False, False, True, False, False, False]
    assert math.isfinite(steps[-1]["loss"])
    assert "1 of 6 steps were skipped" in records(run, "note")[-1]["text"]
    assert read_state(newest_checkpoint(run)).nonfinite_steps == 1
    [record] = written(run)
    assert (record["step"], record["action"]) == (3, "skipped")
    assert re.fullmatch(what, record["what"])


def test_a_person_finds_the_text(shop: Workshop) -> None:
    """The micro batch whose loss it was alone, with the lines of the file and how they begin."""
    run = shop.folder / "skips-loss"
    [record] = written(run)
    assert [one["micro_batch"] for one in record["sequences"]] == [1]
    lines = (shop.folder / "docs.jsonl").read_text().splitlines()
    [sequence] = record["sequences"]
    assert sequence["num_documents"] == len(sequence["documents"]) > 0
    for document in sequence["documents"]:
        file, _, number = document["document"].rpartition(":")
        assert file == str(shop.folder / "docs.jsonl")
        text = json.loads(lines[int(number) - 1])["text"]
        assert text[: len(document["begins"]) - 10] in document["begins"]
        assert document["tokens"][0] == 0
        assert document["first_token_ids"]
    # A gradient does not say whose it is.
    [record] = written(shop.folder / "skips-gradient")
    assert [one["micro_batch"] for one in record["sequences"]] == [0, 1]


def test_a_run_with_a_skipped_step_goes_on_bit_for_bit(shop: Workshop) -> None:
    """Stopped behind the skipped step, and behind the one before it."""
    for last in (2, 3):
        name = f"halves-{last}"
        with broken_loss(lambda call: call == 5):
            train_here(shop.config(name, *SKIP, f"train.steps={last}"))
        with broken_loss(lambda call, done=last: call + 2 * done == 5):
            train_here(shop.config(name, *SKIP))
        assert_equal_runs(shop.folder / name, shop.folder / "skips-loss")
        assert [step["nonfinite_steps"] for step in records(shop.folder / name, "step")][-1] == 1


def test_too_many_in_a_row_stop_the_run(shop: Workshop) -> None:
    """Two in a row are allowed here: one and then two are skipped, then three."""
    name, bad = "too_many", (1, 3, 4, 6, 7, 8)
    few = ("train.max_nonfinite_steps=2", "train.global_batch_sequences=1", "checkpoint.every=1")
    config = shop.config(name, *SKIP, *few, "train.steps=20")
    with (
        broken_loss(lambda call: call in bad),
        pytest.raises(
            TrainingError, match=r"step 9: loss is nan, after 2 skipped .*max_nonfinite_steps.*00008"
        ),
    ):
        train_here(config)
    assert [record["action"] for record in written(shop.folder / name)] == ["skipped"] * 5 + ["stopped"]
    assert len(records(shop.folder / name, "step")) == 8


def test_broken_weights_are_not_saved_behind_a_skipped_step(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[LocalEngine] = []
    build = run_setup.build_engine
    monkeypatch.setattr(
        run_setup, "build_engine", lambda *a, **k: engines.append(build(*a, **k)) or engines[-1]
    )

    def poison() -> None:
        with torch.no_grad():
            next(engines[0].module.parameters())[5] = NAN

    name = "poisoned"
    config = shop.config(name, *SKIP, "checkpoint.every=2", "train.max_nonfinite_steps=9")
    with at_step(2, poison), pytest.raises(TrainingError, match=r"step 6, the last: weights are not finite"):
        train_here(config)
    # What step 2 saved was broken before: nobody had seen it then.
    assert checkpoint_names(shop.folder / name) == ["step-00000002"]


def test_a_run_that_stops_names_the_text(shop: Workshop) -> None:
    name = "stops"
    with (
        broken_loss(lambda call: call == 2),
        pytest.raises(TrainingError, match=r"step 2: .*nonfinite\.jsonl"),
    ):
        train_here(shop.config(name))
    [record] = written(shop.folder / name)
    assert (record["step"], record["action"]) == (2, "stopped")


def skipping_case(yaml: str, rank: int) -> dict[str, list[float]]:
    """A run on several processes of which one rank's loss is broken in step 3."""
    from longseq.distributed.zero import init_deepspeed_communication
    from longseq.launch.train import train

    groups, config = ProcessGroups.create(), load_config(yaml)
    if config.parallel.zero_stage:
        init_deepspeed_communication()
    with broken_loss(lambda call: call == 2 and groups.rank == rank):
        train(config, groups, torch.device("cpu"))
    return {}


@pytest.mark.slow
def test_all_ranks_skip_alike(shop: Workshop) -> None:
    """Slow: two processes, and DeepSpeed, whose engines drop the step as ours does, to float32's rounding."""
    with broken_loss(lambda call: call == 5):
        truth = shop.run("alone", *SKIP)
    cases = {}
    for stage in (2, 3):
        spread = (*SKIP, "parallel.num_gpus=2", f"parallel.zero_stage={stage}")
        yaml = shop.yaml(f"two-{stage}", *spread)
        cases[f"zero{stage}"] = (skipping_case, {"yaml": str(yaml), "rank": 1})
    run_cases(2, cases)
    for stage in (2, 3):
        run = shop.folder / f"two-{stage}"
        found = [step["loss"] for step in records(run, "step")]
        wanted = [step["loss"] for step in records(truth, "step")]
        assert found[2] is None
        assert_close(found[:2] + found[3:], wanted[:2] + wanted[3:], 5e-7)
        for name, tensor in weights(truth).items():
            assert (weights(run)[name] - tensor).abs().max() <= 1e-6, (stage, name)
        [record] = written(run)
        assert [one["dp_rank"] for one in record["sequences"]] == [1]
