"""The benchmark of the head's loss: its data, its truth, and the tables, at sizes that a CPU has time for."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAMES = (
    "report",
    "lm_head_data",
    "lm_head_truth",
    "lm_head_timing",
    "lm_head_methods",
    "lm_head_plot",
    "lm_head",
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules of the folder, imported as `python benchmarks/lm_head.py` does, and gone afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name)


def problem_of(bench: dict[str, ModuleType], kind: str, num_tokens: int, vocab_size: int = 5003):
    data = bench["lm_head_data"]
    shape = data.Shape("test", vocab_size, 64)
    weight = data.draw_weight(shape, kind, "cpu")
    return data.draw_problem(shape, kind, weight, num_tokens)


@pytest.mark.parametrize("kind", ["flat", "zipf", "zipf-sharp"])
def test_first_tokens_of_a_long_problem_are_a_short_problem(bench, kind: str) -> None:
    short, long = problem_of(bench, kind, 600), problem_of(bench, kind, 1100)
    assert torch.equal(short.weight, long.weight)
    assert torch.equal(short.hidden, long.hidden[:600])
    assert torch.equal(short.labels, long.labels[:600])


def test_labels_are_drawn_from_the_softmax_they_are_scored_by(bench) -> None:
    """The mean NLL of labels that are is the softmax's mean entropy, up to the luck of the draw."""
    for kind in ("zipf", "zipf-sharp"):
        problem = problem_of(bench, kind, 4096, 1003)
        log_chances = (problem.hidden.float() @ problem.weight.float().T).log_softmax(1).detach()
        entropies = -(log_chances.exp() * log_chances).sum(1)
        spread = (log_chances.exp() * log_chances**2).sum(1) - entropies**2
        luck = math.sqrt(float(spread.mean()) / 4096)
        assert problem.mean_nll == pytest.approx(float(entropies.mean()), abs=4 * luck)


def test_truth_is_autograd_in_float64(bench) -> None:
    truth = bench["lm_head_truth"]
    problem = problem_of(bench, "zipf", 700)
    hidden, weight = (t.detach().double().requires_grad_() for t in (problem.hidden, problem.weight))
    loss = F.cross_entropy(hidden @ weight.T, problem.labels)
    loss.backward()
    loss = loss.detach()
    found = truth.gradients(problem)
    torch.testing.assert_close(found.loss, loss)
    torch.testing.assert_close(found.hidden, hidden.grad)
    torch.testing.assert_close(found.weight, weight.grad)
    assert problem.mean_nll == pytest.approx(float(loss), rel=1e-5)
    errors = truth.SpotCheck(problem).errors(loss, hidden.grad, weight.grad)
    assert max(errors) < 1e-5
    weight.grad[problem.labels[-1]] *= 1.5
    assert truth.SpotCheck(problem).errors(loss, hidden.grad, weight.grad)[1] > 1e-2
    assert math.isnan(truth.worst(0.1, math.nan, 0.2))


def test_apples_rule_leaves_out_the_tiles_that_a_loop_finds_dead(bench, monkeypatch) -> None:
    """Against a loop over tiles, with sizes that no tile divides and an eps that kills some of them."""
    truth = bench["lm_head_truth"]
    monkeypatch.setattr(truth, "EPS", 0.01)
    problem = problem_of(bench, "zipf", 700)
    hidden, weight = problem.hidden.detach().double(), problem.weight.detach().double()
    chances = (hidden @ weight.T).softmax(1)
    pull = chances - F.one_hot(problem.labels, len(weight)).double()
    order = (hidden @ weight.T).mean(0).argsort()
    dropped, living, num_tiles = 0.0, 0, 0
    # A document is 512 tokens, and tiles of tokens start anew in each: 512 is a multiple of 128.
    for top in range(0, 700, 128):
        for words in order.split(128):
            rows = torch.arange(top, min(top + 128, 700))[:, None]
            num_tiles += 1
            if pull[rows, words].abs().max() >= 0.01:
                living += 1
            else:
                dropped += float(chances[rows, words].sum())
                pull[rows, words] = 0
    assert 0 < living < num_tiles
    found = truth.gradients(problem, filtered=True)
    torch.testing.assert_close(found.hidden, pull @ weight / 700, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.weight, pull.T @ hidden / 700, rtol=1e-5, atol=1e-7)
    about = truth.facts(problem)
    assert about["f, sorted"] == pytest.approx(living / num_tiles)
    assert about["dropped, sorted"] == pytest.approx(dropped / 700, rel=1e-3)


def test_tables_have_a_row_for_what_ran_and_for_what_did_not(bench, tmp_path: Path, monkeypatch) -> None:
    methods = bench["lm_head_methods"]

    def no_memory() -> None:
        raise torch.OutOfMemoryError

    broken = (
        methods.Method("big", "too big", no_memory),
        methods.Method("absent", "not here", lambda: methods._need("no_such_module", "no-such-package")),
    )
    known = tuple(method for method in methods.METHODS if method.key in ("exact", "eager"))
    monkeypatch.setattr(bench["lm_head"], "METHODS", known + broken)
    bench["lm_head"].main(["--shapes", "tiny", "--data", "zipf", "flat", "--out", str(tmp_path)])
    kept = json.loads((tmp_path / "lm_head.json").read_text())
    notes = {row["method"]: row.get("note") for row in kept["rows"]}
    assert notes["too big"] == "out of memory"
    assert notes["not here"] == "no-such-package is not installed"
    timed = [row for row in kept["rows"] if row.get("key") in ("exact", "eager")]
    assert len(timed) == 4
    assert all(row["fwd+bwd G"] > 0 and row["note"] is None for row in timed)
    assert {row["data"] for row in kept["data"]} == {"zipf", "flat"}
    text = (tmp_path / "lm_head.md").read_text()
    assert "## tiny, 300 tokens, flat" in text
    assert "| too big | - |" in text


def test_nothing_is_reported_of_a_wrong_result_of_ours(bench, tmp_path: Path, monkeypatch) -> None:
    methods = bench["lm_head_methods"]
    wrong = methods.Method(
        "exact", "longseq exact", lambda: lambda h, w, y: 1.1 * methods.eager(h, w, y), ours=True
    )
    monkeypatch.setattr(bench["lm_head"], "METHODS", (wrong,))
    with pytest.raises(SystemExit, match="longseq exact disagrees with float64 on tiny, 300 tokens, zipf"):
        bench["lm_head"].main(["--shapes", "tiny", "--data", "zipf", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_picture_has_the_case_nearest_to_8192_tokens(bench, tmp_path: Path) -> None:
    plot = bench["lm_head_plot"]
    rows = [
        {
            "shape": shape,
            "data": data,
            "tokens": tokens,
            "method": "longseq exact",
            "key": "exact",
            "ours": True,
            "fwd+bwd G": 3.2,
            "beside dE, dW MiB": 0.0,
        }
        for shape in ("a", "b")
        for data in ("flat", "zipf")
        for tokens in (65536, 8192)
    ]
    assert set(plot._panels(rows)) == {"a, 8,192 tokens, zipf", "b, 8,192 tokens, zipf"}
    plot.draw(rows, tmp_path / "lm_head.png")
    assert [path.name for path in tmp_path.iterdir()] == ["lm_head.png"]
