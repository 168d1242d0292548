"""What `longseq verify` says, and what it does with configs and processes that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from longseq.launch.cli import main
from longseq.launch.config_file import load_config
from longseq.launch.model import hf_config
from longseq.launch.verify import processes, ranks, run
from longseq.launch.verify.bench import DEEP_LAYERS, Bench, Layout
from longseq.launch.verify.combined import jobs_of
from longseq.launch.verify.compare import EXACT, Row, Step, compare
from longseq.launch.verify.forwards import mlp_forwards
from longseq.launch.verify.report import Findings, as_json, as_text
from longseq.launch.verify.techniques import (
    STREAMED,
    packed_documents,
    rebuilt_layers,
    stream_variants,
    techniques,
)
from longseq.mst.layer_memory import SavedAttention
from longseq.mst.placement import spread_inputs
from longseq.mst.segments import fewest_waiting

TWO = Layout(2, 2, 0)


def step(grad: torch.Tensor, loss: float = 1.0) -> Step:
    return Step(loss, {"weight": grad})


def test_a_factor_is_named() -> None:
    truth = torch.randn(5, 3, dtype=torch.float64)
    row = compare("head", "case", step(2 * truth), step(truth))
    assert (row.tensor, row.error, row.is_right) == ("weight", pytest.approx(1.0), False)
    assert row.note == "2 x the true one"


@pytest.mark.parametrize(
    ("found", "note"),
    [
        (Step(1.0, {}), "is not there"),
        (Step(1.0, {"weight": torch.full((2,), torch.nan)}), "is not finite"),
        (Step(1.0, {"weight": torch.ones(2), "frozen": torch.zeros(2)}), "is there, and should not be"),
        (Step(1.0, {"weight": torch.ones(3)}), "has shape (3,), not (2,)"),
        (Step(torch.nan, {"weight": torch.ones(2)}), "is not finite"),
    ],
)
def test_what_is_missing_or_too_much_is_wrong(found: Step, note: str) -> None:
    row = compare("head", "case", found, step(torch.ones(2)))
    assert not row.is_right
    assert row.note == note


def test_a_gradient_of_nothing_must_be_nothing() -> None:
    nothing = step(torch.zeros(2), loss=0.0)
    assert compare("head", "case", nothing, nothing).is_right
    assert not compare("head", "case", step(torch.full((2,), 1e-3), loss=0.0), nothing).is_right


def test_the_report_shows_the_worst_case_and_the_way_out() -> None:
    rows = [
        Row("streamed layers", "small", 1e-15, "a", EXACT),
        Row("LM head (cut cross-entropy)", "short", 1e-16, "a", EXACT),
        Row("LM head (cut cross-entropy)", "long", 1.0, "lm_head.weight", EXACT, "2 x the true one"),
        Row("LM head (cut cross-entropy)", "crash", float("inf"), "-", EXACT, "raised ValueError: no"),
    ]
    findings = Findings("a llama", rows, ["note: something"], 3.0)
    text = as_text(findings)
    assert "1 of 2 techniques are WRONG" in text
    assert "WRONG LM head (cut cross-entropy): crash" in text
    assert "raised ValueError: no" in text
    assert "sequence.loss=logits" in text
    assert "note: something" in text
    values = json.loads(as_json(findings))
    assert values["ok"] is False
    assert [row["cases"] for row in values["techniques"]] == [1, 3]
    assert values["cases"][-1]["error"] is None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sequence.lenght=4k"], "sequence.length"),
        (["model.config={model_type: gpt2}"], "model_type='gpt2' is no family"),
        (["model.name=/no/such/folder", "model.config={}", "data.tokenizer=bytes"], "/no/such/folder"),
        (["sequence.checkpoints=gpu", "sequence.head_groups=3"], "head_groups=3"),
        # On a GPU they are of streamed layers, however short the sequence is.
        (["sequence.head_groups=3"], "head_groups=3"),
    ],
)
def test_a_config_that_cannot_be_tried_is_bad_input(
    overrides: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "tiny-cpu", *overrides]) == 2
    assert said in capsys.readouterr().err


def test_all_that_a_plan_may_choose_of_attention_is_tried(tmp_path: Path) -> None:
    config = load_config("tiny-cpu", ["sequence.save_attention=auto"])
    bench = Bench.make(config, hf_config(config.model), tmp_path)
    # Too short to stream without a plan, which goes by memory.
    assert not bench.streams
    assert bench.may_stream
    tried = [options["save_attention"] for _, options in stream_variants(bench)]
    assert {"gpu", "host", "all", SavedAttention(1, host=True, everything=True)} <= set(tried)
    kinds = {row.technique for row in techniques(bench)}
    assert STREAMED in kinds


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_rebuilt_layers_are_tried_with_inputs_in_each_place(family: str, tmp_path: Path) -> None:
    config = load_config("tiny-cpu", [f"model.config.model_type={family}"])
    bench = Bench.make(config, hf_config(config.model), tmp_path)
    rows = list(rebuilt_layers(bench))
    assert [row.case.rpartition("; ")[2] for row in rows] == [
        "of 6 layers 3 rebuilt, inputs on the GPU",
        "of 6 layers 3 rebuilt, inputs in host memory",
    ]
    assert all(row.is_right for row in rows), rows
    placement = spread_inputs(DEEP_LAYERS, 0, fewest_waiting(DEEP_LAYERS))
    places, waits = placement.all_places(DEEP_LAYERS), placement.waits(DEEP_LAYERS)
    assert {where for place, where in zip(places, waits, strict=True) if place == "rebuild"} == {
        "gpu",
        "host",
    }


@pytest.mark.parametrize(
    ("overrides", "job"),
    [
        ([], True),
        (["sequence.head_groups=1"], False),  # nothing is left to a plan
        (["sequence.checkpoints=none"], False),
        (["model.config.num_key_value_heads=1"], False),  # one group, which "Ulysses" has tried
        (["model.config.num_key_value_heads=4"], False),  # each rank has a key/value head of each group
    ],
)
def test_groups_finer_than_ranks_share_evenly_are_tried(
    overrides: list[str], job: bool, tmp_path: Path
) -> None:
    config = load_config("tiny-cpu", ["parallel.ulysses_degree=2", *overrides])
    bench = Bench.make(config, hf_config(config.model), tmp_path)
    assert ("ulysses_by_groups" in jobs_of(bench)) == job


def test_one_line_says_how_the_forwards_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "PARTS", (mlp_forwards,))
    assert main(["verify", "tiny-cpu", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["cases"]
    assert row["tensor"] == "2, 2 at most"


def test_an_interrupted_part_does_not_end_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A crash in one case is that case's finding."""
    from longseq.launch.verify import steps

    def fails(*args: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(run, "PARTS", (packed_documents, mlp_forwards))
    monkeypatch.setattr(steps.sequence, "shard_batch", fails)
    assert main(["verify", "tiny-cpu"]) == 1
    out = capsys.readouterr().out
    assert "raised IndexError: list index out of range" in out
    assert "MLP forwards a step" in out


def waits(config: object, layout: Layout) -> Step:
    if os.environ["RANK"] == "1":
        time.sleep(60)
    return step(torch.ones(1))


def fails(config: object, layout: Layout) -> Step:
    if os.environ["RANK"] == "1":
        raise ValueError("no such thing")
    torch.distributed.barrier()
    return step(torch.ones(1))


def dies(config: object, layout: Layout) -> Step:
    os._exit(3)


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (waits, "did not answer within 1 seconds"),
        (fails, "rank 1: ValueError: no such thing"),
        (dies, "ended with exit code 3"),
    ],
)
def test_a_rank_that_fails_or_hangs_is_told(job, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "START_METHOD", "fork")
    monkeypatch.setattr(processes, "WAIT_S", 1 if job is waits else 60)
    monkeypatch.setitem(ranks.JOBS, "ulysses", job)
    started = time.monotonic()
    with pytest.raises(processes.RankError, match=said):
        processes.run_job("ulysses", load_config("tiny-cpu"), TWO)
    assert time.monotonic() - started < 50


# Slow: a process is started as a user would, and two more by it.
@pytest.mark.slow
def test_the_command_prints_json_and_nothing_else(tmp_path: Path) -> None:
    script = """
from longseq.launch.cli import main
from longseq.launch.verify import combined, run

if __name__ == "__main__":
    run.PARTS = (combined.on_several_processes,)
    raise SystemExit(main(["verify", "tiny-cpu", "parallel.ulysses_degree=2", "--json"]))
"""
    (tmp_path / "command.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "command.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    techniques = {row["technique"]: row["ok"] for row in json.loads(done.stdout)["techniques"]}
    assert techniques["Ulysses, 2 processes"]
    assert techniques["all together, 2 processes"]
    assert "leaked" not in done.stderr
