"""The table of profiles: whose moment is whose, and what has no words yet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from benchmark_modules import imported

from longseq.launch.bench.gaps import Event
from longseq.launch.bench.profile import taken_apart
from longseq.launch.bench.recording import Recording

MS = 1_000_000
GEMM, FLASH, NORM = "nvjet_sm90", "cudnn_sdpa_flash_fprop", "_rms_norm_kernel"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module, and gone afterwards."""
    for modules in imported(monkeypatch, ("report", "profile_table")):
        yield modules["profile_table"]


def kept(path: Path, norm_ms: int, wait_ms: int) -> Path:
    """A run of 1 s, most of it products and attention; a copy runs beside both."""
    spans = ((0, 600, GEMM), (600, 1000 - norm_ms - wait_ms, FLASH), (1000 - norm_ms, 1000, NORM))
    events = [Event(start * MS, end * MS, name) for start, end, name in spans]
    events.append(Event(500 * MS, 700 * MS, "Memcpy DtoH (Device -> Pinned)"))
    calls = [Event((1000 - norm_ms - wait_ms) * MS, 1000 * MS, "cudaMalloc")]
    profile = taken_apart(Recording(events, calls, 0, 1000 * MS)).as_json()
    facts = {"tokens": 65536, "gpus": 1, "seconds": 0.99, "environment": here()}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(facts | {"profile": profile}))
    return path


def here() -> dict[str, Any]:
    return {"device": "a made-up GPU", "date": "2000-01-01", "versions": {"torch": "0"}}


def test_runs_stand_side_by_side_and_gaps_ask_for_words(bench, tmp_path: Path, capsys) -> None:
    good, bad = kept(tmp_path / "good.json", 40, 10), kept(tmp_path / "bad.json", 60, 30)
    bench.main([str(good), str(bad), "--out", str(tmp_path)])
    text = (tmp_path / "profile.md").read_text()
    assert "a made-up GPU, 2000-01-01" in text
    assert "| products | 0.600 s, 60.0% | 0.600 s, 60.0% |" in text
    assert "| attention forward | 0.350 s, 35.0% | 0.310 s, 31.0% |" in text
    assert "| norm | 0.040 s, 4.0% | 0.060 s, 6.0% |" in text
    assert "| **beside products and attention** | **5.0%** | **9.0%** |" in text
    # The copy hides behind computing, and is no share of the step.
    assert "| all other kernels | 0.000 s, 0.0% | 0.000 s, 0.0% |" in text
    assert "| good | 65,536 | 1 | a made-up GPU | 2000-01-01 | 1 | 0.99 | 5.0% | yes | 0 | - |" in text
    assert (
        "| bad | 65,536 | 1 | a made-up GPU | 2000-01-01 | 1 | 0.99 | 9.0% | no | 1 | **not explained** |"
        in text
    )
    row = f"| bad | `{FLASH}` | `{NORM}` | 0.03 | 3.00% | 1 | 0.03 | idle 100%, cudaMalloc 100% |"
    assert f"{row} **not explained** |" in text
    assert "2 cells lack words" in capsys.readouterr().out
    saved = json.loads((tmp_path / "profile.json").read_text())
    assert [one["run"] for one in saved["rows"]] == ["good", "bad"]
    mended = kept(tmp_path / "later" / "bad.json", 50, 10)
    bench.main([str(tmp_path / "profile.json"), str(mended), "--out", str(tmp_path / "later")])
    later = json.loads((tmp_path / "later" / "profile.json").read_text())["rows"]
    assert later[0] == saved["rows"][0]
    assert (later[1]["run"], len(later)) == ("bad", 2)
    assert later[1]["beside_products_and_attention"] == pytest.approx(0.06)


def test_words_stand_beside_what_they_explain(bench, tmp_path: Path, capsys) -> None:
    notes = tmp_path / "notes.yaml"
    notes.write_text(
        'gaps:\n- {before: "cudnn*", after: "_rms*", run: "b*", words: "the allocator"}\n'
        'runs:\n- {run: bad, words: "a small model"}\n'
    )
    runs = [str(kept(tmp_path / f"{name}.json", 60, 30)) for name in ("bad", "other")]
    bench.main([*runs, "--notes", str(notes), "--out", str(tmp_path)])
    text = (tmp_path / "profile.md").read_text()
    assert "| idle 100%, cudaMalloc 100% | the allocator |" in text
    assert "| 9.0% | no | 0 | a small model |" in text
    assert "| 9.0% | no | 1 | **not explained** |" in text
    assert "2 cells lack words" in capsys.readouterr().out


def test_what_is_hidden_is_told(bench) -> None:
    took = {"s": 0.4, "exposed_s": 0.1, "share": 0.05, "calls": 3}
    assert bench.cell(took) == "0.100 s, 5.0% (0.300 s hidden)"
    assert bench.cell(took | {"s": 0.1}) == "0.100 s, 5.0%"
    assert bench.cell(None) is None


def test_files_that_say_nothing_are_refused(bench, tmp_path: Path) -> None:
    run = tmp_path / "cpu.json"
    run.write_text(json.dumps({"profile": {"on_gpu": False, "wall_s": 1.0}}))
    with pytest.raises(SystemExit, match="no profile of a GPU"):
        bench.main([str(run)])
    good = str(kept(tmp_path / "good.json", 40, 10))
    with pytest.raises(SystemExit, match="rename one"):
        bench.main([good, good])
    notes = tmp_path / "notes.yaml"
    for wrong, said in (
        ("gap: []", "gap is none of"),
        ("gaps: [{before: a}]", "needs words"),
        ("runs: [{gap: a, words: b}]", "may have"),
    ):
        notes.write_text(wrong)
        with pytest.raises(SystemExit, match=said):
            bench.main([good, "--notes", str(notes)])
