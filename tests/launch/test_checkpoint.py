from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import (
    Killed,
    Workshop,
    assert_equal_runs,
    assert_same_run,
    at_step,
    checkpoint_names,
    environment,
    forget_manifest,
    kill,
    losses,
    records,
    train_here,
    train_on_two,
)

from longseq.distributed.checked_file import FileRecord
from longseq.distributed.engine import LocalEngine
from longseq.launch import background
from longseq.launch import step as step_module
from longseq.launch.checkpoint import newest_checkpoint, read_state
from longseq.launch.data.dataset import Batch
from longseq.launch.processes import sole_user

LONG = ("train.steps=9", "train.eval_every=2", "schedule.name=cosine", "schedule.warmup_steps=2")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(shop: Workshop) -> Path:
    """A run that nothing happened to. Its second epoch begins in step 6."""
    run = shop.run("whole", *LONG)
    assert records(run, "step")[4]["epoch"] <= 1 < records(run, "step")[5]["epoch"]
    return run


@pytest.fixture(scope="module")
def pretrained(shop: Workshop) -> Path:
    return shop.run("pretrained", "checkpoint.export_at_end=true") / "model"


def killed_and_resumed(shop: Workshop, name: str, step: int, *overrides: str) -> Path:
    config = shop.config(name, *overrides)
    with at_step(step, kill), pytest.raises(Killed):
        train_here(config)
    saved = newest_checkpoint(shop.folder / name)
    assert read_state(saved).step < step
    train_here(config)
    return shop.folder / name


@pytest.mark.parametrize(("step", "background"), [(4, "false"), (5, "false"), (8, "false"), (8, "true")])
def test_a_killed_run_ends_as_one_that_was_not(
    shop: Workshop, whole: Path, step: int, background: str
) -> None:
    """Bit for bit; killed at 4, 5 and 8 it goes on from 3, 3 and 6, so once across the end of an epoch.

    In the background the checkpoint of 6 may or may not be complete by then.
    """
    name, how = f"killed{step}{background}", f"checkpoint.background={background}"
    run = killed_and_resumed(shop, name, step, "checkpoint.every=3", how, *LONG)
    assert_equal_runs(run, whole)
    assert [record["step"] for record in records(run, "eval")] == [2, 4, 6, 8, 9]
    assert len(records(run, "reference")) == 1


def test_a_resumed_run_takes_the_sequences_that_come_next(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[int, ...]] = []
    micro_batches = step_module.micro_batches

    def noted(*args: Any, **options: Any) -> Iterator[Batch]:
        for batch in micro_batches(*args, **options):
            taken.append(tuple(batch["input_ids"].flatten().tolist()))
            yield batch

    monkeypatch.setattr(step_module, "micro_batches", noted)
    shop.run("first_half", "train.steps=2")
    shop.run("first_half", "train.steps=5")
    assert len(taken) == 10
    shop.run("epoch_probe", "train.steps=5")
    assert taken[10:] == taken[:10]
    assert len(set(taken)) == 10  # five steps of two sequences: no more than an epoch has


def test_a_resumed_run_draws_the_random_numbers_that_come_next(shop: Workshop, pretrained: Path) -> None:
    lora = (f"model.name={pretrained}", "model.config={}", "model.lora.dropout=0.3", "train.steps=5")
    straight = shop.run("dropout", *lora)
    assert losses(straight) != losses(shop.run("no_dropout", *lora, "model.lora.dropout=0"))
    assert_equal_runs(killed_and_resumed(shop, "dropout_killed", 5, "checkpoint.every=2", *lora), straight)


@pytest.mark.slow
def test_sigkill(shop: Workshop) -> None:
    """A process of the command line is killed wherever it happens to be. Slow: it starts twice."""
    settings = ("train.steps=60", "checkpoint.every=5", "train.eval_every=10")
    straight = shop.run("not_killed", *settings)
    yaml = shop.yaml("sigkill", *settings)
    run = shop.folder / "sigkill"
    command = [sys.executable, "-m", "longseq.launch.cli", "train", str(yaml)]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not (run / "checkpoints" / "step-00000005").is_dir():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert read_state(newest_checkpoint(run)).step < 60
    assert subprocess.run(command, env=environment(), capture_output=True).returncode == 0
    assert_equal_runs(run, straight)


def test_a_kill_during_a_save_leaves_the_checkpoint_before(
    shop: Workshop, whole: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = shop.config("torn", "checkpoint.every=2", "checkpoint.background=false", *LONG)
    write = background.write_file

    def torn(path: Path, file: Any) -> FileRecord:
        if "00000004" in str(path) and "optimizer" in path.name:
            path.write_bytes(b"half")
            raise Killed
        return write(path, file)

    monkeypatch.setattr(background, "write_file", torn)
    with pytest.raises(Killed):
        train_here(config)
    run = shop.folder / "torn"
    assert checkpoint_names(run) == [".step-00000004.partial", "step-00000002"]
    monkeypatch.setattr(background, "write_file", write)
    with caplog.at_level(logging.WARNING, logger="longseq"):
        train_here(config)
    assert_equal_runs(run, whole)
    [said] = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert ".step-00000004.partial is passed over: its writing was cut off; the run goes on from" in said
    assert checkpoint_names(run) == ["step-00000008", "step-00000009"]


def test_the_newest_are_kept(shop: Workshop) -> None:
    names = {
        keep: checkpoint_names(
            shop.run(
                f"keep{keep}",
                "train.steps=6",
                "checkpoint.every=2",
                "checkpoint.at_first_step=true",
                keep_key,
            )
        )
        for keep, keep_key in ((1, "checkpoint.keep=1"), (3, "checkpoint.keep=3"))
    }
    assert names == {1: ["step-00000006"], 3: ["step-00000002", "step-00000004", "step-00000006"]}


def test_a_finished_run_says_so_and_can_be_made_longer(
    shop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    constant = ("train.eval_every=2", "checkpoint.export_at_end=true")
    run = shop.run("finished", *constant)
    (run / "loss.png").unlink()
    before = losses(run)
    with caplog.at_level(logging.INFO, logger="longseq"):
        assert train_here(shop.config("finished", *constant)).step == 4
    assert any("has trained all its 4 steps" in record.getMessage() for record in caplog.records)
    assert losses(run) == before
    # It might have died after its last checkpoint: what comes after that is made up for.
    assert (run / "loss.png").is_file()
    longer = shop.run("finished", "train.steps=6", *constant)
    assert losses(longer) == losses(shop.run("long_at_once", "train.steps=6", *constant))
    assert losses(longer)[:4] == before


def test_never_refuses_what_is_there(shop: Workshop, whole: Path) -> None:
    with pytest.raises(ValueError, match=r"resume=never but .*step-00000009.*log\.run_dir"):
        shop.run("whole", "checkpoint.resume=never", *LONG)
    shop.run("fresh", "checkpoint.resume=never", "train.steps=1")


def test_a_run_branches_off_from_a_checkpoints_folder(shop: Workshop, whole: Path) -> None:
    first = shop.run("first", "checkpoint.every=3", "checkpoint.keep=9", *LONG)
    branch = shop.run("branch", f"checkpoint.resume={first}/checkpoints/step-00000006", *LONG)
    assert [record["step"] for record in records(branch, "step")] == [7, 8, 9]
    assert [record["loss"] for record in records(branch, "step")] == losses(whole)[6:]


def test_an_old_checkpoint_is_not_mixed_with_newer_ones(shop: Workshop) -> None:
    """The newer ones of the first walk would be kept, and resumed from, in place of the new walk's."""
    run = shop.run("mixed", "checkpoint.every=1", "checkpoint.keep=9")
    old = run / "checkpoints" / "step-00000002"
    with pytest.raises(ValueError, match=r"gone on to .*step-00000004.*resume=auto.*log\.run_dir"):
        shop.run("mixed", f"checkpoint.resume={old}", "train.steps=8")
    newest = run / "checkpoints" / "step-00000004"
    assert len(losses(shop.run("mixed", f"checkpoint.resume={newest}", "train.steps=5"))) == 5


def test_another_walk_is_refused_with_both_values(shop: Workshop, whole: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.seed=7 but the checkpoint has 0") as refused:
        shop.run("whole", *LONG, "train.seed=7", "sequence.length=64", "optimizer.lr=1")
    assert "sequence.length=64 but the checkpoint has 128" in str(refused.value)
    assert "optimizer" not in str(refused.value)  # another learning rate is a person's right
    others = {
        "data.source": str(shop.folder / "held_out.jsonl"),
        "data.pack": "false",
        "train.global_batch_sequences": "4",
        "train.precision": "bf16",
        "model.config.hidden_size": "64",
    }
    for key, value in others.items():
        shown_key = "model.config" if key.startswith("model.config") else key
        with pytest.raises(ValueError, match=shown_key):
            shop.run("whole", *LONG, f"{key}={value}")


def test_what_is_no_checkpoint_is_refused(shop: Workshop, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no checkpoint \(it has no state\.json\)"):
        shop.run("nowhere", f"checkpoint.resume={tmp_path}")
    (tmp_path / "state.json").write_text(json.dumps({"step": 3, "words": 1}))
    with pytest.raises(ValueError, match=r"state\.json cannot be read: .*words"):
        read_state(tmp_path)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state\.json cannot be read"):
        read_state(tmp_path)


def test_a_rank_without_random_state_says_so(
    shop: Workshop, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = shop.run("no_rng", "train.steps=2") / "checkpoints" / "step-00000002"
    forget_manifest(first)
    [file] = (first / "rng").iterdir()
    file.unlink()
    shop.run("no_rng", "train.steps=3")
    assert any("no random state for rank 0" in record.getMessage() for record in caplog.records)


def test_newest_of_a_run_or_the_checkpoint_itself(shop: Workshop, whole: Path) -> None:
    newest = whole / "checkpoints" / "step-00000009"
    assert newest_checkpoint(whole) == newest
    assert newest_checkpoint(newest) == newest
    (whole / "checkpoints" / "step-00000099").mkdir()  # of another making: it has no state
    assert newest_checkpoint(whole) == newest
    state = read_state(newest)
    assert (state.step, state.sequences_seen, state.world_size) == (9, 18, 1)
    assert state.after_step(3, 5) == replace(
        state, step=10, sequences_seen=21, tokens_seen=state.tokens_seen + 5
    )


def test_nothing_in_a_checkpoint_can_carry_code(whole: Path) -> None:
    newest = newest_checkpoint(whole)
    assert {file.suffix for file in (newest / "engine").iterdir()} == {".safetensors"}
    for file in (newest / "rng").iterdir():
        torch.load(file, weights_only=True)


def test_a_changed_weight_decay_is_heard(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[LocalEngine] = []
    load = LocalEngine.load
    monkeypatch.setattr(LocalEngine, "load", lambda self, folder: (engines.append(self), load(self, folder)))
    shop.run("decay", "train.steps=2")
    shop.run("decay", "train.steps=4", "optimizer.weight_decay=0.5", "optimizer.betas=[0.5, 0.6]")
    [engine] = engines
    group = engine._optimizer.param_groups[0]
    assert (group["weight_decay"], tuple(group["betas"])) == (0.5, (0.5, 0.6))


def test_other_documents_under_the_same_name_are_refused(shop: Workshop, tmp_path: Path) -> None:
    documents = tmp_path / "own.jsonl"
    documents.write_text("".join(json.dumps({"text": f"document {i} " * 30}) + "\n" for i in range(9)))
    own = (f"data.source={documents}", "data.eval_source=null")
    shop.run("documents", "train.steps=2", *own)
    documents.write_text("".join(json.dumps({"text": f"another {i} " * 30}) + "\n" for i in range(9)))
    with pytest.raises(ValueError, match="the documents are not those"):
        shop.run("documents", "train.steps=4", *own)


def test_a_second_run_is_kept_out_of_the_folder(shop: Workshop) -> None:
    run = shop.run("alone", "train.steps=2")
    with sole_user(run), pytest.raises(ValueError, match=r"log\.run_dir=.* is in use by another run"):
        shop.run("alone", "train.steps=4")
    shop.run("alone", "train.steps=4")


def test_an_early_checkpoint_is_gone_on_from_with_a_note(
    shop: Workshop, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = shop.run("early", "train.steps=9", *LONG[1:], "checkpoint.every=5", "checkpoint.keep=9")
    shutil.rmtree(run / "checkpoints" / "step-00000009")
    (run / "checkpoints" / "latest").unlink()
    forget_manifest(run / "checkpoints" / "step-00000005")
    with caplog.at_level(logging.INFO, logger="longseq"):
        shop.run("early", *LONG)
    assert any("has no manifest.json" in record.getMessage() for record in caplog.records)
    assert_equal_runs(run, whole)
    # What cannot be read is named all the same.
    newest = newest_checkpoint(shop.run("early_damaged", "train.steps=2"))
    forget_manifest(newest)
    (newest / "engine" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"engine/model\.safetensors is no whole safetensors file"):
        shop.run("early_damaged", "train.steps=4")


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout(shop: Workshop, caplog: pytest.LogCaptureFixture) -> None:
    """From one process to ZeRO 2 on two, and from ZeRO 3 with Ulysses on two to one.

    Slow: two processes start.
    """
    truth = shop.run("stayed")
    shop.run("to_two", "train.steps=2")
    two = "parallel.num_gpus=2"
    printed = train_on_two(
        [
            shop.yaml("to_two", two, "parallel.zero_stage=2"),
            shop.yaml("from_two", "parallel.ulysses_degree=2", "parallel.zero_stage=3", "train.steps=2"),
        ]
    )
    assert "goes on with 2 processes, ulysses_degree 1, zero_stage 2" in " ".join(printed.split())
    with caplog.at_level(logging.INFO, logger="longseq"):
        shop.run("from_two")
    said = [record.getMessage() for record in caplog.records if "goes on with" in record.getMessage()]
    assert len(said) == 1
    assert (
        "written on 2 processes, ulysses_degree 2, zero_stage 3; the run goes on with 1 process," in said[0]
    )
    for name, layout in (("to_two", (2, 1, 2)), ("from_two", (1, 1, 0))):
        run = shop.folder / name
        assert_same_run(run, truth, relative=5e-7, absolute=1e-6)
        state = read_state(newest_checkpoint(run))
        assert (state.world_size, state.ulysses_degree, state.zero_stage) == layout
