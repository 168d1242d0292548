"""Attention in plain PyTorch, by blocks of rows: any dtype, any device, windows, softcap and ALiBi.

It is the definition of right for the other kernels (in float64), and does what none of them can. A block
meets only the keys that one of its rows can see, so that work and memory follow the window and the document.
Statistics, sums and products are at least float32. The backward is that of FlashAttention-2
(arXiv 2307.08691, algorithm 2): probabilities come back from the log-sum-exp, and
`d_scores = probabilities * (grad_out @ value.T - rowsum(grad_out * out))`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .attention_kernels import AttentionOptions, Documents, Kernel

BLOCK_ELEMENTS = 2**26
"""Scores of a block, over all heads: 256 MiB in float32, of which the backward holds about four at once."""
BLOCK_ROWS = 512
"""Above this a block would mostly compute scores that causality hides."""


def _refusal(query: Tensor, key: Tensor, options: AttentionOptions, documents: Documents) -> str | None:
    return None


def _blocks(query: Tensor, options: AttentionOptions, documents: Documents) -> Iterator[tuple[slice, slice]]:
    """Rows, and the keys that they can see."""
    heads = query.shape[0] * query.shape[1]
    for start, stop in documents.spans:
        first = start
        while first < stop:
            reach = start if options.window is None else max(start, first - options.window + 1)
            most_keys = min(first + BLOCK_ROWS, stop) - reach
            rows = min(BLOCK_ROWS, max(1, BLOCK_ELEMENTS // (heads * most_keys)))
            last = min(first + rows, stop)
            yield slice(first, last), slice(reach, last)
            first = last


def _hidden(rows: slice, keys: slice, window: int | None, device: torch.device) -> Tensor:
    """What of a block may not be seen, `(rows, keys)`."""
    row = torch.arange(rows.start, rows.stop, device=device).unsqueeze(1)
    key = torch.arange(keys.start, keys.stop, device=device)
    hidden = key > row
    return hidden if window is None else hidden | (key <= row - window)


def _grouped(tensor: Tensor, rows: slice, num_kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Rows of `(B, N, L, H)` -> `(B, K, N / K * rows, H)`: a group meets its keys as one matrix."""
    part = tensor[:, :, rows].to(dtype)
    return part.unflatten(1, (num_kv_heads, -1)).flatten(2, 3)


def _scores(query: Tensor, key: Tensor, options: AttentionOptions) -> Tensor:
    """Scaled and capped scores; `query` is scaled already."""
    scores = query @ key.transpose(-1, -2)
    return scores if options.softcap is None else scores.div_(options.softcap).tanh_().mul_(options.softcap)


def _add_alibi(scores: Tensor, slopes: Tensor | None, rows: slice, keys: slice) -> Tensor:
    """Add `slope * (key - row)` to `(B, K, N / K * rows, keys)`, in place."""
    if slopes is None:
        return scores
    row = torch.arange(rows.start, rows.stop, device=scores.device).unsqueeze(1)
    # Whole numbers of tokens, and so exact also in float32.
    forward = (torch.arange(keys.start, keys.stop, device=scores.device) - row).to(scores.dtype)
    by_row = scores.unflatten(2, (-1, rows.stop - rows.start))
    by_row.addcmul_(slopes.to(scores.dtype).view(scores.shape[1], -1, 1, 1), forward)
    return scores


def _hide(scores: Tensor, rows: slice, keys: slice, window: int | None, value: float) -> Tensor:
    """Fill what may not be seen of `(B, K, N / K * rows, keys)`, in place."""
    by_row = scores.unflatten(2, (-1, rows.stop - rows.start))
    by_row.masked_fill_(_hidden(rows, keys, window, scores.device), value)
    return scores


def _add_over_rows(total: Tensor, scores: Tensor, by_row: Tensor) -> None:
    """Add `scores.T @ by_row`, `(B, K, keys, H)`.

    A group's heads are one matrix with all of their rows. A GPU sums through them one by one, and the longer
    the sum, the more it rounds: plain PyTorch sums through one head.
    """
    parts = scores.split(BLOCK_ROWS, dim=2), by_row.split(BLOCK_ROWS, dim=2)
    for part, rows in zip(*parts, strict=True):
        total += part.transpose(-1, -2) @ rows


def _statistics_dtype(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: AttentionOptions,
    documents: Documents,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype, num_kv_heads = _statistics_dtype(query), key.shape[1]
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:3], dtype=dtype, device=query.device)
    key, value = key.to(dtype), value.to(dtype)
    for rows, keys in _blocks(query, options, documents):
        scaled = _grouped(query, rows, num_kv_heads, dtype) * options.scale
        scores = _add_alibi(_scores(scaled, key[:, :, keys], options), slopes, rows, keys)
        _hide(scores, rows, keys, options.window, -torch.inf)
        highest = scores.amax(-1, keepdim=True)
        weights = scores.sub_(highest).exp_()
        total = weights.sum(-1, keepdim=True)
        part = (weights @ value[:, :, keys]).div_(total)
        out[:, :, rows] = part.view(out[:, :, rows].shape).to(out.dtype)
        lse[:, :, rows] = (highest + total.log()).view(lse[:, :, rows].shape)
    return out, lse


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    documents: Documents,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, num_kv_heads = _statistics_dtype(query), key.shape[1]
    grad_query = torch.empty_like(query)
    wide_key, wide_value = key.to(dtype), value.to(dtype)
    grad_key, grad_value = torch.zeros_like(wide_key), torch.zeros_like(wide_value)
    for rows, keys in _blocks(query, options, documents):
        scaled = _grouped(query, rows, num_kv_heads, dtype) * options.scale
        upstream = _grouped(grad_out, rows, num_kv_heads, dtype)
        delta = (upstream * _grouped(out, rows, num_kv_heads, dtype)).sum(-1, keepdim=True)
        scores = _scores(scaled, wide_key[:, :, keys], options)
        row_lse = _grouped(lse.unsqueeze(-1), rows, num_kv_heads, dtype)
        # Hidden scores are zeroed after the exponential: the softcap's derivative needs them finite, and
        # without the slopes.
        weights = _add_alibi(scores - row_lse, slopes, rows, keys).exp_()
        _hide(weights, rows, keys, options.window, 0.0)
        _add_over_rows(grad_value[:, :, keys], weights, upstream)
        grad_scores = (upstream @ wide_value[:, :, keys].transpose(-1, -2)).sub_(delta).mul_(weights)
        if options.softcap is not None:
            # d/dx c tanh(x / c) = 1 - tanh(x / c)^2, and the scores are c tanh(x / c).
            grad_scores.mul_(1 - scores.div_(options.softcap).square_())
        part = (grad_scores @ wide_key[:, :, keys]).mul_(options.scale)
        grad_query[:, :, rows] = part.view(grad_query[:, :, rows].shape).to(grad_query.dtype)
        _add_over_rows(grad_key[:, :, keys], grad_scores, scaled)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


BLOCKWISE = Kernel(_refusal, _forward, _backward, no_alibi=None)
