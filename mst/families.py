"""Where the parts of a decoder are, family by family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .kernels.gated_activation import activation_name
from .layer_parts import LayerParts
from .projections import HeadShape


@dataclass(frozen=True)
class LayerPattern:
    """Names of a decoder layer's parts; None where the family has no such part."""

    input_norm: str | None = "input_layernorm"
    query_key_value: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    query_norm: str | None = None
    key_norm: str | None = None
    output: str = "self_attn.o_proj"
    post_attention_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    post_mlp_norm: str | None = None

    def names(self) -> list[str]:
        """Of every part there must be."""
        single = (
            self.input_norm,
            self.query_norm,
            self.key_norm,
            self.output,
            self.post_attention_norm,
            self.mlp_norm,
            self.down,
            self.post_mlp_norm,
        )
        return [*self.query_key_value, *self.gate_up, *(name for name in single if name is not None)]


HEAD_NORMS = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
NORMS_AROUND = {
    "post_attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}

LLAMA = LayerPattern()
QWEN3 = LayerPattern(**HEAD_NORMS)
PHI3 = LayerPattern(query_key_value=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))
GEMMA2 = LayerPattern(**NORMS_AROUND)
GEMMA3 = LayerPattern(**NORMS_AROUND, **HEAD_NORMS)
OLMO2 = LayerPattern(
    input_norm=None,
    mlp_norm=None,
    post_attention_norm="post_attention_layernorm",
    post_mlp_norm="post_feedforward_layernorm",
    **HEAD_NORMS,
)

FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": QWEN3,
    "phi3": PHI3,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "olmo2": OLMO2,
}
"""Hugging Face model types, and the pattern of their layers."""


@dataclass(frozen=True)
class CausalLMParts:
    """The parts of a causal language model that mini-sequences are applied to."""

    causal_lm: nn.Module
    """The model with the head, under any wrapper."""
    decoder: nn.Module
    """Embedding, layers and final norm: token ids to hidden states."""
    lm_head: nn.Module
    layers: tuple[nn.Module, ...]
    parts: tuple[LayerParts, ...]
    """Of each layer."""
    final_norm: nn.Module | None
    softcap: float | None
    """Of the logits."""
    logit_scale: float
    known: bool
    """Whether the family is one of FAMILIES; else what the layers compute is to be checked."""


def find_parts(model: nn.Module, layers: str | None = None) -> CausalLMParts:
    """Look up a model's parts, also under peft.

    Args:
        model: A causal LM, or peft's wrapper of one.
        layers: Where the decoder layers of a model of no known family are, such as "model.layers".

    Raises:
        ValueError: The model is of no known family and `layers` is not given, it is a mixture of experts, or
            it does not have the shape of a known pattern.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(causal_lm, "config", None)
    model_type = getattr(config, "model_type", None)
    _refuse_experts(causal_lm, model_type)
    if model_type not in FAMILIES and layers is None:
        raise ValueError(
            f"model_type={model_type!r} ({type(causal_lm).__name__}) is no family that mini-sequences know; "
            f"there are {', '.join(FAMILIES)}. If its decoder layers are built like one of theirs, say where "
            "they are: apply_mini_sequence(model, layers='model.layers'). longseq.mst.mini_sequence works on "
            "any module."
        )
    path = layers or "model.layers"
    decoder_path, _, _ = path.rpartition(".")
    decoder, modules = _submodule(causal_lm, decoder_path), _submodule(causal_lm, path)
    lm_head = causal_lm.get_output_embeddings() if hasattr(causal_lm, "get_output_embeddings") else None
    lm_head = getattr(causal_lm, "lm_head", lm_head)
    if lm_head is None or not isinstance(modules, nn.ModuleList) or len(modules) == 0:
        raise ValueError(
            f"{type(causal_lm).__name__} has no .{path} (a ModuleList) and .lm_head; pass the causal LM "
            f"itself{', and where its layers are' if layers else ''}."
        )
    patterns = [FAMILIES[model_type]] if model_type in FAMILIES else list(dict.fromkeys(FAMILIES.values()))
    parts = tuple(_layer_parts(index, layer, patterns, config) for index, layer in enumerate(modules))
    return CausalLMParts(
        causal_lm,
        decoder,
        lm_head,
        tuple(modules),
        parts,
        getattr(decoder, "norm", None),
        getattr(config, "final_logit_softcapping", None),
        _logit_scale(config),
        model_type in FAMILIES,
    )


def _refuse_experts(causal_lm: nn.Module, model_type: str | None) -> None:
    for name, module in causal_lm.named_modules():
        if name.rpartition(".")[2] in ("experts", "block_sparse_moe"):
            raise ValueError(
                f"model_type={model_type!r} is a mixture of experts ({name} is a {type(module).__name__}): "
                "its router makes tokens depend on how they are cut. Mini-sequences are for dense models; "
                f"use one of {', '.join(FAMILIES)}."
            )


def _layer_parts(index: int, layer: nn.Module, patterns: list[LayerPattern], config: Any) -> LayerParts:
    misfits = []
    for pattern in patterns:
        misfit = _misfit(layer, pattern)
        if misfit is None:
            return _read_parts(layer, pattern, config)
        misfits.append(misfit)
    fewest = min(misfits, key=lambda found: sum(map(len, found)))
    missing, unknown = fewest
    said = [f"{title} {', '.join(names)}" for title, names in (("no", missing), ("also", unknown)) if names]
    expected = ", ".join(patterns[misfits.index(fewest)].names())
    raise ValueError(
        f"layer {index} ({type(layer).__name__}) fits no known pattern. Beside the nearest, it has "
        f"{'; '.join(said)}. Expected were {expected}, and no other weights."
    )


def _misfit(layer: nn.Module, pattern: LayerPattern) -> tuple[list[str], list[str]] | None:
    """Parts that are missing, and weights that belong to none; None if the pattern fits."""
    names = pattern.names()
    missing = [name for name in names if _submodule(layer, name) is None]
    unknown = [
        name
        for name, _ in layer.named_parameters()
        if not any(name.startswith(f"{known}.") for known in names)
    ]
    return (missing, unknown) if missing or unknown else None


def _read_parts(layer: nn.Module, pattern: LayerPattern, config: Any) -> LayerParts:
    attention, mlp = layer.self_attn, layer.mlp
    if getattr(attention, "is_causal", True) is not True:
        raise ValueError(f"{type(attention).__name__} sees later tokens; streamed layers are causal.")
    width = getattr(attention, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    scale = getattr(attention, "scaling", None)
    activation = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)

    def part(name: str | None) -> nn.Module | None:
        return None if name is None else _submodule(layer, name)

    return LayerParts(
        attention=attention,
        query_key_value=tuple(map(part, pattern.query_key_value)),
        output=part(pattern.output),
        mlp=mlp,
        gate_up=tuple(map(part, pattern.gate_up)),
        down=part(pattern.down),
        activation=None if activation is None else activation_name(activation),
        heads=HeadShape(config.num_attention_heads, kv_heads, width),
        scale=width**-0.5 if scale is None else scale,
        input_norm=part(pattern.input_norm),
        query_norm=part(pattern.query_norm),
        key_norm=part(pattern.key_norm),
        post_attention_norm=part(pattern.post_attention_norm),
        mlp_norm=part(pattern.mlp_norm),
        post_mlp_norm=part(pattern.post_mlp_norm),
        window=getattr(attention, "sliding_window", getattr(config, "sliding_window", None)),
        # Gemma-3 has the field too, and leaves it None.
        softcap=getattr(attention, "attn_logit_softcapping", None),
        intermediate_size=_width(part(pattern.down)),
    )


def _width(down: nn.Module) -> int:
    base = down.get_base_layer() if hasattr(down, "get_base_layer") else down
    return base.in_features


def _logit_scale(config: Any) -> float:
    """Factor of the logits: Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`."""
    return getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    for name in filter(None, path.split(".")):
        module = getattr(module, name, None)
        if module is None:
            return None
    return module
