"""Softmax statistics and gradient of stored logits, row by row and in place.

One program a row. A first pass reduces the row, a second overwrites it with its gradient: a chunk of logits
is read twice and written once, and nothing beside it is stored. Both passes go through the row as whole
blocks, unmasked, and one masked tail, so that a vocabulary that is a multiple of nothing still loads wide.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..head import IGNORED, Head, Statistics

MAX_BLOCK = 4096
"""Words a step; on an H200 4,096 to 16,384 are alike for rows of 128,000 to 256,000 words."""

_IGNORED = tl.constexpr(IGNORED)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-1e38)  # finite, so that -inf minus it is no NaN; a multiple of it is finite too


def softmax_statistics(logits: Tensor, labels: Tensor, head: Head, *, need_mean: bool) -> Statistics:
    """Log-sum-exp, label's logit and mean of each row of raw logits; 0 for IGNORED rows.

    Args:
        logits: Raw logits `(T, V)`, bfloat16, float16 or float32, rows contiguous. Left as they are.
        labels: `(T,)`, as in `Tokens`.
        head: Its bias, scale and cap are applied; its weights are not looked at.
        need_mean: Give the mean of the capped logits too.

    Returns:
        float32 tensors `(T,)`.
    """
    lse, target = (torch.empty_like(labels, dtype=torch.float32) for _ in range(2))
    mean = torch.empty_like(lse) if need_mean else None
    _launch(_statistics_kernel, logits, head, labels, lse, target, mean, MEAN=need_mean)
    return Statistics(lse, target, mean)


def softmax_loss_(
    logits: Tensor,  # (T, V)
    labels: Tensor,  # (T,)
    token_weights: Tensor,  # (T,) float32
    head: Head,
    *,
    label_smoothing: float,
    z_loss: float,
    need_gradient: bool,
) -> Tensor:
    """Weighted loss of each row, `(T,)` float32; 0 for IGNORED rows.

    With `need_gradient` the raw logits are overwritten by the gradient that the sum of these losses has by
    them, IGNORED rows by 0. A weight of NaN makes its loss and its row NaN.
    """
    losses = torch.empty_like(labels, dtype=torch.float32)
    _launch(
        _loss_kernel,
        logits,
        head,
        labels,
        token_weights,
        losses,
        label_smoothing,
        z_loss,
        MEAN=label_smoothing != 0.0,
        GRADIENT=need_gradient,
    )
    return losses


def softmax_gradient_(
    logits: Tensor,  # (T, V)
    labels: Tensor,  # (T,)
    lse: Tensor,  # (T,) float32
    upstream: Statistics,  # (T,) float32 each
    head: Head,
) -> None:
    """Overwrite raw logits by their gradient, given that of each row's statistics; IGNORED rows by 0."""
    has_mean = upstream.mean is not None
    _launch(_gradient_kernel, logits, head, labels, lse, *upstream, MEAN=has_mean)


def _launch(kernel, logits: Tensor, head: Head, *arguments, **flags) -> None:
    num_tokens, vocab_size = logits.shape
    assert logits.stride(1) == 1 or vocab_size == 1, logits.stride()
    if num_tokens == 0:
        return
    # An upstream gradient may be one number, expanded.
    arguments = [x.contiguous() if isinstance(x, Tensor) else x for x in arguments]
    bias = None if head.bias is None else head.bias.contiguous()
    block = min(MAX_BLOCK, max(128, triton.next_power_of_2(vocab_size)))
    # Triton launches on the current device, which need not be the one of the tensors.
    with torch.cuda.device_of(logits):
        kernel[(num_tokens,)](
            logits,
            logits.stride(0),
            vocab_size,
            bias,
            head.logit_scale,
            head.softcap or 1.0,
            *arguments,
            **flags,
            BIAS=bias is not None,
            SOFTCAP=head.softcap is not None,
            EVEN=vocab_size % block == 0,
            BLOCK=block,
            num_warps=8 if block >= 2048 else 4,
        )


@triton.jit
def _statistics_kernel(
    logits,
    stride,
    V,
    bias,
    scale,
    cap,
    labels,
    lse,
    target,
    mean,
    MEAN: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)  # T * V passes 2^31
    label = tl.load(labels + token).to(tl.int32)
    row = logits + token * stride
    if label == _IGNORED:
        tl.store(lse + token, 0.0)
        tl.store(target + token, 0.0)
        if MEAN:
            tl.store(mean + token, 0.0)
    else:
        peak, log_total, logits_sum = _reduce_row(row, V, bias, scale, cap, MEAN, BIAS, SOFTCAP, EVEN, BLOCK)
        tl.store(lse + token, peak + log_total)
        tl.store(target + token, _label_logit(row, V, bias, scale, cap, label, BIAS, SOFTCAP))
        if MEAN:
            tl.store(mean + token, logits_sum / V)


@triton.jit
def _loss_kernel(
    logits,
    stride,
    V,
    bias,
    scale,
    cap,
    labels,
    token_weights,
    losses,
    smoothing,
    z_loss,
    MEAN: tl.constexpr,
    GRADIENT: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + token).to(tl.int32)
    row = logits + token * stride
    if label == _IGNORED:
        tl.store(losses + token, 0.0)
        if GRADIENT:
            _clear_row(row, V, EVEN, BLOCK)
    else:
        token_weight = tl.load(token_weights + token)
        target = _label_logit(row, V, bias, scale, cap, label, BIAS, SOFTCAP)
        peak, log_total, logits_sum = _reduce_row(row, V, bias, scale, cap, MEAN, BIAS, SOFTCAP, EVEN, BLOCK)
        lse = peak + log_total
        # Not lse - target: of a token that the model is sure of, little would be left after the rounding.
        loss = (1.0 - smoothing) * (log_total - (target - peak)) + z_loss * lse * lse
        g_each = 0.0
        if MEAN:
            loss += smoothing * (lse - logits_sum / V)
            g_each = -token_weight * smoothing * scale / V
        tl.store(losses + token, token_weight * loss)
        if GRADIENT:
            g_lse = token_weight * (1.0 + 2.0 * z_loss * lse) * scale
            g_target = -token_weight * (1.0 - smoothing) * scale
            _overwrite_row(
                row, V, bias, scale, cap, label, peak, log_total, g_lse, g_target, g_each,
                BIAS, SOFTCAP, EVEN, BLOCK,
            )  # fmt: skip


@triton.jit
def _gradient_kernel(
    logits,
    stride,
    V,
    bias,
    scale,
    cap,
    labels,
    lse,
    upstream_lse,
    upstream_target,
    upstream_mean,
    MEAN: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + token).to(tl.int32)
    row = logits + token * stride
    if label == _IGNORED:
        _clear_row(row, V, EVEN, BLOCK)
    else:
        g_lse = tl.load(upstream_lse + token) * scale
        g_target = tl.load(upstream_target + token) * scale
        g_each = 0.0
        if MEAN:
            g_each = tl.load(upstream_mean + token) * scale / V
        row_lse = tl.load(lse + token)
        _overwrite_row(
            row, V, bias, scale, cap, label, row_lse, 0.0, g_lse, g_target, g_each,
            BIAS, SOFTCAP, EVEN, BLOCK,
        )  # fmt: skip


@triton.jit
def _reduce_row(
    row,
    V,
    bias,
    scale,
    cap,
    MEAN: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Maximum of the capped logits, log of the sum of exp(logit - maximum), and sum of the logits."""
    lanes = tl.arange(0, BLOCK)
    # Kept lane by lane, and reduced over the lanes once.
    peak = tl.full((BLOCK,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    plain = tl.zeros((BLOCK,), tl.float32)
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        z, _ = _capped_logits(row, V, bias, start + lanes, scale, cap, BIAS, SOFTCAP, False, "evict_last")
        peak, total = _add_exp(peak, total, z)
        if MEAN:
            plain += z
    if not EVEN:
        columns = whole + lanes
        z, _ = _capped_logits(row, V, bias, columns, scale, cap, BIAS, SOFTCAP, True, "evict_last")
        peak, total = _add_exp(peak, total, tl.where(columns < V, z, float("-inf")))
        if MEAN:
            plain += tl.where(columns < V, z, 0.0)
    top = tl.max(peak, axis=0)
    row_total = tl.sum(total * tl.exp2((peak - top) * _LOG2_E), axis=0)
    return top, tl.log(row_total), tl.sum(plain, axis=0)


@triton.jit
def _add_exp(peak, total, z):
    """Each lane's (max, sum of exp(z - max)) with one more z: of the two exponentials, one is always 1."""
    distance = z - peak
    smaller = tl.exp2(-tl.abs(distance) * _LOG2_E)
    total = tl.where(distance > 0, total * smaller + 1.0, total + smaller)
    return tl.maximum(peak, z), total


@triton.jit
def _overwrite_row(
    row,
    V,
    bias,
    scale,
    cap,
    label,
    peak,
    log_total,
    g_lse,
    g_target,
    g_each,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Put the gradient of the raw logits in their place; `g_*` hold the scale already."""
    lanes = tl.arange(0, BLOCK)
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        columns = start + lanes
        z, slope = _capped_logits(row, V, bias, columns, scale, cap, BIAS, SOFTCAP, False, "evict_first")
        gradient = _gradient(z, slope, columns, label, peak, log_total, g_lse, g_target, g_each)
        tl.store(row + columns, gradient.to(row.dtype.element_ty))
    if not EVEN:
        columns = whole + lanes
        z, slope = _capped_logits(row, V, bias, columns, scale, cap, BIAS, SOFTCAP, True, "evict_first")
        gradient = _gradient(z, slope, columns, label, peak, log_total, g_lse, g_target, g_each)
        tl.store(row + columns, gradient.to(row.dtype.element_ty), mask=columns < V)


@triton.jit
def _gradient(z, slope, columns, label, peak, log_total, g_lse, g_target, g_each):
    probability = tl.exp2((z - peak - log_total) * _LOG2_E)
    gradient = probability * g_lse + g_each
    return tl.where(columns == label, gradient + g_target, gradient) * slope


@triton.jit
def _clear_row(row, V, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), row.dtype.element_ty)
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        tl.store(row + start + lanes, zeros)
    if not EVEN:
        tl.store(row + whole + lanes, zeros, mask=whole + lanes < V)


@triton.jit
def _label_logit(row, V, bias, scale, cap, label, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """Capped logit of the label; 0 for a label that is no word of the row."""
    is_word = (label >= 0) & (label < V)
    raw = tl.load(row + label, mask=is_word, other=0.0).to(tl.float32)
    if BIAS:
        raw += tl.load(bias + label, mask=is_word, other=0.0).to(tl.float32)
    z, _ = _cap(raw * scale, cap, SOFTCAP)
    return tl.where(is_word, z, 0.0)


@triton.jit
def _capped_logits(
    row,
    V,
    bias,
    columns,
    scale,
    cap,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Capped logits of some columns, float32, and the cap's slope there."""
    if MASKED:
        raw = tl.load(row + columns, mask=columns < V, other=0.0, eviction_policy=EVICTION).to(tl.float32)
        if BIAS:
            raw += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)
    else:
        raw = tl.load(row + columns, eviction_policy=EVICTION).to(tl.float32)
        if BIAS:
            raw += tl.load(bias + columns).to(tl.float32)
    return _cap(raw * scale, cap, SOFTCAP)


@triton.jit
def _cap(z, cap, SOFTCAP: tl.constexpr):
    """`cap * tanh(z / cap)` and its slope, to float32's precision."""
    slope = 1.0
    if SOFTCAP:
        u = z / cap
        e = tl.exp2(tl.abs(u) * (-2.0 * _LOG2_E))
        far = (1.0 - e) / (1.0 + e)
        far = tl.where(u < 0, -far, far)
        # Near 0 the difference cancels: an odd polynomial, fitted on [0, 0.55] to a relative 1e-7.
        s = u * u
        series = -0.0527021580 + s * 0.0164882337
        series = -0.3333297647 + s * (0.1332128151 + s * series)
        near = u + u * (s * series)
        z = cap * tl.where(tl.abs(u) < 0.55, near, far)
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    return z, slope
