"""Mini-sequences on a Hugging Face model, in place and undone by a handle."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ..distributed.attention_kernels import KERNEL_NAMES, Documents
from ..distributed.zero import gather_whole
from .decoder_layer import StreamedLayer, StreamOptions
from .families import CausalLMParts, find_parts
from .final_norm import fused_norm
from .inputs import document_offsets, no_mask
from .layer_memory import Chain
from .layer_parts import dropouts_of
from .layer_places import PlaceChooser, parse_save_attention
from .lm_head import lm_head_loss
from .low_rank import as_linear_head
from .mini_sequence import mini_sequence
from .placement import Placement, parse_placement
from .probe import check_numbers
from .tiling import choose_tile_tokens
from .token_norm import is_rms_norm

logger = logging.getLogger(__name__)

LOSSES = ("cce", "mini_sequence", "logits")
_MISSING = object()


def apply_mini_sequence(
    model: nn.Module,
    *,
    tile_tokens: int | str | None = "auto",
    head_groups: int | str = "auto",
    checkpoints: str | Placement = "auto",
    save_attention: bool | int | str = False,
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
            computing), a `Placement` (the last m on the GPU, only every k-th kept), or "auto", which decides
            by the memory there is. "none" streams no layer: MLPs run by tiles, and what else is kept is left
            to the model's own setting.
        save_attention: Keep attention's output and log-sum-exp too, which spares its second forward for 8 KiB
            a token and layer of a Llama-3-8B: of every layer "gpu" or "host", of the last so many layers on
            the GPU (a number), or True, of as many as there is room for. "all" keeps queries, keys, values
            and the sum behind attention too, 28 KiB in all, and runs nothing before the MLP again.
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
        handle.patch_tiled(parts.lm_head, _head_with_loss(parts, loss, loss_memory_mib))
    forward = _causal_lm_forward(parts, without_logits=loss != "logits", eval_logits=eval_logits)
    handle.patch(parts.causal_lm, forward)
    return handle


def _stream_layers(
    handle: MiniSequenceHandle, parts: CausalLMParts, options: StreamOptions, choose: PlaceChooser
) -> None:
    chain = Chain(len(parts.layers), choose)
    for index, (module, layer_parts) in enumerate(zip(parts.layers, parts.parts, strict=True)):
        layer = StreamedLayer(module, layer_parts, index, options, chain)
        handle.patch_tiled(module, _as_forward_of(module, layer.forward))
    handle.patch(parts.decoder, _decoder_forward(parts))
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


class MiniSequenceHandle:
    """What was changed on a model, and the way back."""

    def __init__(self, parts: CausalLMParts) -> None:
        self._parts = parts
        self._patched: list[tuple[nn.Module, Any]] = []
        self._let_go: list[Callable[[], None]] = []
        self._switched_off: list[nn.Module] = []
        parts.causal_lm._mini_sequence_handle = self

    def patch(self, module: nn.Module, forward: Callable) -> None:
        """Give one instance another forward, remembering an earlier patch of somebody else's."""
        self._patched.append((module, module.__dict__.get("forward", _MISSING)))
        module.forward = forward

    def patch_tiled(self, module: nn.Module, forward: Callable) -> None:
        """Patch a module that calls its children once a tile."""
        self.patch(module, forward)
        self._let_go.append(gather_whole(module))

    def leave_checkpoints_to_layers(self) -> None:
        """Switch transformers' own layer checkpoints off: a streamed layer inside one would run thrice."""
        for layer in self._parts.layers:
            if getattr(layer, "gradient_checkpointing", False):
                layer.gradient_checkpointing = False
                if not self._switched_off:
                    logger.info(
                        "gradient checkpointing is left to the streamed layers, which do it themselves."
                    )
                self._switched_off.append(layer)

    def __deepcopy__(self, memo: dict) -> MiniSequenceHandle:
        # The copy's patched forwards would go on computing with this model's weights.
        raise ValueError(
            "a model with mini-sequences cannot be copied; copy it before, or call handle.undo() first."
        )

    def undo(self) -> None:
        """Give the model back as it was; a second call does nothing."""
        for module, earlier in reversed(self._patched):
            if earlier is _MISSING:
                del module.forward
            else:
                module.forward = earlier
        self._patched.clear()
        for let_go in self._let_go:
            let_go()
        self._let_go.clear()
        for layer in self._switched_off:
            layer.gradient_checkpointing = True
        self._switched_off.clear()
        causal_lm = self._parts.causal_lm
        if getattr(causal_lm, "_mini_sequence_handle", None) is self:
            del causal_lm._mini_sequence_handle


def _check_options(
    tile_tokens: int | str | None,
    head_groups: int | str,
    placement: Placement | str | None,
    save_attention: bool | int | str,
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


def _head_with_loss(parts: CausalLMParts, loss: str, memory_mib: int | None) -> Callable:
    """The loss is made inside the head's own call, so that hooks that gather its weight (ZeRO-3) fire."""
    head, original = parts.lm_head, parts.lm_head.forward

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
            head,
            original,
            hidden,
            labels,
            shift=shift,
            num_items=num_items,
            loss=loss,
            memory_mib=memory_mib,
            softcap=parts.softcap,
            logit_scale=parts.logit_scale,
        )

    return forward


def _causal_lm_forward(parts: CausalLMParts, *, without_logits: bool, eval_logits: bool) -> Callable:
    """The model's forward: no cache in a training step, and a loss that needs no logits."""
    causal_lm, original = parts.causal_lm, parts.causal_lm.forward
    signature = inspect.signature(original)

    def forward(*args, **kwargs):
        named = signature.bind(*args, **kwargs).arguments
        named.update(named.pop("kwargs", {}))
        labels, shift_labels = named.get("labels"), named.get("shift_labels")
        has_loss = labels is not None or shift_labels is not None
        if not has_loss and not causal_lm.training:
            return original(*args, **kwargs)  # generation, or logits that somebody wants
        named.setdefault("use_cache", False)  # a training step would keep every key and value twice
        if not has_loss or not without_logits or (eval_logits and not causal_lm.training):
            return original(**named)
        for name in ("labels", "shift_labels", "logits_to_keep"):
            named.pop(name, None)
        return_dict = named.pop("return_dict", True)
        num_items = named.pop("num_items_in_batch", None)
        outputs = parts.decoder(**named)
        is_shifted = shift_labels is not None
        loss = parts.lm_head(
            outputs.last_hidden_state,
            labels=shift_labels if is_shifted else labels,
            shift=not is_shifted,
            num_items=num_items,
        )
        return _causal_lm_output(loss, outputs, return_dict)

    return _as_method(causal_lm, forward)


def _as_method(module: nn.Module, forward: Callable) -> Callable:
    """A method with the signature of the one whose place it takes.

    accelerate wraps the function of a method; to unwrap it, it follows `__wrapped__` to its end and binds
    what is there to the model. That must be this function.
    """

    @functools.wraps(module.forward)
    def method(self: nn.Module, *args, **kwargs):
        return forward(*args, **kwargs)

    del method.__wrapped__
    signature = inspect.signature(module.forward)
    bound = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    # The Trainer reads the columns it may pass from here.
    method.__signature__ = signature.replace(parameters=[bound, *signature.parameters.values()])
    return MethodType(method, module)


def _decoder_forward(parts: CausalLMParts) -> Callable:
    """The decoder's forward, whoever calls it: layers are told of documents, where they can be streamed."""
    decoder, original = parts.decoder, parts.decoder.forward
    signature = inspect.signature(original)

    def forward(*args, **kwargs):
        named = signature.bind(*args, **kwargs).arguments
        named.update(named.pop("kwargs", {}))
        if named.get("use_cache") is None and decoder.training:
            named["use_cache"] = False
        parts.causal_lm._mini_sequence_handle.leave_checkpoints_to_layers()
        _tell_layers(named, parts)
        return original(**named)

    return _as_method(decoder, forward)


def _tell_layers(named: dict[str, Any], parts: CausalLMParts) -> None:
    """Replace masks by document bounds: no mask of L x L is made, and streamed layers take none."""
    mask, use_cache = named.get("attention_mask"), named.get("use_cache")
    is_plain = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
    has_cache = named.get("past_key_values") is not None
    makes_cache = getattr(parts.decoder.config, "use_cache", False) if use_cache is None else use_cache
    if has_cache or makes_cache or not is_plain:
        return  # layers then run as transformers wrote them
    inputs = named.get("input_ids")
    inputs = named["inputs_embeds"] if inputs is None else inputs
    positions = named.get("position_ids")
    if hasattr(parts.parts[0].attention, "longseq_attention"):
        positions = None  # read by that attention, over all ranks of the sequence
    offsets = named.get("document_offsets")
    if offsets is None:
        offsets = document_offsets(inputs.shape[0], inputs.shape[1], positions, mask)
    if isinstance(offsets, Tensor):
        offsets = Documents.of(offsets)  # one object for all layers: the bounds go to the GPU once
    if offsets is not None:
        named["document_offsets"] = offsets
    named["attention_mask"] = no_mask(inputs.device)


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
