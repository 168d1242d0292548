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
from torch.autograd.function import once_differentiable

from .attention import attention_backward, attention_forward, local_attention
from .attention_kernels import AttentionOptions, Documents
from .groups import ProcessGroups
from .sequence import has_restarts, offsets_from_positions

ATTENTION_NAME = "longseq"
"""Name under which transformers finds this attention; what it does is kept on each layer's own instance."""
UNKNOWN_OPTIONS = ("s_aux", "position_bias")
"""What some families hand their attention beside the tensors, and what would change its numbers."""
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
"""transformers' names of the layers that this attention does; others show in masks that it does not take."""


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


class UlyssesAttention:
    """Causal attention of a sequence that is spread over a process group.

    A call is differentiable. `forward` and `backward` are the same without autograd, for layers that decide
    themselves what waits between the two.
    """

    def __init__(self, groups: ProcessGroups) -> None:
        self._groups = groups

    @property
    def sp_size(self) -> int:
        """Ranks that share a sequence."""
        return self._groups.sp_size

    @property
    def group(self) -> dist.ProcessGroup | None:
        """These ranks; None where a rank is alone."""
        return self._groups.sp

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
        window: int | None = None,
        softcap: float | None = None,
        document_offsets: Tensor | Documents | None = None,
    ) -> Tensor:
        """Attention output of this rank's tokens, `(B, N, S, H)`; offsets are those of the whole sequence."""
        if self._groups.sp_size > 1:
            # Between the exchanges lies the whole sequence: it stays for backward, which need not send it.
            query, key, value = _Exchange.apply(self._groups, query, key, value)
        out = local_attention(
            *(query, key, value),
            scale=scale,
            window=window,
            softcap=softcap,
            document_offsets=document_offsets,
        )
        return out if self._groups.sp_size == 1 else _Return.apply(self._groups, out)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
        document_offsets: Tensor | Documents | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`attention_forward` of a sequence that ranks share; two collectives, nothing is kept.

        Args:
            query: This rank's queries, `(B, N, S, H)`.
            key: Its keys, `(B, K, S, H)`.
            value: Its values, like the keys.
            options: Scale, window, softcap and kernel.
            document_offsets: Of the whole sequence.

        Returns:
            This rank's output, `(B, N, S, H)`, and the log-sum-exp of this rank's heads over all tokens, in a
            layout of the kernel's own, for `backward` on the same rank.
        """
        if self._groups.sp_size == 1:
            return attention_forward(query, key, value, options, document_offsets)
        whole = _to_heads(self._groups, query, key, value)
        out, lse = attention_forward(*whole, options, document_offsets)
        return _to_tokens(self._groups, out)[0], lse

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        options: AttentionOptions,
        document_offsets: Tensor | Documents | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of this rank's queries, keys and values; two collectives.

        Args:
            grad_out: Gradient of this rank's output, `(B, N, S, H)`.
            query: As `forward` was given them, here and below.
            key: Likewise.
            value: Likewise.
            out: The output that `forward` gave.
            lse: The log-sum-exp that it gave.
            options: The same options.
            document_offsets: The same documents.
        """
        if self._groups.sp_size == 1:
            return attention_backward(grad_out, query, key, value, out, lse, options, document_offsets)
        *tensors, out, grad_out = _to_heads(self._groups, query, key, value, out, grad_out)
        grads = attention_backward(grad_out, *tensors, out, lse, options, document_offsets)
        return tuple(_to_tokens(self._groups, *grads))


def _to_heads(groups: ProcessGroups, *tensors: Tensor) -> tuple[Tensor, ...]:
    """All heads of this rank's tokens -> this rank's heads of all tokens, in one exchange.

    Blocks have their tokens first: what came from the ranks then already is the whole sequence, and each
    tensor `(B, n, L, H)` is a view of it.
    """
    size = groups.sp_size
    # (B, N, S, H) -> (P, S, B, N/P, H): block p holds the heads of rank p
    blocks = [tensor.unflatten(1, (size, -1)).permute(1, 3, 0, 2, 4) for tensor in tensors]
    whole = _all_to_all(torch.cat(blocks, dim=3), groups.sp.group_name).flatten(0, 1)
    return whole.permute(1, 2, 0, 3).split([block.shape[3] for block in blocks], dim=1)


def _to_tokens(groups: ProcessGroups, *tensors: Tensor) -> list[Tensor]:
    """The way back from `_to_heads`, in one exchange; each `(B, N, S, H)` is laid out as `(B, S, N, H)`."""
    size = groups.sp_size
    # (B, n, P*S, H) -> (P, S, B, n, H): each rank's tokens go home, with the heads of this rank
    blocks = [tensor.unflatten(2, (size, -1)).permute(2, 3, 0, 1, 4) for tensor in tensors]
    home = _all_to_all(torch.cat(blocks, dim=3), groups.sp.group_name)
    parts = home.split([block.shape[3] for block in blocks], dim=3)
    return [part.permute(2, 1, 0, 3, 4).flatten(2, 3).transpose(1, 2) for part in parts]


class _Exchange(torch.autograd.Function):
    """`_to_heads` of queries, keys and values, with the way back for their gradients."""

    @staticmethod
    def forward(ctx: Any, groups: ProcessGroups, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.groups = groups
        return _to_heads(groups, *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_to_tokens(ctx.groups, *grads)


class _Return(torch.autograd.Function):
    """`_to_tokens` of attention's output, with the way there for its gradient."""

    @staticmethod
    def forward(ctx: Any, groups: ProcessGroups, out: Tensor) -> Tensor:
        ctx.groups = groups
        return _to_tokens(groups, out)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[None, Tensor]:
        return None, _to_heads(ctx.groups, grad_out)[0]


def apply_ulysses(model: nn.Module, groups: ProcessGroups | None = None) -> UlyssesHandle:
    """Give a Hugging Face model attention over a sequence that its ranks share.

    Each rank then calls the model with its own part of a batch, as `shard_batch` cuts it: `input_ids`,
    `shift_labels`, `position_ids`, and `document_offsets` where documents are packed. With one rank (or
    without `groups`) this is causal attention per document that builds no mask.

    Returns:
        A handle whose `undo()` restores the model's own attention.

    Raises:
        ValueError: Head counts that the degree does not divide, a model whose layers are not all causal
            attention (full or within a sliding window), or one that has this attention already.
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
        attention.check_heads(config.num_attention_heads, config.num_key_value_heads)
        _register_with_transformers()
        self._causal_lm = causal_lm
        self._earlier = config._attn_implementation
        self._layers = layers
        for layer, window in zip(self._layers, windows, strict=True):
            layer.longseq_attention = attention
            layer.longseq_window = window
        causal_lm.set_attn_implementation(ATTENTION_NAME)
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
    )
    return out.transpose(1, 2), None
