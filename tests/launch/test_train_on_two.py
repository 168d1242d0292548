"""Two processes train as one does: data parallel, Ulysses, ZeRO 1 to 3, and what they save."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import (
    Workshop,
    assert_close,
    assert_equal_runs,
    assert_same_run,
    checkpoint_names,
    held_out_loss,
    losses,
    records,
    train_on_two,
    weights,
)

from longseq.launch.checkpoint import newest_checkpoint, read_state
from longseq.launch.export import export_checkpoint

# Slow: two processes import torch, transformers and DeepSpeed. They do it once, for all of these runs.
pytestmark = pytest.mark.slow

APOLLO = ["optimizer.name=apollo", "optimizer.apollo.rank=6", "optimizer.apollo.update_gap=2"]
MINI = ["optimizer.name=apollo-mini", "optimizer.apollo.embeddings=low_rank"]
EXACT = {
    "dp2": ["parallel.num_gpus=2"],
    "dp2-micro": ["parallel.num_gpus=2", "train.global_batch_sequences=4", "train.micro_batch_sequences=2"],
    "ulysses2": ["parallel.ulysses_degree=2"],
    "ulysses2-odd": ["parallel.ulysses_degree=2", "data.pack=false", "sequence.checkpoints=gpu"],
    "zero1": ["parallel.num_gpus=2", "parallel.zero_stage=1"],
    "zero2": ["parallel.num_gpus=2", "parallel.zero_stage=2"],
    "zero3": ["parallel.num_gpus=2", "parallel.zero_stage=3"],
    "zero1-accumulates": ["parallel.num_gpus=2", "parallel.zero_stage=1", "train.global_batch_sequences=4"],
    "zero2-accumulates": ["parallel.num_gpus=2", "parallel.zero_stage=2", "train.global_batch_sequences=4"],
    "zero3-ulysses2": ["parallel.ulysses_degree=2", "parallel.zero_stage=3", "sequence.checkpoints=gpu"],
    "zero3-untied": [
        "parallel.num_gpus=2",
        "parallel.zero_stage=3",
        "model.config.tie_word_embeddings=false",
    ],
    "dp2-apollo": ["parallel.num_gpus=2", *APOLLO],
    "zero1-mini": ["parallel.num_gpus=2", "parallel.zero_stage=1", *MINI],
    "zero2-apollo": ["parallel.num_gpus=2", "parallel.zero_stage=2", *APOLLO],
    "zero3-apollo": ["parallel.ulysses_degree=2", "parallel.zero_stage=3", *APOLLO],
}
LORA = ["data.tokenizer=null", "model.lora.rank=4", "optimizer.lr=2e-3", "train.eval_every=1"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def base(shop: Workshop) -> list[str]:
    """Overrides by which a run starts from pretrained weights."""
    return [f"model.name={shop.run('base', 'checkpoint.export_at_end=true') / 'model'}", "model.config={}"]


@pytest.fixture(scope="module")
def two(shop: Workshop, base: list[str]) -> str:
    """Every run of this file, on two processes; what the first of them printed."""
    zero1 = ["parallel.num_gpus=2", "parallel.zero_stage=1"]
    lora = [*zero1, *base, *LORA]
    configs = [shop.yaml(name, *overrides) for name, overrides in EXACT.items()]
    for stage in (1, 2, 3):
        bf16 = ("parallel.num_gpus=2", f"parallel.zero_stage={stage}", "train.precision=bf16")
        configs.append(shop.yaml(f"zero{stage}-bf16", *bf16))
    for name, overrides in (("zero1", zero1), ("zero3-apollo", EXACT["zero3-apollo"]), ("lora", lora)):
        # A file of its own for each half: both are read before either is trained.
        for steps in (2, 4):
            half = shop.yaml(f"{name}-halves", *overrides, f"train.steps={steps}", "checkpoint.keep=9")
            configs.append(half.rename(half.with_stem(f"{name}-halves-{steps}")))
    configs.append(shop.yaml("lora-whole", *lora))
    return train_on_two(configs)


@pytest.mark.parametrize("name", EXACT)
def test_two_processes_walk_as_one(shop: Workshop, two: str, name: str) -> None:
    """To float32's rounding: steps of 1e-2 leave weights within 1e-6, and losses within 5 units of 1e-7."""
    alone = [text for text in EXACT[name] if not text.startswith("parallel.")]
    truth = shop.run(f"{name}-alone", *alone)
    assert_same_run(shop.folder / name, truth, relative=5e-7, absolute=1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_in_bf16_is_near_and_can_be_exported(
    shop: Workshop, two: str, tmp_path: Path, stage: int
) -> None:
    run = shop.folder / f"zero{stage}-bf16"
    truth = shop.run("bf16-alone", "train.precision=float32")
    assert_close(losses(run), losses(truth), 1e-2)
    export_checkpoint(newest_checkpoint(run), tmp_path / "model", dtype="float32")
    loss, _ = held_out_loss(tmp_path / "model", shop.folder / "held_out.jsonl")
    assert loss == pytest.approx(records(run, "eval")[-1]["eval_loss"], rel=1e-2)


@pytest.mark.parametrize("name", ["zero1", "zero3-apollo"])
def test_zero_goes_on_bit_for_bit(shop: Workshop, two: str, name: str) -> None:
    halves = shop.folder / f"{name}-halves"
    assert checkpoint_names(halves) == ["step-00000002", "step-00000004"]
    assert losses(halves) == losses(shop.folder / name)
    assert read_state(newest_checkpoint(halves)).world_size == 2
    mine, theirs = weights(halves), weights(shop.folder / name)
    assert all((mine[name] == theirs[name]).all() for name in theirs)


def test_adapters_under_zero_are_saved_alone_and_go_on(shop: Workshop, two: str, base: list[str]) -> None:
    whole, halves = shop.folder / "lora-whole", shop.folder / "lora-halves"
    assert_equal_runs(halves, whole)
    names = weights(whole)
    assert names
    assert [name for name in names if "lora_" not in name] == []
    one = shop.run("lora-alone", *base, *LORA)
    assert_close(losses(whole), losses(one), 5e-7)
    assert records(one, "eval")[-1]["eval_loss"] < records(one, "eval")[0]["eval_loss"]


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3-untied", "lora-whole", "lora-halves"])
def test_what_zero_wrote_is_exported_with_the_runs_loss(
    shop: Workshop, two: str, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = shop.folder / name
    export_checkpoint(newest_checkpoint(run), tmp_path / "model")
    assert capfd.readouterr() == ("", "")
    loss, count = held_out_loss(tmp_path / "model", shop.folder / "held_out.jsonl")
    last = records(run, "eval")[-1]
    assert count == last["eval_tokens"]
    assert loss == pytest.approx(last["eval_loss"], rel=1e-6)


def test_the_console_is_quiet(two: str) -> None:
    for noise in ("Warning", "WARNING", "deepspeed", "Parsing", "it/s"):
        assert noise not in two, noise
