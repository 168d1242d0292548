"""The model of a config: loaded or made, given adapters, and put on long sequences."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..distributed.apply_ulysses import apply_ulysses
from ..distributed.groups import ProcessGroups
from ..mst.apply import apply_mini_sequence
from ..mst.families import FAMILIES
from ..mst.placement import Placement
from .config import ModelConfig, RunConfig, SequenceConfig
from .config_rules import streams_layers
from .data.tokenizer import vocabulary_size
from .sharded_model import load_sharded_model, random_sharded_model

if TYPE_CHECKING:
    from .planner.knobs import Knobs

logger = logging.getLogger(__name__)

SHAPE_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)
"""Fields that say what shape the weights have: a checkpoint's cannot be overridden."""


def hf_config(config: ModelConfig) -> Any:
    """The Hugging Face config: the checkpoint's with the given fields over it, or made of them.

    Raises:
        ValueError: A field that the model does not know, or a shape that its checkpoint does not have.
    """
    from transformers import AutoConfig

    fields = dict(config.config)
    if config.name is None:
        model_type = fields.pop("model_type", None)
        if model_type is None:
            raise ValueError(
                "model.config has no model_type; say which family model.name=null makes, such as llama."
            )
        known = _default_config(model_type)
    else:
        known = checkpoint_config(config.name)
        refuse_other_shapes(config, known)
        fields.pop("model_type", None)
    _refuse_unknown_activation(fields)
    unknown = [name for name in fields if not hasattr(known, name)]
    if unknown:
        guesses = [_guess(name, known.to_dict()) for name in unknown]
        raise ValueError(
            f"model.config has fields that {type(known).__name__} does not know: {', '.join(guesses)}."
        )
    if config.name is None:
        # Made anew, not changed: a config derives fields (head_dim) from others when it is made.
        try:
            return AutoConfig.for_model(known.model_type, **fields)
        except Exception as error:  # huggingface_hub's own kind, which says no more than this
            # Behind lines about validators stands a sentence.
            reason = str(error).strip().splitlines()[-1].strip()
            reason = reason.partition("Error: ")[2] or reason
            raise ValueError(f"model.config: {reason.rstrip('.')}; correct it.") from error
    return AutoConfig.from_pretrained(config.name, trust_remote_code=False, **fields)


def _refuse_unknown_activation(fields: Mapping[str, Any]) -> None:
    from transformers.activations import ACT2FN

    for name in ("hidden_act", "hidden_activation"):
        value = fields.get(name)
        if isinstance(value, str) and value not in ACT2FN:
            raise ValueError(
                f"model.config.{name}={value!r} is no activation that transformers knows; use one of "
                f"{', '.join(sorted(ACT2FN))}."
            )


def _default_config(model_type: str) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"model.config.model_type={_guess(model_type, CONFIG_MAPPING)} is no family that transformers "
            f"knows; use one of {', '.join(FAMILIES)}."
        )
    return AutoConfig.for_model(model_type)


def refuse_other_shapes(config: ModelConfig, known: Any) -> None:
    """Refuse fields that say another shape than a checkpoint's weights have.

    Raises:
        ValueError: Each that differs.
    """
    wrong = [
        f"model.config.{name}={value!r} but {config.name} has {getattr(known, name)!r}"
        for name, value in config.config.items()
        if name in SHAPE_FIELDS and getattr(known, name, value) != value
    ]
    if wrong:
        raise ValueError(
            "; ".join(wrong) + ". The shape of a checkpoint's weights cannot be overridden; remove these."
        )


def checkpoint_config(name: str) -> Any:
    """The Hugging Face config of a checkpoint.

    Raises:
        ValueError: It cannot be had.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(". ")
        raise ValueError(
            f"model.name={name!r} cannot be loaded: {reason}. Give a folder with a config.json and "
            "safetensors, or the name of a Hugging Face repository that you can reach."
        ) from error


def _guess(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, [str(one) for one in known], n=1)
    return f"{name} (did you mean {near[0]}?)" if near else name


def check_model(config: ModelConfig) -> None:
    """Refuse a model that cannot be trained, from its config alone.

    Raises:
        ValueError: What is wrong with it.
    """
    family = hf_config(config).model_type
    if family not in FAMILIES:
        raise ValueError(
            f"model_type={family!r} is no family that mini-sequences know; use one of {', '.join(FAMILIES)}."
        )


def build_base_model(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, zero: Mapping[str, Any] | None = None
) -> nn.Module:
    """The causal LM itself, loaded from its checkpoint or with random weights (of torch's seed).

    Args:
        config: What is made.
        device: Where its weights are.
        dtype: Of them.
        zero: DeepSpeed's configuration where the weights are to be sharded from the start (ZeRO-3).

    Raises:
        ValueError: A checkpoint that is not there or not of this model.
    """
    from transformers import AutoModelForCausalLM

    architecture = hf_config(config)
    if zero is not None and config.name is not None:
        return load_sharded_model(config.name, architecture, device, dtype, zero)
    if zero is not None:
        return random_sharded_model(architecture, device, dtype, zero)
    if config.name is not None:
        return _pretrained(config.name, architecture, dtype).to(device)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(architecture, dtype=dtype, attn_implementation="eager")


def _pretrained(name: str, architecture: Any, dtype: torch.dtype) -> nn.Module:
    """A checkpoint's model, all of whose weights are the checkpoint's."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            name,
            config=architecture,
            dtype=dtype,
            trust_remote_code=False,
            attn_implementation="eager",
            use_safetensors=True,  # pickles may carry code
            ignore_mismatched_sizes=True,  # so that all of them are named below
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        broken = _broken_file(name)
        reason = str(error).strip().splitlines()[0].rstrip(". ")
        raise ValueError(
            f"model.name={name!r}: {f'{broken}: ' if broken else ''}its weights cannot be read: {reason}. "
            "Give a folder with a config.json and whole safetensors (convert pickles with save_pretrained, "
            "load files that are cut again)."
        ) from error
    shapes = [
        f"{key} is {tuple(there)} and must be {tuple(here)}" for key, there, here in found["mismatched_keys"]
    ]
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    wrong = [*shapes[:3], *(f"{key} is missing" for key in missing[:3])]
    wrong += [f"{key} has no place" for key in unexpected[:3]]
    if wrong:
        raise ValueError(
            f"model.name={name!r}: the weights are not those of its config.json: {'; '.join(wrong)} "
            f"({len(shapes)} of another shape, {len(missing)} missing, {len(unexpected)} too many). Give a "
            "whole checkpoint, with its own config.json."
        )
    return model


def _broken_file(name: str) -> str | None:
    """The name of a file of a folder that cannot be opened, if it is one of these."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(Path(name).expanduser().glob("*.safetensors*")):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text("utf-8"))
            else:
                with safe_open(path, framework="pt"):
                    pass
        except (OSError, ValueError, SafetensorError):
            return path.name
    return None


def check_length(config: RunConfig) -> None:
    """Refuse sequences that are longer than the model has positions.

    Raises:
        ValueError: With both numbers.
    """
    positions = getattr(hf_config(config.model), "max_position_embeddings", None)
    if isinstance(positions, int) and config.sequence.length > positions:
        raise ValueError(
            f"sequence.length={config.sequence.length} is above max_position_embeddings={positions} of "
            f"{config.model.name or 'model.config'}; shorten it, or set model.config.max_position_embeddings "
            "(and with pretrained weights rope_parameters, as the preset llama3-8b-512k-8gpu does)."
        )


def add_adapters(model: nn.Module, config: ModelConfig) -> nn.Module:
    """The model with LoRA adapters where the config has them; its own weights are then frozen.

    Raises:
        ValueError: Adapters on random weights, or peft is not installed.
    """
    if config.lora is None:
        return model
    if config.name is None:
        # A checkpoint holds the adapters alone, and random weights are not the same on every device.
        raise ValueError("model.lora adapts a checkpoint's weights and model.name=null has none; name one.")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("model.lora needs peft; install it with: pip install 'longseq[peft]'") from error
    layers = sorted({name for name, module in model.named_modules() if isinstance(module, nn.Linear)})
    strangers = [
        target
        for target in config.lora.target_modules
        if not any(f".{layer}".endswith(f".{target}") for layer in layers)
    ]
    # Of the defaults, a family may have some under another name.
    if len(strangers) == len(config.lora.target_modules) or (
        strangers and "target_modules" in config.lora.model_fields_set
    ):
        raise ValueError(
            f"model.lora.target_modules: the model has no layer {', '.join(strangers)}; use some of "
            f"{', '.join(sorted({layer.rpartition('.')[2] for layer in layers}))}."
        )
    lora = LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=list(config.lora.target_modules),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft calls transformers by a name that this would like to leave: nothing that a user can change.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, lora)


def build_model(
    config: RunConfig,
    groups: ProcessGroups,
    device: torch.device,
    dtype: torch.dtype,
    zero: Mapping[str, Any] | None = None,
    knobs: Knobs | None = None,
) -> nn.Module:
    """The model as it is trained: adapters, attention over the ranks of a sequence, mini-sequences.

    Args:
        config: The run.
        groups: This rank's process groups.
        device: Where the weights are.
        dtype: Of them.
        zero: DeepSpeed's configuration where weights are sharded from the start.
        knobs: Of the run's plan; without one (on a CPU) the config's own words decide.
    """
    model = add_adapters(build_base_model(config.model, device, dtype, zero), config.model)
    apply_ulysses(model, groups)
    options = _by_config(config, groups) if knobs is None else _by_plan(knobs)
    apply_mini_sequence(
        model, loss=config.sequence.loss, loss_memory_mib=config.sequence.loss_memory_mib, **options
    )
    return model.train()


def _by_plan(knobs: Knobs) -> dict[str, Any]:
    if not knobs.stream:
        return {"tile_tokens": knobs.tile_tokens, "checkpoints": "none"}
    return {
        "tile_tokens": knobs.tile_tokens,
        "checkpoints": knobs.inputs,
        "head_groups": knobs.head_groups,
        "save_attention": knobs.attention,
    }


def _by_config(config: RunConfig, groups: ProcessGroups) -> dict[str, Any]:
    sequence = config.sequence
    tile = sequence.tile_tokens if sequence.mini_sequence else None
    tokens_a_gpu = sequence.length * config.train.micro_batch_sequences // groups.sp_size
    streamed = streams_layers(sequence, tokens_a_gpu)
    if sequence.checkpoints == "auto":
        how = "streamed" if streamed else "not streamed"
        logger.info("sequence.checkpoints: layers are %s, for %d tokens a GPU", how, tokens_a_gpu)
    if not streamed:
        return {"tile_tokens": tile, "checkpoints": "none"}
    return {
        "tile_tokens": tile,
        "checkpoints": _placement(sequence),
        "head_groups": sequence.head_groups,
        "save_attention": {"none": False, "auto": True}.get(sequence.save_attention, sequence.save_attention),
    }


def _placement(sequence: SequenceConfig) -> str | Placement:
    if sequence.checkpoint_every == 1:
        return sequence.checkpoints
    on_host = sequence.checkpoints == "host"
    return Placement(gpu_layers=1 if on_host else 0, every=sequence.checkpoint_every, host=on_host)


def name_special_tokens(model: nn.Module, tokenizer: Any) -> None:
    """Tell a model made anew which ids begin, end and pad a text: generation stops by them."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for config in (model.config, model.generation_config):
            setattr(config, name, getattr(tokenizer, name))


def check_vocabulary(model: nn.Module, tokenizer: Any) -> None:
    """Refuse a tokenizer whose ids the embedding does not have.

    Raises:
        ValueError: With both sizes.
    """
    rows, needed = model.get_input_embeddings().num_embeddings, vocabulary_size(tokenizer)
    if needed > rows:
        raise ValueError(
            f"the tokenizer has {needed} tokens and the model embeds {rows}; choose the model's own "
            "tokenizer (data.tokenizer) or a larger model.config.vocab_size."
        )
