"""DeepSpeed-Ulysses: between two all-to-alls, each rank holds some heads of the whole sequence.

Everything outside attention is token-wise and works on this rank's shard of S = L / P tokens. Queries, keys
and values go out in one exchange and the result comes back in one: two collectives a layer forward.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .attention import local_attention
from .groups import ProcessGroups
from .sequence import has_restarts, offsets_from_positions

ATTENTION_NAME = "longseq"
"""Name under which transformers finds this attention; what it does is kept on each layer's own instance."""
UNKNOWN_OPTIONS = ("softcap", "s_aux", "sliding_window", "position_bias")
"""What some families hand their attention beside the tensors, and what would change its numbers."""


@torch.library.custom_op("longseq::all_to_all", mutates_args=())
def _all_to_all(blocks: Tensor, group_name: str) -> Tensor:
    """Block p of dimension 0 goes to rank p of the group; block p of the result came from there."""
    received = torch.empty_like(blocks)
    group = torch.distributed.distributed_c10d._resolve_process_group(group_name)
    dist.all_to_all_single(received, blocks.contiguous(), group=group)
    return received


@_all_to_all.register_fake
def _(blocks: Tensor, group_name: str) -> Tensor:
    return torch.empty_like(blocks)


def _keep_group(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.group_name = inputs[1]


def _send_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _all_to_all(grad.contiguous(), ctx.group_name), None


_all_to_all.register_autograd(_send_back, setup_context=_keep_group)


class UlyssesAttention:
    """Causal attention of a sequence that is spread over a process group."""

    def __init__(self, groups: ProcessGroups) -> None:
        self._groups = groups

    def check_heads(self, num_heads: int, num_kv_heads: int) -> None:
        """Refuse head counts that the degree does not divide.

        Raises:
            ValueError: With the degrees that would do.
        """
        size = self._groups.sp_size
        if num_heads % size or num_kv_heads % size:
            fitting = [d for d in range(1, num_kv_heads + 1) if num_heads % d == 0 and num_kv_heads % d == 0]
            raise ValueError(
                f"parallel.ulysses_degree={size} must divide both {num_heads} query heads and {num_kv_heads} "
                f"key/value heads; use {', '.join(map(str, fitting))}."
            )

    def __call__(
        self,
        query: Tensor,  # (B, N, S, H)
        key: Tensor,  # (B, K, S, H)
        value: Tensor,  # (B, K, S, H)
        *,
        scale: float,
        document_offsets: Tensor | None = None,
    ) -> Tensor:
        """Attention output of this rank's tokens, `(B, N, S, H)`; offsets are those of the whole sequence."""
        size = self._groups.sp_size
        if size == 1:
            return local_attention(query, key, value, scale=scale, document_offsets=document_offsets)
        num_heads, num_kv_heads = query.shape[1] // size, key.shape[1] // size
        packed = torch.cat([_heads_by_rank(tensor, size) for tensor in (query, key, value)], dim=2)
        whole = _join_tokens(_all_to_all(packed, self._groups.sp.group_name))
        out = local_attention(
            *whole.split([num_heads, num_kv_heads, num_kv_heads], dim=1),
            scale=scale,
            document_offsets=document_offsets,
        )
        # (B, N/P, P*S, H) -> (P, B, N/P, S, H): each rank's tokens go home, with the heads of this rank
        home = out.unflatten(2, (size, -1)).permute(2, 0, 1, 3, 4)
        back = _all_to_all(home.contiguous(), self._groups.sp.group_name)
        return back.transpose(0, 1).flatten(1, 2)


def _heads_by_rank(tensor: Tensor, size: int) -> Tensor:
    """`(B, N, S, H)` -> `(P, B, N/P, S, H)`: block p holds the heads of rank p."""
    return tensor.unflatten(1, (size, -1)).transpose(0, 1)


def _join_tokens(blocks: Tensor) -> Tensor:
    """`(P, B, n, S, H)`, block p the tokens of rank p -> `(B, n, P*S, H)`."""
    return blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)


def apply_ulysses(model: nn.Module, groups: ProcessGroups | None = None) -> UlyssesHandle:
    """Give a Hugging Face model attention over a sequence that its ranks share.

    Each rank then calls the model with its own part of a batch, as `shard_batch` cuts it: `input_ids`,
    `shift_labels`, `position_ids`, and `document_offsets` where documents are packed. With one rank (or
    without `groups`) this is causal attention per document that builds no mask.

    Returns:
        A handle whose `undo()` restores the model's own attention.

    Raises:
        ValueError: Head counts that the degree does not divide, a model with sliding-window attention or
            without decoder layers, or one that has this attention already.
    """
    return UlyssesHandle(model, groups or ProcessGroups())


class UlyssesHandle:
    """What `apply_ulysses` changed, and the way back."""

    def __init__(self, model: nn.Module, groups: ProcessGroups) -> None:
        causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        layers = _attention_layers(causal_lm)
        config = causal_lm.config
        _refuse_windows(config)
        attention = UlyssesAttention(groups)
        attention.check_heads(config.num_attention_heads, config.num_key_value_heads)
        _register_with_transformers()
        self._causal_lm = causal_lm
        self._earlier = config._attn_implementation
        self._layers = layers
        for layer in self._layers:
            layer.longseq_attention = attention
        causal_lm.set_attn_implementation(ATTENTION_NAME)
        self._hook = causal_lm.register_forward_pre_hook(_InputCheck(groups), with_kwargs=True)

    def undo(self) -> None:
        """Restore the model's own attention; a second call does nothing."""
        if not self._layers:
            return
        self._hook.remove()
        self._causal_lm.set_attn_implementation(self._earlier)
        for layer in self._layers:
            del layer.longseq_attention
        self._layers = []


class _InputCheck:
    """Refuses inputs whose numbers would be wrong without a word, and finds documents in position ids."""

    def __init__(self, groups: ProcessGroups) -> None:
        self._groups = groups

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
        return args, kwargs

    def _check_shard(self, given: dict[str, Any], position_ids: Tensor | None) -> None:
        if given.get("labels") is not None and given.get("shift_labels") is None:
            raise ValueError(
                "labels= would be shifted inside each rank's shard and lose one label a border; pass "
                "shift_labels=, as longseq.distributed.shard_batch makes them."
            )
        if position_ids is None:
            raise ValueError("position_ids= are needed where ranks share a sequence; shard_batch makes them.")
        if given.get("document_offsets") is None:
            # A document that begins in this shard is known to the other ranks by its offsets alone.
            length = position_ids.shape[-1]
            first = self._groups.sp_rank * length
            wanted = torch.arange(first, first + length, device=position_ids.device)
            if not (position_ids == wanted).all():
                raise ValueError(
                    f"position_ids of rank {self._groups.sp_rank} of the sequence do not run from {first} to "
                    f"{first + length - 1}; pass the document_offsets of the whole sequence, as shard_batch "
                    "makes them."
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


def _refuse_windows(config: Any) -> None:
    layer_types = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in layer_types or (not layer_types and getattr(config, "sliding_window", None)):
        raise ValueError(
            f"sliding_window={getattr(config, 'sliding_window', None)}: sliding-window attention is not "
            "there yet; set sliding_window to None to train with full attention."
        )


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
    document_offsets: Tensor | None = None,
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
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # Rotary embedding has made queries and keys float32 again: the kernels would refuse the mixture
        # and the exchange would send twice the bytes.
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = module.longseq_attention(query, key, value, scale=scale, document_offsets=document_offsets)
    return out.transpose(1, 2), None
