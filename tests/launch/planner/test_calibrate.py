"""Measuring a GPU: what is refused, what the figures are made of, and how they are kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longseq.launch.planner import calibrate

NAME = "NVIDIA H900 (80GB)"
CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems of a moment on a CPU, each done once and said to have taken two seconds."""
    for name, value in {
        "HIDDEN": 8,
        "FEED_FORWARD": 16,
        "PRODUCT_TOKENS": (4, 32),
        "ATTENTION_TOKENS": (8, 16),
        "HEADS": 4,
        "KV_HEADS": 2,
        "HEAD_DIM": 8,
        "COPY_BYTES": 1024,
    }.items():
        monkeypatch.setattr(calibrate, name, value)

    def two_seconds(work: Callable[[], Any], device: torch.device, seconds: float = 1.0) -> float:
        work()
        return 2.0

    monkeypatch.setattr(calibrate, "seconds_of", two_seconds)


def test_a_cpu_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match=r"torch sees none here; run it where training will run, or .* --gpu"
    ):
        calibrate.calibrate(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_gpu_in_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: NAME)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * 2**30, 80 * 2**30))
    with pytest.raises(ValueError, match=r"2\.0 GiB of NVIDIA H900 .* are free"):
        calibrate.calibrate()


def test_rates_are_operations_and_bytes_over_seconds(small: None) -> None:
    few, many = calibrate._products(CPU)
    # Forward, the input's gradient and the weight's: 2 operations for each of 8 x 16 weights and 32 tokens.
    assert many["tflops"] == pytest.approx(3 * 2 * 32 * 8 * 16 / 2.0 / 1e12)
    assert few["tokens"] == 4
    _, longer = calibrate._attention(CPU)
    # Scores and values of half the square of 16 tokens, 4 heads of 8; as if there were no diagonal.
    operations = 4 * (16 * 16 / 2) * 4 * 8 * (16 + 1200) / 16
    assert longer["forward_tflops"] == pytest.approx(operations / 2.0 / 1e12)
    assert longer["backward_tflops"] == pytest.approx(2.5 * operations / 2.0 / 1e12)
    # A step's kernels attain nine tenths of what one large sum does.
    assert calibrate._memory(CPU) == pytest.approx(0.91 * 3 * 1024 / 2.0 / 1e9)
    assert calibrate._link(CPU) is None or torch.cuda.device_count() > 1


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file of a calibration whose probes are said to have found something."""
    rates = {
        "_products": [{"tokens": 1, "tflops": 100.0}, {"tokens": 9, "tflops": 300.0}],
        "_attention": [
            {"tokens": 8, "kernel": "cudnn", "forward_tflops": 9.0, "backward_tflops": 8.0},
            {"tokens": 32, "kernel": "cudnn", "forward_tflops": 250.0, "backward_tflops": 200.0},
        ],
        "_flash_share": 0.6,
        "_memory": 1500.0,
        "_host": {"to_gpu": 24.0, "to_host": 22.0, "lower": 22.0},
        "_link": None,
        "outside_bytes": 777,
    }
    for name, found in rates.items():
        monkeypatch.setattr(calibrate, name, lambda device, found=found: found)
    monkeypatch.setattr(calibrate, "_refuse", lambda torch: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: NAME)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setenv("LONGSEQ_CACHE", str(tmp_path))
    return calibrate.calibrate(progress=False)


def test_figures_are_kept_by_the_gpus_name_for_later_plans(measured: Path, tmp_path: Path) -> None:
    assert measured == tmp_path / "calibration" / "nvidia-h900-80gb.json"
    assert [file.name for file in measured.parent.iterdir()] == [measured.name]
    found = calibrate.kept(NAME)
    assert found["gpu"] == {
        "context_bytes": 777,
        "matmul_tflops": 300.0,
        # Of the longest sequence, and copies as slow as the slower way.
        "attention_forward_tflops": 250.0,
        "attention_backward_tflops": 200.0,
        "flash_share": 0.6,
        "memory_gb_s": 1500.0,
        "host_gb_s": 22.0,
        "link_gb_s": None,
    }
    assert found["versions"]["torch"] == torch.__version__
    assert calibrate.kept("NVIDIA H901") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"matmul_tflops": 300.0', '"matmul_tflops": 0'),
        lambda text: text.replace('"matmul_tflops": 300.0', '"matmul_tflops": "fast"'),
        lambda text: text.replace(NAME, "NVIDIA H901"),
        lambda text: text.replace('"format": 1', '"format": 0'),
        lambda text: "[]",
    ],
)
def test_a_damaged_file_is_said_and_not_used(
    measured: Path, damage: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    damaged = damage(measured.read_text())
    assert damaged != measured.read_text()
    measured.write_text(damaged)
    with caplog.at_level(logging.WARNING):
        assert calibrate.kept(NAME) is None
    assert f"{measured} is not used" in caplog.text
    assert "--calibrate" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_is_measured(tmp_path: Path) -> None:
    found = json.loads(calibrate.calibrate(str(tmp_path), progress=False).read_text())
    assert found["device"] == torch.cuda.get_device_name()
    assert all(value > 0 for name, value in found["gpu"].items() if name != "link_gb_s")
