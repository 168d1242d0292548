"""Whether layers of a model of no known family do what their names say: tried on a few tokens."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from .families import CausalLMParts

logger = logging.getLogger(__name__)

PROBE_TOKENS = 24
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Relative; roundings of many layers add up, while a part left out changes a result by tens of per cent."""


def probe_hidden(parts: CausalLMParts) -> Tensor | None:
    """Hidden states of a few made-up tokens, `(1, T, D)`; None if the weights are not here."""
    params = list(parts.causal_lm.parameters())
    if any(param.is_meta or hasattr(param, "ds_id") for param in params):
        logger.warning("the layers' numbers are not checked: the weights are not on this device.")
        return None
    vocab_size = parts.causal_lm.get_input_embeddings().weight.shape[0]
    ids = torch.arange(PROBE_TOKENS, device=params[0].device).mul_(7919).remainder_(vocab_size).unsqueeze(0)
    was_training = parts.causal_lm.training
    parts.causal_lm.eval()
    try:
        with torch.no_grad():
            return parts.decoder(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        parts.causal_lm.train(was_training)


def check_numbers(parts: CausalLMParts, before: Tensor | None) -> None:
    """Compare with the hidden states from before the layers were streamed.

    Raises:
        ValueError: They differ by more than roundings.
    """
    if before is None:
        return
    after = probe_hidden(parts)
    error = float((after.double() - before.double()).norm() / before.double().norm())
    if not error <= TOLERANCES.get(before.dtype, 1e-3):
        raise ValueError(
            f"the layers of {type(parts.causal_lm).__name__} are named like those of a known family but "
            f"compute something else: streamed, their hidden states differ by {error:.1%}. Expected were "
            "residuals without factors, RMS norms, a gated MLP and rotary attention. Use checkpoints='none', "
            "which tiles the MLPs alone."
        )
