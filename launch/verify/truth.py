"""The truth: transformers' own model in float64, each document alone, logits whole, autograd for the rest.

None of this library takes part. transformers computes norms and attention's softmax in float32 whatever the
model's dtype is; here they are float64 too, and that this is the same model is a line of the report.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batches import Batch, documents, num_labels
from .compare import InputGradients, Step, grads_of

ATTENTION = "longseq_verify_float64"
"""Name under which transformers finds `exact_attention`."""


def exact(model: nn.Module) -> nn.Module:
    """A float64 copy of a plain model in which nothing is rounded to float32."""
    true = copy.deepcopy(model).double()
    for module in true.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = functools.partial(_exact_norm, module)
    base = true.get_base_model() if hasattr(true, "get_base_model") else true
    _register_attention()
    base.set_attn_implementation(ATTENTION)
    return true


def plain_step(model: nn.Module, batches: list[Batch]) -> Step:
    """One optimizer step's loss and gradients by plain PyTorch, in the model's own dtype.

    Args:
        model: With nothing of this library's on it.
        batches: Micro-batches; the loss is the mean over the labels of all of them.
    """
    model.zero_grad()
    count = max(1, num_labels(batches))
    total = 0.0
    inputs = []
    for batch in batches:
        with InputGradients(model) as gradients:
            for row, tokens in documents(batch):
                logits = model(input_ids=batch["input_ids"][row : row + 1, tokens], use_cache=False).logits
                labels = batch["labels"][row, tokens][1:]
                nll = F.cross_entropy(wide(logits[0, :-1]), labels, ignore_index=-100, reduction="sum")
                (nll / count).backward()
                total += float(nll.detach())
        inputs.append(_rows(gradients.found, batch))
    return Step(total / count, grads_of(model), inputs)


def wide(logits: Tensor) -> Tensor:
    """In float32 at least, as transformers computes losses."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _rows(of_documents: list[Tensor | None], batch: Batch) -> Tensor | None:
    """Gradients of documents, one after the other, as `(B, L, D)`."""
    if any(grad is None for grad in of_documents):
        return None
    rows = batch["input_ids"].shape[0]
    return torch.cat([grad[0] for grad in of_documents]).unflatten(0, (rows, -1))


def _exact_norm(module: nn.Module, x: Tensor) -> Tensor:
    eps = getattr(module, "variance_epsilon", None) or module.eps
    # Gemma's norms keep the weight less 1.
    weight = module.weight + 1.0 if type(module).__name__.startswith("Gemma") else module.weight
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def exact_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as the textbook has it, `(B, N, S, H)` in, `(B, S, N, H)` out."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # Low enough to leave nothing of what is masked, and finite: no row is all -inf.
    scores = scores + attention_mask.double().clamp(min=-1e30)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


@functools.cache
def _register_attention() -> None:
    """Add one name to transformers' registries; models that do not ask for it are not touched."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask

    AttentionInterface.register(ATTENTION, exact_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, eager_mask)
