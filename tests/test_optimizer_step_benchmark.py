"""The benchmarks of an optimizer's step and of a training step's memory, at sizes that a CPU has time for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from benchmark_modules import imported

NAMES = ("report", "decoder_model", "optimizer_systems", "optimizer", "optimizer_memory")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules of the folder, imported as `python benchmarks/optimizer.py` does, and gone afterwards."""
    yield from imported(monkeypatch, NAMES)


def kept(out: Path, name: str) -> list[dict[str, Any]]:
    """The rows that a benchmark has written."""
    assert (out / f"{name}.md").read_text().startswith("# ")
    return json.loads((out / f"{name}.json").read_text())["rows"]


def time_steps(bench: dict[str, ModuleType], out: Path, *systems: str) -> list[dict[str, Any]]:
    options = ["--shapes", "tiny", "--layers", "1", "--repeats", "2", "--profile", "--out", str(out)]
    bench["optimizer"].main([*options, "--systems", *systems])
    return kept(out, "optimizer")


def test_matrices_and_bytes_are_those_of_the_model(bench) -> None:
    shapes = bench["optimizer"].matrices_of("llama-3-8b", 32)
    elements = sum(rows * columns for rows, columns in shapes.values())
    assert (len(shapes), elements) == (224, 6_979_321_856)
    systems = {system.key: system for system in bench["optimizer_systems"].systems_of("llama-3-8b")}
    channels = 32 * (4 * 4096 + 3 * 14336)  # the longer side of each
    assert systems["adamw-fused"].moved_bytes(shapes) == 14 * elements
    assert systems["adamw-fused"].state_formula(shapes) == 2 * elements + 224
    mini, apollo = systems["longseq-mini-stochastic"], systems["longseq-apollo-nearest"]
    assert mini.state_formula(shapes) == 2 * channels + 2 * 224
    assert apollo.state_formula(shapes) == 2 * channels * 256 + 2 * 224
    assert apollo.moved_bytes(shapes) == 8 * elements + 16 * channels * 256


def test_every_system_of_ours_is_timed_and_has_the_state_of_its_formula(bench, tmp_path: Path) -> None:
    rows = time_steps(bench, tmp_path, "adamw", "longseq")
    ours = [row for row in rows if row["key"].startswith("longseq")]
    assert len(ours) == 6
    for row in [rows[0], *ours]:
        assert "note" not in row
        assert row["state elements"] == row["formula"]
        assert row["/ AdamW"] == pytest.approx(2 * row["ms"] / (row["AdamW before"] + row["AdamW after"]))
        assert len(row["times"]) == 2
    for row in ours:
        assert "aten::" in (tmp_path / f"optimizer_profile_{row['key']}.txt").read_text()


@pytest.mark.parametrize(
    ("name", "dtype", "broken"),
    [
        ("apollo", torch.float32, "change"),
        ("apollo", torch.bfloat16, "weights are not next to"),
        ("mini", torch.float32, "update_norm"),
        ("adamw", torch.bfloat16, "weights are not next to"),
    ],
)
def test_a_system_whose_step_is_off_has_no_numbers(
    bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, broken: str
) -> None:
    systems = bench["optimizer_systems"]

    class Broken(systems.Apollo):
        @torch.no_grad()
        def step(self, closure=None) -> None:
            super().step()
            param = self.param_groups[0]["params"][1]
            if param.dtype == dtype and broken == "update_norm":
                self.state[param]["update_norm"] *= 1.001
            elif param.dtype == dtype:
                param *= 1.001 if dtype == torch.float32 else 1.02

    monkeypatch.setattr(systems, "Apollo", Broken)
    key = f"longseq-{name}-nearest"
    with pytest.raises(SystemExit, match=broken):
        time_steps(bench, tmp_path, key)
    [row] = kept(tmp_path, "optimizer")
    assert row["note"].startswith("refused: ")
    assert "ms" not in row


def test_the_truth_is_another_rounding_away(bench) -> None:
    """Nearest's allowance is half of stochastic's, and stochastic rounding does not keep to it."""
    systems = bench["optimizer_systems"]
    shapes = bench["optimizer"].matrices_of("tiny", 1)
    [system] = systems.choose(systems.systems_of("tiny"), ["longseq-mini-stochastic"], "--systems")
    assert systems.disagreement(system, shapes, "cpu") is None
    named = systems.draw_weights(systems.check_shapes(system, shapes), torch.bfloat16, "cpu")
    optimizer = system.make(named, systems.CHECK_LR)
    twin = systems._Twin("low_rank", *named[0], optimizer)
    twin.take_step()
    optimizer.step()
    assert twin.wrong(optimizer) is None
    optimizer.param_groups[0]["rounding"] = "nearest"
    assert "are not next to" in twin.wrong(optimizer)


def test_state_is_counted_in_objects_too(bench) -> None:
    projector = SimpleNamespace(ortho_matrix=torch.zeros(3, 5), rank=3)
    state = {0: {"step": 1, "exp_avg": torch.zeros(2), "projector": projector, "parts": [torch.zeros(7)]}}
    found = bench["optimizer_systems"].tensors_in(state)
    assert sorted(tensor.numel() for tensor in found) == [2, 7, 15]


def test_an_unknown_key_is_refused(bench) -> None:
    memory = bench["optimizer_memory"]
    choose = bench["optimizer_systems"].choose
    assert [one.key for one in choose(memory.VARIANTS, ["bf16-mini"], "--variants")] == ["bf16-mini"]
    assert len(choose(memory.VARIANTS, ["int8"], "--variants")) == 2
    with pytest.raises(ValueError, match="--variants fp4 is the beginning of no key; there are bf16-mini-in"):
        choose(memory.VARIANTS, ["fp4"], "--variants")


def test_every_variant_takes_the_step(bench, tmp_path: Path) -> None:
    """Updates in backward, and inputs on the host, change no number."""
    bench["optimizer_memory"].main(["--shape", "tiny", "--out", str(tmp_path)])
    rows = {row["key"]: row for row in kept(tmp_path, "optimizer_memory_tiny")}
    assert len(rows) == 6
    assert not any("note" in row for row in rows.values())
    bf16, int8 = rows["bf16-mini-in-backward"], rows["int8-mini-in-backward"]
    for key in ("bf16-mini-in-backward-gpu", "bf16-mini"):
        assert rows[key]["losses"] == bf16["losses"]
        assert rows[key]["norms"] == pytest.approx(bf16["norms"], rel=1e-5)
    assert rows["int8-mini-in-backward-gpu"]["losses"] == int8["losses"] != bf16["losses"]
    adamw, parts = rows["bf16-adamw"]["components"], bf16["components"]
    assert adamw["states"] == pytest.approx(2 * adamw["weights"], rel=1e-2)
    assert adamw["gradients"] == adamw["weights"] == parts["weights"]
    assert parts["gradients"] == pytest.approx(512 * 64 * 2 / 2**30)
    # 14 linear layers of 110,592 weights: a byte each, and two float32 a row and group of at most 128.
    linear = 2 * (128 * 64 + 2 * 64 * 64 + 64 * 128 + 2 * 160 * 64 + 64 * 160)
    groups = 2 * (128 + 2 * 64 + 64 + 2 * 160 + 2 * 64)
    saved = (parts["weights"] - int8["components"]["weights"]) * 2**30
    assert saved == pytest.approx(linear - 8 * groups)


def test_a_loss_that_does_not_fall_is_refused(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench["optimizer_memory"], "MINI_LR", 0.0)
    with pytest.raises(SystemExit, match="the loss does not fall"):
        bench["optimizer_memory"].main(["--shape", "tiny", "--variants", "bf16-mini", "--out", str(tmp_path)])
    assert kept(tmp_path, "optimizer_memory_tiny")[0]["note"].startswith("refused: the loss does not fall")


def test_other_losses_or_norms_than_the_first_variants_are_refused(bench) -> None:
    memory = bench["optimizer_memory"]
    run = memory.Bench(memory.arguments(["--shape", "tiny"]))
    run.rows = [{"key": "bf16-mini-in-backward", "losses": [6.0, 5.0], "norms": [1.0, 1.0]}]
    bf16, int8 = memory.VARIANTS[1], memory.VARIANTS[2]

    def wrong(variant, loss: float, norm: float) -> str | None:
        return run.wrong(variant, {"losses": [loss, 5.0], "norms": [norm, 1.0]})

    assert wrong(bf16, 6.006, 1.01) is None
    assert "first of losses" in wrong(bf16, 6.03, 1.0)
    assert "first of norms" in wrong(bf16, 6.0, 1.05)
    assert wrong(int8, 6.03, 1.05) is None
    assert "first of losses" in wrong(int8, 6.3, 1.0)
    assert "nan" in wrong(bf16, float("nan"), 1.0)


@pytest.mark.parametrize("key", ["bf16-mini-in-backward", "int8-mini-in-backward", "bf16-mini"])
def test_phases_of_a_peak_end_in_their_order(bench, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """By an allocator that counts how often it is asked; updates in backward belong to their phases."""
    memory = bench["optimizer_memory"]
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: asked.append(0) or len(asked) * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 7 * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    [variant] = bench["optimizer_systems"].choose(memory.VARIANTS, [key], "--variants")
    training = memory.Training(variant, memory.arguments(["--shape", "tiny"]), "cpu")
    training.peaks._on_gpu = True
    alive = []
    head = training.model.get_output_embeddings().weight
    mark = training.peaks.mark

    def marked(name: str) -> None:
        alive.append((name, head.grad is not None))
        mark(name)

    monkeypatch.setattr(training.peaks, "mark", marked)
    training.step()
    in_layer = 9  # weights of a layer: seven matrices and two norms
    expected = {"forward": 1, "head": 2, "layers": 2 + in_layer, "embedding": 3 + in_layer}
    assert training.peaks.allocated == {**expected, "finish": 4 + in_layer}
    assert training.peaks.reserved == 7
    assert dict(alive)["head"] == (not variant.in_backward)
