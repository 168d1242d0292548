"""The table of claims is made of results, and says what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from benchmark_modules import BENCHMARKS, imported

NAMES = ("report", "bench_runs", "claims_results", "claims_numbers", "claims_list", "claims")
ENVIRONMENT = {"device": "a GPU", "date": "2020-02-02", "versions": {}}


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules, imported as the script does, and gone afterwards."""
    yield from imported(monkeypatch, NAMES)


def put(folder: Path, name: str, *rows: dict[str, Any], **facts: Any) -> None:
    folder.mkdir(exist_ok=True)
    content = {"environment": ENVIRONMENT, "rows": rows} | facts
    (folder / f"{name}.json").write_text(json.dumps(content))


def table(claims: dict[str, ModuleType], folder: Path) -> dict[str, dict[str, Any]]:
    claims["claims"].main(["--results", str(folder), "--out", str(folder)])
    rows = json.loads((folder / "claims.json").read_text())["rows"]
    return {f"{row['technique']} {row['key']}": row for row in rows}


def rung(name: str, longest: int | None, **more: Any) -> dict[str, Any]:
    return {  # an environment of its own, as of another machine than the file's
        **{"name": name, "card_gib": 79.2, "optimizer": "AdamW", "environment": ENVIRONMENT},
        **{"longest": {"tokens": longest, "state": "trained"}, "times": [], **more},
    }


def test_nothing_measured_is_said(claims, tmp_path: Path) -> None:
    rows = table(claims, tmp_path)
    assert len(rows) == len(claims["claims_list"].CLAIMS)
    assert {row["verdict"] for row in rows.values()} == {"not measured"}
    assert rows["APOLLO perplexity"]["why"] == "there is no optimizer_pretraining.json"
    assert all(row["ours"] is None and row["paper"] and row["command"] for row in rows.values())
    assert (tmp_path / "claims.md").read_text().count("| not measured |") == len(rows)


def test_longest_sequences_on_a_small_card(claims, tmp_path: Path) -> None:
    plain_times = [
        *({"tokens": tokens, "tokens_per_second": speed} for tokens, speed in ((16, 100.0), (64, 50.0))),
        {"tokens": 99, "note": "out of memory"},
    ]
    put(
        tmp_path,
        "end_to_end",
        rung("80gb-plain-no-checkpoints", 5000),
        rung("80gb-plain", 15000),
        rung("80gb-mini", 59000, optimizer="APOLLO-Mini in backward"),
        rung("plain", None, times=plain_times),
        rung("mst", None, times=[{"tokens": tokens, "tokens_per_second": 98.0} for tokens in (16, 64, 99)]),
        environment=ENVIRONMENT | {"device": "that of the table"},
    )
    rows = table(claims, tmp_path)
    plain = rows["MST longer-than-plain"]
    assert plain["ours"].startswith(
        "59,000 tokens against 5,000: 11.8 times, on a card that was held to 79.2"
    )
    assert plain["verdict"] == "short by a factor of 1.02"
    assert plain["where"] == "a GPU, 2020-02-02"
    assert rows["MST longer-than-checkpoints"]["verdict"] == "short by a factor of 1.02"
    assert rows["MST 60k"]["verdict"] == "short by a factor of 1.02"
    assert rows["MST throughput-kept"]["verdict"] == "reached"
    assert rows["MST throughput-kept"]["ours"] == "98 against 100 tokens/s at 16 tokens: 0.98 times"
    run = {"gpus": 1, "tokens": 70_000, "kind": "memory-verified, not trained", "environment": ENVIRONMENT}
    run |= {"config": "mini", "overrides": ["sequence.length=70000"], "memory_only": True, "host_gib": 115.0}
    runs = [
        run | {"card_gib": 79.0999, "optimizer": "APOLLO-Mini in backward"},
        run | {"card_gib": None, "tokens": 90_000},  # of the whole card
        run | {"card_gib": 79.0999, "tokens": 90_000, "gpus": 2},
        run | {"card_gib": 79.0999, "tokens": 90_000, "note": "out of memory"},
    ]
    put(tmp_path, "end_to_end", rung("80gb-mini", 60_000), rung("80gb-plain", None), bench=runs)
    rows = table(claims, tmp_path)
    assert rows["MST 60k"]["verdict"] == "reached"
    assert rows["MST 60k"]["ours"].startswith("70,000 tokens on a card that was held to 79.1 GiB")
    assert rows["MST 60k"]["ours"].endswith("(memory-verified, not trained)")
    assert rows["MST 60k"]["command"] == (
        "longseq bench mini sequence.length=70000 --memory-only --gpu-memory 79.1G --host-memory 115G"
    )
    assert (
        rows["MST longer-than-checkpoints"]["why"] == "end_to_end.json has no longest sequence of 80gb-plain"
    )
    assert rows["MST throughput-kept"]["why"] == "end_to_end.json has no row with name=plain"


def curve(run: str, largest: float, apart: str | None = None) -> dict[str, Any]:
    return {
        **{"run": run, "largest difference, smoothed": largest, "held-out difference": largest / 2},
        **({"told apart": apart} if apart else {}),
    }


@pytest.mark.parametrize(
    ("exact", "filtered", "verdict"),
    [
        ("no", "no", "reached"),
        ("no", "yes", "reached, but not with a filtered gradient, which nothing chooses by itself"),
        ("yes", "no", "not reached: the curves can be told apart"),
    ],
)
def test_loss_curves(claims, tmp_path: Path, exact: str, filtered: str, verdict: str) -> None:
    runs = [curve("cce", 0.002, exact), curve("plain-micro", 0.001), curve("plain-again", 0.003)]
    put(tmp_path, "loss_curves", *runs, curve("cce-filtered", 0.01, filtered))
    row = table(claims, tmp_path)["Cut Cross-Entropy loss-curves"]
    assert row["verdict"] == verdict
    assert "roundings alone 0.003" in row["ours"]
    assert "ours 0.002 (held out +0.001)" in row["ours"]
    put(tmp_path, "loss_curves", curve("cce", 0.002, exact))
    assert table(claims, tmp_path)["Cut Cross-Entropy loss-curves"]["verdict"] == "not measured"


def head_rows(shape: str, tokens: int, forward: float, both: float) -> list[dict[str, Any]]:
    common = {"shape": shape, "data": "zipf", "tokens": tokens}
    return [
        common | {"key": "exact-small", "fwd MiB": forward, "fwd+bwd MiB": both, "beside dE, dW MiB": 9.0},
        common | {"key": "eager", "fwd MiB": 16000.0, "fwd+bwd MiB": 24000.0},
    ]


@pytest.mark.parametrize(
    ("forward", "both", "verdicts"),
    [
        (0.9, 1164.0, ["reached", "reached", "reached"]),
        (2.0, 1746.0, ["short by a factor of 2", "short by a factor of 1.5", "reached"]),
        (2.0, 10000.0, ["short by a factor of 2", "short by a factor of 8.59", "short by a factor of 1.4"]),
    ],
)
def test_memory_of_the_head(claims, tmp_path: Path, forward: float, both: float, verdicts: list[str]) -> None:
    gemma = head_rows("Gemma-2-2B", 8192, forward, both)
    llama = [*head_rows("Llama-3-8B", 8192, 1.0, 2400.0), *head_rows("Llama-3-8B", 65536, 1.0, both)]
    put(tmp_path, "lm_head", *gemma, *llama)
    rows = table(claims, tmp_path)
    names = ("Cut Cross-Entropy loss-memory", "Cut Cross-Entropy gradient-memory", "MST head-memory")
    assert [rows[name]["verdict"] for name in names] == verdicts
    assert "(-90 %)" in rows["MST head-memory"]["ours"]
    assert rows["Cut Cross-Entropy loss-speed"]["verdict"] == "not measured"


def test_apollo(claims, tmp_path: Path) -> None:
    throughput = {"case": "c", "length": 256, "largest": 9}
    put(
        tmp_path,
        "batch_throughput",
        throughput | {"key": "adamw", "tokens/s / AdamW": 1.0},
        throughput | {"key": "adamw-checkpoints", "tokens/s / AdamW": 4.0},
        throughput | {"key": "mini", "tokens/s / AdamW": 1.5},
        throughput | {"key": "longseq-mini", "tokens/s / AdamW": 1.2},
    )
    state = {"state elements": 7, "formula": 7, "state GiB": 1.0, "/ AdamW": 0.5}
    keys = ("adamw-fused", "longseq-apollo-stochastic", "longseq-mini-stochastic")
    put(tmp_path, "optimizer", *({"key": key} | state for key in keys))
    perplexities = [("adamw", 20.0), ("adamw", 30.0), ("apollo", 22.0), ("mini", 25.0), ("apollo", 99.0)]
    runs = [{"run": run, "held-out perplexity": value} for run, value in perplexities]
    put(tmp_path, "optimizer_pretraining", *runs, settings={"parameters": 58e6, "tokens": 1e8})
    memory = [
        {"key": "bf16-mini-in-backward", "components": {"weights": 12.5}},
        {"key": "int8-mini-in-backward", "device GiB": 11.25, "peak GiB": 10.0},
    ]
    put(tmp_path, "optimizer_memory_llama_7b", *memory)
    rows = table(claims, tmp_path)
    assert rows["APOLLO three-times"]["verdict"] == "short by a factor of 2"
    assert "1.5 times" in rows["APOLLO three-times"]["ours"]
    assert rows["APOLLO state-memory"]["verdict"] == rows["APOLLO step-time"]["verdict"] == "reached"
    assert rows["APOLLO perplexity"]["verdict"] == "not reached: AdamW, tuned, is ahead"
    assert "1.1 and 1.25 times AdamW's" in rows["APOLLO perplexity"]["ours"]
    assert rows["APOLLO perplexity"]["where"] == "a GPU, 2020-02-02"
    assert rows["APOLLO under-12gb"]["verdict"] == "short by a factor of 1.01"
    memory[1]["device GiB"] = 10.0
    put(tmp_path, "optimizer_memory_llama_7b", *memory)
    put(tmp_path, "optimizer", *({"key": key} | state | {"formula": 8} for key in keys))
    rows = table(claims, tmp_path)
    assert rows["APOLLO under-12gb"]["verdict"] == "reached"
    assert rows["APOLLO under-12gb"]["ours"].startswith("10.74 GB of the GPU in use")
    assert "6.71B weights" in rows["APOLLO under-12gb"]["ours"]
    assert "--shape llama-7b" in rows["APOLLO under-12gb"]["command"]
    assert rows["APOLLO state-memory"]["verdict"] == "not as the formula says"


def bench_file(folder: Path, gpus: int, tokens: int, **more: Any) -> Path:
    facts = {"gpus": gpus, "tokens": tokens, "kind": "trained", "environment": ENVIRONMENT}
    facts |= {"config": "my.yaml", "overrides": ["sequence.length=max"], **more}
    path = folder / f"{gpus}-{tokens}.json"
    path.write_text(json.dumps(facts))
    return path


def test_longest_sequences_by_gpus(claims, tmp_path: Path) -> None:
    results = tmp_path / "results"
    files = [bench_file(tmp_path, gpus, tokens) for gpus, tokens in ((4, 390), (1, 100), (2, 196), (2, 50))]
    arguments = ["--results", str(results), "--out", str(results), "--longest", *map(str, files)]
    claims["claims"].main(arguments)
    row = table(claims, results)["DeepSpeed-Ulysses linear-in-gpus"]
    assert row["ours"].startswith("100 tokens on 1, 196 tokens on 2, 390 tokens on 4 GPUs: 0.98, 0.975 of")
    assert row["verdict"] == "reached"
    assert row["command"] == "longseq bench my.yaml sequence.length=max"
    kept = json.loads((results / "longest.json").read_text())["rows"]
    assert [(one["gpus"], one["tokens a GPU"]) for one in kept] == [(1, 100), (2, 25), (2, 98), (4, 97)]
    claims["claims"].main([*arguments[:5], str(results / "longest.json"), str(bench_file(tmp_path, 8, 700))])
    more = json.loads((results / "longest.json").read_text())["rows"]
    assert more[:-1] == kept
    assert more[-1]["tokens"] == 700
    files[0] = bench_file(tmp_path, 4, 320)
    claims["claims"].main([*arguments[:5], *map(str, files)])
    assert table(claims, results)["MST linear-in-gpus"]["verdict"] == "short by a factor of 1.25"
    short = {"config": "my.yaml", "overrides": []}  # a shorter run on as many GPUs may come later
    put(results, "longest", *({"gpus": g, "tokens": t} | short for g, t in ((1, 9), (2, 18), (2, 4))))
    assert table(claims, results)["MST linear-in-gpus"]["verdict"] == "reached"
    for wrong, why in (({"note": "did not finish"}, "did not finish"), ({"kind": None}, "no kind")):
        path = bench_file(tmp_path, 8, 1, **wrong)
        if "kind" in wrong:
            path.write_text(path.read_text().replace('"kind"', '"other"'))
        with pytest.raises(SystemExit, match=why):
            claims["claims"].main([*arguments[:5], str(path)])


def test_rows_of_several_days_say_their_own(claims, tmp_path: Path) -> None:
    sent = {"system": "ours", "gpus": 4, "tokens": 64, "key": "gpu", "predicted": 5.0}
    sent["all-to-all MiB a layer"] = 5.0
    put(tmp_path, "sequence_parallel", sent | {"run": "2020-03-03 01:44"}, sent | {"run": "2020-03-03 02:57"})
    row = table(claims, tmp_path)["DeepSpeed-Ulysses volume"]
    assert (row["where"], row["verdict"]) == ("a GPU, 2020-03-03", "reached")
    put(tmp_path, "sequence_parallel", sent, sent | {"predicted": 6.0})
    assert table(claims, tmp_path)["DeepSpeed-Ulysses volume"]["verdict"] == "not as the formula says"


def test_the_table_is_that_of_the_results(claims, tmp_path: Path) -> None:
    """After a new result: python benchmarks/claims.py --out benchmarks/results."""
    claims["claims"].main(["--out", str(tmp_path)])
    for name in ("claims.md", "claims.json"):
        assert (BENCHMARKS / "results" / name).read_text() == (tmp_path / name).read_text(), name
