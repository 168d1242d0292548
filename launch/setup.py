"""What a run needs before its first step: tokenizer, sequences, model and engine."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch

from ..distributed.engine import Engine, LocalEngine
from ..distributed.groups import ProcessGroups
from .config import RunConfig
from .config_file import ParallelPlan
from .data.dataset import SequenceDataset
from .data.prepare import prepare
from .data.token_store import TokenStore
from .data.tokenizer import load_tokenizer, padding_id
from .model import build_model, check_vocabulary
from .optimizer import build_optimizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunParts:
    """The parts of a run, on this rank.

    Attributes:
        tokenizer: The tokenizer of data and model.
        train_set: Sequences to train on.
        eval_set: Sequences to evaluate on, if there are any.
        engine: The model and its optimizer.
        total_steps: Optimizer steps of the whole run.
    """

    tokenizer: Any
    train_set: SequenceDataset
    eval_set: SequenceDataset | None
    engine: Engine
    total_steps: int


def set_up(config: RunConfig, plan: ParallelPlan, groups: ProcessGroups, device: torch.device) -> RunParts:
    """Prepare the data unless that has been done, and build the model; every rank calls it.

    Raises:
        ValueError: Data, tokenizer and model do not fit together.
    """
    tokenizer = load_tokenizer(config.data.tokenizer or config.model.name or "bytes")
    if groups.is_main:
        # The others find it done; where nodes do not share the cache, each builds its own.
        prepare(config.data, tokenizer, progress=True)
    groups.barrier()
    prepared = prepare(config.data, tokenizer)
    train_set = _sequences(config, prepared.train, tokenizer)
    eval_set = None if prepared.heldout is None else _sequences(config, prepared.heldout, tokenizer)
    total_steps = config.train.steps
    if total_steps is None:
        total_steps = math.ceil(config.train.epochs * len(train_set) / config.train.global_batch_sequences)
    logger.info(
        "data: %d sequences of up to %d tokens, %.1f%% of them text; %d steps of %d sequences",
        len(train_set),
        config.sequence.length,
        100 * train_set.packing.efficiency,
        total_steps,
        config.train.global_batch_sequences,
    )
    torch.manual_seed(config.train.seed)
    engine = build_engine(config, plan, groups, device, tokenizer)
    torch.manual_seed(config.train.seed + 1 + groups.rank)  # dropout must not repeat from shard to shard
    return RunParts(tokenizer, train_set, eval_set, engine, total_steps)


def _sequences(config: RunConfig, store: TokenStore, tokenizer: Any) -> SequenceDataset:
    return SequenceDataset(
        store,
        length=config.sequence.length,
        pack=config.data.pack,
        long_documents=config.data.long_documents,
        pad_token_id=padding_id(tokenizer),
    )


def build_engine(
    config: RunConfig, plan: ParallelPlan, groups: ProcessGroups, device: torch.device, tokenizer: Any
) -> Engine:
    """The model as it is trained, under the engine that the config asks for."""
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
