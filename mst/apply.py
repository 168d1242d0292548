"""Mini-sequences on a Hugging Face model, in place and undone by a handle."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable

from torch import Tensor, nn

from ..distributed.attention_kernels import KERNEL_NAMES
from .decoder_layer import StreamedLayer, StreamOptions
from .families import CausalLMParts, find_parts
from .final_norm import fused_norm
from .handle import MiniSequenceHandle
from .layer_memory import Chain, SavedAttention
from .layer_parts import dropouts_of
from .layer_places import PlaceChooser, parse_save_attention
from .low_rank import as_linear_head
from .mini_sequence import mini_sequence
from .model_forward import causal_lm_forward, decoder_forward, head_with_loss
from .placement import Placement, parse_placement
from .probe import check_numbers
from .tiling import choose_tile_tokens
from .token_norm import is_rms_norm

logger = logging.getLogger(__name__)

LOSSES = ("cce", "mini_sequence", "logits")


def apply_mini_sequence(
    model: nn.Module,
    *,
    tile_tokens: int | str | None = "auto",
    head_groups: int | str = "auto",
    checkpoints: str | Placement = "auto",
    save_attention: bool | int | str | SavedAttention = False,
    loss: str = "cce",
    loss_memory_mib: int | None = None,
    eval_logits: bool = False,
    layers: str | None = None,
    attention_kernel: str = "auto",
) -> MiniSequenceHandle:
    """Make a causal language model train on long sequences; its numbers stay what they were.

    Decoder layers are streamed: each keeps its input alone, and its backward runs attention by groups of
    heads and the MLP by tiles of tokens (see decoder_layer.py). The loss comes from the head without storing
    the logits. `model(input_ids=..., labels=...)` works as before, except that `logits` is None while a loss
    is asked for; generation uses the model's own layers. Instances are patched, never classes.

    Args:
        model: A Hugging Face causal LM of a known family, or peft's wrapper of one.
        tile_tokens: Tokens of a mini-sequence, "auto", or None for one tile.
        head_groups: Groups of key/value heads that attention runs in, one after the other; "auto" takes two,
            which cost next to no time, or one where there is room. A number must divide the key/value heads.
        checkpoints: Where layer inputs wait for backward: "gpu", "host" (pinned memory, copied beside the
            computing), a `Placement` (the last m on the GPU; every k-th kept, or those of `kept`, and the
            others rebuilt), or "auto", which decides by the memory there is. `spread_inputs` of placement.py
            makes the one that rebuilds least in so much room. "none" streams no layer: MLPs run by tiles,
            and what else is kept is left to the model's own setting.
        save_attention: Keep attention's output and log-sum-exp too, which spares its second forward for 8 KiB
            a token and layer of a Llama-3-8B: of every layer "gpu" or "host", of the last so many layers on
            the GPU (a number), or True, as much as there is room for. "all" keeps queries, keys, values
            and the sum behind attention too, 28 KiB in all, and runs no product before the MLP again; with
            more than two groups of heads the sum alone. A `SavedAttention` says all of it.
        loss: "cce" (cut cross-entropy), "mini_sequence" (the head itself, tile by tile) or "logits" (as
            it was).
        loss_memory_mib: MiB that the loss may take beside its gradients; None lets the method choose.
        eval_logits: In evaluation mode, return logits beside the loss, as plain models do: for metrics made
            from them (the Trainer's `compute_metrics`). They are stored whole.
        layers: For a model of no known family, where its decoder layers are ("model.layers"). They must be
            built like those of a known one; that is checked by name and, on a few tokens, in numbers.
        attention_kernel: "auto", or one of longseq.distributed.attention by name.

    Returns:
        A handle whose `undo()` gives the model back as it was.

    Raises:
        ValueError: An option that does not exist or does nothing here, a model whose layers fit no known
            pattern, or one that has mini-sequences.
    """
    placement = parse_placement(checkpoints)
    _check_options(tile_tokens, head_groups, placement, save_attention, loss, attention_kernel)
    parts = find_parts(model, layers)
    if isinstance(placement, Placement):
        placement.check_layers(len(parts.layers))
    for layer in parts.parts:
        layer.head_groups(head_groups, 1)  # refuses a number that does not divide
    saved = parse_save_attention(save_attention, len(parts.layers))
    if isinstance(getattr(parts.causal_lm, "_mini_sequence_handle", None), MiniSequenceHandle):
        raise ValueError("the model has mini-sequences already; call handle.undo() first.")
    check_numbers(parts, streamed=placement is not None, loss=loss)
    handle = MiniSequenceHandle(parts)
    if placement is None:
        for layer in parts.parts if tile_tokens is not None else ():
            mlp = layer.mlp
            handle.patch_tiled(mlp, _tiled_mlp(mlp, mlp.forward, tile_tokens, layer.intermediate_size))
    else:
        options = StreamOptions(tile_tokens, head_groups, attention_kernel)
        _stream_layers(handle, parts, options, PlaceChooser(model, len(parts.layers), placement, saved))
    if loss != "logits":
        if loss == "cce" and as_linear_head(parts.lm_head) is None:
            logger.info("the LM head is a %s: its loss goes by mini-sequences.", type(parts.lm_head).__name__)
        handle.patch_tiled(parts.lm_head, head_with_loss(parts, loss, loss_memory_mib))
    forward = causal_lm_forward(parts, without_logits=loss != "logits", eval_logits=eval_logits)
    handle.patch(parts.causal_lm, forward)
    return handle


def _stream_layers(
    handle: MiniSequenceHandle, parts: CausalLMParts, options: StreamOptions, choose: PlaceChooser
) -> None:
    chain = Chain(len(parts.layers), choose)
    for index, (module, layer_parts) in enumerate(zip(parts.layers, parts.parts, strict=True)):
        layer = StreamedLayer(module, layer_parts, index, options, chain)
        handle.patch_tiled(module, _as_forward_of(module, layer.forward))
    handle.patch(parts.decoder, decoder_forward(parts))
    norm = parts.final_norm
    if norm is not None and is_rms_norm(norm):
        handle.patch(norm, functools.partial(_final_norm, norm, norm.forward, chain))


def _as_forward_of(module: nn.Module, forward: Callable) -> Callable:
    """With the name and signature that transformers looks at."""

    @functools.wraps(module.forward)
    def patched(*args, **kwargs):
        return forward(*args, **kwargs)

    patched.__signature__ = inspect.signature(module.forward)
    return patched


def _final_norm(norm: nn.Module, original: Callable, chain: Chain, hidden_states: Tensor) -> Tensor:
    if norm.weight.dtype != hidden_states.dtype:
        return original(hidden_states)  # whose result is wider than its input
    return fused_norm(norm, hidden_states, chain.gradients)


def _check_options(
    tile_tokens: int | str | None,
    head_groups: int | str,
    placement: Placement | str | None,
    save_attention: bool | int | str | SavedAttention,
    loss: str,
    attention_kernel: str,
) -> None:
    if tile_tokens not in ("auto", None) and (
        not isinstance(tile_tokens, int) or isinstance(tile_tokens, bool) or tile_tokens < 1
    ):
        raise ValueError(f"tile_tokens={tile_tokens!r} must be 'auto', None or a positive number of tokens.")
    if head_groups != "auto" and (
        not isinstance(head_groups, int) or isinstance(head_groups, bool) or head_groups < 1
    ):
        raise ValueError(f"head_groups={head_groups!r} must be 'auto' or a positive number of groups.")
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r} must be one of {', '.join(LOSSES)}.")
    if attention_kernel not in KERNEL_NAMES:
        raise ValueError(f"attention_kernel={attention_kernel!r} must be one of {', '.join(KERNEL_NAMES)}.")
    if placement is None and (save_attention or head_groups != "auto"):
        asked = f"save_attention={save_attention!r}" if save_attention else f"head_groups={head_groups!r}"
        raise ValueError(
            f"{asked} is for streamed layers, and checkpoints='none' streams none; choose another."
        )


def _tiled_mlp(
    mlp: nn.Module, original: Callable[[Tensor], Tensor], tile_tokens: int | str, intermediate_size: int
) -> Callable[[Tensor], Tensor]:
    has_dropout = any(dropouts_of("mlp", module) for module in mlp.modules())

    @functools.wraps(original)
    def forward(hidden: Tensor) -> Tensor:
        tile = tile_tokens
        if tile == "auto":
            num_tokens = hidden.shape[:-1].numel()
            tile = choose_tile_tokens(num_tokens, intermediate_size, hidden.dtype.itemsize)
        return mini_sequence(
            original,
            hidden,
            mlp.parameters(),
            tile_tokens=tile,
            preserve_rng_state=has_dropout and mlp.training,
        )

    return forward
