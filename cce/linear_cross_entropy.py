"""The public function: cross-entropy of `hidden @ weight.T` against labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .choice import choose_method, watch
from .exact import exact_loss
from .filtered import FilterReport, resolve_eps
from .head import ELSEWHERE, IGNORED, Head, Tokens, wide_dtype
from .options import LossOptions
from .recompute import head_statistics
from .reference import inverse_weight, reference_linear_cross_entropy

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .vocab_parallel import VocabShard


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
    group: ProcessGroup | VocabShard | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    filter_report: FilterReport | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of a linear head, without storing its logits.

    Args:
        hidden: Hidden states, `(..., D)`; finite for ignored tokens too, if anything is left to backward.
        weight: The head's weight, `(V, D)`, in the dtype of `hidden` (autocast is honoured).
        labels: Word of each token, `(...)`, or `ignore_index`. A label outside the vocabulary raises on
            the CPU, and under `torch.autograd.detect_anomaly()`; on a GPU, where looking would stall the
            step, it makes the loss and what it reaches NaN.
        bias: Added to the logits, `(V,)`.
        ignore_index: Label of the tokens that do not count.
        shift: Token t is scored against the label of token t + 1 of its row; a row's last does not count.
        softcap: Logits are capped to `softcap * tanh(logits / softcap)`.
        logit_scale: Logits are multiplied by this, before the cap.
        label_smoothing: Share of the target spread evenly over the vocabulary.
        z_loss: Factor of the squared log-sum-exp that is added to each token's loss.
        token_weights: Weight of each label, shaped like `labels`; constants, no gradient reaches them.
        reduction: "mean" over the weight of the tokens that count (0 where there is none), "sum" or "none".
        method: "exact" (chunks of tokens, gradient in forward), "recompute" (three numbers a token in
            forward, logits made again in backward), "filtered" (exact, but tiles of the gradient below
            `filter_eps` are left out), "reference" (stores the logits), or "auto": what fits the options.
        filter_eps: Largest softmax probability that "filtered" may leave out of the gradient; "auto" is a
            32nd of the dtype's epsilon. "auto" as a method filters only if a number is given here.
        memory_mib: Memory that may be used beside the gradients, in MiB; with too little for the float32
            sum of the weight's gradient, "exact" remakes the logits in backward. None: a chunk of 1 GiB,
            and that sum, until backward. Not under it: 128 tokens' logits or 256 words' gradients, and for
            "recompute" a float32 sum of the hidden states' gradient.
        return_lse: Return each token's log-sum-exp too, shaped like `labels`, 0 for ignored tokens.
        group: Process group over which the vocabulary is split, in order of rank, evenly or not: `weight`
            and `bias` are this process' rows, labels are words of the whole. The group is asked who holds
            what once for each weight; where a weight is a new tensor every call, give a `VocabShard`.
        lora: Low-rank adapter of the head, `(A, B, scale)` with `A (R, D)` and `B (V, R)`: as if `weight`
            were `weight + scale * B @ A`, which is never made.
        filter_report: Is told what "filtered" kept and dropped (nothing where "auto" takes another).

    Returns:
        The loss in float32 (float64 for float64 inputs): a scalar, or shaped like `labels` for "none".

    Raises:
        ValueError: Shapes, dtypes or options that do not fit, or (CPU) a label outside the vocabulary.
        NotImplementedError: Weights of tokens that require a gradient.
    """
    if isinstance(logit_scale, Tensor):
        raise NotImplementedError(
            "logit_scale as a tensor, which would get no gradient: scale hidden by it, or pass a float."
        )
    options = LossOptions(ignore_index, softcap, logit_scale, label_smoothing, z_loss, reduction)
    own_weight = weight  # autocast makes a new one each call
    hidden, weight, bias, lora = _autocast(hidden, weight, bias, lora)
    _check_shapes(hidden, weight, labels, bias, token_weights, lora, shift)
    labels = labels.long()
    if memory_mib is not None and not (isinstance(memory_mib, int) and memory_mib >= 1):
        raise ValueError(f"memory_mib={memory_mib} must be a whole number from 1, or None for the default.")
    if token_weights is not None and token_weights.requires_grad:
        raise NotImplementedError("token_weights that require a gradient; pass token_weights.detach().")
    adapters = lora[:2] if lora else ()
    parameters = [t for t in (hidden, weight, bias, *adapters) if t is not None]
    trained = sum(int(t.requires_grad) for t in parameters)
    eps = resolve_eps(filter_eps, hidden.dtype) if method in ("auto", "filtered") else 0.0
    chosen = choose_method(
        method,
        own_weight,
        reduction=reduction,
        return_lse=return_lse,
        split=group is not None,
        filter_eps=filter_eps,
        label_smoothing=label_smoothing,
        needs_gradient=torch.is_grad_enabled() and trained > 0,
        memory_mib=memory_mib,
        reports=filter_report is not None,
    )
    shard = None
    if group is not None:
        from .vocab_parallel import shard_of

        shard = shard_of(own_weight, group)
    if shift:
        labels = _shift(labels, ignore_index)
        token_weights = None if token_weights is None else _shift(token_weights, 0)
    shape = labels.shape
    flat_labels = labels.reshape(-1)
    flat_weights = None if token_weights is None else token_weights.reshape(-1)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    with torch.autocast(hidden.device.type, enabled=False):
        if chosen == "reference":
            whole = weight if lora is None else weight + lora[2] * (lora[1] @ lora[0])
            _rows_of_labels(flat_labels, 0, weight.shape[0], weight.shape[0], ignore_index)
            loss, lse = reference_linear_cross_entropy(
                hidden, whole, bias, flat_labels, flat_weights, options
            )
            lse = lse.masked_fill(flat_labels == ignore_index, 0.0)
        else:
            inner = None if lora is None else lora[2] * (hidden @ lora[0].T)
            outer = None if lora is None else lora[1]
            head = Head(weight, bias, outer, softcap, float(logit_scale))
            tokens = Tokens(hidden, flat_labels, inner)
            if chosen == "recompute":
                loss, lse = _from_statistics(tokens, head, flat_weights, options, memory_mib, shard)
            else:
                filtering = chosen == "filtered"
                loss, sums = _in_one_pass(
                    tokens,
                    head,
                    flat_weights,
                    options,
                    memory_mib,
                    eps if filtering else 0.0,
                    filter_report is not None,
                )
                if filtering and filter_report is not None:
                    filter_report.add(sums)
                if filtering and method == "auto" and not torch.compiler.is_compiling():
                    watch(own_weight, sums)
    loss = loss.reshape(shape) if reduction == "none" else loss
    return (loss, lse.reshape(shape)) if return_lse else loss


def _in_one_pass(
    tokens: Tokens,
    head: Head,
    token_weights: Tensor | None,
    options: LossOptions,
    memory_mib: int | None,
    filter_eps: float,
    report_dropped: bool,
) -> tuple[Tensor, Tensor]:
    """Mean or sum, and the filter's sums."""
    vocab_size = head.weight.shape[0]
    rows = _rows_of_labels(tokens.labels, 0, vocab_size, vocab_size, options.ignore_index)
    weights = _effective_weights(rows, tokens.labels, token_weights, vocab_size, options, tokens.hidden.dtype)
    loss, sums = exact_loss(
        tokens._replace(labels=rows),
        head,
        weights,
        options,
        memory_mib,
        filter_eps=filter_eps,
        report_dropped=report_dropped,
    )
    if options.reduction == "mean":
        loss = loss * inverse_weight(tokens.labels, token_weights, options).to(loss.dtype)
    return loss, sums


def _from_statistics(
    tokens: Tokens,
    head: Head,
    token_weights: Tensor | None,
    options: LossOptions,
    memory_mib: int | None,
    shard: VocabShard | None,
) -> tuple[Tensor, Tensor]:
    """The loss in any reduction, and the log-sum-exp, both differentiable."""
    first, vocab_size = 0, head.weight.shape[0]
    if shard is not None:
        from .vocab_parallel import combine_statistics, sum_gradient

        first, vocab_size = shard.first, shard.vocab_size
        inner = None if tokens.inner is None else sum_gradient(tokens.inner, shard)
        tokens = tokens._replace(hidden=sum_gradient(tokens.hidden, shard), inner=inner)
    rows = _rows_of_labels(tokens.labels, first, head.weight.shape[0], vocab_size, options.ignore_index)
    smoothing = options.label_smoothing
    found = head_statistics(
        tokens._replace(labels=rows), head, need_mean=smoothing > 0, memory_mib=memory_mib
    )
    if shard is not None:
        found = combine_statistics(found, shard)
        found = found._replace(lse=found.lse.masked_fill(rows == IGNORED, 0.0))
    losses = (1.0 - smoothing) * (found.lse - found.target)
    if smoothing:
        losses = losses + smoothing * (found.lse - found.mean)
    if options.z_loss:
        losses = losses + options.z_loss * found.lse.square()
    weights = _effective_weights(rows, tokens.labels, token_weights, vocab_size, options, tokens.hidden.dtype)
    losses = losses * weights
    if options.reduction == "none":
        return losses, found.lse
    total = losses.sum()
    if options.reduction == "mean":
        total = total * inverse_weight(tokens.labels, token_weights, options).to(total.dtype)
    return total, found.lse


def _effective_weights(
    rows: Tensor,
    labels: Tensor,
    token_weights: Tensor | None,
    vocab_size: int,
    options: LossOptions,
    dtype: torch.dtype,
) -> Tensor:
    """Weight of each token: 0 where ignored, NaN where its label is no word."""
    counts = rows != IGNORED
    weights = counts.to(wide_dtype(dtype))
    if token_weights is not None:
        weights = torch.where(counts, token_weights.to(weights.dtype), weights)
    no_word = counts & ((labels < 0) | (labels >= vocab_size))
    return weights.masked_fill(no_word, float("nan"))


@torch.library.custom_op("longseq::rows_of_labels", mutates_args=())
def _rows_of_labels(labels: Tensor, first: int, num_rows: int, vocab_size: int, ignore_index: int) -> Tensor:
    """Labels as rows `[first, first + num_rows)` of the vocabulary, else ELSEWHERE or IGNORED.

    Where looking is free, or asked for, a label that is no word raises; it is ELSEWHERE otherwise.
    """
    ignored = labels == ignore_index
    if not labels.is_cuda or torch.is_anomaly_enabled():
        wrong = ((labels < 0) | (labels >= vocab_size)) & ~ignored
        if wrong.any():
            index = int(wrong.nonzero()[0])
            raise ValueError(
                f"labels[{index}]={int(labels[index])} (flattened; {int(wrong.sum())} such) is outside the "
                f"vocabulary of {vocab_size} words; give {ignore_index} (ignore_index) to tokens that "
                "do not count."
            )
    rows = labels.long() - first
    here = (rows >= 0) & (rows < num_rows)
    return torch.where(here, rows, ELSEWHERE).masked_fill(ignored, IGNORED)


@_rows_of_labels.register_fake
def _(labels, first, num_rows, vocab_size, ignore_index):
    return torch.empty_like(labels, dtype=torch.int64)


def _autocast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: tuple[Tensor, Tensor, float] | None
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, Tensor, float] | None]:
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        lora = None if lora is None else (lora[0].to(dtype), lora[1].to(dtype), *lora[2:])
    return hidden, weight, bias, lora


def _shift(values: Tensor, fill: int) -> Tensor:
    """Move each row one to the left; hidden states stay where they are, so nothing large is copied."""
    return F.pad(values[..., 1:], (0, 1), value=fill) if values.shape[-1] else values


def _check_shapes(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    token_weights: Tensor | None,
    lora: tuple[Tensor, Tensor, float] | None,
    shift: bool,
) -> None:
    problems = []
    if 0 in weight.shape:
        problems.append(f"weight {tuple(weight.shape)} must have a word and a column at least")
    if shift and labels.dim() == 0:
        problems.append("shift=True needs rows of tokens; labels have no dimension")
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
    if lora is not None and len(lora) != 3:
        problems.append(f"lora has {len(lora)} parts; it must be (A, B, scale)")
    elif lora is not None:
        problems += _lora_problems(weight, *lora[:2])
    if problems:
        raise ValueError("linear_cross_entropy: " + "; ".join(problems) + ".")


def _lora_problems(weight: Tensor, a: Tensor, b: Tensor) -> list[str]:
    problems = []
    if a.dim() != 2 or b.dim() != 2 or (b.shape[0], a.shape[1]) != weight.shape or a.shape[0] != b.shape[1]:
        problems.append(
            f"lora A {tuple(a.shape)} and B {tuple(b.shape)} must be (R, D) and (V, R) of weight "
            f"{tuple(weight.shape)}"
        )
    if not a.dtype == b.dtype == weight.dtype:
        problems.append(f"lora A is {a.dtype}, B {b.dtype} and weight {weight.dtype}; cast, or use autocast")
    return problems
