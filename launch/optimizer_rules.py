"""What the keys of optimizer and schedule demand of each other and of the rest; asked by config_rules.py."""

from __future__ import annotations

from collections.abc import Iterator

from .config import RunConfig
from .config_errors import listed, shown


def apollo_is_used(config: RunConfig, world_size: int | None) -> Iterator[str]:
    optimizer = config.optimizer
    if optimizer.name == "adamw":
        defaults = type(optimizer.apollo)()
        keys = type(defaults).model_fields
        given = [key for key in keys if getattr(optimizer.apollo, key) != getattr(defaults, key)]
        if given:
            verb, them = ("has", "it") if len(given) == 1 else ("have", "them")
            yield (
                f"{listed([f'optimizer.apollo.{key}' for key in given], last='and')} {verb} no effect with "
                f"optimizer.name='adamw'; remove {them}, or set optimizer.name=apollo or apollo-mini."
            )
        return
    if optimizer.apollo.embeddings == "factored" and config.parallel.zero_stage > 0:
        yield (
            "optimizer.apollo.embeddings='factored' takes means of whole rows and columns, which "
            f"parallel.zero_stage={config.parallel.zero_stage} cuts; use adamw_8bit or low_rank."
        )


def weights_are_kept(config: RunConfig, world_size: int | None) -> Iterator[str]:
    optimizer = config.optimizer
    if optimizer.weights == "float32":
        return
    if config.model.lora is not None:
        yield (
            "optimizer.weights='bf16' has no effect with model.lora, whose adapters are float32; remove it."
        )
        return
    wrong = [
        f"{key}={shown(value)}"
        for key, value, fits in (
            ("optimizer.name", optimizer.name, optimizer.name != "adamw"),
            ("train.precision", config.train.precision, config.train.precision == "bf16"),
            ("parallel.zero_stage", config.parallel.zero_stage, config.parallel.zero_stage == 0),
        )
        if not fits
    ]
    if wrong:
        yield (
            f"optimizer.weights='bf16' does not go with {listed(wrong)}: it needs optimizer.name=apollo or "
            "apollo-mini, train.precision=bf16 and parallel.zero_stage=0; set these, or "
            "optimizer.weights=float32."
        )


def in_backward_has_one_gradient(config: RunConfig, world_size: int | None) -> Iterator[str]:
    if not config.optimizer.in_backward:
        return
    parallel, train = config.parallel, config.train
    if parallel.zero_stage > 0 or (world_size or 1) > 1 or parallel.ulysses_degree > 1:
        yield (
            "optimizer.in_backward=true updates a weight before other processes' gradients of it are added: "
            "it needs parallel.num_gpus=1 and parallel.zero_stage=0; set these, or leave it out."
        )
    if train.global_batch_sequences != train.micro_batch_sequences:
        yield (
            "optimizer.in_backward=true updates a weight at each micro-batch, so a step has one: set "
            f"train.global_batch_sequences={train.micro_batch_sequences} (train.micro_batch_sequences), or "
            "leave it out."
        )


def skipped_steps_are_undone(config: RunConfig, world_size: int | None) -> Iterator[str]:
    if config.train.on_nonfinite == "skip" and config.optimizer.in_backward:
        yield (
            "train.on_nonfinite='skip' leaves out an update that is NaN or infinite, and with "
            "optimizer.in_backward=true weights are updated before that is known; set "
            "train.on_nonfinite=stop, or optimizer.in_backward=false."
        )


def warmup_ends(config: RunConfig, world_size: int | None) -> Iterator[str]:
    warmup, steps = config.schedule.warmup_steps, config.train.steps
    if steps is not None and warmup >= steps:
        yield (
            f"schedule.warmup_steps={warmup} must be below train.steps={steps}; "
            f"use {steps - 1} or less, or train longer."
        )


def final_ratio_is_used(config: RunConfig, world_size: int | None) -> Iterator[str]:
    schedule = config.schedule
    given = "final_ratio" in schedule.model_fields_set
    if schedule.name == "constant" and given and schedule.final_ratio != 1:
        yield (
            f"schedule.final_ratio={schedule.final_ratio} has no effect with schedule.name='constant'; "
            "remove it, set it to 1, or choose cosine or linear."
        )
