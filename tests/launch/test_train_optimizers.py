"""Whole runs with the optimizers of a config: what they leave, and how they go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import (
    Killed,
    Workshop,
    assert_close,
    assert_equal_runs,
    assert_same_run,
    at_step,
    held_out_loss,
    kill,
    losses,
    records,
    train_here,
    weights,
)

from longseq.launch import train as train_module
from longseq.launch.checkpoint import newest_checkpoint
from longseq.launch.export import export_checkpoint
from longseq.launch.train import TrainingError

APOLLO = ["optimizer.name=apollo", "optimizer.apollo.rank=6", "optimizer.apollo.update_gap=2"]
MINI = ["optimizer.name=apollo-mini", "optimizer.apollo.alpha=2", "optimizer.apollo.embeddings=low_rank"]
BF16 = ["train.precision=bf16", "optimizer.weights=bf16"]
IN_BACKWARD = ["optimizer.in_backward=true", "train.global_batch_sequences=1"]
RUNS = {
    "apollo": APOLLO,
    "apollo-8-bit": [*APOLLO, "optimizer.apollo.embeddings=adamw_8bit"],
    "apollo-mini": MINI,
    "apollo-bf16": [*APOLLO, *BF16],
    "mini-bf16-in-backward": [*MINI, *BF16, *IN_BACKWARD],
    "adamw-in-backward": IN_BACKWARD,
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_goes_on_bit_for_bit(shop: Workshop, name: str) -> None:
    whole = shop.run(name, "train.steps=5", *RUNS[name])
    assert losses(whole)[-1] < losses(whole)[0]
    config = shop.config(f"{name}-killed", "train.steps=5", "checkpoint.every=3", *RUNS[name])
    with at_step(4, kill), pytest.raises(Killed):
        train_here(config)
    train_here(config)
    mine = records(shop.folder / f"{name}-killed", "step")
    assert [step["loss"] for step in mine][-2:] == losses(whole)[-2:]
    truth = weights(whole)
    for key, weight in weights(shop.folder / f"{name}-killed").items():
        assert torch.equal(weight, truth[key]), key
    bf16 = any("weights=bf16" in text for text in RUNS[name])
    assert {weight.dtype for weight in truth.values()} == {torch.bfloat16 if bf16 else torch.float32}


def test_weights_in_bf16_are_near(shop: Workshop) -> None:
    truth = shop.run("near-truth", *APOLLO)
    run = shop.run("near", *APOLLO, *BF16)
    assert losses(run) != losses(truth)
    assert_close(losses(run), losses(truth), 1e-2)


def test_the_export_of_bf16_weights_has_the_runs_loss(shop: Workshop, tmp_path: Path) -> None:
    run = shop.run("exported", *MINI, *BF16)
    export_checkpoint(newest_checkpoint(run), tmp_path / "model", dtype="float32")
    loss, count = held_out_loss(tmp_path / "model", shop.folder / "held_out.jsonl")
    last = records(run, "eval")[-1]
    assert count == last["eval_tokens"]
    assert loss == pytest.approx(last["eval_loss"], rel=1e-2)


def test_steps_in_backward_are_those_after_it(shop: Workshop) -> None:
    """Without a bound on the gradient, which a step in backward takes from the step before."""
    batch = ["train.global_batch_sequences=1", "schedule.name=linear", "schedule.warmup_steps=2"]
    free = ["optimizer.clip_norm=null", *batch, *MINI]
    after = shop.run("after", *free)
    assert_same_run(shop.run("during", *free, *IN_BACKWARD), after, relative=5e-7, absolute=1e-6)
    assert records(after, "step")[0]["grad_norm"] == pytest.approx(
        records(shop.folder / "during", "step")[0]["grad_norm"], rel=1e-5
    )


def test_the_same_config_is_the_same_run_and_alpha_counts(shop: Workshop) -> None:
    first = shop.run("seed0", *APOLLO)
    assert_equal_runs(shop.run("seed0-again", *APOLLO), first)
    assert losses(shop.run("alpha", *APOLLO, "optimizer.apollo.alpha=0.5"))[0] == losses(first)[0]
    assert losses(shop.folder / "alpha") != losses(first)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ([], APOLLO, "of another optimizer or of another rank"),
        (APOLLO, [*APOLLO, "optimizer.apollo.rank=5"], "of another optimizer or of another rank"),
        (APOLLO, [], "written by another optimizer, such as apollo"),
    ],
    ids=["adamw", "rank", "apollo"],
)
def test_states_of_another_optimizer_are_refused(
    shop: Workshop, request: pytest.FixtureRequest, before: list[str], after: list[str], told: str
) -> None:
    name = f"was-{request.node.callspec.id}"
    shop.run(name, "train.steps=2", *before)
    with pytest.raises(ValueError, match=told):
        train_here(shop.config(name, "train.steps=4", *after))


@pytest.mark.parametrize(
    ("when", "overrides"), [("before", []), ("after", IN_BACKWARD)], ids=["before", "after"]
)
def test_a_norm_that_is_not_finite_stops_and_says_when(
    shop: Workshop, when: str, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In backward, weights whose own gradient is finite have been updated by then."""
    build = train_module.set_up

    def with_a_broken_gradient(*given: Any) -> Any:
        parts = build(*given)
        broken = next(iter(parts.engine.module.parameters()))
        broken.register_hook(lambda grad: grad * float("nan"))
        return parts

    monkeypatch.setattr(train_module, "set_up", with_a_broken_gradient)
    with pytest.raises(TrainingError, match=f"step 1: gradient norm is nan. Stopped {when} the update"):
        train_here(shop.config(f"nan-{when}", *overrides))
