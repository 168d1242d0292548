"""The learning rate as a function of the step alone, so that a resumed run needs no scheduler's state."""

from __future__ import annotations

import math

from .config import ScheduleConfig


def learning_rate(step: int, total_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Learning rate of a step.

    Args:
        step: Step that is taken, from 0.
        total_steps: Steps of the whole run.
        peak: Learning rate after warm-up.
        schedule: Its shape: linear warm-up over `warmup_steps`, then constant, linear or half a cosine
            down to `final_ratio * peak` at the last step.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return peak
    span = max(1, total_steps - 1 - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / span)
    fall = progress if schedule.name == "linear" else 0.5 * (1.0 - math.cos(math.pi * progress))
    return peak * (1.0 - (1.0 - schedule.final_ratio) * fall)
