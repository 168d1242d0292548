from __future__ import annotations

import math

import pytest

from longseq.launch.config import ScheduleConfig
from longseq.launch.schedule import learning_rate

STEPS, PEAK = 11, 2.0


def curve(steps: int = STEPS, **schedule: object) -> list[float]:
    return [learning_rate(step, steps, PEAK, ScheduleConfig(**schedule)) for step in range(steps)]


def test_constant_stays_at_the_peak() -> None:
    assert curve(name="constant") == [PEAK] * STEPS


def test_linear_falls_evenly_to_its_share_of_the_peak() -> None:
    assert curve(name="linear", final_ratio=0.1) == pytest.approx(
        [2.0 - 0.18 * step for step in range(STEPS)]
    )


def test_cosine_is_half_a_wave() -> None:
    expected = [0.2 + 1.8 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(STEPS)]
    assert curve(name="cosine", final_ratio=0.1) == pytest.approx(expected)
    assert curve(name="cosine", final_ratio=0)[-1] == pytest.approx(0)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_warm_up_rises_from_the_first_step_and_reaches_the_peak(name: str) -> None:
    rates = curve(name=name, warmup_steps=4)
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[4] == PEAK
    assert rates[-1] == pytest.approx(PEAK if name == "constant" else 0.1 * PEAK)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_no_run_is_too_short(name: str) -> None:
    assert curve(1, name=name) == [PEAK]
    assert curve(2, name=name, warmup_steps=1) == [PEAK, PEAK]


def test_a_run_that_is_made_longer_never_rises_past_its_end() -> None:
    schedule = ScheduleConfig(name="cosine")
    assert learning_rate(STEPS + 5, STEPS, PEAK, schedule) == pytest.approx(0.1 * PEAK)
