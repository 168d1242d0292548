"""Checkpoints that are written while training goes on are those of the moment when they were asked for."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import run_cases
from torch import nn

from longseq.distributed import ProcessGroups
from longseq.distributed.engine import LocalEngine
from longseq.launch import background
from longseq.launch.checkpoint import Checkpoints, RunState, SaveError
from longseq.launch.manifest import checksum_problems, survey


def engine(groups: ProcessGroups | None = None, device: str = "cpu") -> LocalEngine:
    torch.manual_seed(0)
    # Odd sizes, a buffer, and weights that are not contiguous.
    model = nn.Sequential(nn.Linear(37, 29), nn.BatchNorm1d(29), nn.Linear(29, 3))
    model[2].weight = nn.Parameter(torch.randn(29, 3).t())
    model.to(device)
    return LocalEngine(model, torch.optim.AdamW(model.parameters()), groups or ProcessGroups())


def step(engine: LocalEngine) -> None:
    device = next(engine.module.parameters()).device
    engine.backward(engine.module(torch.randn(4, 37).to(device)).square().sum())
    engine.step(0.1)


def state(engine: LocalEngine) -> dict[str, torch.Tensor]:
    """A copy of weights, buffers and optimizer state."""
    names = {param: name for name, param in engine.module.named_parameters()}
    kept = {name: value.cpu().clone() for name, value in engine.module.state_dict().items()}
    for param, values in engine._optimizer.state.items():
        kept |= {f"{names[param]}/{key}": value.cpu().clone() for key, value in values.items()}
    return kept


def assert_holds(checkpoint: Path, wanted: dict[str, torch.Tensor]) -> None:
    assert checksum_problems(checkpoint) == []
    loaded = engine()
    loaded.load(checkpoint / "engine")
    found = state(loaded)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def write_model_files(folder: Path) -> None:
    (folder / "config.yaml").write_text("model: {}\n")


class Gate:
    """Holds writing threads back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.threads: list[str] = []
        write = background.write_file

        def held(path: Path, file: Any) -> Any:
            self.threads.append(threading.current_thread().name)
            if threading.current_thread() is not threading.main_thread():
                assert self.opened.wait(30)
            return write(path, file)

        monkeypatch.setattr(background, "write_file", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


def checkpoints_of(run: Path) -> Checkpoints:
    return Checkpoints(run, ProcessGroups(), keep=2, background=True)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_written_is_the_state_when_it_was_asked_for(tmp_path: Path, gate: Gate, device: str) -> None:
    trained, checkpoints = engine(device=device), checkpoints_of(tmp_path)
    for number in (1, 2, 3):
        gate.opened.clear()
        step(trained)
        at_save, random = state(trained), torch.get_rng_state()
        checkpoints.save(trained, RunState(step=number), write_model_files, wait=False)
        assert checkpoints.is_pending
        assert checkpoints.is_writing
        step(trained)
        for tensor in (*trained.module.parameters(), *trained.module.buffers()):
            tensor.data.fill_(7)
        assert survey(tmp_path / "checkpoints").newest != tmp_path / "checkpoints" / f"step-{number:08d}"
        gate.opened.set()
        saved = checkpoints.commit()
        assert saved == checkpoints.newest() == tmp_path / "checkpoints" / f"step-{number:08d}"
        assert not checkpoints.is_pending
        assert checkpoints.commit() is None
        assert_holds(saved, at_save)
        written = torch.load(saved / "rng" / "rank-00000.pt", weights_only=True)
        assert torch.equal(written["cpu"], random)
        trained.load(saved / "engine")


def test_the_memory_of_the_copy_is_used_again(tmp_path: Path) -> None:
    trained, checkpoints = engine(), checkpoints_of(tmp_path)
    taken = set()
    for number in (1, 2, 3):
        checkpoints.save(trained, RunState(step=number), write_model_files, wait=False)
        checkpoints.commit()
        assert checkpoints._copies is not None
        slab = checkpoints._copies._slab
        assert slab is not None
        taken.add((slab.total_bytes, slab.free_bytes))
    [(total, free)] = taken
    assert total == free > 0


def test_whoever_must_wait_writes_from_the_weights_themselves(tmp_path: Path, gate: Gate) -> None:
    trained, checkpoints = engine(), checkpoints_of(tmp_path)
    checkpoints.save(trained, RunState(step=1), write_model_files, wait=True)
    assert not checkpoints.is_pending
    assert set(gate.threads) == {"MainThread"}
    assert checkpoints._copies is not None
    assert checkpoints._copies._slab is None
    assert_holds(tmp_path / "checkpoints" / "step-00000001", state(trained))


def test_without_room_for_a_copy_training_waits_and_is_told_once(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "available_host_bytes", lambda: 1000)
    trained, checkpoints = engine(), checkpoints_of(tmp_path)
    with caplog.at_level(logging.WARNING, logger="longseq"):
        for number in (1, 2):
            checkpoints.save(trained, RunState(step=number), write_model_files, wait=False)
            assert not checkpoints.is_pending
            at_save = state(trained)
            step(trained)
            assert_holds(tmp_path / "checkpoints" / f"step-0000000{number}", at_save)
    [said] = caplog.messages
    assert "checkpoint.background: training waits while a checkpoint is written" in said
    assert "1,000 bytes of host memory" in said
    assert set(gate.threads) == {"MainThread"}


def test_a_save_completes_the_one_before_it(tmp_path: Path) -> None:
    trained, checkpoints = engine(), checkpoints_of(tmp_path)
    for number in (1, 2):
        checkpoints.save(trained, RunState(step=number), write_model_files, wait=False)
    assert checkpoints.newest() == tmp_path / "checkpoints" / "step-00000001"
    assert checkpoints.commit() == tmp_path / "checkpoints" / "step-00000002"


def fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)


def test_a_thread_that_fails_is_heard_at_the_commit_and_the_next_save_tries_again(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trained, checkpoints = engine(), checkpoints_of(tmp_path)
    checkpoints.save(trained, RunState(step=1), write_model_files)
    checkpoints.save(trained, RunState(step=2), write_model_files, wait=False)
    with monkeypatch.context() as patched:
        fill_the_disk(patched)
        gate.opened.set()
        with pytest.raises(
            SaveError,
            match=r"of step 2 was not saved: .*engine/model\.safetensors \([\d,]+ bytes\) cannot be written: "
            r"No space left on device; [\d.]+ [GT]B free on its disk; the newest checkpoint is .*-00000001\.",
        ) as failed:
            checkpoints.commit()
    assert failed.value.exit_status == 4
    assert not checkpoints.is_pending
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000001"]
    checkpoints.save(trained, RunState(step=3), write_model_files, wait=False)
    assert checkpoints.commit() == tmp_path / "checkpoints" / "step-00000003"
    # A save that must not be lost is not, because of an earlier one that is.
    with monkeypatch.context() as patched:
        fill_the_disk(patched)
        checkpoints.save(trained, RunState(step=4), write_model_files, wait=False)
        while checkpoints.is_writing:
            threading.Event().wait(0.01)
    with caplog.at_level(logging.WARNING, logger="longseq"):
        checkpoints.save(trained, RunState(step=5), write_model_files, wait=True)
    assert "the checkpoint of step 4 was not saved" in caplog.text
    assert checkpoints.newest() == tmp_path / "checkpoints" / "step-00000005"


def test_a_tokenizer_that_finds_no_room_fails_the_save_alike(tmp_path: Path) -> None:
    """Its library's errors are of no kind of their own."""

    def full(folder: Path) -> None:
        (folder / "config.yaml").write_text("half")
        raise Exception("No space left on device (os error 28)")

    checkpoints = checkpoints_of(tmp_path)
    with pytest.raises(SaveError, match=r"step 1 was not saved: .*os error 28.*no checkpoint yet"):
        checkpoints.save(engine(), RunState(step=1), full)
    checkpoints.save(engine(), RunState(step=1), full, wait=False)
    with pytest.raises(SaveError, match=r"step 1 was not saved: .*os error 28") as failed:
        checkpoints.commit()
    assert failed.value.exit_status == 4
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_run_that_is_given_up_leaves_no_thread(tmp_path: Path, gate: Gate) -> None:
    checkpoints = checkpoints_of(tmp_path)
    checkpoints.save(engine(), RunState(step=1), write_model_files, wait=False)
    threading.Timer(0.05, gate.opened.set).start()
    checkpoints.abandon()
    assert not checkpoints.is_writing
    assert checkpoints.commit() is None
    assert checkpoints.newest() is None
    # At once, whatever there was still to write.
    [draft] = (tmp_path / "checkpoints").iterdir()
    assert [path for path in draft.glob("*/*") if path.suffix != ".partial"] == []


def test_a_lost_rank_is_not_taken_for_a_damaged_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who moved it away, as is said of a damaged one, would lose it."""
    trained, checkpoints = engine(), checkpoints_of(tmp_path)
    checkpoints.save(trained, RunState(step=1), write_model_files)

    def lost(folder: Path) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(trained, "load", lost)
    newest = checkpoints.newest()
    assert newest is not None
    with pytest.raises(RuntimeError, match=r"^Connection closed"):
        checkpoints.load(newest, trained)


def test_a_disk_that_is_too_small_is_said_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("longseq.launch.checkpoint.shutil.disk_usage", lambda path: usage)
    with caplog.at_level(logging.WARNING, logger="longseq"):
        Checkpoints(tmp_path, ProcessGroups(), keep=2).save(engine(), RunState(step=1), write_model_files)
    assert "1,000 bytes free: it will not fit" in caplog.text


def one_rank_fails(folder: str, background_too: bool) -> list[str]:
    """What two ranks hear when only the second's disk is full, and when the first's is; then both save."""
    groups = ProcessGroups.create()
    checkpoints = Checkpoints(Path(folder), groups, keep=2, background=background_too)
    said, write = [], os.write
    for bad_rank in (1, 0):

        def full(descriptor: int, data: memoryview, bad_rank: int = bad_rank) -> int:
            if groups.rank == bad_rank and len(data) > 100:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, data)

        os.write = full
        try:
            checkpoints.save(engine(groups), RunState(step=7), write_model_files, wait=False)
            checkpoints.commit()
            said.append("saved")
        except SaveError as error:
            said.append(f"{error} {error.exit_status}")
        finally:
            os.write = write
    checkpoints.save(engine(groups), RunState(step=8), write_model_files, wait=not background_too)
    checkpoints.commit()
    # Where one rank has no room for a copy, none goes on without it.
    checkpoints = Checkpoints(Path(folder), groups, keep=2, background=background_too)
    if groups.is_main:
        background.available_host_bytes = lambda: 0
    checkpoints.save(engine(groups), RunState(step=9), write_model_files, wait=False)
    assert not checkpoints.is_pending
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.name == "step-00000009"
    # Each rank reads a part, and all hear of what one finds.
    assert checkpoints.checksum_problems(newest) == []
    groups.barrier()
    if groups.is_main:
        file = newest / "rng" / "rank-00001.pt"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    groups.barrier()
    said += checkpoints.checksum_problems(newest)
    return said


@pytest.mark.slow
def test_what_fails_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    """Slow: two processes are started."""
    cases = {
        str(back): (one_rank_fails, {"folder": str(tmp_path / str(back)), "background_too": back})
        for back in (False, True)
    }
    for here, there in run_cases(2, cases).values():
        assert here == there
        second, first, damage = here
        assert "step 7 was not saved on rank 1: " in second
        assert "rng/rank-00001.pt" in second
        assert "step 7 was not saved on rank 0: " in first
        assert second.endswith("there is no checkpoint yet. 4")
        assert damage.startswith("rng/rank-00001.pt has other bytes")
