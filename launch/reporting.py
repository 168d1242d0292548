"""What a run says of its steps, and at its end of what they took beside what was planned."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque

import torch

from ..distributed.groups import ProcessGroups
from .config import RunConfig
from .flops import ModelShape, peak_tflops
from .metrics import EtaEstimate, MetricsWriter, StepMetrics, peak_memory_gib
from .nonfinite import NONFINITE_FILE
from .run_state import RunState
from .setup import RunParts
from .step import StepResult

logger = logging.getLogger(__name__)

SUSPICIOUS_SHARE = 0.8
"""A pretrained model whose first loss is above this share of ln(vocabulary) guesses: something is wrong."""
REMEMBERED_STEPS = 1000


class Reporter:
    """Turns results of steps into metrics."""

    def __init__(
        self, config: RunConfig, groups: ProcessGroups, device: torch.device, parts: RunParts
    ) -> None:
        self._config, self._groups, self._device, self._parts = config, groups, device, parts
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self._peak = peak_tflops(name, config.train.precision)
        self._eta = EtaEstimate()
        self._seconds: deque[float] = deque(maxlen=REMEMBERED_STEPS)
        self._is_first = True
        self.shape: ModelShape | None = None
        """By which FLOPs are counted, if they can be."""
        try:
            self.shape = ModelShape.from_hf_config(parts.engine.module.config)
        except ValueError as error:
            logger.warning("model FLOP/s are not reported: %s", error)

    def step(self, metrics: MetricsWriter, state: RunState, result: StepResult, seconds: float) -> None:
        """Write the metrics of a step.

        Args:
            metrics: Where to.
            state: Behind the step.
            result: What it came to.
            seconds: Its wall time.
        """
        tflops = result.flops / seconds / self._groups.world_size / 1e12 if result.flops else None
        metrics.step(
            StepMetrics(
                step=state.step,
                total_steps=self._parts.total_steps,
                loss=result.loss,
                lr=result.lr,
                grad_norm=result.norm,
                tokens=result.tokens,
                seconds=seconds,
                tokens_per_second=result.tokens / seconds,
                model_tflops_per_gpu=tflops,
                mfu=None if tflops is None or self._peak is None else tflops / self._peak,
                peak_memory_gib=peak_memory_gib(self._device.type),
                epoch=state.sequences_seen / len(self._parts.train_set),
                tokens_seen=state.tokens_seen,
                eta_s=self._eta.update(seconds, self._parts.total_steps - state.step),
                nonfinite_steps=state.nonfinite_steps,
            )
        )
        if not self._is_first:  # which compiles and warms up
            self._seconds.append(seconds)
        self._is_first = False
        if state.step == 1 and self._config.model.name is not None and self._groups.is_main:
            _warn_of_guessing(result.loss, self._parts.engine.module.config.vocab_size)

    def end(self, metrics: MetricsWriter, state: RunState) -> None:
        """Say what of the whole run is worth it."""
        if state.nonfinite_steps:
            metrics.note(
                f"{state.nonfinite_steps} of {state.step} steps were skipped: their loss or gradient was not "
                f"finite ({self._config.log.run_dir}/{NONFINITE_FILE} names their sequences)"
            )
        if self._parts.plan is not None:
            from .planner.report import compare

            seconds = statistics.median(self._seconds) if self._seconds else None
            logger.info("%s", compare(self._parts.plan, peak_memory_gib(self._device.type), seconds))


def _warn_of_guessing(loss: float, vocab_size: int) -> None:
    guess = math.log(vocab_size)
    if loss > SUSPICIOUS_SHARE * guess:
        logger.warning(
            "the first loss of a pretrained model is %.2f, near the %.2f of guessing: check that "
            "tokenizer, chat template and model belong together.",
            loss,
            guess,
        )
