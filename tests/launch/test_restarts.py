"""Runs that crash and go on by themselves; and what is not worth another try."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from tiny_run import Workshop, assert_equal_runs, environment, records

from longseq.launch import restarts
from longseq.launch.checkpoint import SaveError
from longseq.launch.exit_status import (
    BAD_INPUT,
    CRASHED,
    DISK_FULL,
    DONE,
    INTERRUPTED,
    OUT_OF_MEMORY,
    STOPPED_ITSELF,
    describe,
    is_crash,
    status_of,
)
from longseq.launch.loop import TrainingError
from longseq.launch.restarts import supervise

# Stands for `longseq`: each try takes one act off a list, and writes down how it was called.
FAKE = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(os.environ["FAKE_RUN"])
acts = json.loads((folder / "acts.json").read_text())
act = acts.pop(0)
(folder / "acts.json").write_text(json.dumps(acts))
with (folder / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps([sys.argv[1:], os.environ.get("LONGSEQ_RESTARTED")]) + "\\n")
if act.get("saves"):
    (folder / "newest").write_text(act["saves"])
if act.get("waits"):
    asked = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda number, _: asked.append(number))
    (folder / "waits").touch()
    while not asked:
        time.sleep(0.01)
    (folder / "asked").write_text(signal.Signals(asked[0]).name)
if act.get("signal"):
    os.kill(os.getpid(), act["signal"])
sys.exit(act.get("status", 0))
"""


class Fake:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def supervise(self, *acts: dict, restarts: int = 3, words: tuple[str, ...] = ("train", "a.yaml")) -> int:
        (self.folder / "acts.json").write_text(json.dumps(acts))
        return supervise(words, Path("run"), restarts, newest=lambda _: self.newest, first_pause_s=0.001)

    @property
    def newest(self) -> str | None:
        path = self.folder / "newest"
        return path.read_text() if path.exists() else None

    @property
    def calls(self) -> list[tuple[list[str], str | None]]:
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    (tmp_path / "fake_longseq.py").write_text(FAKE)
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FAKE_RUN", str(tmp_path))
    monkeypatch.setattr(restarts, "MODULE", "fake_longseq")
    return Fake(tmp_path)


def test_crashes_go_on_from_where_the_run_is(fake: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    words = ("train", "a.yaml", "checkpoint.resume=never", "--", "--bind_cores_to_rank")
    crashes = [{"status": CRASHED, "saves": "step-1"}, {"signal": signal.SIGKILL, "saves": "step-2"}]
    assert fake.supervise(*crashes, {}, words=words) == DONE
    first, second, third = fake.calls
    assert first == [list(words), None]
    # It was to begin anew, and has: now it is to go on.
    again = [*words[:3], "checkpoint.resume=auto", *words[3:]]
    assert second == [again, "restart 1 of 3: it crashed, or lost a process"]
    assert third[0] == again
    assert third[1].startswith("restart 2 of 3: a process of it was ended by SIGKILL")
    said = capfd.readouterr().err
    assert "restart 2 of 3: a process of it was ended by SIGKILL (the machine may have run out of" in said
    assert "goes on from step-2" in said


def test_a_run_without_a_checkpoint_of_its_own_starts_as_it_was_told(fake: Fake) -> None:
    assert fake.supervise({"status": CRASHED}, {}) == DONE
    assert [words for words, _ in fake.calls] == [["train", "a.yaml"]] * 2


@pytest.mark.parametrize("status", [DONE, STOPPED_ITSELF, BAD_INPUT, OUT_OF_MEMORY, DISK_FULL, INTERRUPTED])
def test_what_would_only_happen_again(fake: Fake, status: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert fake.supervise({"status": status}) == status
    assert len(fake.calls) == 1
    assert capfd.readouterr().err == ""


def test_no_more_than_it_may(fake: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    acts = [{"status": CRASHED, "saves": f"step-{i}"} for i in range(4)]
    assert fake.supervise(*acts, restarts=2) == CRASHED
    assert len(fake.calls) == 3
    assert "all 2 restarts are used. The same command goes on from step-2" in capfd.readouterr().err


def test_a_run_that_comes_no_further_gives_up(fake: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    acts = [{"status": CRASHED, "saves": "step-1"}, *[{"status": CRASHED}] * 5]
    assert fake.supervise(*acts, restarts=5) == CRASHED
    assert len(fake.calls) == 2
    assert "no new checkpoint since the last try (step-1): gave up" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_reaches_the_run_and_is_the_last_word(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    def send() -> None:
        while not (fake.folder / "waits").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    # Tests in a shell's background (`make test &`) ignore Ctrl-C, and so would the command.
    monkeypatch.setattr(signal, "SIG_IGN", None)
    earlier = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    threading.Thread(target=send).start()
    assert fake.supervise({"waits": True, "status": CRASHED}) == CRASHED
    assert (fake.folder / "asked").read_text() == signal.Signals(number).name
    assert len(fake.calls) == 1
    assert capfd.readouterr().err == ""
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == earlier


def test_a_process_among_others_cannot_start_them(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"--max-restarts=3: .*RANK is set.*torchrun's --max-restarts"):
        fake.supervise({})


def test_statuses() -> None:
    full = SaveError("not saved")
    full.__cause__ = OSError(28, "No space left on device")
    for error, status in (
        (TrainingError("loss is nan"), STOPPED_ITSELF),
        (ValueError("key=value"), BAD_INPUT),
        (FileNotFoundError(2, "no such file"), BAD_INPUT),
        (torch.OutOfMemoryError("CUDA out of memory"), OUT_OF_MEMORY),
        (MemoryError(), OUT_OF_MEMORY),
        (OSError(28, "No space left on device"), DISK_FULL),
        (full, DISK_FULL),
        (OSError(5, "Input/output error"), CRASHED),
        (RuntimeError("CUDA error: device-side assert triggered"), CRASHED),
        (KeyboardInterrupt(), INTERRUPTED),
    ):
        assert status_of(error) == status, error
    for status in (-9, 247, 137, -6, 250, 134, 139, CRASHED):
        assert is_crash(status), status
    for status in (0, 1, 2, 3, 4, 126, 127, 130, 143, 241, -15, 255):
        assert not is_crash(status), status
    assert "SIGKILL" in describe(247)
    assert "SIGABRT" in describe(134)
    assert "SIG" not in describe(255)  # what ssh says of itself
    assert describe(INTERRUPTED) == "it was interrupted"


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Slow: two processes that import torch, one after the other. To the last bit what one run would be."""
    monkeypatch.setattr(os, "environ", environment())
    shop = Workshop(tmp_path)
    truth, run = shop.run("truth", "train.steps=40"), tmp_path / "killed"

    is_over = threading.Event()

    def kill() -> None:
        while not is_over.is_set():
            if (run / "checkpoints" / "step-00000020").exists():
                children = psutil.Process().children()  # the server that tests fork from is one, too
                [run_itself] = [child for child in children if restarts.MODULE in child.cmdline()]
                run_itself.kill()
                return
            time.sleep(0.001)

    yaml = shop.yaml("killed", "train.steps=40", "checkpoint.every=10", "checkpoint.keep=9")
    killer = threading.Thread(target=kill)
    killer.start()
    status = supervise(["train", str(yaml)], run, 2, first_pause_s=0.01)
    is_over.set()
    killer.join()
    assert status == DONE
    assert_equal_runs(run, truth)
    assert "restart 1 of 2" in records(run, "note")[0]["text"]
    assert "goes on from step-000000" in capfd.readouterr().err
