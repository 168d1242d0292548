"""Where the parts of a decoder are, family by family."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Hugging Face model types whose causal LM is `model` (decoder) + `lm_head`, layers with a gated `mlp`."""


@dataclass(frozen=True)
class CausalLMParts:
    """The parts of a causal language model that mini-sequences are applied to."""

    causal_lm: nn.Module
    """The model with the head, under any wrapper."""
    decoder: nn.Module
    """Embedding, layers and final norm: token ids to hidden states."""
    lm_head: nn.Module
    mlps: tuple[nn.Module, ...]


def find_parts(model: nn.Module) -> CausalLMParts:
    """Look up a model's parts, also under peft.

    Raises:
        ValueError: The model is of no known family, or does not have the family's shape.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(causal_lm, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type={model_type!r} ({type(causal_lm).__name__}) is not a family that mini-sequences can "
            f"be applied to; there are {', '.join(FAMILIES)}. longseq.mst.mini_sequence works on any module."
        )
    decoder, lm_head = getattr(causal_lm, "model", None), getattr(causal_lm, "lm_head", None)
    layers = getattr(decoder, "layers", None)
    if lm_head is None or layers is None:
        raise ValueError(
            f"{type(causal_lm).__name__} has no .model.layers and .lm_head; pass the causal LM itself."
        )
    mlps = tuple(layer.mlp for layer in layers)
    for index, mlp in enumerate(mlps):
        missing = [name for name in ("gate_proj", "up_proj", "down_proj") if not hasattr(mlp, name)]
        if missing:
            raise ValueError(
                f"layer {index}'s {type(mlp).__name__} has no {', '.join(missing)}: no gated MLP."
            )
    return CausalLMParts(causal_lm, decoder, lm_head, mlps)
