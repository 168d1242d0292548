"""Whether a model of no known family computes what its names say: tried on a few made-up tokens.

Each layer is run as it is and as it is streamed, on what the decoder really hands it, and what it adds is
compared: in hidden states a wrong layer drowns in the residual. Both are run in float64, one layer's weights
at a time. The head is compared by its logits and its loss, in the model's dtype. Weights that ZeRO-3 has
spread over the ranks are gathered for as long as they are looked at.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.zero_init import gathered, gathered_when_called, whole_shape
from .decoder_layer import StreamedLayer, StreamOptions
from .families import CausalLMParts
from .inputs import no_mask
from .layer_memory import Chain
from .lm_head import lm_head_loss
from .token_norm import token_norm

logger = logging.getLogger(__name__)

PROBE_TOKENS = 24
LAYER_TOLERANCE = 1e-4
"""Relative to what a layer adds; transformers' norms and softmax round to float32 even in float64."""
WIDENED = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def check_numbers(parts: CausalLMParts, *, streamed: bool, loss: str) -> None:
    """Compare a model of no known family, not patched yet, with what will take its place.

    Args:
        parts: Of the model; a known family is not checked.
        streamed: Whether its layers are to be streamed.
        loss: As for `apply_mini_sequence`; "logits" leaves the head as it is.

    Raises:
        ValueError: They differ by more than roundings.
    """
    causal_lm = parts.causal_lm
    if parts.known:
        return
    if any(param.is_meta for param in causal_lm.parameters()):
        logger.warning("the layers' numbers are not checked: the weights are not on this device.")
        return
    if any("ds_id" in module.__dict__ for module in causal_lm.modules()):
        # What DeepSpeed's engine gathers by is the order of training's own calls.
        logger.warning("the layers' numbers are not checked: the model is under an engine of ZeRO-3 already.")
        return
    with _evaluating(causal_lm), gathered_when_called(causal_lm):
        ids, hidden, calls = _run_decoder(parts)
        for what, error in _layer_errors(parts, calls) if streamed else ():
            if not error <= LAYER_TOLERANCE:
                raise ValueError(
                    f"the layers of {type(causal_lm).__name__} are named like those of a known family but "
                    f"compute something else: streamed, {what} would differ by {error:.2%}. Expected were "
                    "residuals without factors, RMS norms, a gated MLP and rotary attention. Use "
                    "checkpoints='none', which tiles the MLPs alone."
                )
        for what, error in _head_errors(parts, ids, hidden, loss) if loss != "logits" else ():
            # Scale and cap are rounded to the model's dtype.
            if not error <= (1e-2 if hidden.dtype.itemsize == 2 else 1e-3):
                raise ValueError(
                    f"the head of {type(causal_lm).__name__} computes something else than its config says: "
                    f"with loss={loss!r}, {what} would differ by {error:.2%}. Expected was the mean cross-"
                    f"entropy of lm_head's logits, times {parts.logit_scale:g}, capped at {parts.softcap}. "
                    "Use loss='logits', which leaves the head as it is."
                )


@contextmanager
def _evaluating(causal_lm: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in causal_lm.modules()]
    config = causal_lm.config
    kernel = getattr(config, "_attn_implementation", None)
    is_narrow = any(sign in str(kernel) for sign in ("flash", "flex", "/"))  # takes no float64
    if is_narrow:
        config._attn_implementation = "eager"
    causal_lm.eval()
    try:
        yield
    finally:
        if is_narrow:
            config._attn_implementation = kernel
        for module, mode in modes:
            module.training = mode


def _run_decoder(parts: CausalLMParts) -> tuple[Tensor, Tensor, dict[nn.Module, tuple[Tensor, dict]]]:
    """Token ids, hidden states, and each layer's and the last norm's first argument and others."""
    embedding, calls = parts.causal_lm.get_input_embeddings().weight, {}
    ids = torch.arange(PROBE_TOKENS, device=embedding.device).mul_(7919)
    ids = ids.remainder_(whole_shape(embedding)[0])[None]

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(module.forward).parameters)
        others = {**dict(zip(names, args, strict=False)), **kwargs}
        calls[module] = _wide(others.pop(names[0])), {name: _wide(value) for name, value in others.items()}

    watched = filter(None, (*parts.layers, parts.final_norm))
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in watched]
    try:
        return ids, parts.decoder(input_ids=ids, use_cache=False).last_hidden_state, calls
    finally:
        for hook in hooks:
            hook.remove()


def _wide(value: Any) -> Any:
    if isinstance(value, (tuple, list)):  # the rotary embedding's cosines and sines
        return tuple(map(_wide, value))
    return value.double() if isinstance(value, Tensor) and value.dtype in WIDENED else value


def _layer_errors(
    parts: CausalLMParts, calls: dict[nn.Module, tuple[Tensor, dict]]
) -> Iterator[tuple[str, float]]:
    chain = Chain(len(parts.layers), choose=None)  # which is asked with grad alone
    for index, (layer, layer_parts) in enumerate(zip(parts.layers, parts.parts, strict=True)):
        hidden, others = calls[layer]
        told = {"attention_mask": no_mask(hidden.device), "past_key_values": None}
        streamed = StreamedLayer(layer, layer_parts, index, StreamOptions(), chain)
        with gathered(layer.parameters()), _in_float64(layer):
            theirs = layer(hidden, **others)
            ours = streamed.forward(hidden, **{name: told.get(name, others[name]) for name in others})
        yield f"what layer {index} adds", _error(ours - hidden, theirs - hidden)
    norm = parts.final_norm
    if norm is not None:
        hidden, _ = calls[norm]
        with gathered(norm.parameters()), _in_float64(norm):
            error = _error(token_norm(norm, hidden.dtype, None).forward(hidden), norm(hidden))
        yield "what the last norm gives", error


@contextmanager
def _in_float64(module: nn.Module) -> Iterator[None]:
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.dtype in WIDENED]
    own = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.double()
        yield
    finally:
        for tensor, data in zip(tensors, own, strict=True):
            tensor.data = data


def _head_errors(parts: CausalLMParts, ids: Tensor, hidden: Tensor, loss: str) -> Iterator[tuple[str, float]]:
    head, scale, cap = parts.lm_head, parts.logit_scale, parts.softcap
    # Past the model's hooks: where ranks share a sequence, one refuses labels that are not shifted.
    theirs = parts.causal_lm.forward(input_ids=ids, labels=ids, use_cache=False)
    logits = head(hidden) * scale
    yield "logits", _error(logits if cap is None else cap * torch.tanh(logits / cap), theirs.logits)
    options = {"shift": True, "num_items": None, "loss": loss, "softcap": cap, "logit_scale": scale}
    with gathered(head.parameters()):
        ours = lm_head_loss(head, head.forward, hidden, ids, **options)
    yield "the loss", _error(ours, theirs.loss)


def _error(ours: Tensor, theirs: Tensor) -> float:
    """Relative; infinite where not even the shapes are alike."""
    if ours.shape != theirs.shape:
        return float("inf")
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=torch.finfo(theirs.dtype).tiny))
