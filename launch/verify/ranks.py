"""What each of several processes does: one step of the clone, through the engine that training would take."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...distributed.apply_ulysses import apply_ulysses
from ...distributed.engine import Engine, LocalEngine
from ...distributed.groups import ProcessGroups
from ...distributed.probe import calibrate
from ...distributed.zero_config import ZeroOptions
from ...mst.apply import apply_mini_sequence
from ..config import RunConfig
from ..deepspeed_json import read_json
from ..optimizer import build_optimizer
from .batches import make_samples
from .bench import Layout, trained_model
from .clone import VOCABULARY, architecture_of, heads_of, possible_groups
from .compare import Step
from .optimizers import LEARNING_RATE, small_optimizer
from .steps import CPU, engine_step, evaluated_loss
from .truth import exact

NOT_ON_A_CPU = ("bf16", "fp16", "amp", "torch_autocast", "data_types", "communication_data_type", "aio")
"""Of a user's DeepSpeed JSON: number formats and devices, which the check has its own of."""


def ulysses(config: RunConfig, layout: Layout) -> Step:
    """Attention shared by ranks, in streamed layers where the config has them, and no tiles."""
    groups = ProcessGroups.create(layout.degree)
    model = exact(_load(config, torch.float64))
    apply_ulysses(model, groups)
    sequence = config.sequence
    options: dict[str, Any] = {"checkpoints": "none"}
    if sequence.checkpoints != "none":
        options = {"checkpoints": "gpu", "head_groups": sequence.head_groups}
    apply_mini_sequence(model, tile_tokens=None, loss=sequence.loss, **options)
    return _gradients_of(_local_engine(model, groups, layout), groups, layout)


def ulysses_by_groups(config: RunConfig, layout: Layout) -> Step:
    """The same by the finest groups of heads, whose key/value heads go to several ranks."""
    finest = possible_groups(heads_of(architecture_of(config.model)), layout.degree)[-1]
    sequence = config.sequence.model_copy(update={"checkpoints": "gpu", "head_groups": finest})
    return ulysses(config.model_copy(update={"sequence": sequence}), layout)


def zero(config: RunConfig, layout: Layout) -> Step:
    """A ZeRO stage alone, each rank with sequences of its own."""
    groups = ProcessGroups.create()
    layout = Layout(layout.processes, 1, layout.zero_stage)
    plain = config.model_copy(update={"model": config.model.model_copy(update={"lora": None})})
    sequence = plain.sequence.model_copy(update={"checkpoints": "none", "mini_sequence": False})
    plain = plain.model_copy(update={"sequence": sequence})
    return _zero_step(plain, groups, layout)


def together(config: RunConfig, layout: Layout) -> Step:
    """All that the config uses, built as training builds it."""
    groups = ProcessGroups.create(layout.degree)
    if layout.zero_stage:
        return _zero_step(config, groups, layout)
    model = trained_model(config, groups, torch.float64)
    return _gradients_of(_local_engine(model, groups, layout), groups, layout)


JOBS: dict[str, Callable[[RunConfig, Layout], Step]] = {
    "ulysses": ulysses,
    "ulysses_by_groups": ulysses_by_groups,
    "zero": zero,
    "together": together,
}


def dtype_of(job: str, layout: Layout) -> torch.dtype:
    """What a job computes in: DeepSpeed keeps its masters in float32."""
    return torch.float32 if job in ("zero", "together") and layout.zero_stage else torch.float64


def run_rank(rank: int, folder: str, job: str, config: RunConfig, layout: Layout) -> None:
    """One process of a job: what it found, or how it failed, goes into the folder."""
    from .processes import joined

    logging.disable(logging.WARNING)  # of findings, the report is all there is to say
    out = Path(folder) / f"{rank}.pt"
    with joined(rank, layout.processes, Path(folder), use_deepspeed=layout.zero_stage > 0):
        step = JOBS[job](config, layout)
        torch.save(vars(step), out.with_suffix(".partial"))
        out.with_suffix(".partial").rename(out)


def _load(config: RunConfig, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    assert config.model.name is not None
    model = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=dtype, attn_implementation="eager")
    return model.train()


def _local_engine(model: nn.Module, groups: ProcessGroups, layout: Layout) -> Engine:
    trainable = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=1.0)
    return LocalEngine(model, optimizer, groups, accumulation_steps=layout.micro_batches)


def _zero_step(config: RunConfig, groups: ProcessGroups, layout: Layout) -> Step:
    from ...distributed.zero import DeepSpeedEngine

    options = ZeroOptions(layout.zero_stage, layout.micro_batches, user=_users(config))
    sharded = options.deepspeed_config(groups.world_size) if layout.zero_stage == 3 else None
    model = trained_model(config, groups, torch.float32, sharded)
    optimizer = build_optimizer(model, small_optimizer(config.optimizer), seed=config.train.seed)
    engine = DeepSpeedEngine(model, optimizer, groups, options)
    before = _whole_weights(engine.module)
    step = _gradients_of(engine, groups, layout)
    after = _whole_weights(engine.module)
    step.others = {name: after[name] - before[name] for name in after}
    return step


def _gradients_of(engine: Engine, groups: ProcessGroups, layout: Layout) -> Step:
    calibrate(engine, groups, VOCABULARY, CPU)
    batches = [sample.batch for sample in make_samples()]
    evaluated = evaluated_loss(engine, groups, batches)
    step, _ = engine_step(engine, groups, batches, lr=LEARNING_RATE)
    step.evaluated = evaluated
    return step


def _users(config: RunConfig) -> dict[str, Any] | None:
    given = config.parallel.deepspeed_config
    if given is None:
        return None
    kept = {name: value for name, value in read_json(given).items() if name not in NOT_ON_A_CPU}
    of_zero = kept.get("zero_optimization")
    if isinstance(of_zero, dict):
        kept["zero_optimization"] = {
            name: value for name, value in of_zero.items() if not name.startswith("offload")
        }
    return kept


def _whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Trainable weights by name, gathered where ZeRO-3 has spread them."""
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    sharded = [param for param in params.values() if hasattr(param, "ds_id")]
    gathered: Any = nullcontext()
    if sharded:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(sharded)
    with gathered:
        return {name: param.detach().double().clone() for name, param in params.items()}
