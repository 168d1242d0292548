"""loss.png from metrics.jsonl: what is drawn, and what is said if nothing can be."""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from longseq.launch.metric_records import Evaluation, Reference, StepMetrics, to_json
from longseq.launch.plot import plot_runs, smooth

METRICS = StepMetrics(1, 60, 2.5, 1e-3, 1.25, 64, 0.5, 128.0, None, None, 0.75, 0.01, 64, 49.5)


def make_run(folder, losses, evals=(), entropy=None, **changes):
    folder.mkdir(parents=True)
    records = [
        dataclasses.replace(METRICS, step=step, loss=loss, **changes)
        for step, loss in enumerate(losses, start=1)
    ]
    records += [Evaluation(step, loss, 10, 1.0) for step, loss in evals]
    if entropy is not None:
        records.append(Reference("unigram entropy", entropy))
    (folder / "metrics.jsonl").write_text("".join(to_json(record) + "\n" for record in records))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = Figure.savefig

    def spy(figure, *arguments, **options):
        figures.append(figure)
        return save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    return figures


def lines_of(axes):
    return {line.get_label(): np.asarray(line.get_xydata(), dtype=float) for line in axes.lines}


def test_one_run(tmp_path, drawn):
    losses = [3.0, 2.5, float("nan"), 2.0]
    run = make_run(tmp_path / "my-run", losses, evals=[(2, 2.75), (4, 2.25)], entropy=3.18)
    assert plot_runs([run]) == run / "loss.png"
    assert imread(run / "loss.png").shape[:2] == (900, 1350)
    upper, lower = drawn[0].axes
    assert upper.get_title(loc="left") == "my-run"
    lines = lines_of(upper)
    np.testing.assert_array_equal(lines["training"], np.array([[1, 2, 3, 4], losses]).T)
    np.testing.assert_array_equal(lines["held-out"], [[2, 2.75], [4, 2.25]])
    assert [text.get_text() for text in upper.texts] == ["unigram entropy: 3.18"]
    np.testing.assert_array_equal(lower.lines[0].get_ydata(), [128.0] * 4)
    assert sorted(os.listdir(run)) == ["loss.png", "metrics.jsonl"]


def test_several_runs_share_references_and_have_a_legend(tmp_path, drawn):
    first = make_run(tmp_path / "first", np.linspace(3, 2, 60), entropy=3.18)
    second = make_run(tmp_path / "second", np.linspace(3, 1, 30), evals=[(30, 1.5)], entropy=3.18)
    out = plot_runs([first, second / "metrics.jsonl"], tmp_path / "plots" / "both.svg", lower="grad_norm")
    assert out.read_text().startswith("<?xml")
    upper, lower = drawn[0].axes
    labels = [text.get_text() for text in upper.get_legend().get_texts()]
    assert labels == ["first", "second", "held-out"]
    assert len(upper.texts) == 1
    assert [line.get_ydata()[0] for line in lower.lines] == [1.25, 1.25]


def test_runs_of_one_name_are_told_apart(tmp_path, drawn):
    runs = [make_run(tmp_path / name / "run", [2.0, 1.0]) for name in "ab"]
    plot_runs(runs, tmp_path / "both.png")
    labels = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert labels == [str(run) for run in runs]


@pytest.mark.parametrize("losses", [[2.0], [float("nan")] * 3])
@pytest.mark.parametrize("lower", ["tokens_per_second", "grad_norm"])
def test_a_run_with_next_to_nothing_is_drawn(tmp_path, losses, lower):
    run = make_run(tmp_path / "run", losses, grad_norm=None)
    assert plot_runs([run], lower=lower).stat().st_size > 0


def test_runs_that_cannot_be_drawn_are_named_all_at_once(tmp_path):
    empty = make_run(tmp_path / "empty", [])
    with pytest.raises(ValueError, match=r"(?s)empty: holds no step.*missing: no such file"):
        plot_runs([empty, tmp_path / "missing"], tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_unknown_image(tmp_path):
    run = make_run(tmp_path / "run", [2.0])
    with pytest.raises(ValueError, match=r"loss\.gif.*\.png, \.svg, \.pdf"):
        plot_runs([run], tmp_path / "loss.gif")
    with pytest.raises(ValueError, match="no run to plot"):
        plot_runs([])


def test_a_plot_that_dies_keeps_the_old_one(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", [2.0])
    (run / "loss.png").write_bytes(b"old")

    def die(figure, path, **options):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", die)
    with pytest.raises(OSError, match="no space"):
        plot_runs([run])
    assert (run / "loss.png").read_bytes() == b"old"
    assert sorted(os.listdir(run)) == ["loss.png", "metrics.jsonl"]


def test_smoothing_neither_lags_nor_bridges_a_gap():
    line = np.linspace(5.0, 1.0, 400)
    np.testing.assert_allclose(smooth(line), line, rtol=1e-12)
    noise = np.random.default_rng(0).normal(size=400)
    assert smooth(noise)[10:-10].std() < 0.5
    line[100] = np.nan
    assert np.isnan(smooth(line)[100])
    assert np.isfinite(np.delete(smooth(line), 100)).all()


def test_a_foreign_key_does_not_stop_the_plot(tmp_path):
    run = make_run(tmp_path / "run", [2.0, 1.0])
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "something newer"}) + "\n")
    plot_runs([run])
