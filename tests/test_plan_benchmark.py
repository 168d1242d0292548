"""The benchmark of plans: on a CPU with a tiny model, its order and deadline by themselves, and its table."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from benchmark_modules import BENCHMARKS, imported

NAMES = ("report", "lanes", "plan_settings", "plan", "plan_table")
OFF_BY = 0.12


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules that need no process group, imported as the script does, and gone afterwards."""
    yield from imported(monkeypatch, NAMES)


def measure(out: Path, *options: str) -> str:
    """Output of the script, which writes into a folder."""
    command = [sys.executable, str(BENCHMARKS / "plan.py"), "--out", str(out), "--work", str(out / "work")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_run_is_measured_and_not_again(tmp_path: Path) -> None:
    said = measure(tmp_path, "--only", "tiny-mini", "--steps", "1")
    row = json.loads((tmp_path / "tiny-mini.json").read_text())
    assert "tiny-mini: " in said
    assert "note" not in row, (tmp_path / "tiny-mini.log").read_text()
    assert len(row["steps_s"]) == 1
    assert row["seconds"] == row["steps_s"][0]
    assert row["tokens_per_second"] == pytest.approx(256 / row["seconds"])
    # What a step does is in its phases; a step that is timed is not the first.
    assert sum(row["phase_s"].values()) == pytest.approx(row["seconds"], rel=0.3)
    assert row["loss"] == pytest.approx(6.2, abs=0.2)
    assert measure(tmp_path, "--only", "tiny-mini") == ""


# DeepSpeed is imported in both processes.
@pytest.mark.slow
def test_a_run_of_several_processes_is_measured(tmp_path: Path) -> None:
    measure(tmp_path, "--only", "tiny-zero2-sp2")
    row = json.loads((tmp_path / "tiny-zero2-sp2.json").read_text())
    assert "note" not in row, (tmp_path / "tiny-zero2-sp2.log").read_text()
    assert len(row["steps_s"]) == 2
    assert row["gpus"] == 2


class Starts:
    """Settings that "run" at once, each for its time on a clock of its own."""

    def __init__(self, bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.names: list[str] = []
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        plain = {"deadline_s": None, "lanes": 1, "out": None, "work": None, "steps": 2, "profile": False}
        self.manager = bench["plan"].Manager(argparse.Namespace(**{**plain, **options}))
        monkeypatch.setattr(self.manager, "start", self.start)

    def start(self, setting: Any, lane: int | None) -> None:
        """As `Manager.start`."""
        self.names.append(setting.name)
        self.now += setting.about_s


def test_a_lane_takes_the_longest_that_can_still_end_in_time(
    bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = bench["plan_settings"].Setting
    settings = [setting(f"{s} s", "tiny", (), about_s=s) for s in (5, 40, 20, 90, 30)]
    wide = setting("two GPUs", "tiny", (), gpus=2, about_s=7)
    starts = Starts(bench, monkeypatch, deadline_s=80)
    starts.manager.run([*settings, wide])
    # 7 + 40 + 30 are over at 77 of 80 seconds; those of several GPUs have all of them and go first.
    assert starts.names == ["two GPUs", "40 s", "30 s"]
    assert [one.name for one in starts.manager.waiting] == ["90 s", "20 s", "5 s"]


def test_a_lane_sees_one_gpu_of_those_that_are_visible(
    bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    (one,) = bench["plan_settings"].named(["8b-mini-8k-gpu"])
    manager = Starts(bench, monkeypatch, lanes=4).manager
    assert manager.environment(one, 2)["CUDA_VISIBLE_DEVICES"] == "6"
    assert manager.environment(one, 2)["OMP_NUM_THREADS"] == "16"


def test_what_was_cut_off_is_measured_again(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    (setting,) = bench["plan_settings"].named(["tiny-mini"])
    for row, there in (
        (None, False),
        ({"note": "did not finish"}, False),
        ({"seconds": 1.0, "note": "did not finish"}, False),
        ({"note": "out of memory: all of it"}, True),
        ({"seconds": 1.0}, True),
    ):
        if row is not None:
            (tmp_path / "tiny-mini.json").write_text(json.dumps(row))
        assert bench["plan"].measured(tmp_path, setting) == there


def test_settings_are_valid_and_have_names_of_their_own(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    from longseq.launch.config_file import check_world, load_config

    settings = bench["plan_settings"]
    assert len({one.name for one in settings.SETTINGS}) == len(settings.SETTINGS) >= 16
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    for one in (*settings.SETTINGS, *settings.TINY):
        check_world(load_config(str(empty), one.keys("data.jsonl", "work")), one.gpus)
    assert [one.name for one in settings.named(["tiny-m*", "tiny-mini"])] == ["tiny-mini"]
    with pytest.raises(ValueError, match="--only nothing is no setting"):
        settings.named(["nothing"])


def test_recorded_runs_take_the_seconds_of_their_plans(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    rows = json.loads((BENCHMARKS / "results" / "plan.json").read_text())["rows"]
    table = bench["plan_table"]
    wrong, count = [], 0
    for row in rows:
        if "seconds" not in row:
            continue
        (setting,) = bench["plan_settings"].named([row["name"]])
        found = table.planned(setting, row, tmp_path)["seconds"]
        count += 1
        if abs(found / row["seconds"] - 1) > OFF_BY:
            wrong.append(f"{row['name']}: {found:.3f} s planned, {row['seconds']:.3f} s measured")
    assert not wrong
    assert count >= 16


def test_the_table_puts_runs_beside_their_plans(
    bench: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    measured = {
        "seconds": 1.0,
        "peak_bytes": 28 * 2**30,
        "tokens": 8192,
        "gpus": 1,
        "gpu_bytes": 79 * 2**30,
        "host_pinned_bytes": 0,
        "environment": {"date": "2026-01-02", "device": "NVIDIA H100 80GB HBM3", "versions": {"torch": "2"}},
    }
    (tmp_path / "8b-mini-8k-gpu.json").write_text(json.dumps({"name": "8b-mini-8k-gpu", **measured}))
    (tmp_path / "8b-mini-16k-gpu.json").write_text(json.dumps({"note": "did not finish"}))
    (row,) = bench["plan_table"].collect([tmp_path], tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert kept["rows"] == [row]
    assert kept["environment"]["date"] == "2026-01-02"
    assert row["plan"]["fits"]
    assert row["plan"]["seconds"] == pytest.approx(sum(row["plan"]["parts_s"].values()))
    shown = (tmp_path / "out" / "plan.md").read_text()
    assert "| 8b-mini-8k-gpu | 1 | 1 |" in shown
    with pytest.raises(SystemExit, match="holds no measured setting"):
        bench["plan_table"].collect([tmp_path / "out"], None)
