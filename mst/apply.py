"""Mini-sequences on a Hugging Face model, in place and undone by a handle."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from .families import CausalLMParts, find_parts
from .lm_head import lm_head_loss
from .low_rank import as_linear_head
from .mini_sequence import mini_sequence
from .tiling import choose_tile_tokens

logger = logging.getLogger(__name__)

LOSSES = ("cce", "mini_sequence", "logits")
CHECKPOINTS = ("auto", "none", "gpu")
_MISSING = object()


def apply_mini_sequence(
    model: nn.Module,
    *,
    tile_tokens: int | str | None = "auto",
    head_groups: int | str = "auto",
    checkpoints: str = "auto",
    save_attention: bool = False,
    loss: str = "cce",
    loss_memory_mib: int | None = None,
) -> MiniSequenceHandle:
    """Make a causal language model train on long sequences; its numbers stay what they were.

    Every MLP runs tile by tile, the loss comes from the head without storing the logits, and each layer
    keeps its input alone. `model(input_ids=..., labels=...)` works as before, except that `logits` is None
    while a loss is asked for. Instances are patched, never classes.

    Args:
        model: A Hugging Face causal LM of a known family, or peft's wrapper of one.
        tile_tokens: Tokens of a mini-sequence, "auto", or None to leave the MLPs as they are.
        head_groups: "auto" or 1; attention by groups of heads is not there yet.
        checkpoints: "gpu" keeps each layer's input and rebuilds the rest in backward, "none" leaves the
            model's own setting alone, "auto" is "gpu".
        save_attention: Not there yet.
        loss: "cce" (cut cross-entropy), "mini_sequence" (the head itself, tile by tile) or "logits" (as
            it was).
        loss_memory_mib: MiB that the loss may take beside its gradients; None lets the method choose.

    Returns:
        A handle whose `undo()` gives the model back as it was.

    Raises:
        ValueError: An option that does not exist, a model of no known family, or one that has mini-sequences.
        NotImplementedError: An option that is not there yet.
    """
    _check_options(tile_tokens, head_groups, checkpoints, save_attention, loss)
    parts = find_parts(model)
    if isinstance(getattr(parts.causal_lm, "_mini_sequence_handle", None), MiniSequenceHandle):
        raise ValueError("the model has mini-sequences already; call handle.undo() first.")
    handle = MiniSequenceHandle(parts)
    recomputes_layers = checkpoints in ("auto", "gpu")
    if recomputes_layers:
        handle.enable_layer_checkpoints()
    for mlp in parts.mlps if tile_tokens is not None else ():
        handle.patch_tiled(mlp, _tiled_mlp(mlp, mlp.forward, tile_tokens, parts.causal_lm, recomputes_layers))
    if loss != "logits":
        if loss == "cce" and as_linear_head(parts.lm_head) is None:
            logger.info("the LM head is a %s: its loss goes by mini-sequences.", type(parts.lm_head).__name__)
        handle.patch_tiled(parts.lm_head, _head_with_loss(parts.lm_head, loss, loss_memory_mib))
        handle.patch(parts.causal_lm, _forward_without_logits(parts))
    return handle


class MiniSequenceHandle:
    """What was changed on a model, and the way back."""

    def __init__(self, parts: CausalLMParts) -> None:
        self._parts = parts
        self._patched: list[tuple[nn.Module, Any]] = []
        self._had_checkpoints: bool | None = None
        parts.causal_lm._mini_sequence_handle = self

    def patch(self, module: nn.Module, forward: Callable) -> None:
        """Give one instance another forward, remembering an earlier patch of somebody else's."""
        self._patched.append((module, module.__dict__.get("forward", _MISSING)))
        module.forward = forward

    def patch_tiled(self, module: nn.Module, forward: Callable) -> None:
        """Patch a module that calls its children once a tile."""
        self.patch(module, forward)
        # ZeRO-3 must gather it as a whole: if each tile's call of each linear layer were a collective,
        # ranks whose tile counts differ would wait for each other for ever.
        module.gathers_whole = True

    def enable_layer_checkpoints(self) -> None:
        """Keep only each decoder layer's input for backward."""
        causal_lm = self._parts.causal_lm
        self._had_checkpoints = any(getattr(m, "gradient_checkpointing", False) for m in causal_lm.modules())
        if not self._had_checkpoints:
            enable = getattr(causal_lm, "activation_checkpointing_enable", None)
            enable = enable or causal_lm.gradient_checkpointing_enable  # its name before transformers 5.18
            enable({"use_reentrant": False})

    def __deepcopy__(self, memo: dict) -> MiniSequenceHandle:
        # The copy's patched forwards would go on computing with this model's weights.
        raise ValueError(
            "a model with mini-sequences cannot be copied; copy it before, or call handle.undo() first."
        )

    def undo(self) -> None:
        """Give the model back as it was; a second call does nothing."""
        for module, earlier in reversed(self._patched):
            module.__dict__.pop("gathers_whole", None)
            if earlier is _MISSING:
                del module.forward
            else:
                module.forward = earlier
        self._patched.clear()
        causal_lm = self._parts.causal_lm
        if self._had_checkpoints is False:
            disable = getattr(causal_lm, "activation_checkpointing_disable", None)
            (disable or causal_lm.gradient_checkpointing_disable)()
        self._had_checkpoints = None
        if getattr(causal_lm, "_mini_sequence_handle", None) is self:
            del causal_lm._mini_sequence_handle


def _check_options(
    tile_tokens: int | str | None, head_groups: int | str, checkpoints: str, save_attention: bool, loss: str
) -> None:
    if tile_tokens not in ("auto", None) and (not isinstance(tile_tokens, int) or tile_tokens < 1):
        raise ValueError(f"tile_tokens={tile_tokens!r} must be 'auto', None or a positive number of tokens.")
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r} must be one of {', '.join(LOSSES)}.")
    if checkpoints in ("host",):
        raise NotImplementedError("checkpoints='host' (layer inputs in host memory) is not there yet.")
    if checkpoints not in CHECKPOINTS:
        raise ValueError(f"checkpoints={checkpoints!r} must be one of {', '.join(CHECKPOINTS)}.")
    if head_groups not in ("auto", 1):
        raise NotImplementedError(
            f"head_groups={head_groups!r} (attention by groups of heads) is not there yet."
        )
    if save_attention:
        raise NotImplementedError(
            "save_attention=True (attention's output kept for backward) is not there yet."
        )


def _tiled_mlp(
    mlp: nn.Module,
    original: Callable[[Tensor], Tensor],
    tile_tokens: int | str,
    causal_lm: nn.Module,
    recomputes_layers: bool,
) -> Callable[[Tensor], Tensor]:
    intermediate_size = causal_lm.config.intermediate_size
    has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in mlp.modules())

    @functools.wraps(original)
    def forward(hidden: Tensor) -> Tensor:
        num_tokens = hidden.shape[:-1].numel()
        tile = tile_tokens
        if tile == "auto":
            tile = choose_tile_tokens(num_tokens, intermediate_size, hidden.dtype.itemsize)
        if num_tokens <= tile and recomputes_layers and mlp.training and not _is_one_of_several():
            return original(hidden)  # the layer's own checkpoint already holds it to one tile
        return mini_sequence(
            original,
            hidden,
            mlp.parameters(),
            tile_tokens=tile,
            preserve_rng_state=has_dropout and mlp.training,
        )

    return forward


def _is_one_of_several() -> bool:
    """Whether other ranks may cut other lengths.

    Gradients of a tiled MLP arrive together, those of a plain one layer by layer. ZeRO 2 and 3 reduce in the
    order of arrival: a rank with a short row beside one with a long row would add up different weights.
    """
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _head_with_loss(head: nn.Module, loss: str, memory_mib: int | None) -> Callable:
    """The loss is made inside the head's own call, so that hooks that gather its weight (ZeRO-3) fire."""
    original = head.forward

    @functools.wraps(original)
    def forward(
        hidden: Tensor,
        *,
        labels: Tensor | None = None,
        shift: bool = False,
        num_items: Tensor | float | None = None,
    ) -> Tensor:
        if labels is None:
            return original(hidden)
        return lm_head_loss(
            head, original, hidden, labels, shift=shift, num_items=num_items, loss=loss, memory_mib=memory_mib
        )

    return forward


def _forward_without_logits(parts: CausalLMParts) -> Callable:
    causal_lm, original = parts.causal_lm, parts.causal_lm.forward
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(*args, **kwargs):
        named = signature.bind(*args, **kwargs).arguments
        extra = named.pop("kwargs", {})
        labels, shift_labels = named.pop("labels", None), extra.pop("shift_labels", None)
        if labels is None and shift_labels is None:
            return original(*args, **kwargs)
        return_dict = extra.pop("return_dict", True)
        num_items = extra.pop("num_items_in_batch", None)
        named.pop("logits_to_keep", None)
        named.setdefault("use_cache", False)  # a training step would keep every key and value twice
        outputs = parts.decoder(**named, **extra)
        is_shifted = shift_labels is not None
        loss = parts.lm_head(
            outputs.last_hidden_state,
            labels=shift_labels if is_shifted else labels,
            shift=not is_shifted,
            num_items=num_items,
        )
        return _causal_lm_output(loss, outputs, return_dict)

    forward.__signature__ = signature  # the Trainer reads the columns it may pass from here
    forward.__self__ = causal_lm
    return forward


def _causal_lm_output(loss: Tensor, outputs: Any, return_dict: bool | None) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    output = CausalLMOutputWithPast(
        loss=loss,
        logits=None,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
    return output if return_dict is not False else output.to_tuple()
