"""The training loop: one function a phase of a run, from the config to the exported model."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..distributed.engine import NonFiniteGradientError
from ..distributed.groups import ProcessGroups
from ..distributed.loss import count_tokens, global_token_loss
from ..distributed.sequence import shard_batch
from .checkpoint import Checkpoints, RunState, read_state
from .config import RunConfig
from .config_file import check_world, dump_config
from .data.dataset import Batch, micro_batches
from .data.tokenizer import vocabulary_size
from .evaluation import Evaluator, summed_nll
from .export import export_checkpoint
from .flops import ModelShape, model_flops, peak_tflops
from .metrics import EtaEstimate, MetricsWriter, StepMetrics, peak_memory_gib
from .plot import plot_runs
from .processes import StopRequest, sole_user
from .resume import check_same_data, check_same_walk, choose_checkpoint
from .schedule import learning_rate
from .setup import RunParts, set_up

logger = logging.getLogger(__name__)

SUSPICIOUS_SHARE = 0.8
"""A pretrained model whose first loss is above this share of ln(vocabulary) guesses: something is wrong."""


class TrainingError(RuntimeError):
    """The run stopped itself; the message says at which step and what is left."""


def train(config: RunConfig, groups: ProcessGroups, device: torch.device) -> RunState:
    """Train as a config says, going on from its checkpoint where there is one.

    Every rank calls it.

    Args:
        config: The run.
        groups: This rank's process groups.
        device: Where this rank computes.

    Returns:
        Where the run stopped.

    Raises:
        ValueError: Config, data, model or checkpoint do not fit together.
        TrainingError: Loss or gradient became non-finite; no update was made with it.
    """
    run_dir = Path(config.log.run_dir)
    with sole_user(run_dir) if groups.is_main else nullcontext():
        return _train(config, groups, device, run_dir)


def _train(config: RunConfig, groups: ProcessGroups, device: torch.device, run_dir: Path) -> RunState:
    plan = check_world(config, groups.world_size)
    checkpoints = Checkpoints(run_dir, groups, config.checkpoint.keep)
    resume_from = choose_checkpoint(config, checkpoints, groups)
    if resume_from is not None:
        check_same_walk(config, resume_from)
    run = _Run(config, groups, device, set_up(config, plan, groups, device), checkpoints)
    if resume_from is not None:
        check_same_data(read_state(resume_from), run.parts.data_digest, resume_from)
        run.state = checkpoints.load(resume_from, run.parts.engine)
        logger.info("resumed from %s, after step %d", resume_from, run.state.step)
    if run.state.step >= run.parts.total_steps:
        logger.info(
            "%s has trained all its %d steps; set log.run_dir for a new run, or more train.steps.",
            run_dir,
            run.parts.total_steps,
        )
        if checkpoints.newest() is not None:  # it may have died between its last checkpoint and here
            run.finish(run_dir)
        return run.state
    if groups.is_main:
        _write_whole(run_dir / "config.yaml", dump_config(config))
    with MetricsWriter(
        run_dir,
        config.log,
        groups.is_main,
        resume_step=run.state.step,
        total_steps=run.parts.total_steps,
        config=config.model_dump(),
    ) as metrics:
        run.loop(metrics)
    run.finish(run_dir)
    return run.state


@dataclass
class _Run:
    """All that the loop holds."""

    config: RunConfig
    groups: ProcessGroups
    device: torch.device
    parts: RunParts
    checkpoints: Checkpoints
    state: RunState = field(default_factory=RunState)

    def __post_init__(self) -> None:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        self._peak = peak_tflops(name, self.config.train.precision)
        self._shape: ModelShape | None = None
        try:
            self._shape = ModelShape.from_hf_config(self.parts.engine.module.config)
        except ValueError as error:
            logger.warning("model FLOP/s are not reported: %s", error)
        self._evaluator: Evaluator | None = None
        if self.parts.eval_set is not None:
            self._evaluator = Evaluator(self.parts.eval_set, self.config.train, self.groups, self.device)

    def loop(self, metrics: MetricsWriter) -> None:
        """Every step that is left, with evaluations and checkpoints where they are due."""
        config = self.config
        self.state = replace(self.state, data_digest=self.parts.data_digest)
        stop = StopRequest()
        eta = EtaEstimate()
        if self._evaluator is not None and self.state.step == 0:
            entropy = self._evaluator.unigram_entropy(vocabulary_size(self.parts.tokenizer))
            metrics.reference("unigram entropy of the held-out text", entropy)
        try:
            while self.state.step < self.parts.total_steps:
                started = time.perf_counter()
                result = self._step(stop)
                self._report(metrics, result, time.perf_counter() - started, eta)
                step, is_last = self.state.step, self.state.step == self.parts.total_steps
                # Asked to stop, there may be seconds left: they are for the checkpoint.
                if is_last or (_due(step, config.train.eval_every) and not result.stop):
                    self._evaluate(metrics)
                first = step == 1 and config.checkpoint.at_first_step
                if is_last or result.stop or first or _due(step, config.checkpoint.every):
                    self._save()
                if result.stop and not is_last:
                    asked_by = stop.asked_by or "another rank"
                    metrics.note(f"stopped by {asked_by}; saved step {step} of {self.parts.total_steps}")
                    return
        finally:
            stop.restore()

    def finish(self, run_dir: Path) -> None:
        """What a run leaves behind once it is over: the plot, and the exported model if asked for."""
        if self.groups.is_main:
            try:
                logger.info("loss curve: %s", plot_runs([run_dir]))
            except (ValueError, OSError) as error:
                logger.warning("no loss curve was drawn: %s", error)
        done = self.state.step >= self.parts.total_steps
        if done and self.config.checkpoint.export_at_end and self.groups.is_main:
            newest = self.checkpoints.newest()
            assert newest is not None
            logger.info("exported model: %s", export_checkpoint(newest, run_dir / "model", overwrite=True))

    def _step(self, stop: StopRequest) -> _StepResult:
        """One optimizer step. The host waits for the device for the loss, and again for the norm."""
        engine, groups = self.parts.engine, self.groups
        wholes = list(self._micro_batches())
        batches = [shard_batch(whole, groups) for whole in wholes]
        num_tokens = count_tokens((batch["shift_labels"] for batch in batches), groups, self.device)
        lr = learning_rate(
            self.state.step, self.parts.total_steps, self.config.optimizer.lr, self.config.schedule
        )
        nll_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        norm: float | None = None
        engine.begin_step(lr)
        for index, batch in enumerate(batches):
            nll = summed_nll(engine, batch, self.device)
            nll_sum += nll.detach()
            engine.backward(global_token_loss(nll, num_tokens, reducer_divisor=engine.reducer_divisor))
            if index == len(batches) - 1:
                totals = self._totals(nll_sum, wholes, stop)
                loss = totals.nll / max(1.0, float(num_tokens))
                if not math.isfinite(loss):
                    raise self._non_finite(f"loss is {loss}")
            try:
                norm = engine.step(lr)
            except NonFiniteGradientError as error:
                raise self._non_finite(str(error)) from error
        self.state = self.state.after_step(self.config.train.global_batch_sequences, totals.tokens)
        return _StepResult(loss, norm, totals.tokens, totals.flops, lr, totals.stop)

    def _micro_batches(self) -> Iterator[Batch]:
        train = self.config.train
        return micro_batches(
            self.parts.train_set,
            seed=train.seed,
            first_sequence=self.state.sequences_seen,
            global_batch=train.global_batch_sequences,
            micro_batch=train.micro_batch_sequences,
            dp_rank=self.groups.dp_rank,
            dp_size=self.groups.dp_size,
        )

    def _totals(self, nll_sum: torch.Tensor, wholes: list[Batch], stop: StopRequest) -> _Totals:
        """Sums over all ranks, and whether any was asked to stop: one collective."""
        # Of the whole sequence: a shard's has padding, by which runs of unequal degree would differ.
        lengths = [length for whole in wholes for length in whole["document_offsets"].diff().tolist()]
        shared = 1.0 / self.groups.sp_size  # ranks of a sequence count it together
        mine = [0.0, sum(lengths) * shared, self._flops(lengths) * shared, float(stop.asked_by is not None)]
        totals = torch.tensor(mine, dtype=torch.float64).to(self.device)
        totals[0] = nll_sum
        nll, tokens, flops, votes = self.groups.all_sum(totals).tolist()
        return _Totals(nll, round(tokens), flops, votes > 0)

    def _evaluate(self, metrics: MetricsWriter) -> None:
        if self._evaluator is None:
            return
        started = time.perf_counter()
        loss, num_tokens = self._evaluator.loss(self.parts.engine)
        metrics.evaluation(self.state.step, loss, num_tokens, time.perf_counter() - started)

    def _report(self, metrics: MetricsWriter, result: _StepResult, seconds: float, eta: EtaEstimate) -> None:
        state = self.state
        tflops = result.flops / seconds / self.groups.world_size / 1e12 if result.flops else None
        metrics.step(
            StepMetrics(
                step=state.step,
                total_steps=self.parts.total_steps,
                loss=result.loss,
                lr=result.lr,
                grad_norm=result.norm,
                tokens=result.tokens,
                seconds=seconds,
                tokens_per_second=result.tokens / seconds,
                model_tflops_per_gpu=tflops,
                mfu=None if tflops is None or self._peak is None else tflops / self._peak,
                peak_memory_gib=peak_memory_gib(self.device.type),
                epoch=state.sequences_seen / len(self.parts.train_set),
                tokens_seen=state.tokens_seen,
                eta_s=eta.update(seconds, self.parts.total_steps - state.step),
            )
        )
        if state.step == 1 and self.config.model.name is not None and self.groups.is_main:
            _warn_of_guessing(result.loss, self.parts.engine.module.config.vocab_size)

    def _save(self) -> None:
        self.checkpoints.save(self.parts.engine, self.state, self._write_model_files)

    def _write_model_files(self, folder: Path) -> None:
        model = self.parts.engine.module
        (folder / "config.yaml").write_text(dump_config(self.config))
        model.config.save_pretrained(folder / "hf")
        model.generation_config.save_pretrained(folder / "hf")
        self.parts.tokenizer.save_pretrained(folder / "hf")

    def _non_finite(self, what: str) -> TrainingError:
        newest = self.checkpoints.newest()
        left = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint yet"
        when = "after" if self.config.optimizer.in_backward else "before"
        return TrainingError(
            f"step {self.state.step + 1}: {what}. Stopped {when} the update; {left}. Try a lower "
            "optimizer.lr, more schedule.warmup_steps, or look at the sequences of this step."
        )

    def _flops(self, document_lengths: list[int]) -> float:
        if self._shape is None:
            return 0.0
        return model_flops(self._shape, document_lengths, frozen_weights=self.config.model.lora is not None)


@dataclass(frozen=True)
class _Totals:
    nll: float
    tokens: int
    flops: float
    stop: bool


@dataclass(frozen=True)
class _StepResult:
    loss: float
    norm: float | None
    tokens: int
    flops: float
    lr: float
    stop: bool


def _warn_of_guessing(loss: float, vocab_size: int) -> None:
    guess = math.log(vocab_size)
    if loss > SUSPICIOUS_SHARE * guess:
        logger.warning(
            "the first loss of a pretrained model is %.2f, near the %.2f of guessing: check that "
            "tokenizer, chat template and model belong together.",
            loss,
            guess,
        )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _write_whole(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(text)
    draft.replace(path)
