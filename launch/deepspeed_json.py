"""A person's own DeepSpeed JSON: read, and compared with what the run says.

Dicts in, lines out: DeepSpeed is not imported. What agrees is put over our own configuration by
distributed/zero_config.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

AUTO = "auto"
"""In Hugging Face's JSONs: whatever the trainer says."""
SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
"""To us a batch is what a sequence-parallel group takes; DeepSpeed counts ranks, and is given our numbers."""
KNOWN_KEYS = frozenset(
    {
        *SIZES,
        *("activation_checkpointing", "aio", "autotuning", "bf16", "bfloat16", "checkpoint", "comet"),
        *("comms_logger", "communication_data_type", "compile", "csv_monitor", "data_efficiency"),
        *("data_types", "dataloader_drop_last", "datastates_ckpt", "disable_allgather", "disable_python_gc"),
        *("dump_state", "expert_parallel", "flops_profiler", "fp16", "gradient_allreduce_op"),
        *("gradient_clipping", "gradient_predivide_factor", "hybrid_engine", "log_level"),
        *("managed_gradient_accumulation", "memory_breakdown", "optimizer", "pipeline"),
        *("prescale_gradients", "scheduler", "seq_parallel_communication_data_type"),
        *("sequence_parallel_size", "steps_per_print", "tensor_parallel", "tensorboard", "timers"),
        *("torch_autocast", "use_data_before_expert_parallelism", "vocabulary_size", "wandb"),
        *("wall_clock_breakdown", "weight_quantization", "zero_allow_untested_optimizer"),
        *("zero_force_ds_cpu_optimizer", "zero_optimization"),
        # Refused by DeepSpeed itself, which says what became of each.
        *("amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity"),
        *("graph_harvesting", "nebula", "progressive_layer_drop", "quantize_training", "sparse_attention"),
        "sparse_gradients",
    }
)
"""DeepSpeed 0.19's top-level keys: it ignores others without a word."""
DTYPE_NAMES = {"bf16": True, "bfloat16": True, "fp32": False, "float32": False}
NAN_UNSEEN = "a gradient of NaN or inf would go into the weights without an error; remove it"
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "optimizer": ((None, {}), "the optimizer is longseq's; remove the section and set optimizer.*"),
    "scheduler": ((None, {}), "the learning rate is longseq's; remove the section and set schedule.*"),
    "fp16.enabled": ((False,), "float16 overflows in long sums; remove the section and set train.precision"),
    "torch_autocast.enabled": ((False,), "train.precision decides that; remove the section"),
    "sequence_parallel_size": (
        (1,),
        "told of it, DeepSpeed scales gradients by another factor in each ZeRO stage; remove it and set "
        "parallel.ulysses_degree",
    ),
    "gradient_allreduce_op": (("mean",), "the loss is scaled for a mean over ranks; remove it"),
    "managed_gradient_accumulation": ((True,), "the training loop counts on it; remove it"),
    "zero_allow_untested_optimizer": ((True,), "the optimizer is longseq's; remove it"),
    "zero_force_ds_cpu_optimizer": ((False,), "the optimizer is longseq's; remove it"),
    "tensor_parallel.autotp_size": ((0, 1), "weights are sharded by ZeRO alone; remove the section"),
    "hybrid_engine.enabled": ((False,), "it replaces the layers that longseq streams; remove the section"),
    "data_efficiency.enabled": ((False,), "longseq reads the data; remove the section"),
    "zero_optimization.cpu_offload": ((False, None), "it is an older word for offload_optimizer; use that"),
    "zero_optimization.cpu_offload_param": ((False, None), "it is an older word for offload_param; use that"),
    "bf16.bf16_master_weights_and_grads": ((False,), "trained weights are kept in float32; remove it"),
    "bf16.check_grad_overflow": ((True,), NAN_UNSEEN),
    "bfloat16.check_grad_overflow": ((True,), NAN_UNSEEN),
    "communication_data_type": (
        (None, "fp32", "bf16"),
        "gradients of long sums overflow float16; use bf16 or fp32",
    ),
}
"""Keys by dotted path: the values that change nothing, and why others are not taken."""
SECTIONS = ("zero_optimization", "bf16", "bfloat16", "fp16", "data_types")
MISSING = object()


@dataclass(frozen=True)
class RunFacts:
    """What a run's own keys say of what a DeepSpeed JSON may say too.

    Attributes:
        stage: `parallel.zero_stage`.
        bf16: Whether `train.precision` is bf16.
        clip_norm: `optimizer.clip_norm`.
        offload_optimizer: `parallel.offload_optimizer`.
        offload_parameters: `parallel.offload_parameters`.
        global_batch: `train.global_batch_sequences`.
        micro_batch: `train.micro_batch_sequences`.
        accumulation_steps: What follows from them; None while the number of processes is not known.
    """

    stage: int
    bf16: bool
    clip_norm: float | None
    offload_optimizer: str
    offload_parameters: str
    global_batch: int
    micro_batch: int
    accumulation_steps: int | None = None


def read_json(given: str | Mapping[str, Any]) -> dict[str, Any]:
    """A JSON file's object, or a mapping as it is.

    Raises:
        ValueError: There is no such file, or it is not JSON.
    """
    if not isinstance(given, str):
        return dict(given)
    try:
        data = json.loads(Path(given).read_text("utf-8-sig"), object_pairs_hook=_once_each)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}; check the path.") from error
    except ValueError as error:
        raise ValueError(f"is no JSON: {error}; comments are not JSON either.") from error
    if not isinstance(data, dict):
        raise ValueError(f"holds {json.dumps(data)[:40]}; a DeepSpeed configuration is a JSON object.")
    return data


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {twice!r} twice")
    return made


def contradictions(user: Mapping[str, Any], run: RunFacts) -> list[str]:
    """Where a DeepSpeed JSON and a run's own keys disagree, a line each; "auto" agrees with all."""
    return [*_refusals(user), *_disagreements(user, run)]


def _refusals(user: Mapping[str, Any]) -> Iterator[str]:
    for key in SECTIONS:
        if key in user and user[key] != AUTO and not isinstance(user[key], Mapping):
            yield f"parallel.deepspeed_config: {key}={_shown(user[key])} must be an object, as in {{...}}."
    for key, (harmless, reason) in REFUSED.items():
        value = _at(user, key)
        if value is not MISSING and value != AUTO and not any(_same(value, one) for one in harmless):
            yield f"parallel.deepspeed_config: {key}={_shown(value)} is not taken: {reason}."


def _disagreements(user: Mapping[str, Any], run: RunFacts) -> Iterator[str]:
    precision = "bf16" if run.bf16 else "float32"
    ours: list[tuple[str, Any, str, Any, str]] = [
        # the JSON's key, what it must be, our key, what that is, how the JSON's value reads there
        ("zero_optimization.stage", run.stage, "parallel.zero_stage", run.stage, "{}"),
        ("train_batch_size", run.global_batch, "train.global_batch_sequences", run.global_batch, "{}"),
        (SIZES[1], run.micro_batch, "train.micro_batch_sequences", run.micro_batch, "{}"),
        ("gradient_clipping", run.clip_norm or 0, "optimizer.clip_norm", run.clip_norm, "{}"),
        *(
            (f"{section}.enabled", run.bf16, "train.precision", precision, "float32" if run.bf16 else "bf16")
            for section in ("bf16", "bfloat16")
        ),
    ]
    for section, key, device in (
        ("offload_optimizer", "parallel.offload_optimizer", run.offload_optimizer),
        ("offload_param", "parallel.offload_parameters", run.offload_parameters),
    ):
        ours.append((f"zero_optimization.{section}.device", device, key, device, "{}"))
    for json_key, wanted, key, value, way_out in ours:
        given = _at(user, json_key)
        if given is MISSING or given == AUTO or _same(given, wanted):
            continue
        if given == "nvme":
            way_out = f"none or cpu ({given} is not offered)"
        elif json_key == "gradient_clipping" and given == 0:
            way_out = "null"
        yield (
            f"parallel.deepspeed_config: {json_key}={_shown(given)} contradicts {key}={_shown(value)}; "
            f"remove the former, or set {key} to {way_out.format(_shown(given))}."
        )
    given = _at(user, SIZES[2])
    if given not in (MISSING, AUTO) and run.accumulation_steps not in (None, given):
        yield (
            f"parallel.deepspeed_config: {SIZES[2]}={_shown(given)} contradicts the {run.accumulation_steps} "
            f"that train.global_batch_sequences={run.global_batch} comes to with train.micro_batch_sequences="
            f"{run.micro_batch}; remove the former, or change one of the latter."
        )
    given = _at(user, "data_types.param_dtype")
    if given not in (MISSING, AUTO, None) and DTYPE_NAMES.get(str(given)) is not run.bf16:
        yield (
            f"parallel.deepspeed_config: data_types.param_dtype={_shown(given)} contradicts train.precision="
            f"{precision!r}; remove the former."
        )


def unknown_keys(user: Mapping[str, Any]) -> list[str]:
    """Top-level keys that DeepSpeed would ignore without a word, a line each."""
    lines = []
    for key in user:
        if key not in KNOWN_KEYS:
            near = get_close_matches(key, KNOWN_KEYS, n=1)
            guess = f"; did you mean {near[0]}?" if near else "."
            lines.append(f"parallel.deepspeed_config: DeepSpeed ignores {key}={_shown(user[key])}{guess}")
    return lines


def _at(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        if value == AUTO:
            return AUTO
        if not isinstance(value, Mapping) or key not in value:
            return MISSING
        value = value[key]
    return value


def _same(one: Any, other: Any) -> bool:
    # True is 1 in Python and not in JSON.
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
