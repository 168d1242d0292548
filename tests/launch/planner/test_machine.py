"""Machines by name and the one that is there: memory, rates, and what all ranks of a run agree on."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from longseq.launch.planner import calibrate
from longseq.launch.planner.catalogue import CARDS, card_of
from longseq.launch.planner.machine import host_limit_bytes, named_machine, parse_bytes, this_machine

GIB = 2**30


def test_a_named_machine_has_the_drivers_memory_and_attainable_rates() -> None:
    machine = named_machine("h100-80g", 16, host_bytes=1000 * GIB)
    assert (machine.num_gpus, machine.gpus_per_node) == (16, 8)
    assert machine.host_bytes == 850 * GIB
    # The driver keeps some for itself, and no kernel attains the datasheet's 989 TFLOP/s or 3,350 GB/s.
    assert 78 * GIB < machine.gpu.memory_bytes < 80 * GIB
    assert 500 < machine.gpu.matmul_tflops < 900
    assert 2000 < machine.gpu.memory_gb_s < 3350
    assert machine.gpu.attention_backward_tflops < machine.gpu.attention_forward_tflops
    assert "not measured" not in machine.gpu.rates
    assert "not measured" in named_machine("a100-80g", 1).gpu.rates


def test_a_machine_that_is_only_named_has_128_gib_for_each_gpu_of_a_node() -> None:
    assert named_machine("H200", 4).host_bytes == int(4 * 128 * GIB * 0.85)
    assert named_machine("NVIDIA H200", 32).host_bytes == int(8 * 128 * GIB * 0.85)
    assert named_machine("rtx-4090", 2).gpus_per_node == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("h100-80gb", 1), ["did you mean h100-80g?", "rtx-4090", "b200"]),
        (("tpu", 1), ["use one of", "a100-40g"]),
        (("h200", 0), ["num_gpus=0"]),
        (("h200", 12), ["12 GPUs do not fill nodes of 8; use 8 or 16"]),
    ],
)
def test_a_machine_that_cannot_be_is_refused_with_the_way_out(arguments: tuple, said: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(said[0])) as error:
        named_machine(*arguments)
    for words in said:
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80g"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA A100-PCIE-40GB", "a100-40g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A100 80GB PCIe", "a100-80g-pcie"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        # Other chips of almost the same name, and a slice of a GPU.
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_a_card_is_known_by_its_own_name_alone(name: str, key: str | None) -> None:
    card = card_of(name)
    assert (card and card.key) == key


def test_every_card_is_found_by_its_name_and_has_a_peak() -> None:
    assert [card_of(card.name).key for card in CARDS] == [card.key for card in CARDS]
    assert all(card.peak_tflops > 50 for card in CARDS)
    assert len({card.key for card in CARDS}) == len(CARDS)


@pytest.mark.parametrize(
    ("text", "size"),
    [("512G", 512 * GIB), ("1.9T", int(1.9 * 2**40)), ("64 GiB", 64 * GIB), ("1024mb", GIB), ("7", 7)],
)
def test_sizes_are_read_as_people_type_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1G", "0G", "12X", "1,9T"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"512G or 1\.9T"):
        parse_bytes(text)


def test_the_hosts_memory_is_the_tightest_limit_above_this_process(tmp_path: Path) -> None:
    membership, mount = tmp_path / "cgroup", tmp_path / "fs"
    group = mount / "pod" / "job"
    group.mkdir(parents=True)
    membership.write_text("0::/pod/job\n")
    whole = host_limit_bytes(membership, mount)
    assert whole == psutil.virtual_memory().total
    (group / "memory.max").write_text("max\n")
    (mount / "pod" / "memory.max").write_text(f"{GIB}\n")
    (mount / "pod" / "memory.current").write_text(f"{GIB - 5}\n")
    # What is in use already is no part of it: other ranks use it, each a little later than this one.
    assert host_limit_bytes(membership, mount) == GIB
    (mount / "memory" / "v1").mkdir(parents=True)
    (mount / "memory" / "v1" / "memory.limit_in_bytes").write_text("77")
    membership.write_text("4:cpu:/v1\n3:memory,hugetlb:/v1\n")
    assert host_limit_bytes(membership, mount) == 77


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, name: str, count: int = 4) -> None:
    """A machine of `count` GPUs, as far as torch tells."""
    properties = SimpleNamespace(name=name, total_memory=100 * GIB, multi_processor_count=54)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_this_machine_is_its_drivers_memory_and_its_own_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LONGSEQ_CACHE", str(tmp_path))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    pretend_gpu(monkeypatch, "NVIDIA H200")
    machine = this_machine(2)
    assert machine is not None
    assert (machine.num_gpus, machine.gpus_per_node, machine.gpu.memory_bytes) == (2, 2, 100 * GIB)
    assert machine.gpu.matmul_tflops == named_machine("h200", 1).gpu.matmul_tflops
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert this_machine(8).gpus_per_node == 2


def test_there_is_no_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert this_machine(1) is None


def test_a_gpu_that_nobody_wrote_down_is_guessed_aloud_until_it_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LONGSEQ_CACHE", str(tmp_path))
    pretend_gpu(monkeypatch, "NVIDIA Z9")
    with caplog.at_level(logging.WARNING):
        guessed = this_machine(1).gpu
    assert "NVIDIA Z9 is not in the catalogue" in caplog.text
    assert "--calibrate" in caplog.text
    # Half of an A100's multiprocessors.
    assert guessed.matmul_tflops == pytest.approx(named_machine("a100-40g", 1).gpu.matmul_tflops / 2)
    rates = {"matmul_tflops": 123.0, "context_bytes": 456, "link_gb_s": None}
    calibrate._write(
        calibrate.calibration_path("NVIDIA Z9"),
        {"format": calibrate.FORMAT, "device": "NVIDIA Z9", "date": "2026-01-02", "gpu": rates},
    )
    caplog.clear()
    measured = this_machine(1).gpu
    assert not caplog.text
    assert (measured.matmul_tflops, measured.context_bytes) == (123.0, 456)
    # A machine of one GPU has no link to measure.
    assert measured.link_gb_s == guessed.link_gb_s
    assert measured.rates == "measured here on 2026-01-02"
