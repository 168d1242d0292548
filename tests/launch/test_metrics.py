"""Metrics survive crashes and resumes: no step is lost, none appears twice."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import types

import pytest

from longseq.launch.config import LogConfig
from longseq.launch.metric_sinks import scalars
from longseq.launch.metrics import EtaEstimate, MetricsWriter, StepMetrics, peak_memory_gib, read_metrics

PLAIN = LogConfig(tensorboard=False)
METRICS = StepMetrics(
    step=1,
    total_steps=100,
    loss=2.5,
    lr=1e-3,
    grad_norm=1.25,
    tokens=64,
    seconds=0.5,
    tokens_per_second=128.0,
    model_tflops_per_gpu=0.25,
    mfu=None,
    peak_memory_gib=0.75,
    epoch=0.01,
    tokens_seen=64,
    eta_s=49.5,
)


def train(run_dir, first, last, log=PLAIN, loss=2.5, **options):
    with MetricsWriter(run_dir, log, **options) as metrics:
        for number in range(first, last + 1):
            metrics.step(dataclasses.replace(METRICS, step=number, loss=loss))


def steps(run_dir):
    return [record["step"] for record in read_metrics(run_dir) if record["kind"] == "step"]


def strict_lines(path):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_every_record_is_a_line_with_units_in_its_keys(tmp_path):
    with MetricsWriter(tmp_path / "a" / "run", PLAIN.model_copy(update={"every": 10})) as metrics:
        metrics.reference("unigram entropy of the held-out text", 3.18)
        metrics.step(METRICS)
        metrics.step(dataclasses.replace(METRICS, step=2))
        metrics.evaluation(2, 2.25, 640, 1.5)
        metrics.note("saved")
    lines = strict_lines(tmp_path / "a" / "run" / "metrics.jsonl")
    for line in lines:
        assert line.pop("time_unix_s") > 1.7e9
    assert lines == [
        {"kind": "reference", "name": "unigram entropy of the held-out text", "value": 3.18},
        {"kind": "step", **dataclasses.asdict(METRICS)},
        {"kind": "step", **dataclasses.asdict(METRICS) | {"step": 2}},
        {"kind": "eval", "step": 2, "eval_loss": 2.25, "eval_tokens": 640, "seconds": 1.5},
        {"kind": "note", "step": 2, "text": "saved"},
    ]


def test_not_a_number_is_null(tmp_path):
    with MetricsWriter(tmp_path, PLAIN) as metrics:
        metrics.step(dataclasses.replace(METRICS, loss=float("nan"), grad_norm=float("inf")))
    (line,) = strict_lines(tmp_path / "metrics.jsonl")
    assert line["loss"] is None
    assert line["grad_norm"] is None


def test_a_skipped_step_has_no_point_in_the_trackers_curves():
    points = scalars(dataclasses.replace(METRICS, loss=float("nan"), grad_norm=None, nonfinite_steps=1))
    assert "train/loss" not in points
    assert points["train/nonfinite_steps"] == 1
    assert "train/nonfinite_steps" not in scalars(METRICS)


def test_a_killed_process_keeps_its_lines(tmp_path):
    script = (
        "import dataclasses, os, sys\n"
        "from longseq.launch.config import LogConfig\n"
        "from longseq.launch.metrics import MetricsWriter, StepMetrics\n"
        f"metrics = MetricsWriter({str(tmp_path)!r}, LogConfig(tensorboard=False))\n"
        f"metrics.step(StepMetrics(**{dataclasses.asdict(METRICS)!r}))\n"
        "assert 'torch' not in sys.modules, 'torch is imported for nothing'\n"
        "os._exit(9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    assert steps(tmp_path) == [1]


def test_resume_drops_what_will_be_done_again(tmp_path):
    with MetricsWriter(tmp_path, PLAIN) as metrics:
        metrics.reference("entropy", 3.0)
        for number in range(1, 8):
            metrics.step(dataclasses.replace(METRICS, step=number))
            metrics.evaluation(number, 2.0, 10, 1.0)
            metrics.note(f"after {number}")
    with MetricsWriter(tmp_path, PLAIN, resume_step=5) as metrics:
        metrics.reference("entropy", 3.0)
        metrics.note("resumed")
        metrics.step(dataclasses.replace(METRICS, step=6))
    records = read_metrics(tmp_path)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if r["kind"] == "eval"] == [1, 2, 3, 4, 5]
    assert [r["text"] for r in records if r["kind"] == "note"][-2:] == ["after 5", "resumed"]
    assert [r["value"] for r in records if r["kind"] == "reference"] == [3.0]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_resume_after_a_torn_line(tmp_path):
    train(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert steps(tmp_path) == [1, 2]
    train(tmp_path, 3, 4, resume_step=2)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_rewind_that_dies_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    train(tmp_path, 1, 3)

    def die(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(OSError, match="no space"):
        MetricsWriter(tmp_path, PLAIN, resume_step=1)
    assert steps(tmp_path) == [1, 2, 3]


def test_a_new_run_sets_an_earlier_one_aside(tmp_path):
    for loss in (3.0, 2.0, 1.0):
        train(tmp_path, 1, 1, loss=loss)
    losses = {path.name: strict_lines(path)[0]["loss"] for path in tmp_path.iterdir()}
    assert losses == {
        "metrics.jsonl": 1.0,
        "metrics.previous-1.jsonl": 3.0,
        "metrics.previous-2.jsonl": 2.0,
    }


def test_a_bad_line_is_named(tmp_path):
    train(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:30], lines[2]]) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not JSON"):
        read_metrics(tmp_path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: not a record"):
        read_metrics(tmp_path)
    with pytest.raises(ValueError, match=r"other.*no such file"):
        read_metrics(tmp_path / "other")


def test_a_last_line_that_lost_only_its_end_counts(tmp_path):
    train(tmp_path, 1, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().rstrip())
    assert steps(tmp_path) == [1, 2]


def test_a_step_that_does_not_rise_is_our_bug(tmp_path):
    with MetricsWriter(tmp_path, PLAIN, resume_step=5) as metrics, pytest.raises(AssertionError):
        metrics.step(dataclasses.replace(METRICS, step=5))


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = LogConfig(wandb_project="never asked for")
    with MetricsWriter(tmp_path / "run", log, is_main=False) as metrics:
        metrics.step(METRICS)
        metrics.evaluation(1, 2.0, 10, 1.0)
        metrics.note("x")
        metrics.reference("y", 1.0)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_tensorboard_hides_the_steps_that_are_done_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, 1, 4, log=LogConfig(), loss=2.0)
    train(tmp_path, 3, 5, log=LogConfig(), loss=1.0, resume_step=2)

    def losses():
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert "speed/mfu" not in events.Tags()["scalars"]
        return [(event.step, event.value) for event in events.Scalars("train/loss")]

    assert losses() == [(1, 2.0), (2, 2.0), (3, 1.0), (4, 1.0), (5, 1.0)]
    train(tmp_path, 1, 1, log=LogConfig(), loss=9.0)
    assert losses() == [(1, 9.0)]


class FakeWandb(types.ModuleType):
    """Remembers what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.logged, self.exit_codes, self.summary = [], [], [], {}

    def init(self, **options):
        self.inits.append(options)
        return self

    def define_metric(self, name, step_metric=None):
        pass

    def log(self, values):
        self.logged.append(values)

    def finish(self, exit_code):
        self.exit_codes.append(exit_code)


def test_wandb_goes_on_with_the_same_run_only_if_resumed(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = LogConfig(tensorboard=False, wandb_project="p")
    train(tmp_path, 1, 1, log=log, config={"a": 1})
    with contextlib.suppress(KeyboardInterrupt), MetricsWriter(tmp_path, log, resume_step=1) as metrics:
        metrics.reference("entropy", 3.0)
        metrics.evaluation(1, 2.25, 10, 1.0)
        raise KeyboardInterrupt
    train(tmp_path, 1, 1, log=log)
    first, second, anew = fake.inits
    assert first["project"] == "p"
    assert first["config"] == {"a": 1}
    assert first["id"] == second["id"] != anew["id"]
    assert fake.logged[0]["step"] == 1
    assert fake.logged[0]["train/loss"] == 2.5
    assert fake.logged[1] == {"eval/loss": 2.25, "step": 1}
    assert fake.summary == {"reference/entropy": 3.0}
    assert fake.exit_codes == [0, 1, 0]


def test_wandb_that_is_not_installed_is_said_before_anything_is_touched(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    train(tmp_path, 1, 2)
    with pytest.raises(ValueError, match=r"log\.wandb_project='p'.*pip install 'longseq\[wandb\]'"):
        MetricsWriter(tmp_path, LogConfig(wandb_project="p"), resume_step=1)
    assert steps(tmp_path) == [1, 2]


def test_what_was_opened_is_closed_if_the_next_cannot_be(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / "metrics.jsonl").write_text("broken\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1"):
        MetricsWriter(tmp_path, LogConfig(wandb_project="p"), resume_step=1)
    assert fake.exit_codes == [1]


def test_eta_is_not_moved_by_a_slow_first_step():
    eta = EtaEstimate()
    assert eta.update(60.0, 10) == 600.0
    eta.update(2.0, 9)
    assert eta.update(2.0, 8) == 16.0
    assert eta.update(2.0, 0) == 0.0


def test_peak_memory_of_the_process_is_in_gib():
    block = bytearray(200 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    assert 0.2 < peak_memory_gib("cpu") < 64
