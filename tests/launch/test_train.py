from __future__ import annotations

import errno
import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import (
    Workshop,
    assert_close,
    assert_equal_runs,
    assert_same_run,
    at_step,
    checkpoint_names,
    losses,
    records,
    train_here,
    weights,
)

from longseq.distributed.engine import LocalEngine
from longseq.launch import background, checkpoint
from longseq.launch import setup as run_setup
from longseq.launch.checkpoint import SaveError
from longseq.launch.config_file import load_config
from longseq.launch.train import TrainingError


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def plain(shop: Workshop) -> Path:
    """The run that others are compared with."""
    return shop.run("plain")


def test_a_run_leaves_what_it_promises(shop: Workshop) -> None:
    run = shop.run(
        "promises",
        "train.steps=5",
        "checkpoint.at_first_step=true",
        "checkpoint.every=2",
        "checkpoint.keep=9",
        "checkpoint.export_at_end=true",
        "train.eval_every=2",
        "log.tensorboard=true",
    )
    assert load_config(str(run / "config.yaml")) == load_config(str(shop.folder / "promises.yaml"))
    assert checkpoint_names(run) == [f"step-0000000{step}" for step in (1, 2, 4, 5)]
    assert [record["step"] for record in records(run, "eval")] == [2, 4, 5]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "model" / "model.safetensors").is_file()
    assert list((run / "tensorboard").iterdir())
    assert [path for path in run.rglob("*") if "partial" in path.name or "tmp" in path.name] == []
    found = losses(run)
    assert len(found) == 5
    assert found[-1] < found[0] - 0.5
    last = records(run, "step")[-1]
    assert last["tokens_seen"] == 5 * 2 * 128
    assert last["total_steps"] == 5
    assert 0.8 < last["epoch"] < 1.2
    [entropy] = records(run, "reference")
    assert 2 < entropy["value"] < 4


def test_the_same_seed_is_the_same_run_and_another_is_not(shop: Workshop, plain: Path) -> None:
    torch.manual_seed(12345)  # what the process did before must not matter
    assert_equal_runs(shop.run("again"), plain)
    assert losses(shop.run("other_seed", "train.seed=1"))[0] != losses(plain)[0]


@pytest.mark.parametrize(
    "override",
    [
        "train.micro_batch_sequences=2",
        "sequence.loss=mini_sequence",
        "sequence.loss=logits",
        "sequence.checkpoints=gpu",
        "sequence.mini_sequence=false",
        "sequence.tile_tokens=37",
        "sequence.loss_memory_mib=1",
    ],
)
def test_what_saves_memory_changes_no_number(shop: Workshop, plain: Path, override: str) -> None:
    """To float32's rounding: 4 steps of 1e-2 leave the weights within 1e-6."""
    run = shop.run(override.replace("=", "-"), override)
    assert_same_run(run, plain, relative=5e-7, absolute=1e-6)


def test_packing_changes_no_number(shop: Workshop) -> None:
    """No document of these is split, so that an epoch's loss is the same however it is packed."""
    runs = []
    for pack in ("true", "false"):
        probe = shop.run(f"pack-{pack}-probe", f"data.pack={pack}", "train.steps=1")
        num_sequences = round(2 / records(probe, "step")[0]["epoch"])
        epochs = (f"train.global_batch_sequences={num_sequences}", "train.steps=null", "train.epochs=3")
        runs.append(shop.run(f"pack-{pack}", f"data.pack={pack}", *epochs))
    packed, single = runs
    assert len(losses(packed)) == 3
    assert_close(losses(single), losses(packed), 5e-7)
    for name, tensor in weights(packed).items():
        assert (weights(single)[name] - tensor).abs().max() <= 1e-6, name


def test_bf16_is_near(shop: Workshop, plain: Path) -> None:
    run = shop.run("bf16", "train.precision=bf16")
    assert losses(run) != losses(plain)
    assert_close(losses(run), losses(plain), 5e-3)
    assert {tensor.dtype for tensor in weights(run).values()} == {torch.float32}


def test_steps_follow_from_epochs(shop: Workshop) -> None:
    run = shop.run("epochs", "train.steps=null", "train.epochs=1.5", "schedule.name=linear")
    last = records(run, "step")[-1]
    assert last["step"] == last["total_steps"]
    assert 1.5 <= last["epoch"] < 1.7
    assert last["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_stops_and_the_run_goes_on(shop: Workshop, plain: Path, number: int) -> None:
    name = signal.Signals(number).name
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1)]
    config = shop.config(name)
    with at_step(1, lambda: os.kill(os.getpid(), number)):
        state = train_here(config)
    run = shop.folder / name
    assert state.step == 2
    assert checkpoint_names(run) == ["step-00000002"]
    assert name in records(run, "note")[0]["text"]
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1)] == handlers
    assert train_here(config).step == 4
    assert_equal_runs(run, plain)


def test_a_file_saves_and_another_stops(shop: Workshop, plain: Path) -> None:
    run = shop.folder / "files"
    config = shop.config("files", "checkpoint.keep=9")
    with at_step(1, (run / "SAVE").touch), at_step(2, (run / "STOP").touch):
        assert train_here(config).step == 3
    assert checkpoint_names(run) == ["step-00000002", "step-00000003"]
    assert f"stopped by {run / 'STOP'}; saved step 3 of 4" == records(run, "note")[0]["text"]
    assert [path.name for path in run.iterdir() if path.name in ("SAVE", "STOP")] == []
    # Asked in the last step, it is over as it is; nothing waits for whoever goes on with more steps.
    with at_step(4, (run / "STOP").touch):
        assert train_here(config).step == 4
    assert not (run / "STOP").exists()
    assert_equal_runs(run, plain)


class SlowWriting:
    """Writing that lasts until it is let go, and may fail then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: str | None = None) -> None:
        self.go_on = threading.Event()
        original = background.write_file

        def write_file(path: Path, *args: object, **kwargs: object) -> object:
            if threading.current_thread() is not threading.main_thread():
                assert self.go_on.wait(60)
                if error is not None:
                    raise OSError(errno.ENOSPC, error)
            return original(path, *args, **kwargs)

        monkeypatch.setattr(background, "write_file", write_file)


def test_training_goes_on_while_a_checkpoint_is_written(
    shop: Workshop, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there a step after its writing ended, as it was when it was taken."""
    run, writing, seen = shop.folder / "background", SlowWriting(monkeypatch), {}

    def look(step: int) -> None:
        seen[step] = list((run / "checkpoints").glob("step-*"))

    with (
        at_step(4, lambda: (look(4), writing.go_on.set(), time.sleep(0.5))),
        at_step(6, lambda: look(6)),
    ):
        shop.run("background", "train.steps=6", "checkpoint.every=3", "checkpoint.keep=9")
    assert seen[4] == []
    assert [path.name for path in seen[6]] == ["step-00000003"]
    assert checkpoint_names(run) == ["step-00000003", "step-00000006"]
    halves = shop.run("background-halves", "train.steps=3")
    saved = load_file(run / "checkpoints" / "step-00000003" / "engine" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in weights(halves).items())


def test_a_background_save_that_fails_is_said_and_the_run_goes_on(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writing = SlowWriting(monkeypatch, "no space")
    writing.go_on.set()
    run = shop.run("full", "checkpoint.every=1")
    assert checkpoint_names(run) == ["step-00000004"]  # the last, for which the run waits
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert said
    assert all("was not saved" in text and "no space" in text for text in said)


def test_a_save_that_cannot_begin_is_said_and_the_run_goes_on(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = checkpoint.make_draft

    def make_draft(draft: Path) -> None:
        if "step-00000002" in draft.name:
            raise OSError(errno.EIO, "Input/output error")
        original(draft)

    monkeypatch.setattr(checkpoint, "make_draft", make_draft)
    run = shop.run("unwritable", "checkpoint.every=2")
    assert checkpoint_names(run) == ["step-00000004"]
    assert "the checkpoint of step 2 was not saved" in caplog.text
    # The last one fails the run: nothing else would show it.
    monkeypatch.setattr(checkpoint, "make_draft", lambda draft: make_draft(draft.with_name("step-00000002")))
    with pytest.raises(SaveError, match="Input/output error"):
        shop.run("unwritable-at-the-end")


def test_what_ends_a_run_does_not_take_the_checkpoint_with_it(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where memory runs out while the one before is still being written."""
    writing = SlowWriting(monkeypatch)

    def fail() -> None:
        threading.Timer(0.3, writing.go_on.set).start()
        raise torch.OutOfMemoryError("CUDA out of memory")

    with at_step(3, fail), pytest.raises(torch.OutOfMemoryError):
        shop.run("ended", "checkpoint.every=2")
    assert checkpoint_names(shop.folder / "ended") == ["step-00000002"]


def test_a_loss_that_is_not_finite_stops_before_the_update(shop: Workshop) -> None:
    config = shop.config("wild", "optimizer.lr=1e30", "optimizer.clip_norm=null", "checkpoint.every=1")
    with pytest.raises(TrainingError, match=r"step 2: .* is (nan|inf).*step-00000001.*optimizer\.lr"):
        train_here(config)
    run = shop.folder / "wild"
    assert checkpoint_names(run) == ["step-00000001"]
    assert len(losses(run)) == 1


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_gradient_that_is_not_finite_touches_no_weight(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    engines: list[LocalEngine] = []
    build = run_setup.build_engine
    monkeypatch.setattr(run_setup, "build_engine", lambda *args: engines.append(build(*args)) or engines[-1])
    calls = 0
    backward = LocalEngine.backward

    def poisoned(self: LocalEngine, loss: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        backward(self, loss)
        if calls == 2 * accumulation + 1:  # in the first micro batch of step 3; the loss itself is fine
            next(self.module.parameters()).grad[3, 3] = float("inf")

    monkeypatch.setattr(LocalEngine, "backward", poisoned)
    name = f"poisoned{accumulation}"
    batch = f"train.global_batch_sequences={accumulation}"
    with pytest.raises(TrainingError, match=r"step 3: gradient norm is (nan|inf)"):
        train_here(shop.config(name, batch, "checkpoint.every=1"))
    saved = load_file(shop.folder / name / "checkpoints" / "step-00000002" / "engine" / "model.safetensors")
    now = engines[0].module.state_dict()
    assert checkpoint_names(shop.folder / name)[-1] == "step-00000002"
    assert [key for key in saved if not torch.equal(saved[key], now[key])] == []


def test_a_poisoned_weight_is_not_saved(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[LocalEngine] = []
    build = run_setup.build_engine
    monkeypatch.setattr(run_setup, "build_engine", lambda *args: engines.append(build(*args)) or engines[-1])

    def poison() -> None:
        with torch.no_grad():
            next(engines[0].module.parameters())[5] = float("nan")

    # The weight breaks after step 3 was counted and before the save of step 4.
    with at_step(3, poison), pytest.raises(TrainingError, match=r"step 4: loss is nan"):
        train_here(shop.config("nan_weight", "checkpoint.every=2"))
    assert checkpoint_names(shop.folder / "nan_weight") == ["step-00000002"]
    assert all(tensor.isfinite().all() for tensor in weights(shop.folder / "nan_weight").values())


def test_a_pretrained_model_that_guesses_is_doubted(
    shop: Workshop, plain: Path, caplog: pytest.LogCaptureFixture
) -> None:
    untrained = ("optimizer.lr=1e-9", "checkpoint.export_at_end=true")
    trained = ("train.steps=30", "checkpoint.export_at_end=true")
    for name, settings in (("untrained", untrained), ("trained", trained)):
        start = shop.run(name, *settings) / "model"
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="longseq"):
            shop.run(f"from_{name}", f"model.name={start}", "model.config={}", "data.tokenizer=null")
        doubts = [record.getMessage() for record in caplog.records if "guessing" in record.getMessage()]
        assert len(doubts) == (name == "untrained")
    # A pretrained model goes on from where it was, not from random weights.
    assert losses(shop.folder / "from_trained")[0] < losses(plain)[-1]
