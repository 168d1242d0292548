"""The training loop: one function a phase of a run, from the config to the exported model."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed.engine import Engine, LocalEngine, NonFiniteGradientError
from ..distributed.groups import ProcessGroups
from ..distributed.loss import count_tokens, global_token_loss
from ..distributed.sequence import IGNORE_INDEX, shard_batch
from .checkpoint import Checkpoints, RunState
from .config import RunConfig
from .config_file import ParallelPlan, check_world, dump_config
from .data import Batch, SequenceDataset, evaluation_batches, micro_batches
from .export import export_checkpoint
from .flops import ModelShape, model_flops, peak_tflops
from .metrics import EtaEstimate, MetricsWriter, StepMetrics, peak_memory_gib
from .model import build_model, check_vocabulary
from .optimizer import build_optimizer
from .plot import plot_runs
from .prepare import prepare
from .processes import StopRequest
from .resume import check_same_walk, choose_checkpoint
from .schedule import learning_rate
from .tokenizer import load_tokenizer, padding_id, vocabulary_size

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
    plan = check_world(config, groups.world_size)
    run_dir = Path(config.log.run_dir)
    checkpoints = Checkpoints(run_dir, groups, config.checkpoint.keep)
    resume_from = choose_checkpoint(config, checkpoints)
    if resume_from is not None:
        check_same_walk(config, resume_from)
    run = _set_up(config, plan, groups, device, checkpoints)
    if resume_from is not None:
        run.state = checkpoints.load(resume_from, run.engine)
        logger.info("resumed from %s, after step %d", resume_from, run.state.step)
    if run.state.step >= run.total_steps:
        logger.info(
            "%s has trained all its %d steps; set log.run_dir for a new run, or more train.steps.",
            run_dir,
            run.total_steps,
        )
        if checkpoints.newest() is not None:  # it may have died between its last checkpoint and here
            run.finish(run_dir)
        return run.state
    if groups.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        _write_whole(run_dir / "config.yaml", dump_config(config))
    with MetricsWriter(
        run_dir,
        config.log,
        groups.is_main,
        resume_step=run.state.step,
        total_steps=run.total_steps,
        config=config.model_dump(),
    ) as metrics:
        run.loop(metrics)
    run.finish(run_dir)
    return run.state


def _set_up(
    config: RunConfig,
    plan: ParallelPlan,
    groups: ProcessGroups,
    device: torch.device,
    checkpoints: Checkpoints,
) -> _Run:
    tokenizer = load_tokenizer(config.data.tokenizer or config.model.name or "bytes")
    if groups.is_main:
        # The others find it done; where nodes do not share the cache, each builds its own.
        prepare(config.data, tokenizer, progress=True)
    groups.barrier()
    prepared = prepare(config.data, tokenizer)
    train_set, eval_set = (
        None if store is None else _sequences(config, store, tokenizer)
        for store in (prepared.train, prepared.heldout)
    )
    assert train_set is not None
    if config.train.steps is not None:
        total_steps = config.train.steps
    else:
        total_steps = math.ceil(config.train.epochs * len(train_set) / config.train.global_batch_sequences)
    if groups.is_main:
        logger.info(
            "data: %d sequences of up to %d tokens, %.1f%% of them text; %d steps of %d sequences",
            len(train_set),
            config.sequence.length,
            100 * train_set.packing.efficiency,
            total_steps,
            config.train.global_batch_sequences,
        )
    torch.manual_seed(config.train.seed)
    engine = _build_engine(config, plan, groups, device, tokenizer)
    torch.manual_seed(config.train.seed + 1 + groups.rank)  # dropout must not repeat from shard to shard
    return _Run(config, groups, device, engine, tokenizer, train_set, eval_set, total_steps, checkpoints)


def _sequences(config: RunConfig, store: Any, tokenizer: Any) -> SequenceDataset:
    return SequenceDataset(
        store,
        length=config.sequence.length,
        pack=config.data.pack,
        long_documents=config.data.long_documents,
        pad_token_id=padding_id(tokenizer),
    )


def _build_engine(
    config: RunConfig, plan: ParallelPlan, groups: ProcessGroups, device: torch.device, tokenizer: Any
) -> Engine:
    bf16 = config.train.precision == "bf16"
    use_zero = config.parallel.zero_stage > 0
    # ZeRO keeps float32 masters of its own, and frozen weights need none (peft makes adapters float32);
    # otherwise the weights are the masters.
    dtype = torch.bfloat16 if bf16 and (use_zero or config.model.lora is not None) else torch.float32
    model = build_model(config, groups, device, dtype)
    check_vocabulary(model, tokenizer)
    optimizer = build_optimizer(model, config.optimizer)
    if not use_zero:
        return LocalEngine(
            model,
            optimizer,
            groups,
            accumulation_steps=plan.accumulation_steps,
            clip_norm=config.optimizer.clip_norm,
            bf16=bf16,
        )
    from ..distributed.zero import DeepSpeedEngine, ZeroOptions

    options = ZeroOptions(
        config.parallel.zero_stage,
        plan.accumulation_steps,
        config.optimizer.clip_norm,
        bf16,
        config.parallel.offload_optimizer == "cpu",
        config.parallel.offload_parameters == "cpu",
    )
    return DeepSpeedEngine(model, optimizer, groups, options)


@dataclass
class _Run:
    """All that the loop holds."""

    config: RunConfig
    groups: ProcessGroups
    device: torch.device
    engine: Engine
    tokenizer: Any
    train_set: SequenceDataset
    eval_set: SequenceDataset | None
    total_steps: int
    checkpoints: Checkpoints
    state: RunState = field(default_factory=RunState)

    def loop(self, metrics: MetricsWriter) -> None:
        """Every step that is left, with evaluations and checkpoints where they are due."""
        config = self.config
        self.state = RunState(
            self.state.step,
            self.state.sequences_seen,
            self.state.tokens_seen,
            self.groups.world_size,
            config.parallel.zero_stage,
        )
        stop = StopRequest()
        eta = EtaEstimate()
        self._note_entropy(metrics)
        try:
            while self.state.step < self.total_steps:
                started = time.perf_counter()
                result = self._step(stop)
                self._report(metrics, result, time.perf_counter() - started, eta)
                step, is_last = self.state.step, self.state.step == self.total_steps
                if is_last or _due(step, config.train.eval_every):
                    self._evaluate(metrics)
                first = step == 1 and config.checkpoint.at_first_step
                if is_last or result.stop or first or _due(step, config.checkpoint.every):
                    self._save()
                if result.stop and not is_last:
                    asked_by = stop.asked_by or "another rank"
                    metrics.note(f"stopped by {asked_by}; saved step {step} of {self.total_steps}")
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
        done = self.state.step >= self.total_steps
        if done and self.config.checkpoint.export_at_end and self.groups.is_main:
            newest = self.checkpoints.newest()
            assert newest is not None
            logger.info("exported model: %s", export_checkpoint(newest, run_dir / "model", overwrite=True))
        self.groups.barrier()

    def _step(self, stop: StopRequest) -> _StepResult:
        """One optimizer step. The host waits for the device once before the update and once in it."""
        wholes = list(self._train_batches())
        batches = list(self._shards(wholes))
        num_tokens = count_tokens((batch["shift_labels"] for batch in batches), self.groups, self.device)
        shared = 1.0 / self.groups.sp_size  # ranks of a sequence count it together
        totals = torch.zeros(4, dtype=torch.float64, device=self.device)  # NLL, tokens, FLOPs, votes to stop
        totals[3] = float(stop.asked_by is not None)
        lr = learning_rate(self.state.step, self.total_steps, self.config.optimizer.lr, self.config.schedule)
        norm: float | None = None
        for index, (whole, batch) in enumerate(zip(wholes, batches, strict=True)):
            # Of the whole sequence: a shard's has padding, by which runs of unequal degree would differ.
            lengths = whole["document_offsets"].diff().tolist()
            totals[1:3] += torch.tensor([sum(lengths) * shared, self._flops(lengths) * shared]).to(
                self.device
            )
            nll = self._nll(batch)
            totals[0] += nll.detach()
            self.engine.backward(
                global_token_loss(nll, num_tokens, reducer_divisor=self.engine.reducer_divisor)
            )
            if index == len(batches) - 1:
                nll_sum, tokens, flops, votes = self.groups.all_sum(totals).tolist()
                loss = nll_sum / max(1.0, float(num_tokens))
                if not math.isfinite(loss):
                    raise self._non_finite(f"loss is {loss}")
            try:
                norm = self.engine.step(lr)
            except NonFiniteGradientError as error:
                raise self._non_finite(str(error)) from error
        self.state = self.state.after_step(self.config.train.global_batch_sequences, round(tokens))
        return _StepResult(loss, norm, round(tokens), flops, lr, votes > 0)

    def _train_batches(self) -> Iterator[Batch]:
        train = self.config.train
        return micro_batches(
            self.train_set,
            seed=train.seed,
            first_sequence=self.state.sequences_seen,
            global_batch=train.global_batch_sequences,
            micro_batch=train.micro_batch_sequences,
            dp_rank=self.groups.dp_rank,
            dp_size=self.groups.dp_size,
        )

    def _shards(self, batches: Iterable[Batch]) -> Iterator[dict[str, Tensor]]:
        for batch in batches:
            yield shard_batch(batch, self.groups)

    def _nll(self, batch: dict[str, Tensor]) -> Tensor:
        """Summed negative log-likelihood of this rank's labels of a micro batch."""
        on_device = {
            # Documents stay with the host: attention needs their bounds there in every layer.
            name: tensor if name == "document_offsets" else tensor.to(self.device, non_blocking=True)
            for name, tensor in batch.items()
        }
        labels = on_device["shift_labels"]
        return self.engine(**on_device, labels=labels, num_items_in_batch=1, use_cache=False).loss

    def _evaluate(self, metrics: MetricsWriter) -> None:
        if self.eval_set is None:
            return
        started = time.perf_counter()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.engine.module.eval()
        with torch.no_grad():
            for batch in self._shards(self._eval_batches()):
                totals[0] += self._nll(batch)
                totals[1] += (batch["shift_labels"] != IGNORE_INDEX).sum().to(self.device)
        self.engine.module.train()
        nll_sum, num_tokens = self.groups.all_sum(totals).tolist()
        seconds = time.perf_counter() - started
        metrics.evaluation(self.state.step, nll_sum / max(1.0, num_tokens), round(num_tokens), seconds)

    def _eval_batches(self) -> Iterator[Batch]:
        assert self.eval_set is not None
        return evaluation_batches(
            self.eval_set,
            max_sequences=self.config.train.eval_sequences,
            micro_batch=self.config.train.micro_batch_sequences,
            dp_rank=self.groups.dp_rank,
            dp_size=self.groups.dp_size,
        )

    def _note_entropy(self, metrics: MetricsWriter) -> None:
        """The loss of a model that knows how frequent each word is and no more, to hold the curve against."""
        if self.eval_set is None or self.state.step > 0:
            return
        counts = torch.zeros(vocabulary_size(self.tokenizer), dtype=torch.float64, device=self.device)
        for batch in self._shards(self._eval_batches()):
            labels = batch["shift_labels"].flatten()
            counts += torch.bincount(labels[labels >= 0], minlength=len(counts)).to(counts)
        shares = self.groups.all_sum(counts) / counts.sum().clamp(min=1)
        entropy = float(torch.special.entr(shares).sum())
        metrics.reference("unigram entropy of the held-out text", entropy)

    def _report(self, metrics: MetricsWriter, result: _StepResult, seconds: float, eta: EtaEstimate) -> None:
        state = self.state
        tflops = result.flops / seconds / self.groups.world_size / 1e12 if result.flops else None
        metrics.step(
            StepMetrics(
                step=state.step,
                total_steps=self.total_steps,
                loss=result.loss,
                lr=result.lr,
                grad_norm=result.norm,
                tokens=result.tokens,
                seconds=seconds,
                tokens_per_second=result.tokens / seconds,
                model_tflops_per_gpu=tflops,
                mfu=None if tflops is None or self._peak is None else tflops / self._peak,
                peak_memory_gib=peak_memory_gib(self.device.type),
                epoch=state.sequences_seen / len(self.train_set),
                tokens_seen=state.tokens_seen,
                eta_s=eta.update(seconds, self.total_steps - state.step),
            )
        )
        if state.step == 1 and self.config.model.name is not None:
            guess = math.log(vocabulary_size(self.tokenizer))
            if result.loss > SUSPICIOUS_SHARE * guess:
                logger.warning(
                    "the first loss of a pretrained model is %.2f, near the %.2f of guessing: check that "
                    "tokenizer, chat template and model belong together.",
                    result.loss,
                    guess,
                )

    def _save(self) -> None:
        self.checkpoints.save(self.engine, self.state, self._write_model_files)

    def _write_model_files(self, folder: Path) -> None:
        (folder / "config.yaml").write_text(dump_config(self.config))
        self.engine.module.config.save_pretrained(folder / "hf")
        self.tokenizer.save_pretrained(folder / "hf")

    def _non_finite(self, what: str) -> TrainingError:
        newest = self.checkpoints.newest()
        left = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint yet"
        return TrainingError(
            f"step {self.state.step + 1}: {what}. Stopped before the update; {left}. Try a lower "
            "optimizer.lr, more schedule.warmup_steps, or look at the sequences of this step."
        )

    def __post_init__(self) -> None:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        self._peak = peak_tflops(name, self.config.train.precision)
        try:
            self._shape: ModelShape | None = ModelShape.from_hf_config(self.engine.module.config)
        except ValueError as error:
            logger.warning("model FLOP/s are not reported: %s", error)
            self._shape = None

    def _flops(self, document_lengths: list[int]) -> float:
        if self._shape is None:
            return 0.0
        return model_flops(self._shape, document_lengths, frozen_weights=self.config.model.lora is not None)


@dataclass(frozen=True)
class _StepResult:
    loss: float
    norm: float | None
    tokens: int
    flops: float
    lr: float
    stop: bool


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _write_whole(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(text)
    draft.replace(path)
