"""Attention on one device, causal and per document, never with an L x L mask."""

from __future__ import annotations

from inspect import signature
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

_LOW_PRECISION_KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]


def local_attention(
    query: Tensor,  # (B, N, L, H)
    key: Tensor,  # (B, K, L, H)
    value: Tensor,  # (B, K, L, H)
    *,
    scale: float,
    document_offsets: Tensor | None = None,  # (documents + 1,), on the CPU
) -> Tensor:  # (B, N, L, H)
    """Causal attention in which no document sees another.

    Args:
        query: Queries, `(B, N, L, H)`.
        key: Keys, `(B, K, L, H)`; K divides N.
        value: Values, like the keys.
        scale: Factor of the scores.
        document_offsets: Where documents begin and the last ends, for B = 1; on the CPU, so that no layer
            waits for the GPU. None is one document a row.

    Raises:
        ValueError: Query and key lengths differ (decoding with a cache), packed documents with B > 1, or
            documents that end before or after the sequence.
    """
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{query.shape[2]} queries against {key.shape[2]} keys: this attention trains on whole "
            "sequences and has no cache; call the handle's undo() before generating."
        )
    if document_offsets is None:
        return _one_document(query, key, value, scale)
    if document_offsets[0] != 0 or document_offsets[-1] != query.shape[2]:
        # The kernels would leave tokens behind the last document unwritten.
        raise ValueError(
            f"document_offsets run from {int(document_offsets[0])} to {int(document_offsets[-1])}; they "
            f"must run from 0 to the {query.shape[2]} tokens of the whole sequence, its padding included."
        )
    if len(document_offsets) == 2:
        return _one_document(query, key, value, scale)
    if query.shape[0] != 1:
        raise ValueError(
            f"packed documents need one row, not a batch of {query.shape[0]}; concatenate the rows."
        )
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, scale, document_offsets)
    bounds = document_offsets.tolist()
    documents = [
        _one_document(query[:, :, start:stop], key[:, :, start:stop], value[:, :, start:stop], scale)
        for start, stop in pairwise(bounds)
        if stop > start
    ]
    return torch.cat(documents, dim=2)


def _one_document(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        with sdpa_kernel(_LOW_PRECISION_KERNELS, set_priority=True):
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
            )
    # The memory-efficient kernels for float32 (and the CPU's) know no grouped heads.
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    kernel = SDPBackend.EFFICIENT_ATTENTION if query.is_cuda else SDPBackend.FLASH_ATTENTION
    with sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)


def _varlen(query: Tensor, key: Tensor, value: Tensor, scale: float, document_offsets: Tensor) -> Tensor:
    """All documents in one kernel; `(1, N, L, H)` in and out."""
    from torch.nn.attention.varlen import varlen_attn

    longest = int(document_offsets.diff().max())
    offsets = document_offsets.to(query.device, torch.int32, non_blocking=True)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    # torch 2.11 takes grouped heads as they are; later it wants to be told.
    grouped = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
    out = varlen_attn(
        query, key, value, offsets, offsets, longest, longest, scale=scale, window_size=(-1, 0), **grouped
    )
    return out.transpose(0, 1).unsqueeze(0)
