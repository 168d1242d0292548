"""What a person and a program read of a plan."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from plan_samples import machine_with, plan_config, work_of

from longseq.launch.planner.advice import advice
from longseq.launch.planner.drawing import draw
from longseq.launch.planner.plan import Plan, make_plan
from longseq.launch.planner.report import as_json, compare, log_plan, print_plan, verdict


@pytest.fixture(scope="module")
def fitting() -> Plan:
    config = plan_config(
        8, sequence={"length": "64k", "save_attention": "auto"}, parallel={"zero_stage": "auto"}
    )
    return make_plan(config, machine_with(79), work=work_of(config))


@pytest.fixture(scope="module")
def too_large() -> Plan:
    config = plan_config(2, sequence={"length": "4M"})
    return make_plan(config, machine_with(60, host_gib=100), work=work_of(config))


def test_json_has_all_of_it_and_comes_back_equal(fitting: Plan) -> None:
    content = as_json(fitting, ["said"])
    assert json.loads(json.dumps(content, allow_nan=False)) == json.loads(json.dumps(content))
    read = json.loads(json.dumps(content))
    assert read["fits"] is True
    assert sum(part["gpu_bytes"] for part in read["memory"]["parts"]) == read["memory"]["peak_bytes"]
    assert (
        read["memory"]["peak_bytes"] < read["memory"]["reserved_bytes"] <= read["memory"]["card_room_bytes"]
    )
    assert read["seconds"]["step"] == pytest.approx(sum(read["seconds"]["parts"].values()))
    assert read["knobs"]["length"] == 65536
    assert read["knobs"]["attention"] == {
        "gpu_layers": fitting.knobs.attention.gpu_layers,
        "host": fitting.knobs.attention.host,
        "everything": fitting.knobs.attention.everything,
    }
    assert [reason["key"] for reason in read["reasons"]] == [reason.key for reason in fitting.reasons]
    assert f"parallel.zero_stage={fitting.knobs.zero_stage}" in read["settings"]
    assert read["notes"] == ["said"]
    assert read["machine"]["gpu"]["memory_bytes"] == fitting.machine.gpu.memory_bytes


def test_the_tables_say_what_is_taken_of_what(fitting: Plan, capsys: pytest.CaptureFixture) -> None:
    print_plan(fitting, ["nobody said which GPU"])
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0] == "note: nobody said which GPU"
    assert "65,536 tokens a sequence" in lines[1]
    assert lines[2].startswith("fits: ")
    for part in fitting.memory.parts:
        assert part.name in text
    peak = f"{fitting.memory.peak_bytes / 2**30:.1f}"
    assert next(line for line in lines if line.startswith("sum")).split()[1] == peak
    assert next(line for line in lines if line.startswith("room")).split()[1] == "76.6"
    assert "sequence.save_attention" in text
    assert "What would help" not in text
    assert all(line == line.rstrip() for line in lines)
    # Every row is whole in a log file: nothing is cut off at a terminal's width.
    assert "…" not in text
    assert all(reason.why.split()[-1] in text for reason in fitting.reasons)


def test_what_does_not_fit_is_told_with_what_would_help(
    too_large: Plan, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    print_plan(too_large)
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text
    assert text.index("What would help") < text.index(f"sequence.length={too_large.longest_tokens}")
    with caplog.at_level(logging.INFO, logger="longseq"):
        log_plan(too_large)
    warning = caplog.records[-1]
    assert warning.levelno == logging.WARNING
    assert advice(too_large)[0] in warning.getMessage()


def test_a_short_step_is_told_in_milliseconds(fitting: Plan) -> None:
    short = replace(fitting, seconds=replace(fitting.seconds, seconds=0.0139))
    assert "; 13.9ms a step, " in verdict(short)


def test_a_run_says_its_plan_in_a_few_lines(fitting: Plan, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="longseq"):
        log_plan(fitting)
    lines = caplog.text.splitlines()
    assert 2 <= len(lines) <= 5
    assert all(record.levelno == logging.INFO for record in caplog.records)
    assert "fits: " in lines[0]
    assert "tokens" in lines[1]


def test_what_was_expected_stands_beside_what_was_measured(fitting: Plan) -> None:
    peak, step = fitting.memory.peak_bytes / 2**30, fitting.seconds.seconds
    line = compare(fitting, 1.1 * peak, 0.5 * step)
    assert f"peak memory {1.1 * peak:.1f} GiB, planned {peak:.1f} (+10 %)" in line
    assert "(-50 %)" in line
    assert "\n" not in line
    assert "step" not in compare(fitting, peak, None)


def test_a_picture_is_drawn_whole_or_not_at_all(fitting: Plan, too_large: Plan, tmp_path: Path) -> None:
    for name, plan in (("fits.png", fitting), ("too-large.png", too_large)):
        draw(plan, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fits.png", "too-large.png"]
    with pytest.raises(ValueError, match=r"memory\.bmp: unknown kind of image.*\.png"):
        draw(fitting, tmp_path / "memory.bmp")
