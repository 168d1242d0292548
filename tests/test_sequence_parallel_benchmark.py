"""The benchmark of sequences over GPUs: on a CPU, by gloo, and its arithmetic by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from benchmark_modules import BENCHMARKS, imported

NAMES = ("report", "sequence_parallel_comm", "sequence_parallel_rows", "sequence_parallel_plot")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules that need no process group, imported as the script does, and gone afterwards."""
    yield from imported(monkeypatch, NAMES)


def launch(num_processes: int, *options: str, out: Path, script: Path | None = None) -> tuple[int, str]:
    """Exit status and output of a launch with the tiny shape."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_processes), str(script or BENCHMARKS / "sequence_parallel.py")]
    command += ["--shape", "tiny", "--add", "--out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def kept(out: Path) -> dict[str, Any]:
    """What the launches have written."""
    return json.loads((out / "sequence_parallel.json").read_text())


# Each launch imports DeepSpeed in each of its processes.
@pytest.mark.slow
def test_both_systems_give_one_loss_on_any_number_of_ranks(tmp_path: Path) -> None:
    """Against transformers' own layers in the launch, and against each other in the file."""
    ours = ("auto", "gpu+all", "host+groups2+1")
    for num_processes, *options in (
        (2, "--system", "ours", "--variants", *ours, "--lengths", "128", "256", "--minutes", "9"),
        (2, "--system", "alst", "--variants", "host", "gpu", "--lengths", "128"),
        (1, "--system", "ours", "--optimizer", "none", "--lengths", "128"),
    ):
        status, output = launch(num_processes, *options, out=tmp_path)
        assert status == 0, output
    found = kept(tmp_path)
    rows = {(row["system"], row["key"], row["gpus"], row["tokens"]): row for row in found["rows"]}
    assert set(rows) == {
        *(("ours", key, 2, tokens) for key in ours for tokens in (128, 256)),
        ("alst", "gpu", 2, 128),
        ("ours", "auto", 1, 128),
    }
    assert not [row["note"] for row in rows.values() if "note" in row]
    for row in rows.values():
        assert row["tokens/s"] == pytest.approx(row["tokens"] / row["s"])
        if row["gpus"] == 2:
            # The formula has 8, 6 or, with one layer of two saved, 7 times the heads.
            assert row["all-to-all MiB a layer"] == pytest.approx(row["predicted"])
    sent = [rows["ours", key, 2, 128]["predicted"] for key in ours]
    assert sent == pytest.approx([sent[0], sent[0] * 6 / 8, sent[0] * 7 / 8])
    assert rows["alst", "gpu", 2, 128]["predicted"] == pytest.approx(sent[1])
    losses = [row["loss"] for row in rows.values() if row["tokens"] == 128]
    norms = [row["norm"] for row in rows.values() if row["tokens"] == 128]
    assert losses == pytest.approx([losses[0]] * len(losses), abs=5e-4)
    assert norms == pytest.approx([norms[0]] * len(norms), rel=0.01)
    assert rows["ours", "host+groups2+1", 2, 256]["host GiB"] > 0
    assert "needs a CUDA GPU" in found["left_out"]["('alst', 'host', 'adamw', 2, 2, 128)"]
    text = (tmp_path / "sequence_parallel.md").read_text()
    assert "## Scaling" in text
    assert "## Collectives of a step" in text
    assert (tmp_path / "sequence_parallel.png").exists()


@pytest.mark.slow
def test_a_rank_that_fails_leaves_a_row_that_says_so(tmp_path: Path) -> None:
    """The others wait for it in a collective; what was measured before is kept."""
    script = tmp_path / "failing.py"
    script.write_text(
        "import sys, torch\n"
        f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "import sequence_parallel as bench\n"
        "step = bench.Ours._step\n"
        "def failing(self, ids):\n"
        "    if ids.shape[1] == 192 and self.setup.groups.rank == 1:\n"
        "        raise torch.OutOfMemoryError('CUDA out of memory.')\n"
        "    return step(self, ids)\n"
        "bench.Ours._step = failing\n"
        "bench.main()\n"
    )
    status, output = launch(2, "--lengths", "192", "128", "256", out=tmp_path, script=script)
    assert status != 0, output
    rows = {row["tokens"]: row for row in kept(tmp_path)["rows"]}
    assert set(rows) == {128, 192}
    assert rows[128]["tokens/s"] > 0
    assert rows[192]["note"] == "out of memory"


def test_time_of_communication_is_what_no_computing_hides(bench) -> None:
    comm = bench["sequence_parallel_comm"]
    kernels = [
        comm.Event(round(start * 1e9), round(end * 1e9), name)
        for name, start, end in (
            ("gemm", 0, 4),
            ("ncclDevKernel_SendRecv(args)", 3, 5),
            ("ncclDevKernel_AllGather_RING_LL(args)", 4.5, 6),
            ("flash", 7, 8),
            ("gemm", 7.5, 9),
            ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(args)", 7.2, 7.4),
            ("Memcpy DtoH (Device -> Pinned)", 9, 9.5),
            ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(args)", 11, 12),
        )
    ]
    found = comm.times(kernels[::-1])
    top = found.pop("top")
    assert found == pytest.approx(
        {
            "span": 12.0,
            "compute": 6.0,
            "NCCL": 4.2,
            "exposed NCCL": 3.0,
            "idle": 2.5,
            "all-to-all": 2.0,
            "all-gather": 1.5,
            "reduce-scatter": 0.2,
            "other NCCL": 1.0,
            "host copy": 0.5,
        }
    )
    assert (top[0]["kernel"], top[0]["calls"], top[0]["s"]) == ("gemm", 2, pytest.approx(5.5))
    assert comm.times([]) == {}


def row_of(key: str, gpus: int, tokens: int, **numbers: Any) -> dict[str, Any]:
    return {
        "system": "ours",
        "key": key,
        "optimizer": "none" if gpus == 1 else "adamw",
        "gpus": gpus,
        "sp": gpus,
        "tokens": tokens,
        **numbers,
    }


def test_scaling_is_against_one_gpu_of_the_same_variant_or_the_fastest(bench) -> None:
    rows = [
        row_of("auto", 1, 100, **{"s": 1.0, "tokens/s": 100.0, "model TFLOP/s a GPU": 400.0}),
        row_of("host", 1, 100, **{"s": 1.1, "tokens/s": 90.0, "model TFLOP/s a GPU": 360.0}),
        row_of("host", 4, 100, **{"s": 0.3, "tokens/s": 270.0, "model TFLOP/s a GPU": 270.0}),
        row_of("host", 4, 400, **{"s": 2.0, "tokens/s": 200.0, "model TFLOP/s a GPU": 450.0}),
        row_of("gpu", 2, 100, **{"s": 0.6, "tokens/s": 160.0, "model TFLOP/s a GPU": 320.0}),
        row_of("gpu", 2, 200, note="out of memory"),
    ]
    found = {(line["key"], line["tokens"]): line for line in bench["sequence_parallel_rows"].scaling(rows)}
    assert set(found) == {("host", 100), ("host", 400), ("gpu", 100)}
    assert found["host", 100]["strong"] == pytest.approx(0.75)
    assert found["gpu", 100]["strong"] == pytest.approx(0.8)
    assert found["host", 400]["weak"] == pytest.approx(450 / 360)
    assert found["host", 400]["strong"] is None


def test_slopes_are_by_the_tokens_of_a_rank(bench, tmp_path: Path) -> None:
    rows = bench["sequence_parallel_rows"].Rows({"shape": "tiny", "layers": 2, "allocator": None}, tmp_path)
    for gpus, tokens, peak in ((4, 8192, 12.0), (4, 4096, 11.0), (1, 4096, 30.0), (1, 8192, 34.0)):
        rows.keep(row_of("auto", gpus, tokens, **{"peak GiB": peak}))
    found = {(row["gpus"], row["tokens"]): row.get("KiB/token") for row in rows.with_slopes()}
    assert found == {(4, 4096): None, (4, 8192): 1024.0, (1, 4096): None, (1, 8192): 1024.0}
    rows.leave_out(row_of("host", 4, 1), "no time left")
    rows.write()
    again = type(rows).of_file(rows.facts, tmp_path)
    assert again.with_slopes() == rows.with_slopes()
    again.keep(row_of("host", 4, 1))
    assert rows.left_out
    assert not again.left_out
    with pytest.raises(SystemExit, match="has layers=2, here it is 3"):
        type(rows).of_file({**rows.facts, "layers": 3}, tmp_path)


def test_another_loss_than_the_first_rows_is_told(bench) -> None:
    rows = bench["sequence_parallel_rows"].Rows({}, None)
    first = row_of("auto", 2, 64, loss=6.0, norm=1.0)
    rows.keep(first)
    assert rows.disagreement(first | {"loss": 7.0}) is None  # it takes the first one's place
    assert rows.disagreement(first | {"key": "host", "loss": 6.001}) is None
    assert "the loss is 6.003" in rows.disagreement(first | {"key": "host", "loss": 6.003})
    assert "norm is 1.03" in rows.disagreement(first | {"key": "host", "norm": 1.03})
    assert "the loss is nan" in rows.disagreement(first | {"key": "host", "loss": float("nan")})
    # Another number of sequences is other data.
    assert rows.disagreement(first | {"sp": 1, "loss": 7.0}) is None
