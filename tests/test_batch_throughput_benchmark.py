"""The benchmark of micro-batches, at sizes that a CPU has time for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmark_modules import imported

NAMES = (
    "report",
    "decoder_model",
    "decoder_anchors",
    "batch_throughput_training",
    "batch_throughput",
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules, imported as the script does, and gone afterwards."""
    yield from imported(monkeypatch, NAMES)


def run(bench: dict[str, ModuleType], out: Path, *options: str) -> dict[tuple[str, int], dict[str, Any]]:
    sizes = ("--shape", "tiny", "--layers", "1", "--first-tokens", "32", "--max-tokens", "128")
    bench["batch_throughput"].main([*sizes, "--lengths", "16", "32", "--out", str(out), *options])
    rows = json.loads((out / "batch_throughput.json").read_text())["rows"]
    return {(row["key"], row["length"]): row for row in rows}


def fits_up_to(bench, monkeypatch: pytest.MonkeyPatch, most: dict[str, int]) -> None:
    """Steps of more tokens end as those of a full GPU do, with gradients left behind."""
    training = bench["batch_throughput_training"].Training
    take, start = training.step, training.__init__

    def begin(self: Any, case: Any, *given: Any) -> None:
        self.most = most[case.key]
        start(self, case, *given)

    def step(self: Any, ids: torch.Tensor) -> dict[str, Any]:
        assert not any(param.grad is not None for param in self.model.parameters())
        if ids.numel() > self.most:
            next(self.model.parameters()).grad = torch.zeros_like(next(self.model.parameters()))
            raise torch.OutOfMemoryError("of the test")
        return take(self, ids)

    monkeypatch.setattr(training, "__init__", begin)
    monkeypatch.setattr(training, "step", step)


@pytest.mark.parametrize("largest", [1, 2, 3, 5, 11, 29, 64])
def test_the_largest_batch_is_known_to_an_eighth(bench, largest: int) -> None:
    following = bench["batch_throughput"].next_batch
    batch, fits, too_large, tried = 1, 0, None, 0
    while batch is not None:
        tried += 1
        if batch <= largest:
            fits = batch
        else:
            too_large = batch
        batch = following(fits, too_large)
    assert largest - max(1, largest // 8) <= fits <= largest < too_large
    assert tried <= 12


def test_a_batch_that_is_too_large_for_the_first_is_halved(bench) -> None:
    following = bench["batch_throughput"].next_batch
    assert [following(0, 4), following(0, 2), following(0, 1), following(1, 2)] == [2, 1, None, None]


@pytest.mark.slow  # four cases of two lengths, some hundred steps
def test_cases_are_searched_and_set_beside_adamw(bench, tmp_path: Path, monkeypatch) -> None:
    fits_up_to(bench, monkeypatch, {"adamw": 50, "mini": 100, "longseq-mini": 10**6, "adamw-checkpoints": 20})
    rows = run(bench, tmp_path)
    found = {key: (row.get("largest"), row.get("stopped by"), row.get("note")) for key, row in rows.items()}
    assert found == {
        ("adamw", 16): (3, None, None),
        ("adamw", 32): (1, None, None),
        ("mini", 16): (6, None, None),
        ("mini", 32): (3, None, None),
        ("longseq-mini", 16): (8, "--max-tokens", None),
        ("longseq-mini", 32): (4, "--max-tokens", None),
        ("adamw-checkpoints", 16): (1, None, None),
        ("adamw-checkpoints", 32): (None, None, "out of memory"),
    }
    mini, adamw = rows["mini", 16], rows["adamw", 16]
    assert mini["batch / AdamW"] == 2
    assert mini["tokens/s / AdamW"] == pytest.approx(mini["tokens/s"] / adamw["tokens/s"])
    assert mini["steps timed"] == 3
    assert mini["tokens"] == 96
    assert adamw["backward alone tokens/s"] > adamw["tokens/s"]
    assert "optimizer s" not in mini
    assert adamw["fastest tokens/s"] == max(one["tokens/s"] for one in adamw["tried"].values())
    text = (tmp_path / "batch_throughput.md").read_text()
    assert "## Sequences of 16 tokens" in text
    assert "| transformers, AdamW | 3 |" in text


def test_all_cases_take_the_same_first_step(bench, tmp_path: Path) -> None:
    keys = [case.key for case in bench["batch_throughput_training"].CASES]
    rows = run(bench, tmp_path, "--max-tokens", "32", "--lengths", "16", "--cases", *keys)
    losses = [rows[key, 16]["tried"]["2"]["first loss"] for key in keys]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4)
    assert all(rows[key, 16]["last loss"] < rows[key, 16]["tried"]["2"]["first loss"] for key in keys)
    assert rows["mini-checkpoints", 16]["case"].startswith("transformers layer checkpoints, APOLLO-Mini")


def test_a_case_with_another_loss_is_refused(bench, tmp_path: Path, monkeypatch) -> None:
    training = bench["batch_throughput_training"].Training
    take = training.step

    def step(self: Any, ids: torch.Tensor) -> dict[str, Any]:
        found = take(self, ids)
        return found | {"loss": found["loss"] * (1.01 if self.in_backward else 1)}

    monkeypatch.setattr(training, "step", step)
    with pytest.raises(SystemExit, match="mini at 16: the first loss is"):
        run(bench, tmp_path, "--max-tokens", "32", "--cases", "adamw", "mini")
    rows = json.loads((tmp_path / "batch_throughput.json").read_text())["rows"]
    notes = {(row["key"], row["length"]): row.get("note", "") for row in rows}
    assert notes["mini", 16].startswith("refused: ")
    assert not notes["adamw", 16]
    assert all("tokens/s" not in row for row in rows if row["key"] == "mini" and row["length"] == 16)


def test_rows_are_added_to_those_of_the_same_kind(bench, tmp_path: Path) -> None:
    options = ("--max-tokens", "32")
    run(bench, tmp_path, "--cases", "adamw", *options)
    rows = run(bench, tmp_path, "--cases", "mini", "--add", *options)
    assert list(rows) == [("adamw", 16), ("adamw", 32), ("mini", 16), ("mini", 32)]
    assert rows["mini", 32]["tokens/s / AdamW"] > 0
    with pytest.raises(SystemExit, match="has max tokens=32, here it is 64"):
        run(bench, tmp_path, "--cases", "mini", "--add", "--max-tokens", "64")
    assert run(bench, tmp_path, "--cases", "mini", "--minutes", "0", "--add", *options) == rows


def test_an_error_of_another_kind_is_a_note(bench, tmp_path: Path, monkeypatch) -> None:
    def broken(self: Any, ids: torch.Tensor) -> dict[str, Any]:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(bench["batch_throughput_training"].Training, "step", broken)
    rows = run(bench, tmp_path, "--cases", "adamw")
    assert [row["note"] for row in rows.values()] == ["RuntimeError: no kernel"] * 2


def test_each_case_is_what_its_name_says(bench) -> None:
    module = bench["batch_throughput_training"]
    found = {}
    for case in module.CASES:
        training = module.Training(case, "tiny", 1, "cpu")
        has_streamed = getattr(training.model, "_mini_sequence_handle", None) is not None
        found[case.key] = (
            type(training.optimizer).__name__,
            training.in_backward is not None,
            training.model.is_gradient_checkpointing,
            has_streamed,
        )
        training.undo()
    assert found == {
        "adamw": ("AdamW", False, False, False),
        "mini": ("Apollo", True, False, False),
        "longseq-mini": ("Apollo", True, False, True),
        "adamw-checkpoints": ("AdamW", False, True, False),
        "mini-checkpoints": ("Apollo", True, True, False),
    }
