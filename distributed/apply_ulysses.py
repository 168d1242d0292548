"""`apply_ulysses`: a Hugging Face model whose attention is over a sequence that its ranks share."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .attention_kernels import Documents
from .groups import ProcessGroups
from .sequence import has_restarts, offsets_from_positions
from .ulysses import UlyssesAttention

logger = logging.getLogger(__name__)

ATTENTION_NAME = "longseq"
"""Name under which transformers finds this attention; what it does is kept on each layer's own instance."""
UNKNOWN_OPTIONS = ("position_bias",)
"""What some families hand their attention beside the tensors, and what would change its numbers."""
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
"""transformers' names of the layers that this attention does; others show in masks that it does not take."""


def apply_ulysses(model: nn.Module, groups: ProcessGroups | None = None) -> UlyssesHandle:
    """Give a Hugging Face model attention over a sequence that its ranks share.

    Each rank then calls the model with its own part of a batch, as `shard_batch` cuts it: `input_ids`,
    `shift_labels`, `position_ids`, and `document_offsets` where documents are packed. With one rank (or
    without `groups`) this is causal attention per document that builds no mask.

    Returns:
        A handle whose `undo()` restores the model's own attention.

    Raises:
        ValueError: More ranks than query heads, a model whose layers are not all causal attention (full or
            within a sliding window), or one that has this attention already.
    """
    return UlyssesHandle(model, groups or ProcessGroups())


class UlyssesHandle:
    """What `apply_ulysses` changed, and the way back."""

    def __init__(self, model: nn.Module, groups: ProcessGroups) -> None:
        causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        layers = _attention_layers(causal_lm)
        config = causal_lm.config
        windows = _windows_of_layers(config, layers)
        attention = UlyssesAttention(groups)
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        plan = attention.plan(heads, kv_heads)
        if plan.imbalance > 1:
            logger.warning(
                "%d ranks share %d query and %d key/value heads unevenly (%s): attention takes %.0f%% longer "
                "than evenly shared.",
                groups.sp_size,
                heads,
                kv_heads,
                "+".join(map(str, plan.queries.counts)),
                100 * (plan.imbalance - 1),
            )
        _register_with_transformers()
        self._causal_lm = causal_lm
        self._earlier = config._attn_implementation
        self._layers = layers
        causal_lm.set_attn_implementation(ATTENTION_NAME)
        for layer, window in zip(self._layers, windows, strict=True):
            layer.longseq_attention = attention
            layer.longseq_window = window
        self._hook = causal_lm.register_forward_pre_hook(_InputCheck(groups), with_kwargs=True)

    def undo(self) -> None:
        """Restore the model's own attention; a second call does nothing."""
        if not self._layers:
            return
        self._hook.remove()
        self._causal_lm.set_attn_implementation(self._earlier)
        for layer in self._layers:
            del layer.longseq_attention, layer.longseq_window
        self._layers = []


class _InputCheck:
    """Refuses inputs whose numbers would be wrong without a word, and finds documents in position ids."""

    def __init__(self, groups: ProcessGroups) -> None:
        self._groups = groups
        self._seen_shapes: set[torch.Size] = set()

    def __call__(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        given = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
        if given.get("attention_mask") is not None:
            raise ValueError(
                "attention_mask is not taken: sequences are causal, padding goes on the right with label "
                "-100, and packed documents are told by document_offsets (or by position_ids that "
                "restart). To generate, call the handle's undo() first."
            )
        position_ids = given.get("position_ids")
        if self._groups.sp_size > 1:
            self._check_shard(given, position_ids)
        elif given.get("document_offsets") is None and position_ids is not None:
            if position_ids.shape[0] == 1:
                kwargs = {**kwargs, "document_offsets": offsets_from_positions(position_ids)}
            elif has_restarts(position_ids):
                raise ValueError(
                    f"position_ids restart inside a batch of {position_ids.shape[0]} rows: packed documents "
                    "need one row; concatenate the rows."
                )
        if isinstance(kwargs.get("document_offsets"), Tensor):
            # Read once here, and sent to the device once, instead of once a layer.
            kwargs = {**kwargs, "document_offsets": Documents.of(kwargs["document_offsets"])}
        return args, kwargs

    def _check_shard(self, given: dict[str, Any], position_ids: Tensor | None) -> None:
        if given.get("labels") is not None and given.get("shift_labels") is None:
            raise ValueError(
                "labels= would be shifted inside each rank's shard and lose one label a border; pass "
                "shift_labels=, as longseq.distributed.shard_batch makes them."
            )
        if position_ids is None:
            raise ValueError("position_ids= are needed where ranks share a sequence; shard_batch makes them.")
        if given.get("document_offsets") is None and position_ids.shape not in self._seen_shapes:
            self._check_positions(position_ids)
            self._seen_shapes.add(position_ids.shape)

    def _check_positions(self, position_ids: Tensor) -> None:
        """Once for each shape: it is waited for, by every rank of the sequence, so that all raise alike.

        A document that begins in one shard is known to the other ranks by its offsets alone.
        """
        length = position_ids.shape[-1]
        first = self._groups.sp_rank * length
        wanted = torch.arange(first, first + length, device=position_ids.device)
        num_wrong = (position_ids != wanted).sum()
        dist.all_reduce(num_wrong, group=self._groups.sp)
        if num_wrong:
            raise ValueError(
                f"position_ids of rank {self._groups.sp_rank} of the sequence, or of another one, do not run "
                f"from {first} to {first + length - 1}; pass the document_offsets of the whole sequence, as "
                "shard_batch makes them."
            )


def _attention_layers(causal_lm: nn.Module) -> list[nn.Module]:
    layers = getattr(getattr(causal_lm, "model", None), "layers", None)
    attentions = [getattr(layer, "self_attn", None) for layer in layers or ()]
    if not attentions or None in attentions:
        raise ValueError(
            f"{type(causal_lm).__name__} has no .model.layers with a self_attn each; pass a causal LM whose "
            "every layer is such a decoder layer."
        )
    if any(hasattr(attention, "longseq_attention") for attention in attentions):
        raise ValueError("the model has this attention already; call handle.undo() first.")
    return attentions


def _windows_of_layers(config: Any, layers: list[nn.Module]) -> list[int | None]:
    """The sliding window that the config gives each layer."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    unknown = sorted(set(types or ()) - LAYER_TYPES)
    if unknown:
        raise ValueError(
            f"layer_types has {unknown[0]}, which this attention does not do; it does "
            f"{' and '.join(sorted(LAYER_TYPES))}."
        )
    if any(getattr(layer, "is_causal", True) is False for layer in layers):
        raise ValueError("the model's attention sees tokens that come later; this attention is causal.")
    if types is None:
        return [window] * len(layers)
    return [window if kind == "sliding_attention" else None for kind in types]


def _register_with_transformers() -> None:
    """Add one name to transformers' registry; models that do not ask for it are not touched."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _attention_of_layer)


def _attention_of_layer(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    document_offsets: Tensor | Documents | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: `(B, N, S, H)` in, `(B, S, N, H)` out."""
    if dropout:
        raise ValueError(f"attention_dropout={dropout}: attention dropout is not offered; set it to 0.")
    unknown = [name for name in UNKNOWN_OPTIONS if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(
            f"{type(module).__name__} asks for {unknown[0]}={kwargs[unknown[0]]!r}, which this attention "
            "does not do."
        )
    if sliding_window != module.longseq_window:
        # Some families put the window into the mask alone, which is never made here.
        raise ValueError(
            f"{type(module).__name__} asks for sliding_window={sliding_window}, its config for "
            f"{module.longseq_window}: this attention cannot tell which it is."
        )
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # Rotary embedding has made queries and keys float32 again: the kernels would refuse the mixture
        # and the exchange would send twice the bytes.
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = module.longseq_attention(
        *(query, key, value),
        scale=scale,
        window=sliding_window,
        softcap=softcap,
        document_offsets=document_offsets,
        sinks=s_aux,
    )
    return out.transpose(1, 2), None
