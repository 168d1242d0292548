"""What a run computes, in sizes: each weight's shape and kind, the optimizer's states, what the loss needs.

Shapes are those of the model itself, built without memory ("meta" tensors) and with its adapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from ...apollo import Apollo, parameter_groups
from ...distributed import flash_attention_2, flash_attention_3, flash_attention_4
from ...mst.families import CausalLMParts, find_parts
from ...mst.layer_parts import LayerParts
from ...mst.projections import MOST_GROUPS_AT_ONCE, HeadShape
from ..config import RunConfig
from ..flops import ModelShape
from ..model import add_adapters, hf_config

Kind = Literal["embedding", "head", "projections", "output", "gate_up", "down", "norm", "adapter", "other"]
"""What a weight does: `projections` are those of queries, keys and values, `other` is what no layer names."""
Kernel = Literal["fa4", "fa3", "cudnn", "flash", "blockwise", "cpu"]
"""Of attention (distributed/attention.py)."""
Where = int | None | Literal["any"]


@dataclass(frozen=True)
class Weight:
    """One weight; tied ones are one.

    Attributes:
        name: As the model calls it.
        shape: Of the whole weight.
        trained: It gets a gradient.
        kind: What it does.
        layer: Index of its decoder layer; None outside of them.
    """

    name: str
    shape: tuple[int, ...]
    trained: bool
    kind: Kind
    layer: int | None

    @cached_property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class LayerStructure:
    """How a streamed layer is run, as far as memory depends on it.

    Attributes:
        heads: Query heads, key/value heads and their width.
        mlp_norm: A norm stands before the MLP.
        post_attention_norm: A norm stands behind the output projection.
        post_mlp_norm: A norm stands behind the MLP.
        gates: Maps to the gate and to what it gates: two, or one for both.
        norms_heads: Queries and keys are normalised, head by head.
        norms_whole: They are, over all heads together: then projections cannot be cut by heads.
        kernel: Of attention, where "auto" chooses.
    """

    heads: HeadShape
    mlp_norm: bool
    post_attention_norm: bool
    post_mlp_norm: bool
    gates: int
    norms_heads: bool
    norms_whole: bool
    kernel: Kernel

    def at_once(self, num_groups: int) -> bool:
        """Whether all heads are projected at once, and so can be kept (mst/projections.py)."""
        return num_groups <= MOST_GROUPS_AT_ONCE or self.norms_whole


@dataclass(frozen=True)
class Workload:
    """A run's work, whatever the machine; `Knobs` say how it is spread and where it waits.

    Attributes:
        shape: The sizes that FLOPs follow from.
        weights: All of the model's.
        layer: A decoder layer's structure.
        tied: The LM head's weight is the embedding's.
        is_bf16: Arithmetic is bf16 (`train.precision`), else float32.
        rounds_weights: Trained weights are bf16, rounded stochastically (`optimizer.weights`).
        has_adapters: Adapters are trained and nothing else.
        optimizer: Its name.
        in_backward: Each weight is stepped as soon as its gradient is there.
        state_bytes: Of the optimizer's states without ZeRO, all on one process.
        loss: How the head's loss is made.
        loss_memory_mib: What it may take; None lets the method choose.
        is_packed: Sequences hold several documents.
        adapts_groups: A layer's backward may take fewer groups of heads where there is room.
    """

    shape: ModelShape
    weights: tuple[Weight, ...]
    layer: LayerStructure
    tied: bool
    is_bf16: bool
    rounds_weights: bool
    has_adapters: bool
    optimizer: str
    in_backward: bool
    state_bytes: int
    loss: str
    loss_memory_mib: int | None
    is_packed: bool
    adapts_groups: bool

    @classmethod
    def from_config(cls, config: RunConfig, architecture: Any = None) -> Workload:
        """A config's work.

        Args:
            config: The run; what it leaves to the plan is not looked at.
            architecture: The Hugging Face config of its model; None reads it.

        Raises:
            ValueError: A model whose sizes cannot be counted, or adapters that cannot be made.
        """
        architecture = hf_config(config.model) if architecture is None else architecture
        shape = ModelShape.from_hf_config(architecture)
        model = add_adapters(_without_memory(architecture), config.model)
        parts = find_parts(model)
        weights = tuple(_weights(model, parts))
        return cls(
            shape=shape,
            weights=weights,
            layer=_structure(parts, config),
            tied=parts.lm_head.weight is parts.causal_lm.get_input_embeddings().weight,
            is_bf16=config.train.precision == "bf16",
            rounds_weights=config.optimizer.weights == "bf16",
            has_adapters=config.model.lora is not None,
            optimizer=config.optimizer.name,
            in_backward=config.optimizer.in_backward,
            state_bytes=_state_bytes(model, config, weights),
            loss=config.sequence.loss,
            loss_memory_mib=config.sequence.loss_memory_mib,
            is_packed=config.data.pack,
            adapts_groups=config.sequence.head_groups == "auto",
        )

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.shape.num_layers

    @property
    def compute_bytes(self) -> int:
        """Of a number in products."""
        return 2 if self.is_bf16 else 4

    def weight_bytes(self, zero_stage: int) -> int:
        """Of a number of the model's own weights, and of hidden states; as `setup.build_engine` decides."""
        needs_no_masters = zero_stage > 0 or self.has_adapters or self.rounds_weights
        return 2 if self.is_bf16 and needs_no_masters else 4

    def adapter_bytes(self, zero_stage: int) -> int:
        """Of a number of the adapters: peft makes them float32, DeepSpeed casts them."""
        return self.weight_bytes(zero_stage) if zero_stage > 0 else 4

    def whole_bytes(self, zero_stage: int) -> int:
        """Of all weights, as the model holds them where each process has them whole."""
        adapters = self.numel("adapter")
        own = (self.numel() - adapters) * self.weight_bytes(zero_stage)
        return own + adapters * self.adapter_bytes(zero_stage)

    def numel(self, *kinds: Kind, layer: Where = "any", trained: bool = False) -> int:
        """Elements of weights of some kinds (of all, if none is named).

        Args:
            kinds: Which.
            layer: Of one decoder layer, of none (None), or of any.
            trained: Count those alone that get a gradient.
        """

        def count() -> int:
            return sum(
                weight.numel
                for weight in self.weights
                if (not kinds or weight.kind in kinds)
                and (layer == "any" or weight.layer == layer)
                and (weight.trained or not trained)
            )

        return self.remembered((kinds, layer, trained), count)

    def remembered(self, key: tuple, count: Callable[[], int]) -> int:
        """A number that follows from the weights, counted once: a plan asks for the same many times."""
        if key not in self._counted:
            self._counted[key] = count()
        return self._counted[key]

    @cached_property
    def _counted(self) -> dict[tuple, int]:
        return {}

    @cached_property
    def trained_numel(self) -> int:
        """Elements that get a gradient."""
        return self.numel(trained=True)

    @cached_property
    def frozen_numel(self) -> int:
        """Elements that get none."""
        return self.numel() - self.trained_numel

    @cached_property
    def widest_layer(self) -> int:
        """Index of the decoder layer with most elements."""
        return max(range(self.num_layers), key=lambda index: self.numel(layer=index))

    @cached_property
    def largest_trained(self) -> int:
        """Elements of the largest weight that gets a gradient."""
        return max((weight.numel for weight in self.weights if weight.trained), default=0)

    @cached_property
    def largest_of_layers(self) -> int:
        """The same among those of decoder layers."""
        return max((one.numel for one in self.weights if one.trained and one.layer is not None), default=0)


def _without_memory(architecture: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device("meta"):
        # How attention is computed changes no weight; every family has this way.
        model = AutoModelForCausalLM.from_config(
            architecture, dtype=torch.bfloat16, attn_implementation="eager"
        )
    # no_init_weights leaves out tying too.
    model.tie_weights()
    return model


def _weights(model: Any, parts: CausalLMParts) -> Iterator[Weight]:
    places = _places(parts)
    for name, param in model.named_parameters():
        kind, layer = places.get(id(param), ("other", None))
        if "lora_" in name:
            kind, layer = "adapter", _layer_of(name)
        yield Weight(name, tuple(param.shape), param.requires_grad, kind, layer)


def _layer_of(name: str) -> int | None:
    _, _, behind = name.partition(".layers.")
    index = behind.partition(".")[0]
    return int(index) if index.isdigit() else None


def _places(parts: CausalLMParts) -> dict[int, tuple[Kind, int | None]]:
    """Kind and layer of each weight of the base model, by identity."""
    places: dict[int, tuple[Kind, int | None]] = {}

    def put(module: Any, kind: Kind, layer: int | None) -> None:
        for param in () if module is None else module.parameters():
            places[id(param)] = kind, layer

    put(parts.final_norm, "norm", None)
    put(parts.lm_head, "head", None)
    put(parts.causal_lm.get_input_embeddings(), "embedding", None)
    for index, (module, layer) in enumerate(zip(parts.layers, parts.parts, strict=True)):
        put(module, "norm", index)
        for one in layer.query_key_value:
            put(one, "projections", index)
        put(layer.output, "output", index)
        for one in layer.gate_up:
            put(one, "gate_up", index)
        put(layer.down, "down", index)
        for norm in (layer.query_norm, layer.key_norm):
            put(norm, "norm", index)
    return places


def _structure(parts: CausalLMParts, config: RunConfig) -> LayerStructure:
    layer = parts.parts[0]
    return LayerStructure(
        heads=layer.heads,
        mlp_norm=layer.mlp_norm is not None,
        post_attention_norm=layer.post_attention_norm is not None,
        post_mlp_norm=layer.post_mlp_norm is not None,
        gates=len(layer.gate_up),
        norms_heads=layer.query_norm is not None,
        norms_whole=layer.query_norm is not None
        and tuple(layer.query_norm.weight.shape) != (layer.heads.width,),
        kernel=_kernel(parts.parts, config),
    )


def _kernel(layers: tuple[LayerParts, ...], config: RunConfig) -> Kernel:
    """What attention's "auto" takes on a GPU of Hopper's kind, with the packages that are installed here."""
    capped = any(layer.softcap is not None for layer in layers)
    windowed = any(layer.window is not None for layer in layers)
    if config.train.precision == "float32":
        return "blockwise"
    if flash_attention_4.INSTALLED:
        return "fa4"
    if flash_attention_3.INSTALLED:
        return "fa3"
    if capped:
        return "blockwise" if flash_attention_2.VERSION is None else "flash"
    # Sequences of one document each go to cuDNN's.
    whole = not config.data.pack and not windowed and layers[0].heads.width <= 128
    return "cudnn" if whole else "flash"


def _state_bytes(model: Any, config: RunConfig, weights: tuple[Weight, ...]) -> int:
    """Of the optimizer's states, float32, without ZeRO; for APOLLO by its own report."""
    if config.optimizer.name == "adamw":
        return sum(2 * 4 * weight.numel for weight in weights if weight.trained)
    own = config.optimizer.apollo
    scale_type = "channel" if config.optimizer.name == "apollo" else "tensor"
    groups = parameter_groups(model, embeddings=own.embeddings)
    return Apollo(groups, rank=own.rank, scale_type=scale_type).memory_report().state_bytes
