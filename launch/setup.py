"""What a run needs before its first step: tokenizer, sequences, model and engine."""

from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..apollo import Apollo
from ..distributed.engine import Engine, LocalEngine
from ..distributed.groups import ProcessGroups
from ..distributed.probe import calibrate
from ..distributed.zero_config import ZeroOptions, refuse_what_deepspeed_does
from .config import RunConfig
from .config_file import ParallelPlan
from .data.dataset import SequenceDataset
from .data.prepare import prepare
from .data.token_store import TokenStore
from .data.tokenizer import load_tokenizer, padding_id
from .deepspeed_json import read_json, unknown_keys
from .model import build_model, check_length, check_model, check_vocabulary, name_special_tokens
from .nodes import require_same
from .optimizer import build_optimizer

if TYPE_CHECKING:
    from .planner.knobs import Knobs
    from .planner.plan import Plan

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
        data_digest: Of every document's tokens, in their order: the cursor means nothing in other data.
        plan: By which the run is run; None on a CPU, where nothing is planned.
    """

    tokenizer: Any
    train_set: SequenceDataset
    eval_set: SequenceDataset | None
    engine: Engine
    total_steps: int
    data_digest: str
    plan: Plan | None = None


def set_up(config: RunConfig, sharing: ParallelPlan, groups: ProcessGroups, device: torch.device) -> RunParts:
    """Prepare the data unless that has been done, and build the model; every rank calls it.

    Raises:
        ValueError: Data, tokenizer and model do not fit together.
    """
    # Before hours of data:
    check_model(config.model)
    check_length(config)
    _check_deepspeed_config(config, sharing, groups)
    # While ranks have pinned nothing yet: what is free is asked for once.
    plan = _plan(config, groups, device)
    tokenizer = load_tokenizer(config.data.tokenizer or config.model.name or "bytes")
    # The others find it done; where nodes do not share the cache, each builds its own.
    groups.main_first(lambda: prepare(config.data, tokenizer, progress=True), "data")
    prepared = groups.each_in_its_time(lambda: prepare(config.data, tokenizer), "preparing data.source")
    digest = _digest(prepared.train, prepared.heldout)
    require_same({"the digest of data.source": digest}, groups, "every node must read the same documents")
    train_set = _sequences(config, prepared.train, tokenizer)
    eval_set = None if prepared.heldout is None else _sequences(config, prepared.heldout, tokenizer)
    total_steps = config.train.steps
    if total_steps is None:
        total_steps = math.ceil(config.train.epochs * len(train_set) / config.train.global_batch_sequences)
    if config.schedule.warmup_steps >= total_steps:
        logger.warning(
            "schedule.warmup_steps=%d does not end in the %d steps of this run; lower it, or train longer.",
            config.schedule.warmup_steps,
            total_steps,
        )
    if eval_set is None and config.data.eval_fraction > 0:
        logger.warning("nothing is held out for evaluation: data.source has a single document.")
    logger.info(
        "data: %d sequences of up to %d tokens, %.1f%% of them text; %d steps of %d sequences",
        len(train_set),
        config.sequence.length,
        100 * train_set.packing.efficiency,
        total_steps,
        config.train.global_batch_sequences,
    )
    torch.manual_seed(config.train.seed)
    knobs = None if plan is None else plan.knobs
    engine = build_engine(config, sharing, groups, device, tokenizer, knobs)
    if groups.world_size > 1:
        calibrate(engine, groups, engine.module.config.vocab_size, device)
    torch.manual_seed(config.train.seed + 1 + groups.rank)  # dropout must not repeat from shard to shard
    return RunParts(tokenizer, train_set, eval_set, engine, total_steps, digest, plan)


def _plan(config: RunConfig, groups: ProcessGroups, device: torch.device) -> Plan | None:
    """The plan of this run, said at once; none on a CPU."""
    if device.type != "cuda":
        return None
    from .planner.at_start import plan_for_run
    from .planner.report import log_plan

    plan = plan_for_run(config, groups, device)
    # Groups of heads are collectives: ranks that planned otherwise would wait for each other for ever.
    advice = "every node must see the same model and have the same packages"
    require_same({"what the plan chose": str(plan.knobs)}, groups, advice)
    log_plan(plan)
    return plan


def _digest(*stores: TokenStore | None) -> str:
    digest = hashlib.sha256()
    for store in stores:
        digest.update(b"|" if store is None else store.digests.tobytes())
    return digest.hexdigest()[:16]


def _sequences(config: RunConfig, store: TokenStore, tokenizer: Any) -> SequenceDataset:
    return SequenceDataset(
        store,
        length=config.sequence.length,
        pack=config.data.pack,
        long_documents=config.data.long_documents,
        pad_token_id=padding_id(tokenizer),
    )


def build_engine(
    config: RunConfig,
    sharing: ParallelPlan,
    groups: ProcessGroups,
    device: torch.device,
    tokenizer: Any,
    knobs: Knobs | None = None,
) -> Engine:
    """The model as it is trained, by the plan's knobs if there are any, under the engine of the config."""
    bf16 = config.train.precision == "bf16"
    use_zero = config.parallel.zero_stage > 0
    # ZeRO keeps float32 masters of its own, and frozen weights need none (peft makes adapters float32);
    # otherwise the weights are the masters, unless they are to be rounded stochastically.
    needs_none = use_zero or config.model.lora is not None or config.optimizer.weights == "bf16"
    dtype = torch.bfloat16 if bf16 and needs_none else torch.float32
    options = _zero_options(config, sharing) if use_zero else None
    # Under ZeRO-3 no rank could hold the whole of a model that needs it.
    sharded = options.deepspeed_config(groups.world_size) if options and options.stage == 3 else None
    model = build_model(config, groups, device, dtype, sharded, knobs)
    check_vocabulary(model, tokenizer)
    if config.model.name is None:
        name_special_tokens(model, tokenizer)
    optimizer = build_optimizer(model, config.optimizer, seed=config.train.seed)
    if options is None:
        engine: Engine = LocalEngine(
            model,
            optimizer,
            groups,
            accumulation_steps=sharing.accumulation_steps,
            clip_norm=config.optimizer.clip_norm,
            bf16=bf16,
            in_backward=config.optimizer.in_backward,
        )
    else:
        from ..distributed.zero import DeepSpeedEngine

        engine = DeepSpeedEngine(model, optimizer, groups, options)
    if isinstance(optimizer, Apollo):
        logger.info("states of %s on this process:\n%s", config.optimizer.name, optimizer.memory_report())
    return engine


def _check_deepspeed_config(config: RunConfig, sharing: ParallelPlan, groups: ProcessGroups) -> None:
    if config.parallel.deepspeed_config is None:
        return
    options = _zero_options(config, sharing)
    for line in unknown_keys(options.user or {}):
        logger.warning("%s", line)
    refuse_what_deepspeed_does(options.deepspeed_config(groups.world_size))


def _zero_options(config: RunConfig, sharing: ParallelPlan) -> ZeroOptions:
    return ZeroOptions(
        config.parallel.zero_stage,
        sharing.accumulation_steps,
        config.optimizer.clip_norm,
        config.train.precision == "bf16",
        config.parallel.offload_optimizer == "cpu",
        config.parallel.offload_parameters == "cpu",
        None if config.parallel.deepspeed_config is None else read_json(config.parallel.deepspeed_config),
    )
