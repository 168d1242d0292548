"""Methods `exact` and `filtered`: loss and gradients in one pass, gradients taken in forward.

Three products of the problem's size in all, where remaking the logits in backward would take four; a filter
takes the second and third over the living tiles alone. The work is a custom op, opaque to `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from . import portable
from .chunks import SORT_FROM_TOKENS, Chunks, plan
from .head import Gradients, Head, Needs, Statistics, Tokens, refuse_second_order, wide_dtype
from .options import LossOptions
from .recompute import head_statistics_backward, kernels_for

OF_HEAD = ("weight", "bias", "outer")


def exact_loss(
    tokens: Tokens,
    head: Head,
    token_weights: Tensor,  # (N,) wide; 0 for ignored tokens
    options: LossOptions,
    memory_mib: int | None,
    *,
    filter_eps: float = 0.0,
    report_dropped: bool = False,
) -> tuple[Tensor, Tensor]:
    """Summed weighted loss, and the filter's report `(4,)`.

    The report: living tiles, tiles, summed probability in dead tiles (if asked for), tokens that count;
    zeros without a filter.
    """
    grad = torch.is_grad_enabled()
    flat = (tokens.hidden, head.weight, head.bias, tokens.inner, head.outer)
    needs = [grad and tensor is not None and tensor.requires_grad for tensor in flat]
    settings = (head.softcap, head.logit_scale, options.label_smoothing, options.z_loss)
    return _ExactLoss.apply(
        *flat, tokens.labels, token_weights, *settings, needs, memory_mib, filter_eps, report_dropped
    )


class _ExactLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        inner,
        outer,
        labels,
        token_weights,
        softcap,
        logit_scale,
        label_smoothing,
        z_loss,
        needs,
        memory_mib,
        filter_eps,
        report_dropped,
    ):
        flat = (hidden, weight, bias, inner, outer)
        found = _exact_op(
            *flat,
            labels,
            token_weights,
            softcap,
            logit_scale,
            label_smoothing,
            z_loss,
            needs,
            memory_mib,
            filter_eps,
            report_dropped,
        )
        loss, gradients, (lse, report, words), kept = found[0], found[1:6], found[6:9], found[9:]
        ctx.deferred, ctx.kept, ctx.spent = lse.numel() > 0, kept[0].numel() > 0, False
        # What backward makes the gradients from that wait for it.
        late = (*flat, labels, token_weights, lse) if ctx.deferred else kept if ctx.kept else ()
        ctx.save_for_backward(words, *gradients, *late)
        ctx.vocab_size = weight.shape[0]
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in flat]
        ctx.needs, ctx.memory_mib = needs, memory_mib
        ctx.settings = (softcap, logit_scale, z_loss)
        ctx.mark_non_differentiable(report)
        return loss, report

    @staticmethod
    @refuse_second_order
    def backward(ctx, upstream, _report):
        if ctx.spent:
            raise RuntimeError(
                "linear_cross_entropy with a memory_mib this small scales the hidden states' gradient in "
                "place, so its backward runs once; for retain_graph=True take a larger memory_mib, or "
                "method='recompute'."
            )
        words, *gradients = ctx.saved_tensors[:6]
        late = ctx.saved_tensors[6:]
        rows = words if words.numel() else None
        if ctx.deferred and gradients[0].numel() and not torch.compiler.is_compiling():
            # A copy of it may be more than the memory that was allowed.
            ctx.spent = True
            gradients[0].mul_(upstream)
        # Out of place: a second backward must find them as they were.
        scaled = [
            None
            if not need or not gradient.numel()
            else gradient
            if name == "hidden" and ctx.spent
            else _scaled_op(gradient, upstream, dtype, rows if name in OF_HEAD else None)
            for gradient, need, dtype, name in zip(
                gradients, ctx.needs, ctx.dtypes, Needs._fields, strict=True
            )
        ]
        left = Needs(*(need and now is None for need, now in zip(ctx.needs, scaled, strict=True)))
        if ctx.deferred:
            found = _remade_gradients(late, upstream, ctx.settings, left, ctx.memory_mib)
            scaled = [then if now is None else now for now, then in zip(scaled, found, strict=True)]
        if ctx.kept:
            of_head = [left.weight, left.bias, left.outer]
            found = _kept_op(*late, ctx.vocab_size, upstream, of_head)
            for need, index, gradient in zip(of_head, (1, 2, 4), found, strict=True):
                scaled[index] = gradient.to(ctx.dtypes[index]) if need else scaled[index]
        # An empty gradient of something that was wanted: there were no tokens, or no words.
        for index, (need, gradient) in enumerate(zip(ctx.needs, scaled, strict=True)):
            if need and gradient is None:
                scaled[index] = gradients[index].to(ctx.dtypes[index])
        return (*scaled, *[None] * 10)


def _remade_gradients(
    late: tuple[Tensor | None, ...],
    upstream: Tensor,
    settings: tuple[float | None, float, float],
    needs: Needs,
    memory_mib: int | None,
) -> Gradients:
    hidden, weight, bias, inner, outer, labels, token_weights, lse = late
    softcap, logit_scale, z_loss = settings
    weights = upstream * token_weights
    return head_statistics_backward(
        Tokens(hidden, labels, inner),
        Head(weight, bias, outer, softcap, logit_scale),
        lse,
        Statistics(weights * (1.0 + 2.0 * z_loss * lse), -weights),
        needs,
        memory_mib,
    )


@torch.library.custom_op("longseq::exact_loss", mutates_args=())
def _exact_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inner: Tensor | None,
    outer: Tensor | None,
    labels: Tensor,
    token_weights: Tensor,
    softcap: float | None,
    logit_scale: float,
    label_smoothing: float,
    z_loss: float,
    needs: list[bool],
    memory_mib: int | None,
    filter_eps: float,
    report_dropped: bool,
) -> tuple[
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
]:
    """The loss and what backward needs; tensors are empty that are not.

    Five gradients; lse, if backward remakes some of them; the filter's report; the word of each row of the
    head's gradients, if not its own; and the five of `KeptExponentials`, if backward makes some from them.
    """
    tokens, head = Tokens(hidden, labels, inner), Head(weight, bias, outer, softcap, logit_scale)
    wanted = Needs(*needs)
    kernels = kernels_for(tokens, head)
    if kernels is None or label_smoothing:
        loss, gradients, report = portable.exact_loss(
            tokens,
            head,
            token_weights,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            needs=wanted,
            memory_mib=memory_mib,
            filter_eps=filter_eps,
        )
        nothing = _or_empty((None,) * 5, hidden)
        empty = (hidden.new_empty(0), report, labels.new_empty(0))
        return (loss, *_or_empty(gradients, hidden), *empty, *nothing)
    chunks = _plan(kernels, hidden, weight, wanted, memory_mib, filter_eps)
    # Triton launches on the current device, wherever the tensors are.
    with torch.cuda.device_of(hidden):
        found = kernels.exact_loss(
            tokens,
            head,
            token_weights,
            z_loss=z_loss,
            needs=wanted,
            chunks=chunks,
            filter_eps=filter_eps,
            report_dropped=report_dropped,
        )
    lse = hidden.new_empty(0) if found.lse is None else found.lse
    words = labels.new_empty(0) if found.words is None else found.words
    kept = _or_empty(found.kept or (None,) * 5, hidden)
    return (found.loss, *_or_empty(found.gradients, hidden), lse, found.report, words, *kept)


@_exact_op.register_fake
def _(
    hidden,
    weight,
    bias,
    inner,
    outer,
    labels,
    token_weights,
    softcap,
    logit_scale,
    label_smoothing,
    z_loss,
    needs,
    memory_mib,
    filter_eps,
    report_dropped,
):
    tokens, head = Tokens(hidden, labels, inner), Head(weight, bias, outer, softcap, logit_scale)
    wide, wanted, num_tokens = wide_dtype(hidden.dtype), Needs(*needs), hidden.shape[0]
    kernels = None if label_smoothing else kernels_for(tokens, head)
    defer_weight = defer_hidden = keep = False
    num_words = 0
    kept = [hidden.new_empty(0) for _ in range(5)]
    if kernels is not None:
        chunks = _plan(kernels, hidden, weight, wanted, memory_mib, filter_eps)
        num_rows, defer_weight, defer_hidden, keep = chunks
        if keep:
            kept = kernels.kept_like(hidden, weight, inner, num_rows)
        if filter_eps > 0 and num_tokens >= SORT_FROM_TOKENS:
            num_words = weight.shape[0]
    of_tokens = wide if hidden.dtype == torch.float16 else hidden.dtype
    gradients = []
    for name, like in zip(Needs._fields, (hidden, weight, bias, inner, outer), strict=True):
        if not getattr(wanted, name) or (defer_weight or keep if name in OF_HEAD else defer_hidden):
            gradients.append(hidden.new_empty(0))
        else:
            gradients.append(like.new_empty(like.shape, dtype=wide if name in OF_HEAD else of_tokens))
    lse = hidden.new_empty(num_tokens if defer_weight else 0, dtype=wide if defer_weight else hidden.dtype)
    report = hidden.new_empty(4, dtype=torch.float64)
    return (hidden.new_empty((), dtype=wide), *gradients, lse, report, labels.new_empty(num_words), *kept)


@torch.library.custom_op("longseq::kept_gradients", mutates_args=())
def _kept_op(
    exponentials: Tensor,
    hidden: Tensor,
    inner: Tensor,
    scale: Tensor,
    num_row_tiles: Tensor,
    vocab_size: int,
    factor: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, bias and outer (empty where not wanted) from `KeptExponentials`."""
    from . import fused

    kept = fused.KeptExponentials(exponentials, hidden, inner, scale, num_row_tiles)
    weight, bias, outer = needs
    with torch.cuda.device_of(hidden):
        found = fused.head_gradients(kept, vocab_size, factor, Needs(weight=weight, bias=bias, outer=outer))
    return tuple(_or_empty((found.weight, found.bias, found.outer), hidden))


@_kept_op.register_fake
def _(exponentials, hidden, inner, scale, num_row_tiles, vocab_size, factor, needs):
    shapes = ((vocab_size, hidden.shape[-1]), (vocab_size,), (vocab_size, inner.shape[-1]))
    return tuple(hidden.new_empty(shape if need else (0,)) for need, shape in zip(needs, shapes, strict=True))


@torch.library.custom_op("longseq::scaled", mutates_args=())
def _scaled_op(gradient: Tensor, factor: Tensor, dtype: torch.dtype, rows: Tensor | None) -> Tensor:
    """`gradient * factor` in `dtype`, multiplied wide and rounded once; row i goes to row `rows[i]`."""
    out = gradient.new_empty(gradient.shape, dtype=dtype)
    narrow = gradient.dtype != torch.float64  # the kernel multiplies in float32
    if gradient.is_cuda and gradient.dim() == 2 and narrow and find_spec("triton") is not None:
        from .kernels.weights import scale_rows

        with torch.cuda.device_of(gradient):
            scale_rows(gradient, factor, out, rows=rows)
        return out
    if rows is None:
        return torch.mul(gradient, factor, out=out)
    out[rows] = (gradient * factor).to(dtype)
    return out


@_scaled_op.register_fake
def _(gradient, factor, dtype, rows):
    return gradient.new_empty(gradient.shape, dtype=dtype)


def _plan(
    kernels: ModuleType,
    hidden: Tensor,
    weight: Tensor,
    needs: Needs,
    memory_mib: int | None,
    filter_eps: float,
) -> Chunks:
    return plan(
        hidden.shape[0],
        *weight.shape,
        needs,
        memory_mib,
        filtered=filter_eps > 0,
        processors=kernels.logits.processors(hidden),
    )


def _or_empty(tensors: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if tensor is None else tensor for tensor in tensors]
