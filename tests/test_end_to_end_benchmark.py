"""The benchmark of whole steps: every rung with a tiny model, its search on made-up memory, its table."""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from benchmark_modules import BENCHMARKS, imported
from torch import Tensor

from longseq.launch.bench.stub_products import StubProducts
from longseq.mst.placement import choose_placement

NAMES = (
    *("report", "lanes", "decoder_model", "decoder_anchors", "decoder_variants"),
    *("end_to_end_rungs", "end_to_end_step", "end_to_end_memory", "end_to_end_row"),
    *("end_to_end_worker", "bench_runs"),
    *("end_to_end_plot", "end_to_end_table", "end_to_end"),
)
TOKENS = 96
NEED_A_GPU = ("mini-saved-fa4", "liger", "alst-host")
GIB = 2**30
Row = dict[str, Any]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules, imported as the script does, and gone afterwards."""
    yield from imported(monkeypatch, NAMES)


@pytest.fixture(autouse=True)
def short(bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens where a real model takes some more."""
    for name in ("end_to_end_step", "end_to_end_memory"):
        monkeypatch.setattr(bench[name], "SMALL_TOKENS", 32)
    monkeypatch.setattr(bench["end_to_end_worker"], "LADDER", (16,))


def rung(bench: dict[str, ModuleType], name: str) -> Any:
    return next(one for one in bench["end_to_end_rungs"].RUNGS if one.name == name)


def training(bench: dict[str, ModuleType], name: str) -> Any:
    return bench["end_to_end_step"].Training(rung(bench, name), "tiny", 2, "cpu", 64 * 2**20)


def weights(of: Any) -> list[Tensor]:
    return [param.detach().clone() for param in of.model.parameters()]


def same(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.fixture
def truth(bench: dict[str, ModuleType]) -> tuple[float, float]:
    """Loss and gradient norm of the plain model."""
    taken = training(bench, "plain-no-checkpoints").step(TOKENS)
    return taken.loss, taken.norm


def test_all_rungs_take_the_plain_models_step(
    bench: dict[str, ModuleType], truth: tuple[float, float]
) -> None:
    names = [one.name for one in bench["end_to_end_rungs"].RUNGS]
    for name in [name for name in names if name not in NEED_A_GPU]:
        of = training(bench, name)
        before = weights(of)
        first, again = of.step(TOKENS), of.step(TOKENS)
        assert first.loss == pytest.approx(truth[0], abs=5e-4), name
        assert first.norm == pytest.approx(truth[1], rel=1e-2), name
        assert same(before, weights(of)), f"{name}: a rate of 0 moved weights"
        # Gradients are gone after a step: a second one is not added to the first.
        assert again.norm == pytest.approx(first.norm, rel=1e-3), name
        of.step(TOKENS, 1e-3)
        assert of.step(TOKENS).loss < first.loss - 1e-2, f"{name} learns nothing"
        assert of.state_bytes() > 0
        of.ready.prepared.undo()


def test_rungs_that_need_a_gpu_say_so(bench: dict[str, ModuleType]) -> None:
    for name in NEED_A_GPU:
        with pytest.raises(bench["decoder_anchors"].MissingError):
            training(bench, name)


def note_norm(model: torch.nn.Module, seen: list[float]) -> None:
    """In place of an optimizer's step."""
    norms = [param.grad.float().norm() for param in model.parameters()]
    seen.append(torch.linalg.vector_norm(torch.stack(norms)).item())


def test_large_gradients_are_clipped_with_and_without_steps_in_backward(
    bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = bench["end_to_end_step"]
    seen: list[float] = []
    for name in ("alst", "mini-s", "groups"):
        of = training(bench, name)
        monkeypatch.setattr(step, "CLIP_NORM", 0.25)
        monkeypatch.setattr(of.optimizer, "step", functools.partial(note_norm, of.model, seen))
        assert of.step(TOKENS).norm > 1
    assert seen == pytest.approx([0.25] * 3, rel=1e-2)


@pytest.mark.parametrize("name", ["plain", "groups", "mini"])
def test_after_a_step_without_room_the_next_is_as_ever(
    bench: dict[str, ModuleType],
    truth: tuple[float, float],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of = training(bench, name)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("made up")

    # In the middle of backward: some gradients are there, and some are not.
    hook = of.model.model.layers[0].mlp.down_proj.weight.register_hook(full)
    note = bench["decoder_model"].attempt(lambda: vars(of.step(TOKENS)))
    hook.remove()
    assert note == {"note": "out of memory"}
    real, left = of.step, []

    def step(tokens: int) -> Any:
        left.extend(param for param in of.model.parameters() if param.grad is not None)
        return real(tokens)

    monkeypatch.setattr(of, "step", step)
    of.recover()
    assert left == []
    taken = of.step(TOKENS)
    assert (taken.loss, taken.norm) == pytest.approx(truth, rel=1e-2)


def products(left: Tensor, right: Tensor, total: Tensor) -> list[Tensor]:
    """Of each kind that a step has."""
    column = torch.empty_strided(total.shape, (1, total.shape[0]), dtype=total.dtype)
    found = [
        left @ right,
        torch.mm(left, right, out=column.copy_(total)),
        torch.addmm(total, left, right),
        total.clone().addmm_(left, right),
        torch.addmm(total, left, right, out=total.clone()),
        torch.nn.functional.linear(left[None], right.t(), total[0]),
    ]
    sums = total.clone()
    return [*found, torch.addmm(sums, left, right, out=sums)]


def test_products_that_are_skipped_are_zeros_of_the_same_kind(bench: dict[str, ModuleType]) -> None:
    left, right = torch.randn(3, 5), torch.randn(5, 7)
    total = torch.randn(3, 7)
    real = products(left, right, total)
    with StubProducts():
        skipped = products(left, right, total)
    sums = [False, False, True, True, True, None, True]
    for one, other, is_sum in zip(real, skipped, sums, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
        wanted = total[0].expand(3, 7)[None] if is_sum is None else total if is_sum else torch.zeros(3, 7)
        assert torch.equal(other, wanted)


@pytest.mark.parametrize("name", ["plain", "alst", "mini-s", "groups", "mini"])
def test_a_probe_leaves_nothing_behind(
    bench: dict[str, ModuleType], truth: tuple[float, float], name: str
) -> None:
    memory = bench["end_to_end_memory"]
    of = training(bench, name)
    before = weights(of)
    calls: list[str] = []
    real = memory.StubAttention.kernel_backward
    memory.StubAttention.kernel_backward = lambda *args: calls.append(name) or real(*args)
    try:
        found = memory.probe(of, TOKENS)
    finally:
        memory.StubAttention.kernel_backward = real
    assert "note" not in found
    assert calls, "attention was not the stub"
    assert same(before, weights(of)), "the probe moved weights"
    taken = of.step(TOKENS)
    assert (taken.loss, taken.norm) == pytest.approx(truth, rel=1e-2)


class MadeUp:
    """A GPU whose steps take a line of memory, and the search on it."""

    def __init__(
        self, bench: dict[str, ModuleType], *, gib: float, base_gib: float, kib: float, **options: Any
    ) -> None:
        self.memory_module = bench["end_to_end_memory"]
        self.total, self.base, self.slope = gib * GIB, base_gib * GIB, kib * 1024
        self.least = 0.0
        card = SimpleNamespace(room_bytes=lambda: self.total)
        self.memory = self.memory_module.Memory(card, 115 * GIB, 32, 8192, **options)
        self.tried: list[int] = []

    def peak(self, tokens: int) -> float:
        return max(self.least, self.base + self.slope * tokens)

    def row(self, tokens: int) -> Row:
        self.tried.append(tokens)
        if self.peak(tokens) > self.total:
            return {"tokens": tokens, "note": "out of memory"}
        return {"tokens": tokens, "peak_bytes": self.peak(tokens)}

    def search(self, lengths: list[int], tries: int = 6) -> Any:
        search = self.memory_module.Search(self.memory, tries)
        for tokens in lengths:
            row = self.row(tokens)
            search.took(row)
            self.memory.add(row)
        while (tokens := search.next()) is not None:
            row = self.row(tokens)
            search.took(row)
            self.memory.add(row)
        return search


@pytest.mark.parametrize(
    ("base_gib", "kib", "lengths"), [(60, 320, [65536, 131072]), (58, 2300, [4096, 16384])]
)
def test_the_search_ends_between_what_fits_and_what_does_not(
    bench: dict[str, ModuleType], base_gib: float, kib: float, lengths: list[int]
) -> None:
    made_up = MadeUp(bench, gib=139, base_gib=base_gib, kib=kib)
    search = made_up.search(lengths)
    truth = (made_up.total - made_up.base) / made_up.slope
    assert search.fits <= truth < search.fails
    assert search.fails - search.fits <= max(4096, 0.031 * search.fits)
    grain = made_up.memory_module.grain
    assert all(tokens % grain(tokens) == 0 for tokens in made_up.tried)
    assert len(made_up.tried) <= 7


@pytest.mark.parametrize(
    ("base_gib", "kib", "lengths"),
    [(46, 517, [4096, 16384, 65536]), (46, 337, [4096, 16384, 65536]), (45, 1792, [4096, 16384])],
)
def test_the_search_is_close_where_short_lengths_have_the_optimizers_peak(
    bench: dict[str, ModuleType], base_gib: float, kib: float, lengths: list[int]
) -> None:
    made_up = MadeUp(bench, gib=139, base_gib=base_gib, kib=kib)
    made_up.least = 61 * GIB
    search = made_up.search(lengths, tries=12)
    truth = (made_up.total - made_up.base) / made_up.slope
    assert search.fits <= truth < search.fails
    assert search.fails - search.fits <= 0.031 * search.fits
    assert len(made_up.tried) - len(lengths) <= 6


def test_what_fits_nearly_all_the_room_is_followed_by_a_step_above(bench: dict[str, ModuleType]) -> None:
    made_up = MadeUp(bench, gib=139, base_gib=46, kib=337)
    made_up.memory.points = {tokens: made_up.peak(tokens) for tokens in (266240, 282624)}
    search = made_up.memory_module.Search(made_up.memory, 6)
    search.took({"tokens": 282624})
    search.took({"tokens": 499712, "note": "out of memory"})  # of an earlier guess, far too long
    assert search.next() == 290816
    search.took({"tokens": 290816, "note": "out of memory"})
    assert search.next() is None


def test_a_search_begins_where_it_is_told_to(bench: dict[str, ModuleType]) -> None:
    made_up = MadeUp(bench, gib=139, base_gib=46, kib=337)
    made_up.memory.points = {tokens: made_up.peak(tokens) for tokens in (4096, 16384)}
    search = made_up.memory_module.Search(made_up.memory, 6, first=200_000)
    search.took({"tokens": 16384})
    first = search.next()
    assert first == made_up.memory_module.on_grain(200_000)
    search.took(made_up.row(first))
    assert search.next() > first
    search = made_up.memory_module.Search(made_up.memory, 6, first=200_000)
    search.took({"tokens": 16384})
    search.took({"tokens": first, "note": "out of memory"})
    assert 16384 < search.next() < first


def test_a_probe_placed_by_room_adds_what_the_rungs_own_placement_takes(
    bench: dict[str, ModuleType],
) -> None:
    made_up = MadeUp(bench, gib=139, base_gib=18, kib=50, on_host=True)
    made_up.memory.points = {tokens: made_up.peak(tokens) for tokens in (16384, 65536)}
    assert made_up.memory.guess(65536) == 4 * 65536
    tokens, inputs = 262144, {"gpu": 7, "host": 20, "rebuild": 5}
    peak = made_up.peak(tokens) + 6 * tokens * 8192
    made_up.memory.add_steered({"tokens": tokens, "peak_bytes": peak, "inputs": inputs})
    assert made_up.memory.points[tokens] == made_up.peak(tokens)
    assert made_up.memory.guess(262144) > 4 * 262144


def test_the_search_goes_down_from_a_guess_that_was_too_long(bench: dict[str, ModuleType]) -> None:
    made_up = MadeUp(bench, gib=139, base_gib=60, kib=320)
    made_up.memory.points = {65536: 65 * GIB, 131072: 70 * GIB}  # a slope of a quarter of the true one
    search = made_up.memory_module.Search(made_up.memory, 6)
    search.took({"tokens": 131072})
    made_up.memory.add = lambda row: None
    while (tokens := search.next()) is not None:
        search.took(made_up.row(tokens))
    truth = (made_up.total - made_up.base) / made_up.slope
    assert made_up.tried[0] > truth >= search.fits
    assert search.fits > 0.6 * truth


def test_inputs_on_the_host_end_where_no_placement_is_left(bench: dict[str, ModuleType]) -> None:
    made_up = MadeUp(bench, gib=139, base_gib=18, kib=50, on_host=True)
    made_up.memory.points = {tokens: made_up.peak(tokens) for tokens in (65536, 131072)}
    made_up.memory.knows_a_probe = True
    longest = made_up.memory.guess(131072)
    assert 115 * GIB / (31 * 8192) < longest < (139 - 18) * GIB / (50 * 1024)
    # Beyond what the host takes more of the room on the GPU is for inputs, or they are rebuilt.
    assert made_up.memory.can_fit(longest)
    assert not made_up.memory.can_fit(int(1.05 * longest))
    made_up.memory.host_bytes = 1
    assert made_up.memory.guess(131072) < 0.95 * longest


def test_room_that_inputs_would_fill_again_is_given_up(bench: dict[str, ModuleType]) -> None:
    made_up = MadeUp(bench, gib=139, base_gib=18, kib=50, on_host=True)
    made_up.memory.points = {tokens: made_up.peak(tokens) for tokens in (65536, 131072)}
    made_up.memory.knows_a_probe = True
    search = made_up.memory_module.Search(made_up.memory, 6)
    search.took({"tokens": 131072})
    before, longest = made_up.memory.room_for_inputs(10**6), search.next()
    search.took({"tokens": longest, "note": "out of memory"})
    assert made_up.memory.room_for_inputs(10**6) < before - 2 * GIB
    assert 0.95 * longest < search.next() < longest


def test_an_anchors_own_host_memory_is_bounded(bench: dict[str, ModuleType]) -> None:
    rounded = bench["end_to_end_rungs"].rounded_up
    assert rounded(32, 8192 * 65536) == 16 * GIB
    assert rounded(32, 8192 * 65537) == 32 * GIB
    made_up = MadeUp(bench, gib=139, base_gib=60, kib=100, anchor_host_bytes=rounded)
    search = made_up.search([65536, 131072])
    assert search.fits == 262144


def test_places_follow_the_measured_room_and_the_given_host(bench: dict[str, ModuleType]) -> None:
    from longseq.mst.layer_memory import SavedAttention

    chooser = bench["end_to_end_rungs"].SteeredChooser(
        torch.nn.Linear(1, 1), 32, "auto", SavedAttention(), available_host=lambda: 10 * 2**20
    )
    hidden = SimpleNamespace(device=torch.device("cuda"), nbytes=2**20, shape=(128, 4096))
    for room_mib, on_host in ((40, 0), (24, 8)):
        chooser.room = lambda tokens, room_mib=room_mib: room_mib * 2**20 if tokens == 128 else 0
        places = chooser(hidden, 4096)
        assert places.inputs.count("host", 32) == on_host
        assert chooser.last is places


def options(bench: dict[str, ModuleType], name: str, out: Path, *words: str) -> argparse.Namespace:
    parser = bench["end_to_end_worker"].parser()
    return parser.parse_args([name, "--out", str(out), "--shape", "tiny", "--lengths", "32", "64", *words])


def run(bench: dict[str, ModuleType], name: str, out: Path, row: Row, *words: str, **changes: Any) -> Row:
    """A setting's worker, in this process."""
    module = bench["end_to_end_worker"]
    (setting,) = [one for one in bench["end_to_end_rungs"].SETTINGS if one.name == name]
    worker = module.Worker(options(bench, name, out, *words), setting, row)
    for attribute, change in changes.items():
        setattr(worker, attribute, change)
    worker.run()
    return json.loads((out / f"{name}.json").read_text())


def test_a_setting_goes_on_where_its_time_was_over(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    short = SimpleNamespace(allows=lambda tokens, steps: tokens < 64, add=lambda tokens, seconds: None)
    row = run(bench, "host", tmp_path, {}, "--phases", "times", budget=short)
    assert [one["tokens"] for one in row["times"]] == [32]
    assert row["left_out"] == ["times at 64: no time left"]
    assert row["done"] == []
    setting = SimpleNamespace(name="host", phases=("times", "longest"))
    is_done = bench["end_to_end"].is_done
    assert not is_done(tmp_path, setting, ["times"], [32])
    seconds = row["times"][0]["seconds"]
    row = run(bench, "host", tmp_path, row, "--tries", "1", "--train-minutes", "0")
    assert [one["tokens"] for one in row["times"]] == [32, 64]
    assert row["times"][0]["seconds"] == seconds
    assert row["done"] == ["times", "longest"]
    assert row["longest"]["state"] == "memory-verified"
    assert row["longest"]["tokens"] > 64
    tried = [probe["tokens"] for probe in row["longest"]["probes"]]
    assert row["left_out"][-1].startswith("train at ")
    assert row["moves"]["loss_after"] != row["moves"]["loss_before"]
    assert "note" not in row
    assert is_done(tmp_path, setting, ["times", "longest"], [32, 64])
    assert not is_done(tmp_path, setting, ["times", "longest"], [32, 64, 96])
    # A search that was cut off goes on beyond what it has tried.
    row["done"].remove("longest")
    row = run(bench, "host", tmp_path, row, "--tries", "1", "--phases", "longest")
    assert [probe["tokens"] for probe in row["longest"]["probes"]][: len(tried)] == tried
    assert row["longest"]["tokens"] > max(tried)


def test_lengths_are_added_to_an_earlier_table(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    times = [{"tokens": 32, "seconds": 1.0}, {"tokens": 64, "note": "out of memory"}]
    rows = [
        {"name": name, "done": ["times"], "times": times[:count]} for name, count in (("mst", 1), ("cce", 2))
    ]
    earlier = tmp_path / "end_to_end.json"
    earlier.write_text(json.dumps({"rows": rows}))
    out = tmp_path / "out"
    out.mkdir()
    (out / "mst.json").write_text(json.dumps(rows[0] | {"label": "measured here"}))
    bench["end_to_end"].put_earlier(earlier, out)
    assert json.loads((out / "mst.json").read_text())["label"] == "measured here"
    assert json.loads((out / "cce.json").read_text()) == rows[1]
    lacks = bench["end_to_end_row"].lacks_times
    assert lacks(rows[0], [32, 64])
    assert not lacks(rows[0], [32])
    assert not lacks(rows[1], [32, 64, 96])  # where a shorter one has no room
    row = run(bench, "mst", tmp_path, {})
    row = run(bench, "mst", tmp_path, row, "--phases", "times", "--lengths", "32", "64", "96")
    assert [one["tokens"] for one in row["times"]] == [32, 64, 96]
    assert row["done"].count("times") == 1
    earlier.write_text("{}")
    with pytest.raises(SystemExit, match="has no rows of settings"):
        bench["end_to_end"].put_earlier(earlier, out)


def test_a_setting_that_fails_says_how(
    bench: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = bench["end_to_end_worker"]
    words = ["--out", str(tmp_path), "--shape", "tiny", "--lengths", "32", "--phases", "times", "longest"]
    module.main(["liger", *words])
    monkeypatch.setattr(module.Worker, "longest", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module.main(["plain", *words])
    rows = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("liger", "plain")}
    assert rows["liger"]["note"].startswith("left out: liger-kernel is not installed")
    assert rows["plain"]["note"] == "did not finish: ZeroDivisionError: division by zero"
    assert (rows["plain"]["done"], len(rows["plain"]["times"])) == (["times"], 1)


def test_a_length_that_has_room_is_trained(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    row = {"longest": {"tokens": 160, "state": "memory-verified"}, "done": ["times", "longest"]}
    row = run(bench, "mini-s", tmp_path, row)
    assert row["longest"]["state"] == "trained"
    assert row["trained"]["tokens"] == 160
    assert row["trained"]["loss"] == pytest.approx(6.24, abs=0.05)
    assert row["done"][-1] == "train"


def test_attention_is_saved_while_it_has_room(
    bench: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = bench["end_to_end_worker"]
    real = module.Training.step

    def step(self: Any, tokens: int, lr: float = 0.0) -> Any:
        taken = real(self, tokens, lr)
        return type(taken)(taken.seconds, taken.loss, taken.norm, 1000 * tokens, 0, 0)

    monkeypatch.setattr(module.Training, "step", step)
    monkeypatch.setattr(module, "WARM_UP_TOKENS", 16)
    monkeypatch.setattr(module.Card, "room_bytes", lambda self: 50_000)
    row = run(bench, "saved", tmp_path, {}, "--phases", "times")
    assert row["times"][0]["saved"].startswith("all: 2 on the GPU")
    assert row["times"][1]["saved"].startswith("outputs")
    assert set(row["points"]) == {"16", "32"}


def test_a_smaller_card_is_what_torch_and_the_planner_see(
    bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []
    reserved = [GIB]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (138 * GIB - reserved[0], 140 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: reserved[0])
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append(share)
    )
    card = bench["end_to_end_step"].Card(80.0, "cuda")
    # 2 GiB are CUDA's own.
    assert shares == [78 / 140]
    reserved[0] = 50 * GIB
    assert torch.cuda.mem_get_info("cuda:0") == (28 * GIB, 80 * GIB)
    assert card.room_bytes() == 78 * GIB


# Two processes with torch and transformers.
@pytest.mark.slow
def test_the_script_runs_a_setting(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "end_to_end.py"), "--out", str(tmp_path), "--shape", "tiny"]
    command += ["--lengths", "64", "--phases", "times", "--only", "plain", "--deadline-s", "200"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("plain: ")
    row = json.loads((tmp_path / "plain.json").read_text())
    assert row["done"] == ["times"], (tmp_path / "plain.log").read_text()
    assert row["allocator"] == "expandable_segments:True"


def manager(bench: dict[str, ModuleType], out: Path, **changes: Any) -> Any:
    plain = vars(options(bench, "plain", out)) | {"lanes": 4, "deadline_s": 300.0, "again": False}
    return bench["end_to_end"].Manager(argparse.Namespace(**plain | changes))


def test_a_setting_is_begun_if_its_first_numbers_have_time(
    bench: dict[str, ModuleType], tmp_path: Path
) -> None:
    settings = {one.name: one for one in bench["end_to_end_rungs"].SETTINGS}
    timed = bench["end_to_end_rungs"].timed
    lengths = [16384, 65536, 131072]
    step_s = bench["end_to_end"].step_seconds("llama-3-8b", 32)
    assert step_s(65536) == pytest.approx(15, rel=0.1)
    groups, plain, small = (
        timed(settings[name], ["times", "longest"], step_s, lengths, repeats=2, train_s=0)
        for name in ("groups", "plain", "80gb-plain")
    )
    assert plain.about_s < groups.about_s
    assert small.about_s < plain.about_s
    assert small.phases == ("longest",)
    of = manager(bench, tmp_path, deadline_s=60.0)
    assert of.has_time(groups)
    assert groups.about_s > 100
    assert not manager(bench, tmp_path, deadline_s=30.0).has_time(groups)
    words = of.words(groups)
    assert 50 < float(words[words.index("--deadline-s") + 1]) < 55
    assert of.environment(groups, 2)["CUDA_VISIBLE_DEVICES"] == "2"
    parsed = bench["end_to_end_worker"].parser().parse_args(words[2:])
    assert parsed.lengths == [32, 64]


# A manager and its settings, each a process of Python alone.
@pytest.mark.parametrize("gpus", [1, 2])
def test_a_manager_that_is_ended_ends_its_settings(tmp_path: Path, gpus: int) -> None:
    script = f"""
import sys, types
from pathlib import Path
sys.path.insert(0, {str(BENCHMARKS)!r})
import lanes

class Manager(lanes.Lanes):
    def words(self, setting):
        return [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(99)"]
    def told(self, setting, status):
        return f"status {{status}}"

settings = [types.SimpleNamespace(name=name, gpus={gpus}, about_s=99.0) for name in ("one", "two", "three")]
Manager(Path({str(tmp_path)!r}), 2, None).run(settings)
"""
    manager = subprocess.Popen([sys.executable, "-c", script])
    logs = [tmp_path / f"{name}.log" for name in ("one", "two")[: 3 - gpus]]
    until = time.monotonic() + 60
    while not all(log.exists() and log.read_text().endswith("\n") for log in logs):
        assert time.monotonic() < until
        time.sleep(0.05)
    manager.terminate()
    assert manager.wait(30) == 128 + signal.SIGTERM
    for log in logs:
        with pytest.raises(ProcessLookupError):
            os.kill(int(log.read_text()), 0)
    assert not (tmp_path / "three.log").exists()


def test_rows_of_two_machines_are_no_table(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    other = {"date": "2026-01-02", "device": "NVIDIA H100", "versions": {"torch": "2"}}
    rows = [made_up_row("plain", "one"), made_up_row("mst", "other", environment=other)]
    for row in rows:
        (tmp_path / f"{row['name']}.json").write_text(json.dumps(row))
    with pytest.raises(SystemExit, match="mst has device=NVIDIA H100, and plain device=NVIDIA H200"):
        bench["end_to_end_table"].collect([tmp_path], [], None)
    with pytest.raises(SystemExit, match=r"is of device=NVIDIA H200, and here it is .*--again"):
        run(bench, "plain", tmp_path, made_up_row("plain", "one"), "--phases", "times")


def test_a_step_without_numbers_is_not_trained(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    nan = SimpleNamespace(loss=float("nan"), norm=1.0)
    row = {"longest": {"tokens": 160, "state": "memory-verified"}, "done": ["times", "longest"]}
    row = run(bench, "mini-s", tmp_path, row, after_warm_up=lambda tokens: nan)
    assert row["trained"]["note"] == "ArithmeticError: loss nan, gradient norm 1.0"
    assert row["longest"]["state"] == "memory-verified"


def made_up_row(name: str, label: str, **changes: Any) -> Row:
    environment = {"date": "2026-01-02", "device": "NVIDIA H200", "versions": {"torch": "2"}}
    row = {"name": name, "label": label, "card_gib": None, "host_gib": 115.0, "shape": "llama-3-8b"}
    return row | {"optimizer": "AdamW", "environment": environment, "times": [], "left_out": []} | changes


def test_a_row_that_goes_on_another_day_has_both_dates(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    first = made_up_row("plain", "one")
    later = first["environment"] | {"date": "2026-01-03"}
    kept = bench["end_to_end_row"].Kept(tmp_path / "plain.json", first)
    for _ in range(2):
        kept.row["environment"] = kept.checked(later)
    assert kept.row["environment"]["date"] == "2026-01-02, 2026-01-03"
    rows = [kept.row, made_up_row("mst", "other", environment=later | {"date": "2026-01-01"})]
    assert bench["end_to_end_table"].dates_of(rows) == "2026-01-01, 2026-01-02, 2026-01-03"


def test_inputs_without_room_are_said_in_words(bench: dict[str, ModuleType]) -> None:
    with pytest.raises(ValueError, match="fit neither") as refused:
        choose_placement(32, 2**30, 0, 0)
    found = {"fails_tokens": 2048, "why": f"ValueError: {refused.value}"}
    words = "2,048 (inputs have no room on the GPU and the host together)"
    assert bench["end_to_end_table"].above({}, found) == words


def made_up_time(tokens: int, loss: float, **changes: Any) -> Row:
    return {"tokens": tokens, "tokens_per_second": 1234.6, "loss": loss, "norm": 2 * loss} | changes


def test_the_table_has_speeds_lengths_and_differences(
    bench: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    no_room = {"tokens": 65536, "note": "out of memory"}
    groups = {
        "tokens": 700416,
        "fails_tokens": 720896,
        "state": "memory-verified",
        "slope_bytes": 51200.0,
        "probes": [
            {"tokens": 700416, "peak_bytes": 130 * GIB, "inputs": {"gpu": 1, "host": 31, "rebuild": 0}}
        ],
        "check": {"tokens": 65536, "real_peak_bytes": 2**21, "probe_peak_bytes": 2**20},
    }
    times = [made_up_time(16384, 12.5), made_up_time(65536, 12.25, peak_bytes=60 * GIB)]
    rows = [
        made_up_row("plain", "+ layer checkpoints", times=[made_up_time(16384, 12.0), no_room]),
        made_up_row("groups", "+ 8 groups of heads", times=times, longest=groups),
        made_up_row("saved", "+ attention saved", times=times, longest={"as": "groups"}),
        made_up_row("liger", "Liger", note="left out: liger-kernel is not installed"),
        made_up_row(
            "80gb-mini", "8 groups, Mini", card_gib=79.1, longest={"tokens": 65536, "state": "trained"}
        ),
    ]
    for row in rows:
        (tmp_path / f"{row['name']}.json").write_text(json.dumps(row))
    run_of_bench = {"tokens": 1048576, "gpus": 2, "overrides": ["parallel.ulysses_degree=2"]}
    run_of_bench |= {"config": "llama3.yaml", "seconds": 500.0, "tokens_per_second": 2097.2}
    run_of_bench |= {"peak_gib": 120.5, "host_pinned_gib": 39.25, "losses": [10.5], "norms": [5.5]}
    run_of_bench["keys"] = {"optimizer": {"name": "apollo-mini", "in_backward": True}}
    run_of_bench["options"] = {"gpu_bytes": 79 * GIB, "host_bytes": None}
    run_of_bench["environment"] = {"device": "NVIDIA H200"}
    run_of_bench["plan"] = {"seconds": 490.0, "peak_gib": 121.5}
    (tmp_path / "two.json").write_text(json.dumps(run_of_bench))
    table = bench["end_to_end_table"]
    table.collect([tmp_path], [tmp_path / "two.json"], tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "end_to_end.json").read_text())
    assert [row["name"] for row in kept["rows"]] == ["plain", "groups", "saved", "liger", "80gb-mini"]
    of_groups = kept["rows"][1]["times"]
    assert (of_groups[0]["compared_to"], of_groups[0]["loss_difference"]) == ("plain", 0.5)
    assert (of_groups[1]["compared_to"], of_groups[1]["loss_difference"]) == ("groups", 0.0)
    assert "keys" not in kept["bench"][0]
    assert kept["left_out"]["liger"] == "left out: liger-kernel is not installed"
    assert kept["left_out"]["mst"] == "no file"
    assert "plain" not in kept["left_out"]
    shown = (tmp_path / "out" / "end_to_end.md").read_text()
    assert "| + layer checkpoints | AdamW | 1,235 | out of memory |" in shown
    lengths = "700,416 | 720,896 | {} | 50 | 130 | - | - | 1 gpu, 31 host | -1 MiB"
    assert f"| + 8 groups of heads | AdamW | {lengths.format('memory-verified')}" in shown
    assert f"| + attention saved | AdamW | {lengths.format('that of + 8 groups of heads')}" in shown
    assert "a card of 79.1 GiB, emulated on one NVIDIA H200" in shown
    of_bench = "1,048,576 | trained | 500 | 490 | 2,097 | 120.5 | 121.5 | 39.25 | 10.5 | 5.5 |"
    held = "2 | NVIDIA H200 | 79 | - | APOLLO-Mini in backward"
    assert f"| llama3.yaml parallel.ulysses_degree=2 | {held} | {of_bench}" in shown
    assert (tmp_path / "out" / "end_to_end.png").stat().st_size > 10_000
    (tmp_path / "four.json").write_text(json.dumps(run_of_bench | {"gpus": 4}))
    of_bench = [tmp_path / "out" / "end_to_end.json", tmp_path / "four.json"]
    table.collect([tmp_path], of_bench, tmp_path / "more")
    assert json.loads((tmp_path / "more" / "end_to_end.json").read_text())["bench"] == [
        kept["bench"][0],
        kept["bench"][0] | {"file": "four", "gpus": 4},
    ]
    with pytest.raises(SystemExit, match="no measured setting"):
        table.collect([tmp_path / "out"], [], None)
    (tmp_path / "two.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"two\.json has no rows with `tokens`"):
        table.collect([tmp_path], [tmp_path / "two.json"], None)
