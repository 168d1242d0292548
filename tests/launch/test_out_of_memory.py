"""What is said and written when GPU memory runs out, with a plan and without."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from plan_samples import machine_with, plan_config, work_of

from longseq.launch import out_of_memory
from longseq.launch.out_of_memory import Moment, describe, explain, read_moment, snapshot_path, watch_memory
from longseq.launch.planner.advice import advice
from longseq.launch.planner.plan import Plan, make_plan

GIB = 2**30
MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which "
    "1.20 GiB is free. Process 1234 has 512.00 MiB memory in use. Process 99 has 1.50 GiB memory in use. "
    "Including non-PyTorch memory, this process has 73.90 GiB memory in use. Of the allocated memory "
    "61.20 GiB is allocated by PyTorch, and 3.10 GiB is reserved by PyTorch but unallocated. If reserved but "
    "unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid "
    "fragmentation."
)


@pytest.fixture(scope="module")
def plan() -> Plan:
    config = plan_config(
        8, sequence={"length": "64k", "save_attention": "gpu"}, train={"micro_batch_sequences": 1}
    )
    return make_plan(config, machine_with(), work=work_of(config))


@pytest.fixture(autouse=True)
def _no_allocator_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "RANK"):
        monkeypatch.delenv(name, raising=False)


def test_the_moment_is_read_from_torchs_message() -> None:
    found = read_moment(MESSAGE, {"allocated_bytes.all.peak": 70 * GIB, "num_alloc_retries": 3})
    assert found == Moment(
        asked=int(2.5 * GIB),
        allocated=int(61.2 * GIB),
        unused=int(3.1 * GIB),
        free=int(1.2 * GIB),
        total=int(79.1 * GIB),
        others=((1234, GIB // 2), (99, 3 * GIB // 2)),
        peak=70 * GIB,
        retries=3,
    )
    assert read_moment("CUDA error: out of memory", {}) == Moment()


def test_the_plan_stands_beside_what_there_was(plan: Plan) -> None:
    lines = describe(read_moment(MESSAGE, {}), plan)
    [total] = [line.split() for line in lines if line.startswith("allocated in all")]
    assert total[-4:] == [f"{plan.memory.peak_bytes / GIB:.1f}", "GiB", "61.2", "GiB"]
    planned = sum(part.gpu_bytes for part in plan.memory.parts)
    assert planned == plan.memory.peak_bytes
    biggest = max(plan.memory.parts, key=lambda part: part.gpu_bytes)
    assert lines[1].startswith(biggest.name)


@pytest.mark.parametrize(
    ("moment", "said", "not_said"),
    [
        (Moment(asked=GIB, allocated=9 * GIB, unused=3 * GIB), "expandable_segments:True", "Other processes"),
        (Moment(asked=GIB, unused=GIB // 2), None, "expandable_segments"),
        (
            Moment(asked=GIB, unused=3 * GIB, others=((7, 2 * GIB),)),
            "Other processes have 2.0 GiB",
            "expandable",
        ),
        (Moment(retries=5), "give back what it had cached 5 times", None),
        (Moment(asked=10 * GIB, allocated=500 * GIB), "GiB too little: please report it", None),
    ],
)
def test_what_follows_from_it(plan: Plan, moment: Moment, said: str | None, not_said: str | None) -> None:
    text = "\n".join(describe(moment, replace(plan, fits=True)))
    assert said is None or said in text
    assert not_said is None or not_said not in text


def test_a_plan_that_had_said_so_is_not_to_be_reported(plan: Plan) -> None:
    text = "\n".join(describe(Moment(asked=10 * GIB, allocated=500 * GIB), replace(plan, fits=False)))
    assert "The plan had said so" in text
    assert "report" not in text


def test_segments_that_expand_are_not_advised_twice(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert "expandable" not in "\n".join(describe(Moment(asked=GIB, unused=9 * GIB), plan))


def test_the_whole_text_on_a_cpu(plan: Plan, tmp_path: Path) -> None:
    text = explain(torch.OutOfMemoryError(MESSAGE), plan, torch.device("cpu"), tmp_path)
    assert text.startswith("out of memory: CUDA out of memory. Tried to allocate 2.50 GiB\n")
    told = advice(plan, 3)
    assert len(told) == 3
    for line in told:
        assert f"\n  {line}\n" in text
    assert text.endswith("There is no checkpoint yet: nothing is lost.")
    without = explain(MemoryError(), None, torch.device("cpu"), tmp_path)
    assert "sequence.checkpoints=host" in without
    assert not list(tmp_path.iterdir())


def test_it_says_what_the_run_goes_on_from(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(newest=tmp_path / "checkpoints" / "step-00000004")
    monkeypatch.setattr(out_of_memory, "survey", {tmp_path / "checkpoints": found}.__getitem__)
    text = explain(torch.OutOfMemoryError(MESSAGE), plan, torch.device("cpu"), tmp_path)
    assert "The newest checkpoint, step-00000004, is whole: the same command goes on" in text


# --- the snapshot


@pytest.fixture
def attached(monkeypatch: pytest.MonkeyPatch) -> list:
    """A torch with a GPU, which keeps what is attached to it."""
    observers: list = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", observers.append, raising=False)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"snapshot"))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {})
    return observers


def test_a_failure_leaves_a_snapshot(attached: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    watch_memory(tmp_path / "run", history=False)
    assert not (tmp_path / "run").exists()
    [observer] = attached
    observer(0, 1, 2, 3)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["out_of_memory-rank-3.pickle"]
    text = explain(torch.OutOfMemoryError(MESSAGE), None, torch.device("cuda:0"), tmp_path / "run")
    assert "out_of_memory-rank-3.pickle" in text
    assert "after the failure" not in text


def test_an_old_snapshot_is_not_taken_for_this_failures(attached: list, tmp_path: Path) -> None:
    path = snapshot_path(tmp_path)
    path.write_bytes(b"old")
    os.utime(path, (time.time() - 7200,) * 2)
    text = explain(torch.OutOfMemoryError(MESSAGE), None, torch.device("cuda:0"), tmp_path)
    assert "(taken after the failure)" in text
    assert path.read_bytes() == b"snapshot"


def test_what_goes_wrong_with_it_hides_nothing(
    attached: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(path: str) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", fail)
    watch_memory(tmp_path, history=False)
    attached[0](0, 1, 2, 3)
    assert "no room" in caplog.text
    text = explain(torch.OutOfMemoryError(MESSAGE), None, torch.device("cuda:0"), tmp_path)
    assert "pickle" not in text


def test_history_is_recorded_where_it_is_asked_for(
    attached: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[dict] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **how: recorded.append(how))
    watch_memory(tmp_path, history=False)
    assert not recorded
    watch_memory(tmp_path, history=True)
    assert recorded[0]["max_entries"] == out_of_memory.HISTORY_ENTRIES


def test_a_torch_that_cannot_tell_is_named(
    attached: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(torch._C, "_cuda_attach_out_of_memory_observer")
    with caplog.at_level(logging.INFO):
        watch_memory(tmp_path, history=False)
    assert "does not tell when memory runs out" in caplog.text


def test_a_cpu_has_nothing_to_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    watch_memory(tmp_path, history=True)
    assert not list(tmp_path.iterdir())
