"""The benchmark of loss curves, at sizes that a CPU has time for."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_modules import imported

NAMES = (
    "report",
    "optimizer_corpus",
    "optimizer_pretraining_model",
    "loss_curves_text",
    "loss_curves_plot",
    "loss_curves_table",
    "loss_curves",
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules, imported as the script does, and gone afterwards."""
    yield from imported(monkeypatch, NAMES)


@pytest.fixture
def text_file(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tokens of some of the standard library's modules."""
    module, library = bench["loss_curves_text"], Path(sysconfig.get_path("stdlib"))
    folders = [library / "json", library / "logging", library / "http"]
    monkeypatch.setattr(module, "HELDOUT_ONE_IN", 3)
    monkeypatch.setattr(module, "source_folders", lambda: folders)
    module.load_or_make(tmp_path / "text.npz", 10**6, 600)
    return tmp_path / "text.npz"


def run(bench: dict[str, ModuleType], text_file: Path, out: Path, *options: str) -> None:
    sizes = ("--shape", "tiny", "--steps", "4", "--batch", "4", "--micro-batch", "4", "--length", "17")
    given = ("--heldout-tokens", "80", "--text", str(text_file), "--out", str(out), *options)
    bench["loss_curves"].main([*sizes, *given])


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    return {row["run"]: row for row in json.loads((out / "loss_curves.json").read_text())["rows"]}


def test_text_is_of_sources_each_paragraph_once(bench, tmp_path: Path, monkeypatch) -> None:
    module = bench["loss_curves_text"]
    monkeypatch.setattr(module, "MIN_CHARACTERS", 20)
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 1000)
    long = "def long_enough_to_count_as_a_paragraph_of_its_own():\n    return 'so it is'"
    package = tmp_path / "site-packages" / "one"
    package.mkdir(parents=True)
    (package / "a.py").write_text(f"{long}\n\nreturn self\n\nfirst = 'of a.py, and nowhere else'")
    (package / "b.py").write_text(f"{long}\n\nreturn self\n\nsecond = 'of b.py, and nowhere else'")
    (tmp_path / "c.py").write_text("x = '" + 1000 * "y" + "'")
    (tmp_path / "d.py").write_bytes(b"\xff\xfe no text at all, but it is long enough")
    files = module.files_below([tmp_path, tmp_path / "site-packages"])
    assert sorted((name, path.name) for name, path in files) == [
        *(("c.py", "c.py"), ("d.py", "d.py"), ("one", "a.py"), ("one", "b.py")),
    ]
    found = [text for _, text in module.documents(files, 10**6)]
    assert len(found) == 2
    assert sum(long in text for text in found) == 1
    assert all("return self" in text for text in found)
    assert len(list(module.documents(files, 50))) == 1


def test_text_is_kept_and_read_again(bench, text_file: Path, monkeypatch) -> None:
    module = bench["loss_curves_text"]
    made = module.make(10**6, 600)
    monkeypatch.setattr(module, "make", None)
    kept = module.load_or_make(text_file, 10**6, 600)
    assert np.array_equal(kept.train, made.train)
    assert np.array_equal(kept.heldout, made.heldout)
    assert kept.facts == made.facts
    assert kept.facts["vocab_size"] == 600 > kept.train.max()


@pytest.mark.slow  # eight runs and a picture
def test_runs_differ_in_the_loss_alone(bench, text_file: Path, tmp_path: Path, capsys) -> None:
    run(bench, text_file, tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert list(rows) == list(bench["loss_curves"].KINDS)
    # A CPU adds in one order: the same run twice is the same to the bit.
    assert rows["plain-again"]["largest difference, a step"] == 0
    assert rows["plain-again"]["held-out difference"] == 0
    for name in ("cce", "cce-filtered", "cce-recompute", "plain-micro", "plain-quarter", "plain-float32"):
        assert 0 < rows[name]["largest difference, a step"] < 2e-3, name
        assert abs(rows[name]["held-out difference"]) < 2e-3, name
    assert {row.get("told apart") for row in rows.values()} <= {None, "yes", "no"}
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"loss_curves.json", "loss_curves.md", "loss_curves.png", "loss_curves_runs"}
    kept = json.loads((tmp_path / "out" / "loss_curves.json").read_text())
    assert [len(curve) for curve in kept["curves"].values()] == [4] * len(rows)
    assert kept["text"]["train"]["sha256"] == kept["settings"]["sha256"]["train"]
    capsys.readouterr()
    run(bench, text_file, tmp_path / "out")
    assert "begins" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has seed=0, here it is 1"):
        run(bench, text_file, tmp_path / "out", "--seed", "1")


def test_a_run_that_fails_or_has_no_time_leaves_the_others(
    bench, text_file: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def broken(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel")

    module = bench["loss_curves"]
    monkeypatch.setitem(module.KINDS, "cce", module.Kind("broken", broken))
    with pytest.raises(SystemExit, match="failed: cce"):
        run(bench, text_file, tmp_path / "out", "--runs", "cce", "plain")
    assert list(rows_of(tmp_path / "out")) == ["plain"]
    assert "cce failed: RuntimeError: no kernel" in capsys.readouterr().out
    run(bench, text_file, tmp_path / "out", "--runs", "plain-again", "--time-limit-s", "0")
    assert list(rows_of(tmp_path / "out")) == ["plain"]
    with pytest.raises(SystemExit, match="a multiple of 4 for the runs that cut it"):
        run(bench, text_file, tmp_path / "out", "--micro-batch", "2")


def of_curve(name: str, losses: Any, heldout: Any, *, yardstick: bool = False) -> dict[str, Any]:
    environment = {"device": "none"}
    return {
        **{"name": name, "label": name, "yardstick": yardstick, "tokens/s": 1.0},
        **{"losses": list(losses), "heldout losses": list(heldout), "environment": environment},
    }


def test_what_is_told_apart_is_beyond_the_yardsticks(bench) -> None:
    table = bench["loss_curves_table"].table
    steps = np.arange(120)
    falls, wave = 8 - 0.01 * steps, 0.01 * (-1.0) ** steps
    held = np.array([3.0, 3.1, 3.3])
    runs = [
        of_curve("plain", falls, held),
        of_curve("other", falls + wave + 0.001, held + 0.001, yardstick=True),
        of_curve("near", falls + 0.0019, held - 0.0019),
        of_curve("far", falls + 0.0021, held),
        of_curve("worse", falls, held + 0.0021),
        of_curve("early", falls + (steps < 20), held),
        of_curve("nan", [*falls[:-1], float("nan")], held),
    ]
    rows = {row["run"]: row for row in table(runs, 20)}
    apart = {name: rows[name].get("told apart") for name in rows}
    assert (apart["plain"], apart["other"]) == (None, None)
    assert {name for name in apart if apart[name] == "yes"} == {"far", "worse", "nan"}
    assert {name for name in apart if apart[name] == "no"} == {"near", "early"}
    assert rows["other"]["largest difference, smoothed"] == pytest.approx(0.001)
    assert rows["other"]["largest difference, a step"] == pytest.approx(0.011)
    assert rows["far"]["mean difference"] == pytest.approx(0.0021)
    assert rows["far"]["held-out loss"] == pytest.approx(held.mean())
    assert "told apart" not in table([runs[2], runs[3]], 0)[0]  # without a plain run


def test_steps_that_are_alike_do_not_shrink_the_standard_error(bench) -> None:
    module = bench["loss_curves_table"]
    rng = np.random.default_rng(0)
    slow = np.repeat(rng.normal(size=10), 20)  # ten numbers, each 20 times
    plain = of_curve("plain", np.zeros(200), [1.0, 2.0])
    found = module.compare(of_curve("other", slow, [1.0, 2.0]), plain, 0)
    assert found["standard error"] == pytest.approx(slow[::20].std(ddof=1) / 10**0.5)
    assert found["standard error"] > 4 * module.standard_error(slow)


def test_the_picture_needs_the_plain_run(bench, tmp_path: Path, capsys) -> None:
    plot = bench["loss_curves_plot"]
    runs = [of_curve("plain", [3.0, 2.0, 1.0], [1.0]), of_curve("other", [3.0, 2.1, 1.0], [1.0])]
    plot.draw(runs[1:], tmp_path / "none.png")
    assert "there is no plain run" in capsys.readouterr().out
    folder = tmp_path / "runs"
    folder.mkdir()
    for one in runs:
        (folder / f"{one['name']}.json").write_text(json.dumps(one))
    plot.main([str(folder), str(tmp_path / "some.png")])
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "some.png"}
    assert plot.smoothed([1.0, 2.0, 6.0], 2) == pytest.approx([1.5, 4.0])
    assert plot.smoothed([1.0, 2.0], 20) == pytest.approx([1.5])
