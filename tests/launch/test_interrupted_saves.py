"""A save that is cut off, or fails, at any operation on the disk leaves a whole checkpoint, bit for bit."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from longseq.distributed import ProcessGroups
from longseq.distributed.engine import LocalEngine
from longseq.launch.checkpoint import Checkpoints, RunState, SaveError
from longseq.launch.exit_status import DISK_FULL
from longseq.launch.manifest import checksum_problems, survey

OPERATIONS = ("write", "fsync", "replace", "mkdir", "unlink", "rmdir")
FIRST, SECOND, THIRD = 10, 20, 30
LOADED = 0
"""This engine takes what is loaded."""
KILLED = 9


@cache
def engine_at(step: int) -> LocalEngine:
    """An engine whose weights and states say which step it is at; it is not to be changed."""
    torch.manual_seed(step)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    engine = LocalEngine(model, optimizer, ProcessGroups())
    engine.backward(model(torch.ones(1, 3)).sum())
    engine.step(0.1)
    return engine


def bits(engine: LocalEngine) -> list[bytes]:
    state = [values[key] for values in engine._optimizer.state.values() for key in sorted(values)]
    return [tensor.detach().numpy().tobytes() for tensor in (*engine.module.parameters(), *state)]


def write_config(folder: Path) -> None:
    (folder / "config.yaml").write_text("model: {}\n")


def save(run_dir: Path, step: int, bits_of: int) -> None:
    checkpoints = Checkpoints(run_dir, ProcessGroups(), keep=1)
    checkpoints.save(engine_at(bits_of), RunState(step=step), write_config)


class Interrupted:
    """Does something at the n-th operation on the disk, which is not done, or half if it is a write."""

    def __init__(self, number: int, act: Callable[[], Any]) -> None:
        self.left, self._act = number, act

    def __call__(self, name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def operation(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                if name == "write":
                    original(args[0], args[1][: len(args[1]) // 2])
                self._act()
            return original(*args, **kwargs)

        return operation

    def run(self, work: Callable[[], None]) -> None:
        with patch.multiple(os, **{name: self(name) for name in OPERATIONS}):
            work()


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about power cuts."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def one_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("saved")
    save(run, FIRST, bits_of=FIRST)
    return run


def assert_whole(run: Path, allowed: dict[int, list[int]]) -> None:
    """The newest checkpoint is one of `allowed` (step: whose bits), and the next save finds its way."""
    found = survey(run / "checkpoints")
    assert found.newest is not None
    assert checksum_problems(found.newest) == []
    engine = engine_at(LOADED)
    state = Checkpoints(run, ProcessGroups(), keep=1).load(found.newest, engine)
    assert bits(engine) in [bits(engine_at(whose)) for whose in allowed[state.step]]
    save(run, THIRD, bits_of=THIRD)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", f"step-{THIRD:08d}"]
    assert (run / "checkpoints" / "latest").read_text() == f"step-{THIRD:08d}\n"


@pytest.mark.parametrize("step", [SECOND, FIRST], ids=["another-step", "same-step"])
def test_a_kill_at_any_operation_leaves_a_whole_checkpoint(
    one_saved: Path, tmp_path: Path, step: int
) -> None:
    number, status = 0, -1
    while status != 0:
        number += 1
        run = tmp_path / str(number)
        shutil.copytree(one_saved, run)
        status = status_of_a_child(run, number, step)
        assert status in (0, KILLED)
        assert_whole(run, allowed(step))
    assert number > 40


def status_of_a_child(run: Path, number: int, step: int) -> int:
    """How a process ends that saves and is killed at its n-th operation."""
    child = os.fork()
    if child == 0:
        try:
            Interrupted(number, lambda: os._exit(KILLED)).run(lambda: save(run, step, bits_of=SECOND))
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def allowed(step: int) -> dict[int, list[int]]:
    """Which steps may be found after a save of the second state as `step`, and whose bits they may have."""
    return {FIRST: [FIRST, SECOND]} if step == FIRST else {FIRST: [FIRST], step: [SECOND]}


@pytest.mark.parametrize("step", [SECOND, FIRST], ids=["another-step", "same-step"])
def test_a_full_disk_at_any_operation_leaves_a_whole_checkpoint(
    one_saved: Path, tmp_path: Path, step: int
) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    number, failures, was_reached = 0, 0, True
    while was_reached:
        number += 1
        run = tmp_path / str(number)
        shutil.copytree(one_saved, run)
        interrupted = Interrupted(number, full)
        error = what_is_raised(interrupted, run, step)
        was_reached = interrupted.left <= 0
        if error is not None:
            failures += 1
            assert error.exit_status == DISK_FULL
            assert f"the checkpoint of step {step} was not saved" in str(error)
            assert "No space left on device" in str(error)
            assert not list((run / "checkpoints").glob(".step-*.partial"))
        assert_whole(run, allowed(step))
    # What fails once the new one is in its place is no failure of the save.
    assert 15 < failures < number


def what_is_raised(interrupted: Interrupted, run: Path, step: int) -> SaveError | None:
    try:
        interrupted.run(lambda: save(run, step, bits_of=SECOND))
    except SaveError as error:
        return error
    return None
