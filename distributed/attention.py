"""Attention on one device, causal and per document: an explicit forward and backward, never an L x L mask.

`attention_forward` and `attention_backward` keep nothing: who calls them decides what stays between the two
(queries, keys and values may be rebuilt, output and log-sum-exp may wait on the host). `local_attention` is
both behind one autograd node.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention_kernels import CPU, CUDNN, FLASH, AttentionOptions, Documents, Kernel
from .blockwise_attention import BLOCKWISE
from .flash_attention_2 import FLASH_2
from .flash_attention_3 import FLASH_3
from .flash_attention_4 import FLASH_4
from .per_head import PerHead, add_sinks, sink_gradient
from .short_offsets import with_short_offsets

# The fastest first. Hopper: flash-attn-4 is ahead of cuDNN; flash-attn-3 is by its paper (arXiv 2407.08608)
# as fast as cuDNN on long sequences, and also does packed documents, windows, a softcap and wide heads, which
# else fall to "flash", written for Ampere and by that paper half as fast. Blackwell: flash-attn-4, or cuDNN.
# Ampere and Ada: "flash" and "fa2" are the same code. PyTorch's own goes first, for it always fits this
# PyTorch; the package does what only it can: a softcap and ALiBi. Packed documents never reach cuDNN.
KERNELS: dict[str, Kernel] = {
    name: with_short_offsets(kernel) if kernel.counts_in_32_bits else kernel
    for name, kernel in {
        "fa4": FLASH_4,
        "fa3": FLASH_3,
        "cudnn": CUDNN,
        "flash": FLASH,
        "fa2": FLASH_2,
        "cpu": CPU,
        "blockwise": BLOCKWISE,
    }.items()
}
"""In the order in which "auto" asks them."""


def choose_kernel(
    query: Tensor,  # (B, N, L, H)
    key: Tensor,  # (B, K, L, H)
    options: AttentionOptions,
    document_offsets: Tensor | Documents | None = None,
    per_head: PerHead | None = None,
) -> tuple[str, str]:
    """The kernel that will do a problem, and why; a function of dtype, device, shapes and options alone.

    Raises:
        ValueError: A kernel asked for by name that cannot do it, or inputs that `attention_forward` refuses.
    """
    return _choose(query, key, *_prepare(query, key, options, document_offsets, per_head))


@torch.no_grad()
def attention_forward(
    query: Tensor,  # (B, N, L, H)
    key: Tensor,  # (B, K, L, H)
    value: Tensor,  # (B, K, L, H)
    options: AttentionOptions,
    document_offsets: Tensor | Documents | None = None,
    per_head: PerHead | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention in which no document sees another, outside of autograd.

    Args:
        query: Queries, `(B, N, L, H)`; like keys and values they may be strided views whose last dimension is
            dense, such as columns of one projection's output.
        key: Keys, `(B, K, L, H)`; K divides N.
        value: Values, like the keys.
        options: Scale, window, softcap and kernel.
        document_offsets: Where documents begin and the last ends, `(documents + 1,)` for B = 1, on the CPU;
            or `Documents.of(offsets)`, made once for all layers. None is one document a row.
        per_head: Sinks and ALiBi slopes of these query heads.

    Returns:
        The output `(B, N, L, H)`, and the log-sum-exp of each row's scores and sink: one tensor (float32;
        float64 for float64) whose layout is the kernel's own, for `attention_backward`.

    Raises:
        ValueError: Query and key lengths differ (decoding with a cache), heads that do not divide, packed
            documents with B > 1, documents that end before or after the sequence, sinks or slopes of other
            heads, or a kernel that cannot.
    """
    options, documents, per_head = _prepare(query, key, options, document_offsets, per_head)
    name, _ = _choose(query, key, options, documents, per_head)
    out, lse = KERNELS[name].forward(query, key, value, options, documents, *_slopes(per_head))
    if per_head.sinks is not None:
        add_sinks(out, lse, per_head.sinks)
    return out, lse


@torch.no_grad()
def attention_backward(
    grad_out: Tensor,  # (B, N, L, H)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    document_offsets: Tensor | Documents | None = None,
    per_head: PerHead | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, shaped like them; that of sinks is `sink_gradient`.

    Args:
        grad_out: Gradient of the output, `(B, N, L, H)`.
        query: As `attention_forward` was given them, here and below.
        key: Likewise.
        value: Likewise.
        out: The output that `attention_forward` gave.
        lse: The log-sum-exp that it gave.
        options: The same options.
        document_offsets: The same documents.
        per_head: The same sinks and slopes.

    Raises:
        ValueError: As `attention_forward`.
    """
    options, documents, per_head = _prepare(query, key, options, document_offsets, per_head)
    name, _ = _choose(query, key, options, documents, per_head)
    slopes = _slopes(per_head)
    return KERNELS[name].backward(grad_out, query, key, value, out, lse, options, documents, *slopes)


def own_log_sum(
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    options: AttentionOptions,
    documents: Documents,
    per_head: PerHead,
) -> Tensor:
    """A log-sum-exp `(B, N, L)` in the layout of the kernel that `attention_backward` will take."""
    options, documents, per_head = _prepare(query, key, options, documents, per_head)
    name, _ = _choose(query, key, options, documents, per_head)
    if name == "cudnn":
        return lse.unsqueeze(-1)
    is_by_token = name not in ("cpu", "blockwise") and len(documents.spans) > 1
    return lse[0] if is_by_token else lse


def log_sums_of_groups(log_sum: Tensor, num_groups: int) -> list[Tensor]:
    """A log-sum-exp of all query heads, `(B, N, ...)` or `(N, L)`, cut into equal groups of heads."""
    dim = 0 if log_sum.dim() == 2 else 1
    return [part.contiguous() for part in log_sum.chunk(num_groups, dim)]


def local_attention(
    query: Tensor,  # (B, N, L, H)
    key: Tensor,  # (B, K, L, H)
    value: Tensor,  # (B, K, L, H)
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    document_offsets: Tensor | Documents | None = None,  # (documents + 1,), on the CPU
    sinks: Tensor | None = None,  # (N,)
    alibi_slopes: Tensor | None = None,  # (N,)
) -> Tensor:  # (B, N, L, H)
    """Differentiable causal attention in which no document sees another.

    Args:
        query: Queries, `(B, N, L, H)`.
        key: Keys, `(B, K, L, H)`; K divides N.
        value: Values, like the keys.
        scale: Factor of the scores.
        window: A token sees itself and the `window - 1` tokens before it; None sees its whole document.
        softcap: Scores become `softcap * tanh(scores / softcap)`.
        document_offsets: As for `attention_forward`.
        sinks: One more logit in the denominator of each head's softmax; they get a gradient.
        alibi_slopes: `slope * (i - j)` is taken from each head's scores, after scale and softcap; constants.

    Raises:
        ValueError: As `attention_forward`; slopes that ask for a gradient.
    """
    if torch.compiler.is_compiling() and not isinstance(document_offsets, Documents):
        from .compiled_attention import attention_operator

        rules = (scale, window, softcap)
        return attention_operator(query, key, value, sinks, alibi_slopes, document_offsets, *rules)[0]
    options = AttentionOptions(scale, window, softcap)
    PerHead(sinks, alibi_slopes).check(query.shape[1])
    documents = _as_documents(document_offsets)
    return _Attention.apply(query, key, value, sinks, alibi_slopes, options, documents)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        slopes: Tensor | None,
        options: AttentionOptions,
        documents: Documents | None,
    ) -> Tensor:
        out, lse = attention_forward(query, key, value, options, documents, PerHead(sinks, slopes))
        ctx.save_for_backward(query, key, value, out, lse, sinks, slopes)
        ctx.options, ctx.documents = options, documents
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, out, lse, sinks, slopes = ctx.saved_tensors
        per_head = PerHead(sinks, slopes)
        grads = attention_backward(grad_out, *tensors, out, lse, ctx.options, ctx.documents, per_head)
        of_sinks = None
        if ctx.needs_input_grad[3]:
            of_sinks = sink_gradient(grad_out, out, lse, sinks).to(sinks.dtype)
        return *grads, of_sinks, None, None, None


def _as_documents(offsets: Tensor | Documents | None) -> Documents | None:
    return Documents.of(offsets) if isinstance(offsets, Tensor) else offsets


def _slopes(per_head: PerHead) -> tuple[Tensor, ...]:
    """The last argument of kernels, where there is one: those that have no slopes have no place for it."""
    return () if per_head.alibi_slopes is None else (per_head.alibi_slopes,)


def _prepare(
    query: Tensor,
    key: Tensor,
    options: AttentionOptions,
    document_offsets: Tensor | Documents | None,
    per_head: PerHead | None,
) -> tuple[AttentionOptions, Documents, PerHead]:
    """The problem as kernels see it: documents that fit, and no window that is wider than they are."""
    length = query.shape[2]
    if length != key.shape[2]:
        raise ValueError(
            f"{length} queries against {key.shape[2]} keys: this attention trains on whole "
            "sequences and has no cache; call the handle's undo() before generating."
        )
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{key.shape[1]} key/value heads do not divide {query.shape[1]} query heads.")
    documents = _as_documents(document_offsets) or Documents.whole(length)
    _check_documents(documents, query)
    if options.window is not None and options.window >= documents.longest:
        options = replace(options, window=None)
    per_head = per_head or PerHead()
    per_head.check(query.shape[1])
    return options, documents, per_head


def _check_documents(documents: Documents, query: Tensor) -> None:
    if documents.bounds[0] != 0 or documents.bounds[-1] != query.shape[2]:
        # The kernels would leave tokens behind the last document unwritten.
        raise ValueError(
            f"document_offsets run from {documents.bounds[0]} to {documents.bounds[-1]}; they "
            f"must run from 0 to the {query.shape[2]} tokens of the whole sequence, its padding included."
        )
    if len(documents.spans) > 1 and query.shape[0] != 1:
        raise ValueError(
            f"packed documents need one row, not a batch of {query.shape[0]}; concatenate the rows."
        )


def _choose(
    query: Tensor, key: Tensor, options: AttentionOptions, documents: Documents, per_head: PerHead
) -> tuple[str, str]:
    if options.kernel != "auto":
        refusal = _refusal(options.kernel, query, key, options, documents, per_head)
        if refusal:
            raise ValueError(
                f"kernel={options.kernel!r} cannot do this attention: {refusal}; use kernel='auto'."
            )
        return options.kernel, "it was asked for"
    refusals = []
    for name in KERNELS:
        refusal = _refusal(name, query, key, options, documents, per_head) or _drawback(name, query)
        if refusal is None:
            return name, "; ".join(refusals) or "the fastest of all"
        refusals.append(f"not {name}: {refusal}")
    raise AssertionError("blockwise refuses nothing")


def _refusal(
    name: str,
    query: Tensor,
    key: Tensor,
    options: AttentionOptions,
    documents: Documents,
    per_head: PerHead,
) -> str | None:
    kernel = KERNELS[name]
    if per_head.alibi_slopes is not None and kernel.no_alibi:
        return kernel.no_alibi
    return kernel.refusal(query, key, options, documents)


def _drawback(name: str, query: Tensor) -> str | None:
    """Why "auto" passes by a kernel that could."""
    if name == "cudnn" and torch.cuda.get_device_capability(query.device) < (9, 0):
        return "before Hopper it is not the fastest"
    return None
