"""For attention kernels that count elements in 32 bits: tensors whose last element they can find.

A strided view reaches far beyond its own size. Of 350,000 tokens, a Llama-3-8B layer's queries are columns of
one projection's output, whose last row begins 2.1e9 elements behind the first; so are 16 columns of a hundred
of another. Where 2^31 is passed, a kernel that multiplies row and stride in 32 bits reads somewhere else, and
nobody is told: flash-attn-4's backward did with gradients of the output (its issue 2611), and cuDNN's does
with the same tensor, not with queries, keys and values (benchmarks/results/attention_offsets.md; cuDNN of
torch 2.11 on an H200; an output that reaches far was not tried). A step of 750,000 tokens, where that tensor
reached 2.7e9, had a gradient norm of 8e9, and one of 524,288 was right.

So tensors that reach as far, whichever they are, are taken by one key/value head at a time, with the query
heads that read it (or by one query head, if these are too large together), and are copied for that, a head's
at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .attention_kernels import AttentionOptions, Documents, Kernel

MOST_OFFSET = 2**31 - 1
"""Of an element behind a tensor's first."""


def last_offset(tensor: Tensor) -> int:
    """Elements from a tensor's first to its last, by its strides."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def with_short_offsets(kernel: Kernel) -> Kernel:
    """The same kernel, which is never handed a tensor that reaches beyond `MOST_OFFSET`."""

    def refusal(query: Tensor, key: Tensor, options: AttentionOptions, documents: Documents) -> str | None:
        reason = kernel.refusal(query, key, options, documents)
        rows, _, length, width = query.shape
        if reason is None and rows * length * width > MOST_OFFSET:
            return f"it counts in 32 bits, and a head of {length:,} tokens has more elements"
        return reason

    def forward(
        query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions, documents: Documents
    ) -> tuple[Tensor, Tensor]:
        tensors = (query, key, value)
        if not _reach_far(tensors):
            return kernel.forward(*tensors, options, documents)
        out = _like(query)
        sums = []
        for heads, head in _pieces(query, key):
            parts = _parts("qkk", tensors, heads, head)
            out[:, heads], lse = kernel.forward(*parts, options, documents)
            sums.append(lse)
        return out, torch.cat(sums, dim=0 if sums[0].dim() == 2 else 1)

    def backward(
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        options: AttentionOptions,
        documents: Documents,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (grad_out, query, key, value, out)
        if not _reach_far(tensors):
            return kernel.backward(*tensors, lse, options, documents)
        grads = _like(query), _like(key), _like(value)
        written: set[int] = set()
        for heads, head in _pieces(query, key):
            parts = _parts("qqkkq", tensors, heads, head)
            lse_part = (lse[heads] if lse.dim() == 2 else lse[:, heads]).contiguous()
            found = kernel.backward(*parts, lse_part, options, documents)
            grads[0][:, heads] = found[0]
            for grad, of_piece in zip(grads[1:], found[1:], strict=True):
                place = grad[:, head]
                # One key/value head may have been taken in several pieces, whose gradients add up.
                place.copy_(of_piece) if head.start not in written else place.add_(of_piece)
            written.add(head.start)
        return grads

    return kernel._replace(refusal=refusal, forward=forward, backward=backward)


def _reach_far(tensors: tuple[Tensor, ...]) -> bool:
    # Results are dense, and as large as the queries.
    return max(map(last_offset, tensors)) > MOST_OFFSET or tensors[0].numel() > MOST_OFFSET


def _pieces(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice]]:
    """Query heads and their key/value head, such that none of their tensors reaches far."""
    size = query.shape[1] // key.shape[1]
    step = size if query[:, :size].numel() <= MOST_OFFSET else 1
    for first in range(0, query.shape[1], step):
        head = first // size
        yield slice(first, first + step), slice(head, head + 1)


def _parts(kinds: str, tensors: tuple[Tensor, ...], heads: slice, head: slice) -> list[Tensor]:
    """Of each tensor a piece's heads, copied where they still reach far."""
    parts = []
    for kind, tensor in zip(kinds, tensors, strict=True):
        part = tensor[:, heads if kind == "q" else head]
        parts.append(part.contiguous() if last_offset(part) > MOST_OFFSET else part)
    return parts


def _like(tensor: Tensor) -> Tensor:
    """`(B, n, L, H)` with heads behind tokens, as kernels lay their results out."""
    rows, heads, length, width = tensor.shape
    return tensor.new_empty(rows, length, heads, width).transpose(1, 2)
