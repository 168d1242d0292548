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
from .flash_attention_4 import FLASH_4

KERNELS: dict[str, Kernel] = {
    "fa4": FLASH_4,
    "cudnn": CUDNN,
    "flash": FLASH,
    "cpu": CPU,
    "blockwise": BLOCKWISE,
}
"""In the order in which "auto" asks them."""


def choose_kernel(
    query: Tensor,  # (B, N, L, H)
    key: Tensor,  # (B, K, L, H)
    options: AttentionOptions,
    document_offsets: Tensor | Documents | None = None,
) -> tuple[str, str]:
    """The kernel that will do a problem, and why; a function of dtype, device, shapes and options alone.

    Raises:
        ValueError: A kernel asked for by name that cannot do it, or inputs that `attention_forward` refuses.
    """
    return _choose(query, key, *_prepare(query, key, options, document_offsets))


@torch.no_grad()
def attention_forward(
    query: Tensor,  # (B, N, L, H)
    key: Tensor,  # (B, K, L, H)
    value: Tensor,  # (B, K, L, H)
    options: AttentionOptions,
    document_offsets: Tensor | Documents | None = None,
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

    Returns:
        The output `(B, N, L, H)`, and the log-sum-exp of each row of scores: one tensor (float32; float64 for
        float64) whose layout is the kernel's own, for `attention_backward`.

    Raises:
        ValueError: Query and key lengths differ (decoding with a cache), heads that do not divide, packed
            documents with B > 1, documents that end before or after the sequence, or a kernel that cannot.
    """
    options, documents = _prepare(query, key, options, document_offsets)
    name, _ = _choose(query, key, options, documents)
    return KERNELS[name].forward(query, key, value, options, documents)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, shaped like them.

    Args:
        grad_out: Gradient of the output, `(B, N, L, H)`.
        query: As `attention_forward` was given them, here and below.
        key: Likewise.
        value: Likewise.
        out: The output that `attention_forward` gave.
        lse: The log-sum-exp that it gave.
        options: The same options.
        document_offsets: The same documents.

    Raises:
        ValueError: As `attention_forward`.
    """
    options, documents = _prepare(query, key, options, document_offsets)
    name, _ = _choose(query, key, options, documents)
    return KERNELS[name].backward(grad_out, query, key, value, out, lse, options, documents)


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

    Raises:
        ValueError: As `attention_forward`.
    """
    options = AttentionOptions(scale, window, softcap)
    return _Attention.apply(query, key, value, options, _as_documents(document_offsets))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
        documents: Documents | None,
    ) -> Tensor:
        out, lse = attention_forward(query, key, value, options, documents)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.options, ctx.documents = options, documents
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grads = attention_backward(grad_out, *ctx.saved_tensors, ctx.options, ctx.documents)
        return *grads, None, None


def _as_documents(offsets: Tensor | Documents | None) -> Documents | None:
    return Documents.of(offsets) if isinstance(offsets, Tensor) else offsets


def _prepare(
    query: Tensor, key: Tensor, options: AttentionOptions, document_offsets: Tensor | Documents | None
) -> tuple[AttentionOptions, Documents]:
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
    return options, documents


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


def _choose(query: Tensor, key: Tensor, options: AttentionOptions, documents: Documents) -> tuple[str, str]:
    if options.kernel != "auto":
        refusal = KERNELS[options.kernel].refusal(query, key, options, documents)
        if refusal:
            raise ValueError(
                f"kernel={options.kernel!r} cannot do this attention: {refusal}; use kernel='auto'."
            )
        return options.kernel, "it was asked for"
    refusals = []
    for name, kernel in KERNELS.items():
        refusal = kernel.refusal(query, key, options, documents) or _drawback(name, query)
        if refusal is None:
            return name, "; ".join(refusals) or "the fastest of all"
        refusals.append(f"not {name}: {refusal}")
    raise AssertionError("blockwise refuses nothing")


def _drawback(name: str, query: Tensor) -> str | None:
    """Why "auto" passes by a kernel that could."""
    if name == "cudnn" and torch.cuda.get_device_capability(query.device) < (9, 0):
        return "before Hopper it is not the fastest"
    return None
