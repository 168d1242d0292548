"""What keys demand of each other, beyond what each of them demands of itself.

A rule is pure, names the keys that it reads, and yields one line for each way in which they disagree. The
same rules are asked again when the number of processes is known (`check_world`). Where a key is left to the
plan (`auto`, `max`), rules that read it wait until it is a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .config import RunConfig, SequenceConfig
from .config_errors import ConfigError, listed, shown
from .deepspeed_json import RunFacts, contradictions, read_json
from .optimizer_rules import (
    apollo_is_used,
    final_ratio_is_used,
    in_backward_has_one_gradient,
    skipped_steps_are_undone,
    warmup_ends,
    weights_are_kept,
)

_SHAPES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)

STREAM_FROM_TOKENS = 8192
"""Tokens a process from which `sequence.checkpoints=auto` streams the layers, where no plan decides it."""

DECIDED_KEYS = ("ulysses_degree", "zero_stage", "offload_optimizer", "offload_parameters")
"""Keys of `parallel` whose `auto` is for the plan."""


@dataclass(frozen=True)
class ParallelPlan:
    """How the processes of a run share its work.

    Attributes:
        num_gpus: Processes in all, one a GPU.
        ulysses_degree: Processes that share one sequence.
        data_degree: Groups of `ulysses_degree` processes, each with sequences of its own.
        accumulation_steps: Micro-batches of each group in one optimizer step.
    """

    num_gpus: int
    ulysses_degree: int
    data_degree: int
    accumulation_steps: int


@dataclass(frozen=True)
class Rule:
    """Attributes: `keys`, what the rule reads; `broken`, yields a line for each disagreement."""

    keys: tuple[str, ...]
    broken: Callable[[RunConfig, int | None], Iterator[str]]


def check_world(config: RunConfig, world_size: int) -> ParallelPlan:
    """Check a config against the processes that really run, and say how they share the work.

    Args:
        config: A run's config; its `parallel.num_gpus` may be `auto`, and nothing else that a plan decides.
        world_size: Number of processes that were started.

    Raises:
        ConfigError: The number of processes is not the one asked for, or any rule does not hold for it.
    """
    assert not undecided(config), undecided(config)
    check_count(config, world_size)
    degree = config.parallel.ulysses_degree
    groups = world_size // degree
    accumulation = config.train.global_batch_sequences // (config.train.micro_batch_sequences * groups)
    return ParallelPlan(world_size, degree, groups, accumulation)


def check_count(config: RunConfig, world_size: int) -> None:
    """Check a config against a number of processes, as far as what it leaves to the plan allows.

    Raises:
        ConfigError: The number is not the one asked for, or any rule does not hold for it.
    """
    assert world_size >= 1, world_size
    asked = config.parallel.num_gpus
    if asked not in ("auto", world_size):
        line = f"parallel.num_gpus={asked} but {world_size} processes were started"
        raise ConfigError([f"{line}; start {asked}, or set parallel.num_gpus={world_size} or auto."])
    errors = broken_rules(config, world_size)
    if errors:
        raise ConfigError(errors)


def undecided(config: RunConfig) -> tuple[str, ...]:
    """Keys whose value is for the plan to find, and must be a number before a run begins."""
    parallel = config.parallel
    keys = ["sequence.length"] if config.sequence.length == "max" else []
    keys += [f"parallel.{name}" for name in DECIDED_KEYS if getattr(parallel, name) == "auto"]
    return tuple(keys)


def broken_rules(config: RunConfig, world_size: int | None = None, doubtful: Iterable[str] = ()) -> list[str]:
    """All disagreements between the keys of a config.

    Args:
        config: What is checked.
        world_size: Number of processes; None takes `parallel.num_gpus`, and leaves out what cannot be known
            while that is `auto`.
        doubtful: Dotted keys whose value is not what the person meant; rules that read them are left out, and
            so are those that read what a plan has yet to decide.
    """
    if world_size is None and config.parallel.num_gpus != "auto":
        world_size = config.parallel.num_gpus
    skipped = (*doubtful, *undecided(config))
    rules = [rule for rule in RULES if not any(_touches(key, bad) for key in rule.keys for bad in skipped)]
    return [line for rule in rules for line in rule.broken(config, world_size)]


def _touches(key: str, doubtful: str) -> bool:
    return f"{key}.".startswith(f"{doubtful}.") or f"{doubtful}.".startswith(f"{key}.")


def _shape(config: RunConfig, name: str) -> int | None:
    value = config.model.config.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 1 else None


def _world(config: RunConfig, world_size: int) -> str:
    if config.parallel.num_gpus == world_size:
        return f"parallel.num_gpus={world_size}"
    return f"the {world_size} processes of this run"


def _valid_degrees(config: RunConfig, world_size: int | None) -> str:
    """Degrees that divide the processes and have a query head each, as far as these are known."""
    heads = _shape(config, "num_attention_heads")
    most = min(count for count in (world_size, heads) if count)
    fitting = [degree for degree in range(1, most + 1) if world_size is None or world_size % degree == 0]
    return listed(fitting) if world_size is not None else f"{most} or less"


def _model_is_named(config: RunConfig, world_size: int | None) -> Iterator[str]:
    model = config.model
    if model.name is None and not model.config:
        yield (
            "model.name=null and model.config={} leave no model; name a checkpoint (model.name=...), "
            "or give model.config a model_type and sizes to train from random weights."
        )
    elif model.name is None and not isinstance(model.config.get("model_type"), str):
        yield (
            f"model.config.model_type={shown(model.config.get('model_type'))} must be named when "
            "model.name=null; write the architecture, such as llama or qwen3."
        )
    if model.name is None and model.lora is not None:
        yield "model.lora adapts a checkpoint's weights and model.name=null has none; name a checkpoint."


def _shapes_are_counts(config: RunConfig, world_size: int | None) -> Iterator[str]:
    for name in _SHAPES:
        # null is how Hugging Face configs spell "derive it from the others".
        if config.model.config.get(name) is not None and _shape(config, name) is None:
            value = shown(config.model.config[name])
            yield f"model.config.{name}={value} must be a whole number of 1 or above, written out (no 4k)."


def _heads_are_grouped(config: RunConfig, world_size: int | None) -> Iterator[str]:
    heads, kv_heads = _shape(config, "num_attention_heads"), _shape(config, "num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        divisors = [count for count in range(1, heads + 1) if heads % count == 0]
        yield (
            f"model.config.num_key_value_heads={kv_heads} must divide "
            f"model.config.num_attention_heads={heads}; use {listed(divisors)}."
        )


def _tokenizer_is_known(config: RunConfig, world_size: int | None) -> Iterator[str]:
    if config.data.tokenizer is None and config.model.name is None:
        yield (
            "data.tokenizer=null takes the model's own tokenizer, and model.name=null has none; "
            "set data.tokenizer to bytes or to a Hugging Face name."
        )


def _eval_has_documents(config: RunConfig, world_size: int | None) -> Iterator[str]:
    data, every = config.data, config.train.eval_every
    if every is not None and data.eval_fraction == 0 and data.eval_source is None:
        yield (
            f"train.eval_every={every} has nothing to evaluate on: data.eval_fraction=0 and "
            "data.eval_source=null; set one of them, or train.eval_every=null."
        )


def _length_is_shared(config: RunConfig, world_size: int | None) -> Iterator[str]:
    length, degree = config.sequence.length, config.parallel.ulysses_degree
    if length < 2:
        yield f"sequence.length={length} leaves no token to predict; use 2 or more."
    elif length < 2 * degree:
        yield (
            f"sequence.length={length} leaves fewer than 2 tokens to each of "
            f"parallel.ulysses_degree={degree} processes; use {2 * degree} or more."
        )


def _length_fits_positions(config: RunConfig, world_size: int | None) -> Iterator[str]:
    length, positions = config.sequence.length, _shape(config, "max_position_embeddings")
    if positions and length > positions:
        yield (
            f"sequence.length={length} is above model.config.max_position_embeddings={positions}; shorten "
            "it, or raise max_position_embeddings (and with pretrained weights rope_parameters, as the "
            "preset llama3-8b-512k-8gpu does)."
        )


def _loss_memory_is_used(config: RunConfig, world_size: int | None) -> Iterator[str]:
    memory = config.sequence.loss_memory_mib
    if memory is not None and config.sequence.loss == "logits":
        yield (
            f"sequence.loss_memory_mib={memory} has no effect with sequence.loss='logits', which makes all "
            "the logits at once; set it to null, or sequence.loss=cce."
        )


def streams_layers(sequence: SequenceConfig, tokens_a_gpu: int) -> bool:
    """Whether decoder layers are streamed, each keeping its input alone."""
    if sequence.checkpoints == "auto":
        return tokens_a_gpu >= STREAM_FROM_TOKENS
    return sequence.checkpoints != "none"


def _streamed_layers_drop_nothing(config: RunConfig, world_size: int | None) -> Iterator[str]:
    sequence, lora = config.sequence, config.model.lora
    tokens = sequence.length * config.train.micro_batch_sequences // config.parallel.ulysses_degree
    if lora is not None and lora.dropout > 0 and streams_layers(sequence, tokens):
        yield (
            f"model.lora.dropout={lora.dropout} must be 0 where layers are streamed (sequence.checkpoints="
            f"{sequence.checkpoints}, {tokens} tokens a GPU): they run twice and would drop others "
            "the second time. Set it to 0, or sequence.checkpoints=none."
        )


def _streaming_options_are_used(config: RunConfig, world_size: int | None) -> Iterator[str]:
    sequence = config.sequence
    if sequence.checkpoints == "auto" and sequence.checkpoint_every > 1:
        yield (
            f"sequence.checkpoint_every={sequence.checkpoint_every} says how many layers' inputs are kept "
            "but not where, and sequence.checkpoints=auto chooses both; set sequence.checkpoints=gpu or "
            "host, or leave it out."
        )
    if sequence.checkpoints != "none":
        return
    for name, default in (("checkpoint_every", 1), ("head_groups", "auto"), ("save_attention", "none")):
        if getattr(sequence, name) != default:
            yield (
                f"sequence.{name}={getattr(sequence, name)} has no effect with sequence.checkpoints=none, "
                f"which streams no layer; set it to {default}, or sequence.checkpoints=auto."
            )


def _packs_fill_shards(config: RunConfig, world_size: int | None) -> Iterator[str]:
    length, degree = config.sequence.length, config.parallel.ulysses_degree
    if config.data.pack and length >= 2 * degree and length % degree:
        # Packing leaves no gap, and then every sequence would be padded for want of a shard's last tokens.
        yield (
            f"sequence.length={length} is no multiple of parallel.ulysses_degree={degree}, so every packed "
            f"sequence would be padded; use {length - length % degree}, or data.pack=false."
        )


def _degree_divides_world(config: RunConfig, world_size: int | None) -> Iterator[str]:
    degree = config.parallel.ulysses_degree
    if world_size is not None and world_size % degree:
        degrees = _valid_degrees(config, world_size)
        yield (
            f"parallel.ulysses_degree={degree} does not divide {_world(config, world_size)}; use {degrees}."
        )


def _degree_has_heads(config: RunConfig, world_size: int | None) -> Iterator[str]:
    degree, heads = config.parallel.ulysses_degree, _shape(config, "num_attention_heads")
    if heads and degree > heads:
        yield (
            f"parallel.ulysses_degree={degree} is above model.config.num_attention_heads={heads}: each "
            f"process attends with one query head at least; use {_valid_degrees(config, world_size)}."
        )


def _batch_is_shared(config: RunConfig, world_size: int | None) -> Iterator[str]:
    whole, micro = config.train.global_batch_sequences, config.train.micro_batch_sequences
    degree = config.parallel.ulysses_degree
    if world_size is not None and world_size % degree:
        return
    groups = 1 if world_size is None else world_size // degree
    unit = micro * groups
    if whole % unit == 0:
        return
    near = [count for count in (whole // unit * unit, (whole // unit + 1) * unit) if count]
    reason = f"train.micro_batch_sequences={micro}"
    if world_size is not None:
        world = _world(config, world_size)
        reason += f" x {groups} data-parallel groups ({world} / parallel.ulysses_degree={degree})"
    yield (
        f"train.global_batch_sequences={whole} must be a multiple of {unit}, {reason}; use {listed(near)}."
    )


def _offload_has_shards(config: RunConfig, world_size: int | None) -> Iterator[str]:
    parallel = config.parallel
    if parallel.offload_optimizer != "none" and parallel.zero_stage < 1:
        yield (
            f"parallel.offload_optimizer='{parallel.offload_optimizer}' needs parallel.zero_stage 1, 2 or 3, "
            "got 0; set parallel.zero_stage=1 (it works on one GPU too)."
        )
    if parallel.offload_parameters != "none" and parallel.zero_stage < 3:
        yield (
            f"parallel.offload_parameters='{parallel.offload_parameters}' needs parallel.zero_stage 3, got "
            f"{parallel.zero_stage}; set parallel.zero_stage=3."
        )


def _deepspeed_config_agrees(config: RunConfig, world_size: int | None) -> Iterator[str]:
    parallel, train = config.parallel, config.train
    if parallel.deepspeed_config is None:
        return
    if parallel.zero_stage < 1:
        yield (
            f"parallel.deepspeed_config={shown(parallel.deepspeed_config)} needs parallel.zero_stage 1, 2 or "
            "3, got 0: without ZeRO DeepSpeed is not used; set parallel.zero_stage, or remove the former."
        )
        return
    try:
        user = read_json(parallel.deepspeed_config)
    except ValueError as error:
        yield f"parallel.deepspeed_config={parallel.deepspeed_config!r} {error}"  # the whole path
        return
    whole, unit = train.global_batch_sequences, train.micro_batch_sequences
    unit *= (world_size or 0) // parallel.ulysses_degree
    yield from contradictions(
        user,
        RunFacts(
            parallel.zero_stage,
            train.precision == "bf16",
            config.optimizer.clip_norm,
            parallel.offload_optimizer,
            parallel.offload_parameters,
            whole,
            train.micro_batch_sequences,
            whole // unit if unit and whole % unit == 0 else None,
        ),
    )


RULES: tuple[Rule, ...] = (
    Rule(("model.name", "model.config", "model.lora"), _model_is_named),
    Rule(("model.config",), _shapes_are_counts),
    Rule(("model.config",), _heads_are_grouped),
    Rule(("model.name", "data.tokenizer"), _tokenizer_is_known),
    Rule(("train.eval_every", "data.eval_fraction", "data.eval_source"), _eval_has_documents),
    Rule(("sequence.length", "parallel.ulysses_degree"), _length_is_shared),
    Rule(("sequence.length", "parallel.ulysses_degree", "data.pack"), _packs_fill_shards),
    Rule(("sequence.length", "model.config"), _length_fits_positions),
    Rule(("sequence.loss", "sequence.loss_memory_mib"), _loss_memory_is_used),
    Rule(
        (
            "sequence.checkpoints",
            "sequence.length",
            "train.micro_batch_sequences",
            "parallel.ulysses_degree",
            "model.lora",
        ),
        _streamed_layers_drop_nothing,
    ),
    Rule(
        (
            "sequence.checkpoints",
            "sequence.checkpoint_every",
            "sequence.head_groups",
            "sequence.save_attention",
        ),
        _streaming_options_are_used,
    ),
    Rule(("parallel.num_gpus", "parallel.ulysses_degree"), _degree_divides_world),
    Rule(("parallel.ulysses_degree", "model.config"), _degree_has_heads),
    Rule(
        (
            "train.global_batch_sequences",
            "train.micro_batch_sequences",
            "parallel.num_gpus",
            "parallel.ulysses_degree",
        ),
        _batch_is_shared,
    ),
    Rule(
        ("parallel.zero_stage", "parallel.offload_optimizer", "parallel.offload_parameters"),
        _offload_has_shards,
    ),
    Rule(
        (
            "parallel.deepspeed_config",
            "parallel.zero_stage",
            "parallel.num_gpus",
            "parallel.ulysses_degree",
            "parallel.offload_optimizer",
            "parallel.offload_parameters",
            "optimizer.clip_norm",
            "train.precision",
            "train.global_batch_sequences",
            "train.micro_batch_sequences",
        ),
        _deepspeed_config_agrees,
    ),
    Rule(("optimizer.name", "optimizer.apollo", "parallel.zero_stage"), apollo_is_used),
    Rule(
        ("optimizer.weights", "optimizer.name", "train.precision", "parallel.zero_stage", "model.lora"),
        weights_are_kept,
    ),
    Rule(
        (
            "optimizer.in_backward",
            "parallel.zero_stage",
            "parallel.num_gpus",
            "parallel.ulysses_degree",
            "train.global_batch_sequences",
            "train.micro_batch_sequences",
        ),
        in_backward_has_one_gradient,
    ),
    Rule(("train.on_nonfinite", "optimizer.in_backward"), skipped_steps_are_undone),
    Rule(("schedule.warmup_steps", "train.steps"), warmup_ends),
    Rule(("schedule.name", "schedule.final_ratio"), final_ratio_is_used),
)
"""In the order in which their lines are shown."""
