"""`longseq bench` on a CPU: whole steps, what is printed and what is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_inputs import OUR_BUG, WAY_OUT
from tiny_run import environment

from longseq.distributed.sequence import shard_batch
from longseq.launch.bench.measure import Measurement
from longseq.launch.cli import main

TINY = [
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "model.config.head_dim=8",
    "sequence.length=250",
    "sequence.tile_tokens=128",
]
CLI = [sys.executable, "-m", "longseq.launch.cli"]


@pytest.fixture(autouse=True)
def _on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSEQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Status and JSON of a bench in this process."""

    def run(*words: str) -> tuple[int, dict[str, Any]]:
        path = tmp_path / "found" / "bench.json"
        status = main(["bench", "tiny-cpu", *TINY, *words, "--json", str(path)])
        assert [other.name for other in path.parent.iterdir()] == [path.name]
        return status, json.loads(path.read_text())

    return run


def test_steps_are_those_of_a_run(bench: Callable, capsys: pytest.CaptureFixture) -> None:
    status, found = bench("--steps", "3", "--profile")
    assert status == 0
    assert found["keys"]["sequence"]["length"] == found["tokens"] == 250
    assert len(found["steps_s"]) == len(found["losses"]) == len(found["norms"]) == 3
    assert found["seconds"] == sorted(found["steps_s"])[1]
    assert found["tokens_per_second"] == pytest.approx(250 / found["seconds"])
    assert sum(found["phase_s"].values()) == pytest.approx(found["seconds"], rel=0.5)
    # One document again and again, after a first step that is not among them.
    assert 5.6 > found["losses"][0] > found["losses"][1] > found["losses"][2]
    assert (found["memory_only"], found["kind"], found["plan"]) == (False, "trained", None)
    assert "note" not in found
    assert found["host_peak_gib"] > 0.05
    assert "profile" in found
    said = capsys.readouterr().out
    for line in ("set up: ", "first step: ", "step 3 of 3: ", "tokens/s", "\nloss ", "bench.json"):
        assert line in said


def test_memory_is_verified_without_attention(bench: Callable, capsys: pytest.CaptureFixture) -> None:
    status, found = bench("--memory-only", "sequence.length=9001", "sequence.checkpoints=gpu")
    said = capsys.readouterr().out
    assert status == 0
    assert found["memory_only"]
    assert found["kind"] == "memory-verified, not trained"
    assert not {"losses", "loss", "tokens_per_second", "model_tflops_per_gpu"} & set(found)
    assert "a step of 4,096 tokens to warm up" in said
    assert "step 1 of 1" in said
    assert "memory-verified, not trained" in said
    assert "loss" not in said.replace("carry loss", "")


def test_attention_that_was_not_left_out_is_no_result(bench: Callable, monkeypatch) -> None:
    monkeypatch.setattr("longseq.launch.bench.stub_attention.stub_attention", lambda model: [])
    status, found = bench("--memory-only")
    assert status == 5
    assert found["note"] == "did not finish"


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """The step of that number, counted from 1, raises."""
    original, calls = Measurement.step, []

    def step(self: Measurement, num_tokens: int | None = None) -> float:
        calls.append(num_tokens)
        if len(calls) == number:
            raise error
        return original(self, num_tokens)

    monkeypatch.setattr(Measurement, "step", step)


def test_what_was_found_before_memory_ran_out_is_kept(bench: Callable, monkeypatch, capsys) -> None:
    stop_at(monkeypatch, 3, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    status, found = bench()
    assert status == 3
    assert found["note"].startswith("out of memory: CUDA out of memory. Tried to allocate 2.00 GiB")
    assert len(found["steps_s"]) == 1
    assert "What frees most" in capsys.readouterr().out


def test_what_a_killed_bench_had_found_is_kept(bench: Callable, monkeypatch, tmp_path: Path) -> None:
    stop_at(monkeypatch, 3, KeyboardInterrupt())
    status, found = bench()
    assert status == 130
    assert found["note"] == "did not finish"
    assert len(found["steps_s"]) == 1


def test_a_first_step_is_timed_where_steps_take_minutes(bench: Callable, monkeypatch) -> None:
    taken: list[list[int]] = []

    def shard(whole: Any, groups: Any) -> Any:
        taken.append([whole["input_ids"].shape[1], *whole["document_offsets"].tolist()])
        return shard_batch(whole, groups)

    monkeypatch.setattr("longseq.launch.bench.measure.shard_batch", shard)
    status, found = bench("--no-warm-up", "--steps", "1", "sequence.length=5k")
    assert (status, len(found["steps_s"])) == (0, 1)
    assert taken == [[4096, 0, 4096], [5120, 0, 5120]]
    assert "first_step_s" not in found


def test_documents_share_a_sequence(bench: Callable) -> None:
    status, found = bench("--document-tokens", "50", "--steps", "1")
    assert (status, found["document_tokens"], found["keys"]["data"]["pack"]) == (0, 50, True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--steps", "0"], "--steps 0 must be 1 or above"),
        (["--gpu-memory", "lots"], "Or name a card: b200"),
        (["--host-memory", "lots"], "--host-memory lots: 'lots' is no size of memory; write one"),
        (["--document-tokens", "auto"], "--document-tokens auto is no number of tokens; write one"),
        (["--document-tokens", "12x"], "--document-tokens 12x: "),
        (["--json", "/tmp"], "--json /tmp is a folder; name a file"),
        (["--json", "/dev/null/a/b.json"], "nothing can be written in /dev/null; name a file elsewhere"),
        (["--gpu-memory", "80G"], "torch sees none; leave it out"),
        (["--document-tokens", "7"], "must be 4 or more and divide sequence.length=250"),
        (["sequence.length=max"], "give a number of tokens"),
        (["--", "--no_ssh"], "leave it out"),
    ],
)
def test_what_cannot_be_benched_is_refused(words: list[str], says: str, capsys) -> None:
    assert main(["bench", "tiny-cpu", *TINY, *words]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert WAY_OUT.search(said)
    assert not OUR_BUG.search(said)


@pytest.mark.slow  # DeepSpeed's launcher, and two processes that import DeepSpeed
def test_ranks_that_share_a_sequence_verify_its_memory(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    spread = ["parallel.num_gpus=2", "parallel.ulysses_degree=2", "parallel.zero_stage=3"]
    words = ["sequence.length=8999", "sequence.checkpoints=host", "--memory-only", "--json", str(path)]
    done = subprocess.run(
        [*CLI, "bench", "tiny-cpu", *TINY, *spread, *words],
        env=environment(LONGSEQ_CACHE=str(tmp_path / "cache")),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    assert (found["gpus"], found["tokens"], found["kind"]) == (2, 8999, "memory-verified, not trained")
    assert len(found["steps_s"]) == 1
    assert found["host_pinned_gib"] > 0
    assert "note" not in found
    assert done.stdout.count("step 1 of 1") == 1
