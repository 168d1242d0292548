"""The public function: cross-entropy of `hidden @ weight.T` against labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .exact import exact_linear_cross_entropy
from .options import LossOptions
from .reference import is_out_of_range, reference_linear_cross_entropy

METHODS = ("auto", "exact", "recompute", "filtered", "reference")
_UNBUILT_METHODS = ("recompute", "filtered")


def linear_cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    shift: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weights: Tensor | None = None,  # (...), of the token that is predicted, like labels
    reduction: str = "mean",
    method: str = "auto",
    filter_eps: float | str = "auto",
    memory_mib: int | None = None,
    return_lse: bool = False,
    group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of a linear head, without storing its logits.

    Args:
        hidden: Hidden states, `(..., D)`.
        weight: The head's weight, `(V, D)`, in the dtype of `hidden` (autocast is honoured).
        labels: Word of each token, `(...)`, or `ignore_index`. A label outside the vocabulary raises on
            the CPU; on a GPU, where looking would stall the step, it makes the loss NaN.
        bias: Added to the logits, `(V,)`.
        ignore_index: Label of the tokens that do not count.
        shift: Token t is scored against the label of token t + 1 of its row; a row's last does not count.
        softcap: Logits are capped to `softcap * tanh(logits / softcap)`.
        logit_scale: Logits are multiplied by this, before the cap.
        label_smoothing: Share of the target spread evenly over the vocabulary.
        z_loss: Factor of the squared log-sum-exp that is added to each token's loss.
        token_weights: Weight of each label, shaped like `labels`; constants, no gradient reaches them.
        reduction: "mean" over the weight of the tokens that count (0 where there is none), "sum" or "none".
        method: "exact" (chunks of tokens, gradient in forward), "reference" (stores the logits), or "auto".
        filter_eps: Threshold of method "filtered".
        memory_mib: Memory that a chunk of logits may take; None lets the method choose.
        return_lse: Return each token's log-sum-exp too, shaped like `labels`.
        group: Process group over which the vocabulary is split.

    Returns:
        The loss in float32 (float64 for float64 inputs): a scalar, or shaped like `labels` for "none".

    Raises:
        ValueError: Shapes, dtypes or options that do not fit, or (CPU) a label outside the vocabulary.
        NotImplementedError: An option that the method does not offer.
    """
    options = LossOptions(ignore_index, softcap, logit_scale, label_smoothing, z_loss, reduction)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    _check_shapes(hidden, weight, labels, bias, token_weights)
    if memory_mib is not None and memory_mib < 1:
        raise ValueError(f"memory_mib={memory_mib} must be at least 1, or None to let the method choose.")
    method = _choose_method(method, reduction, return_lse, group, filter_eps)
    if token_weights is not None and token_weights.requires_grad:
        raise NotImplementedError("token_weights that require a gradient; pass token_weights.detach().")
    if shift:
        labels = _shift(labels, ignore_index)
        token_weights = None if token_weights is None else _shift(token_weights, 0)
    shape = labels.shape
    flat_hidden, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    flat_weights = None if token_weights is None else token_weights.reshape(-1)
    if labels.device.type == "cpu":
        _check_labels(flat_labels, weight.shape[0], options)
    with torch.autocast(hidden.device.type, enabled=False):
        if method == "exact":
            return exact_linear_cross_entropy(
                flat_hidden, weight, bias, flat_labels, flat_weights, options, memory_mib
            )
        loss, lse = reference_linear_cross_entropy(
            flat_hidden, weight, bias, flat_labels, flat_weights, options
        )
    loss = loss.reshape(shape) if reduction == "none" else loss
    return (loss, lse.reshape(shape)) if return_lse else loss


def _choose_method(method: str, reduction: str, return_lse: bool, group: Any, filter_eps: float | str) -> str:
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {', '.join(METHODS)}.")
    missing = []
    if method in _UNBUILT_METHODS:
        missing.append(f"method={method!r}")
    if filter_eps != "auto":
        missing.append(f"filter_eps={filter_eps!r} (it belongs to method='filtered')")
    if group is not None:
        missing.append("group= (a vocabulary split over processes)")
    if method in ("auto", "exact"):
        if reduction == "none":
            missing.append(f"reduction='none' with method={method!r}")
        if return_lse:
            missing.append(f"return_lse=True with method={method!r}")
    if missing:
        raise NotImplementedError(
            f"linear_cross_entropy does not offer {', '.join(missing)} yet; "
            "method='reference' has every reduction and return_lse, but stores the logits."
        )
    return "exact" if method == "auto" else method


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return hidden, weight, bias


def _shift(values: Tensor, fill: int) -> Tensor:
    """Move each row one to the left; hidden states stay where they are, so nothing large is copied."""
    return F.pad(values[..., 1:], (0, 1), value=fill)


def _check_labels(labels: Tensor, vocab_size: int, options: LossOptions) -> None:
    wrong = is_out_of_range(labels, vocab_size, options)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"labels[{index}]={int(labels[index])} (flattened; {int(wrong.sum())} such) is outside the "
            f"vocabulary of {vocab_size} words; give {options.ignore_index} (ignore_index) to tokens that "
            "do not count."
        )


def _check_shapes(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, token_weights: Tensor | None
) -> None:
    problems = []
    if weight.dim() != 2 or hidden.dim() < 1 or weight.shape[-1] != hidden.shape[-1]:
        problems.append(f"weight {tuple(weight.shape)} must be (V, D) with D of hidden {tuple(hidden.shape)}")
    if labels.shape != hidden.shape[:-1]:
        problems.append(
            f"labels {tuple(labels.shape)} must have the shape of hidden {tuple(hidden.shape)} without D"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        problems.append(f"labels are {labels.dtype}; they must be integers")
    if bias is not None and bias.shape != weight.shape[:1]:
        problems.append(f"bias {tuple(bias.shape)} must be (V,) = {tuple(weight.shape[:1])}")
    if token_weights is not None and token_weights.shape != labels.shape:
        problems.append(
            f"token_weights {tuple(token_weights.shape)} must have the shape of labels {tuple(labels.shape)}"
        )
    if not hidden.is_floating_point() or hidden.dtype != weight.dtype:
        problems.append(f"hidden is {hidden.dtype} and weight {weight.dtype}; cast one, or use autocast")
    if problems:
        raise ValueError("linear_cross_entropy: " + "; ".join(problems) + ".")
