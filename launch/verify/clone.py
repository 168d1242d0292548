"""A model like the config's in everything but its sizes: what is true of it is true of the large one."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..planner import known_shapes

if TYPE_CHECKING:
    from ..config import ModelConfig

VOCABULARY = 1031
"""A prime: a multiple of no block. Large enough that a loss in 1 MiB has several chunks."""
LEAST_HIDDEN = 48
MOST_WIDE_HEADS = 16
"""Query heads from which heads are half as wide, so that many of them are still a small model."""
WINDOW = 11
"""Of sliding windows: documents of the batches are longer, and none is a multiple of it."""
HEAD_WIDTH = 8
"""Least width of a head, unless there are many."""
LAYERS = 2
OF_THE_FILES = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "transformers_version",
)
"""Fields that say where weights came from and how they were stored, not what the model computes."""
TOKEN_FIELDS = ("pad_token_id", "bos_token_id", "eos_token_id")


class Heads(NamedTuple):
    """Query heads N and key/value heads K."""

    queries: int
    keys: int


def architecture_of(model: ModelConfig) -> Any:
    """The Hugging Face config of the model itself; of a well-known one also where the hub cannot be reached.

    Raises:
        ValueError: It is not to be had.
    """
    return known_shapes.architecture(model)[0]


def heads_of(architecture: Any) -> Heads:
    """The heads that a model has."""
    queries = architecture.num_attention_heads
    return Heads(queries, getattr(architecture, "num_key_value_heads", None) or queries)


def heads_for(heads: Heads, degree: int, ranks: int) -> Heads:
    """Heads that `ranks` share as `degree` ranks share the model's own: as many each, as often sent twice."""
    if degree == ranks:
        return heads
    keys = max(1, round(heads.keys * ranks / degree))
    return Heads(keys * (heads.queries // heads.keys), keys)


def possible_groups(heads: Heads, ranks: int) -> list[int]:
    """Numbers of head groups that a plan may choose: whole key/value heads, a query head for each rank."""
    return [n for n in range(1, heads.keys + 1) if heads.keys % n == 0 and heads.queries // n >= ranks]


def small_config(
    architecture: Any,
    *,
    heads: Heads | None = None,
    head_width: int | None = None,
    window: int = WINDOW,
    layers: int = LAYERS,
) -> Any:
    """The architecture with every field as it is, except its sizes.

    Activation, norms, caps, scales, biases, rotary embedding, tied embeddings and kinds of layers stay; two
    layers, one of each kind where there are two kinds.

    Args:
        architecture: Hugging Face config of the model.
        heads: Query and key/value heads; None keeps the model's own.
        head_width: Width of a head, doubled until the rotated part of it is even; None chooses.
        window: Sliding window, where the model has one.
        layers: Of the clone; with two, each kind of layer that the model has is there once.
    """
    fields = {name: value for name, value in architecture.to_dict().items() if name not in OF_THE_FILES}
    queries, keys = heads or heads_of(architecture)
    if head_width is None:
        head_width = HEAD_WIDTH if queries <= MOST_WIDE_HEADS else HEAD_WIDTH // 2
    width = _rotatable_width(fields, head_width)
    hidden = queries * math.ceil(LEAST_HIDDEN / queries)
    if _heads_are_hidden(architecture):
        hidden = queries * width  # attention's output may then take its input's place
    fields |= {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden + 16,
        "num_hidden_layers": layers,
        "num_attention_heads": queries,
        "num_key_value_heads": keys,
        "head_dim": width,
        "vocab_size": VOCABULARY,
        **dict.fromkeys(TOKEN_FIELDS),
        # Dropped out would be others in each of two runs.
        **{name: 0.0 for name in fields if name.endswith("_pdrop")},
    }
    if getattr(architecture, "head_dim", None) is None:
        del fields["head_dim"]
    if fields.get("sliding_window"):
        fields["sliding_window"] = window
    if fields.get("layer_types"):
        fields["layer_types"] = (sorted(set(fields["layer_types"])) * layers)[:layers]
    if fields.get("rope_parameters"):
        fields["rope_parameters"] = _small_rope(fields["rope_parameters"], width)
    return type(architecture)(**fields)


def small_model(
    architecture: Any,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    attention: str = "eager",
    seed: int = 0,
) -> nn.Module:
    """A causal LM of a `small_config`, in training, whose every weight matters.

    Args:
        architecture: What `small_config` gave.
        device: Where its weights are.
        dtype: Of the weights, whose numbers are those of bfloat16: the model is the same one in any dtype.
        attention: Name of transformers' attention.
        seed: Of the weights.
    """
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(architecture), dtype=dtype, attn_implementation=attention
        )
    draw_weights(model, seed=seed)
    return model.train()


@torch.no_grad()
def draw_weights(model: nn.Module, *, only: str = "", seed: int = 0) -> None:
    """Draw weights (of names with `only` in them): no norm of ones, no bias and no adapter of zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if only not in name:
            continue
        noise = torch.randn(param.shape, generator=generator)
        if param.dim() > 1:
            noise = noise / param.shape[1] ** 0.5
        elif "norm" in name:
            noise = 0.3 * noise + param.cpu().float()
        else:
            noise = 0.3 * noise
        param.copy_(noise.bfloat16())


def _heads_are_hidden(architecture: Any) -> bool:
    width = getattr(architecture, "head_dim", None)
    return width is None or width * architecture.num_attention_heads == architecture.hidden_size


def _rotatable_width(fields: dict[str, Any], width: int) -> int:
    share = (fields.get("rope_parameters") or {}).get("partial_rotary_factor")
    share = share or fields.get("partial_rotary_factor") or 1.0
    while int(width * share) % 2 or not int(width * share):
        width *= 2
    return width


def _small_rope(rope: dict[str, Any], width: int) -> dict[str, Any]:
    """Rotary parameters with lists of one number a rotation cut to a small head's."""
    small = dict(rope)
    for name, value in rope.items():
        if isinstance(value, dict):  # of one kind of layers
            small[name] = _small_rope(value, width)
        elif isinstance(value, (list, tuple)) and name.endswith("_factor"):
            small[name] = list(value)[: int(width * (rope.get("partial_rotary_factor") or 1.0)) // 2]
    return small
