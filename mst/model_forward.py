"""The forwards that a causal language model, its decoder and its head get."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ..distributed.attention_kernels import Documents
from .families import CausalLMParts
from .inputs import document_offsets, no_mask
from .lm_head import lm_head_loss


def head_with_loss(parts: CausalLMParts, loss: str, memory_mib: int | None) -> Callable:
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


def causal_lm_forward(parts: CausalLMParts, *, without_logits: bool, eval_logits: bool) -> Callable:
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


def decoder_forward(parts: CausalLMParts) -> Callable:
    """The decoder's forward, whoever calls it: layers are told of documents, where they can be streamed."""
    decoder, original = parts.decoder, parts.decoder.forward
    signature = inspect.signature(original)

    def forward(*args, **kwargs):
        named = signature.bind(*args, **kwargs).arguments
        named.update(named.pop("kwargs", {}))
        if named.get("use_cache") is None and decoder.training:
            named["use_cache"] = False
        handle = parts.causal_lm._mini_sequence_handle
        if _tell_layers(named, parts):
            handle.leave_checkpoints_to_layers()
        else:
            handle.give_checkpoints_back()
        return original(**named)

    return _as_method(decoder, forward)


def _tell_layers(named: dict[str, Any], parts: CausalLMParts) -> bool:
    """Replace masks by document bounds: no mask of L x L is made, and streamed layers take none.

    Returns:
        Whether layers are streamed; else they run as transformers wrote them.
    """
    mask, use_cache = named.get("attention_mask"), named.get("use_cache")
    is_plain = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
    has_cache = named.get("past_key_values") is not None
    makes_cache = getattr(parts.decoder.config, "use_cache", False) if use_cache is None else use_cache
    if has_cache or makes_cache or not is_plain:
        return False
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
    return True


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
