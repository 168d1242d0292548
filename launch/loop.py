"""The loop over a run's steps: reports, evaluations and checkpoints where they are due, and when to stop."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

import torch

from ..distributed.groups import ProcessGroups
from .checkpoint import Checkpoints, SaveError
from .config import RunConfig
from .config_file import dump_config
from .data.tokenizer import vocabulary_size
from .evaluation import Evaluator
from .exit_status import STOPPED_ITSELF
from .metrics import MetricsWriter
from .nonfinite import NONFINITE_FILE, culprits, weights_are_finite, write_step
from .reporting import Reporter
from .requests import SAVE_FILE, Requests
from .run_state import RunState
from .setup import RunParts
from .step import Stepper, StepResult

logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """The run stopped itself; the message says at which step and what is left."""

    exit_status = STOPPED_ITSELF


class Loop:
    """The steps of a run that are left, on this rank."""

    def __init__(
        self,
        config: RunConfig,
        groups: ProcessGroups,
        device: torch.device,
        parts: RunParts,
        checkpoints: Checkpoints,
        state: RunState,
    ) -> None:
        self.state = replace(state, data_digest=parts.data_digest)
        self._config, self._groups, self._device = config, groups, device
        self._parts, self._checkpoints = parts, checkpoints
        self._run_dir = Path(config.log.run_dir)
        self._reporter = Reporter(config, groups, device, parts)
        self._stepper = Stepper(config, groups, device, parts, self._reporter.shape)
        self._evaluator: Evaluator | None = None
        if parts.eval_set is not None:
            self._evaluator = Evaluator(parts.eval_set, config.train, groups, device)

    def run(self, metrics: MetricsWriter) -> None:
        """Every step that is left.

        Raises:
            TrainingError: Loss or gradient became non-finite.
            SaveError: The first checkpoint, or the last, could not be saved.
        """
        requests = Requests(self._run_dir, self._groups.is_main)
        if self._evaluator is not None and self.state.step == 0:
            entropy = self._evaluator.unigram_entropy(vocabulary_size(self._parts.tokenizer))
            metrics.reference("unigram entropy of the held-out text", entropy)
        try:
            while self.state.step < self._parts.total_steps:
                result = self._step(requests, metrics)
                self._settle(result)
                is_last = self.state.step == self._parts.total_steps
                # Asked to stop, there may be seconds left: they are for the checkpoint.
                if is_last or (self._is_due(self._config.train.eval_every) and not result.wishes.stop):
                    self._evaluate(metrics)
                asked_by = requests.stop_asked_by if result.wishes.stop else None
                requests.take(replace(result.wishes, stop=result.wishes.stop or is_last))
                saved = self._save_where_due(result, is_last)
                if result.wishes.stop and not is_last:
                    did = "saved" if saved else "did not save"
                    total = self._parts.total_steps
                    metrics.note(
                        f"stopped by {asked_by or 'another rank'}; {did} step {self.state.step} of {total}"
                    )
                    break
            self._checkpoints.commit()
            self._reporter.end(metrics, self.state)
        except BaseException as error:
            self._break_off(error)
            raise
        finally:
            requests.close()

    def _step(self, requests: Requests, metrics: MetricsWriter) -> StepResult:
        started = time.perf_counter()
        result = self._stepper.step(self.state, requests.wishes(), is_writing=self._checkpoints.is_writing)
        if result.problem is not None:
            self._not_finite(result, result.problem)
        state = self.state.after_step(self._config.train.global_batch_sequences, result.tokens)
        skipped = result.problem is not None
        self.state = replace(
            state,
            nonfinite_steps=state.nonfinite_steps + skipped,
            nonfinite_in_a_row=state.nonfinite_in_a_row + 1 if skipped else 0,
        )
        self._reporter.step(metrics, self.state, result, time.perf_counter() - started)
        return result

    def _not_finite(self, result: StepResult, problem: str) -> None:
        """Write down what the step was made of; then go on without it, or stop."""
        train, state = self._config.train, self.state
        too_many = state.nonfinite_in_a_row >= train.max_nonfinite_steps
        stops = train.on_nonfinite == "stop" or too_many
        sums = culprits(result.nll_sums, train, self._groups, self._device)
        if self._groups.is_main:
            action = "stopped" if stops else "skipped"
            write_step(self._run_dir, state, problem, action, sums, self._parts, train, self._groups.dp_size)
        where = f"its sequences are in {self._run_dir / NONFINITE_FILE}"
        if not stops:
            self._say(logging.WARNING, f"step {state.step + 1} is skipped: {problem}; {where}.")
            return
        if too_many:
            problem += f", after {state.nonfinite_in_a_row} skipped steps (train.max_nonfinite_steps)"
        self._finish_writing()
        newest = self._checkpoints.newest()
        left = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint yet"
        when = "after" if self._config.optimizer.in_backward else "before"
        raise TrainingError(
            f"step {state.step + 1}: {problem}. Stopped {when} the update; {left}, and {where}. Try a lower "
            "optimizer.lr, more schedule.warmup_steps, or look at these sequences; "
            "train.on_nonfinite=skip leaves such steps out."
        )

    def _settle(self, result: StepResult) -> None:
        """Complete a checkpoint that was written meanwhile: it may be the one that a crash needs."""
        if self._checkpoints.is_pending and not result.is_writing:
            try:
                self._checkpoints.commit()
            except SaveError as error:
                self._say(logging.ERROR, f"{error} The run goes on.")

    def _save_where_due(self, result: StepResult, is_last: bool) -> bool:
        """Save, if that is due; whether it is saved, or will be while the run goes on."""
        config, step = self._config.checkpoint, self.state.step
        must = is_last or result.wishes.stop or (step == 1 and config.at_first_step)
        if not (must or result.wishes.save or self._is_due(config.every)):
            return False
        if self.state.nonfinite_in_a_row and not weights_are_finite(self._parts, self._groups, self._device):
            if is_last:
                raise TrainingError(
                    f"step {step}, the last: weights are not finite; the newest checkpoint is "
                    f"{self._checkpoints.newest()}. Go on from it with a lower optimizer.lr."
                )
            self._say(logging.ERROR, f"step {step} is not saved: weights are not finite.")
            return False
        if result.wishes.save:
            self._say(logging.INFO, f"step {step} is saved, as {self._run_dir / SAVE_FILE} asked")
        try:
            self._checkpoints.save(self._parts.engine, self.state, self._write_model_files, wait=must)
        except SaveError as error:
            if must:
                raise
            self._say(logging.ERROR, f"{error} The run goes on.")
            return False
        return True

    def _break_off(self, error: BaseException) -> None:
        """Do not lose the checkpoint that is being written to what ends the run.

        With other ranks it is lost: to complete it, all would have to come, and the earlier ones are there.
        """
        if self._groups.world_size > 1:
            return
        if not isinstance(error, Exception):
            self._checkpoints.abandon()
            return
        self._finish_writing()

    def _finish_writing(self) -> None:
        try:
            self._checkpoints.commit()
        except SaveError as problem:
            self._say(logging.ERROR, str(problem))

    def _evaluate(self, metrics: MetricsWriter) -> None:
        if self._evaluator is None:
            return
        started = time.perf_counter()
        loss, num_tokens = self._evaluator.loss(self._parts.engine)
        metrics.evaluation(self.state.step, loss, num_tokens, time.perf_counter() - started)

    def _write_model_files(self, folder: Path) -> None:
        model = self._parts.engine.module
        (folder / "config.yaml").write_text(dump_config(self._config))
        model.config.save_pretrained(folder / "hf")
        model.generation_config.save_pretrained(folder / "hf")
        self._parts.tokenizer.save_pretrained(folder / "hf")

    def _say(self, level: int, text: str) -> None:
        """What all ranks know, one says."""
        if self._groups.is_main:
            logger.log(level, "%s", text)

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.state.step % every == 0
