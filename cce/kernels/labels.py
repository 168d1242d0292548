"""The label's own term of the gradient, where it is not made with the rest."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..head import Head
from .logits import LOG2E, cap_slope
from .tuning import TILE


@triton.jit
def _label_gradient_kernel(
    out_ptr,  # (N, words of the chunk)
    lse_ptr,
    target_ptr,
    labels_ptr,
    g_lse_ptr,
    g_target_ptr,
    g_mean_ptr,
    first_word,
    num_words,
    stride,
    N,
    logit_scale,
    softcap,
    HAS_CAP: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(labels_ptr + rows, mask=rows < N, other=-2) - first_word
    here = (rows < N) & (word >= 0) & (word < num_words)
    target = tl.load(target_ptr + rows, mask=here, other=0.0)
    p = tl.exp2((target - tl.load(lse_ptr + rows, mask=here, other=0.0)) * LOG2E)
    gradient = tl.load(g_lse_ptr + rows, mask=here, other=0.0) * p
    gradient += tl.load(g_target_ptr + rows, mask=here, other=0.0)
    if HAS_MEAN:
        gradient += tl.load(g_mean_ptr + rows, mask=here, other=0.0)
    if HAS_CAP:
        gradient *= cap_slope(target, softcap)
    gradient *= logit_scale
    tl.store(out_ptr + rows.to(tl.int64) * stride + word, gradient.to(out_ptr.dtype.element_ty), mask=here)


def write_label_gradient(
    out: Tensor,
    head: Head,
    labels: Tensor,
    first_word: int,
    num_words: int,
    lse: Tensor,
    target: Tensor,
    g_lse: Tensor,
    g_target: Tensor,
    g_mean: Tensor | None,
) -> None:
    """Overwrite the labels' elements of a chunk `first_word + [0, num_words)` of the logits' gradient."""
    num_rows = labels.shape[0]
    _label_gradient_kernel[(triton.cdiv(num_rows, 256),)](
        out,
        lse,
        target,
        labels,
        g_lse,
        g_target,
        g_mean,
        first_word,
        num_words,
        out.stride(0),
        num_rows,
        float(head.logit_scale),
        float(head.softcap or 0.0),
        HAS_CAP=head.softcap is not None,
        HAS_MEAN=g_mean is not None,
        BLOCK=256,
    )


@triton.jit
def _apart_kernel(
    alive_ptr,  # (row tiles, word tiles)
    labels_ptr,
    of_label_ptr,
    count_ptr,
    apart_out,
    keys_out,
    num_word_tiles,
    vocab_size,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels_ptr + rows)
    counts = (rows < tl.load(count_ptr)) & (label >= 0)
    at = rows // TILE * num_word_tiles + tl.maximum(label, 0) // TILE
    apart = counts & (tl.load(alive_ptr + at, mask=counts, other=1) == 0)
    tl.store(apart_out + rows, tl.where(apart, tl.load(of_label_ptr + rows, mask=apart, other=0.0), 0.0))
    tl.store(keys_out + rows, tl.where(apart, label, vocab_size).to(tl.int32))


@triton.jit
def _add_labels_kernel(
    keys_ptr,  # (N,), sorted; vocab_size where there is nothing to add
    sources_ptr,
    apart_ptr,
    scaled_ptr,
    out_ptr,
    N,
    vocab_size,
    D,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0)
    key = tl.load(keys_ptr + place)
    before = tl.load(keys_ptr + place - 1, mask=place > 0, other=-1)
    # The first of a run of one word adds them all, in their order: no two programs write one row.
    if (key < vocab_size) & (key != before):
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at = out_ptr + key.to(tl.int64) * D + columns
        total = tl.load(at, mask=columns < D, other=0.0)
        current = key
        while current == key:
            source = tl.load(sources_ptr + place)
            values = tl.load(scaled_ptr + source * D + columns, mask=columns < D, other=0.0)
            total += tl.load(apart_ptr + source) * values.to(tl.float32)
            place += 1
            current = tl.load(keys_ptr + place, mask=place < N, other=-1)
        tl.store(at, total, mask=columns < D)


class LabelsApart(NamedTuple):
    """The labels' elements of rows whose label's tile is left out."""

    elements: Tensor  # (N,) float32, 0 where the label's tile lives
    keys: Tensor  # (N,) int32: their words, sorted; the vocabulary's size for the rest
    sources: Tensor  # (N,) int64: whose they are


def labels_apart(
    alive: Tensor, labels: Tensor, of_label: Tensor, count: Tensor, vocab_size: int
) -> LabelsApart:
    """Find the labels in dead tiles of a chunk, whose rows are a multiple of a tile."""
    num_rows = labels.shape[0]
    elements = torch.empty_like(of_label)
    keys = torch.empty(num_rows, dtype=torch.int32, device=labels.device)
    _apart_kernel[(num_rows // TILE,)](
        alive,
        labels,
        of_label,
        count,
        elements,
        keys,
        alive.shape[1],
        vocab_size,
        TILE=TILE,
        BLOCK=TILE,
    )
    sorted_keys, sources = torch.sort(keys, dim=0, stable=True)
    return LabelsApart(elements, sorted_keys, sources)


def add_labels_apart(apart: LabelsApart, scaled: Tensor, out: Tensor) -> None:
    """`out[label of i] += elements[i] * scaled[i]`, float32, for labels that are apart."""
    num_rows, width = scaled.shape
    _add_labels_kernel[(num_rows, triton.cdiv(width, 1024))](
        apart.keys, apart.sources, apart.elements, scaled, out, num_rows, out.shape[0], width, BLOCK=1024
    )
