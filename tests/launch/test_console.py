"""What a person reads while a run goes on."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from longseq.launch.console import ConsoleSink, format_duration, format_rate, format_record, format_step
from longseq.launch.metric_records import Evaluation, Note, Reference, StepMetrics

METRICS = StepMetrics(
    step=12,
    total_steps=200,
    loss=2.34561,
    lr=1e-3,
    grad_norm=1.234,
    tokens=65536,
    seconds=5.3,
    tokens_per_second=12345.6,
    model_tflops_per_gpu=446.2,
    mfu=0.451,
    peak_memory_gib=3.214,
    epoch=0.5,
    tokens_seen=786432,
    eta_s=62.4,
)


def step(number, total=20, **changes):
    return dataclasses.replace(METRICS, step=number, total_steps=total, **changes)


def printed(sink_steps, every=1, **options):
    stream = io.StringIO()
    sink = ConsoleSink(every, console=Console(file=stream, width=40), bar=False, **options)
    for record in sink_steps:
        sink.write(record)
    sink.close(failed=False)
    return stream.getvalue().splitlines()


def test_line_of_a_step():
    assert format_step(METRICS) == (
        "step 12/200 | loss 2.3456 | lr 1.0e-03 | grad norm 1.23 | 12.3k tok/s | "
        "446 TFLOP/s (MFU 45.1%) | 3.21 GiB | ETA 1m02s"
    )


def test_what_is_not_known_is_left_out():
    line = format_step(
        dataclasses.replace(METRICS, grad_norm=None, model_tflops_per_gpu=0.00123, mfu=None, eta_s=None)
    )
    assert line == "step 12/200 | loss 2.3456 | lr 1.0e-03 | 12.3k tok/s | 0.00123 TFLOP/s | 3.21 GiB"


def test_steps_that_were_skipped_are_counted():
    line = format_step(dataclasses.replace(METRICS, loss=float("nan"), grad_norm=None, nonfinite_steps=3))
    assert line.startswith("step 12/200 | loss nan | 3 skipped so far | lr 1.0e-03 | 12.3k tok/s")


def test_the_last_step_has_no_time_left():
    assert "ETA" not in format_step(dataclasses.replace(METRICS, eta_s=0.0))


def test_a_loss_that_is_not_finite_shows():
    assert "loss nan" in format_step(dataclasses.replace(METRICS, loss=float("nan")))


def test_lines_of_other_records():
    assert format_record(Evaluation(50, 2.1, 65536, 3.21)) == (
        "eval at step 50 | loss 2.1000 | 65,536 tokens | 3.2s"
    )
    assert format_record(Note(3, "[saved] checkpoint")) == "[saved] checkpoint"
    assert format_record(Reference("unigram entropy", 3.18)) == "unigram entropy: 3.1800"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.6, "1m00s"),
        (62.4, "1m02s"),
        (3599.7, "1h00m"),
        (7500, "2h05m"),
        (86399, "1d00h"),
        (273_600, "3d04h"),
    ],
)
def test_durations_never_show_a_sixtieth_minute(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0.5, "0.500"), (87.46, "87.5"), (512, "512"), (999.7, "1.00k"), (12345, "12.3k"), (999_900, "1.00M")],
)
def test_rates_never_show_an_exponent(rate, text):
    assert format_rate(rate) == text


def test_every_counts_for_steps_alone():
    records = [*(step(number) for number in range(3, 21)), Evaluation(20, 2.0, 10, 1.0), Note(20, "saved")]
    lines = printed(records, every=8, resume_step=2)
    # The first one shows that the run lives, the last one how it ends.
    assert [line.split(" |")[0] for line in lines] == [
        "step 3/20",
        "step 8/20",
        "step 16/20",
        "step 20/20",
        "eval at step 20",
        "saved",
    ]


def test_lines_are_not_wrapped_to_the_width_of_a_log_file():
    assert printed([step(1)]) == [format_step(step(1))]


def test_no_bar_in_a_log_file_even_if_colours_are_forced(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    sink = ConsoleSink(1)
    sink.write(step(1))
    sink.close(failed=False)
    assert capsys.readouterr().out == format_step(step(1)) + "\n"


def test_bar_stands_below_whole_lines():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=60, color_system=None)
    sink = ConsoleSink(1, resume_step=2, total_steps=20, console=console, bar=True)
    sink.write(Note(2, "[bold]not markup[/bold]"))
    sink.write(step(3, eta_s=61.0))
    sink.close(failed=False)
    text = stream.getvalue()
    assert "2/20 · waiting" in text
    assert "3/20 · loss 2.3456 · 1m01s left" in text
    assert format_step(step(3, eta_s=61.0)) + "\n" in text
    assert "[bold]not markup[/bold]" in text
