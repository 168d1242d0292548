"""Logits tile by tile, and what is made of them before they are gone.

One persistent kernel. A program takes a tile of tokens and a strip of words and walks the strip, so that a
row's running sums stay in its registers: no locks, no atomics, and the same bits on every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..head import Head, Tokens
from .tuning import LOGITS, TILE, strips_for

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
STATISTICS = tl.constexpr(0)
EXPONENTIALS = tl.constexpr(1)
GRADIENT = tl.constexpr(2)


@triton.jit
def cap_logits(logits, logit_scale, softcap, HAS_CAP: tl.constexpr):
    logits = logits * logit_scale
    if HAS_CAP:
        # tanh by one exponential; it is exact at both ends, where exp2 is 0 or infinite.
        logits = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(logits * (2.0 * LOG2E / softcap))))
    return logits


@triton.jit
def cap_slope(capped, softcap):
    share = capped / softcap
    return 1.0 - share * share


@triton.jit
def _logits_kernel(
    hidden_desc,
    weight_desc,
    inner_desc,
    outer_desc,
    out_desc,
    bias_ptr,
    labels_ptr,  # (N,): STATISTICS and EXPONENTIALS, whose sums leave the label's word out
    reference_ptr,  # (N,): subtracted from the logits before exp; +inf empties a row
    g_lse_ptr,  # (N,): GRADIENT
    g_mean_ptr,  # (N,): GRADIENT, already over V
    max_ptr,  # (STRIPS, N), base 2: STATISTICS
    sum_ptr,  # (STRIPS, N)
    total_ptr,  # (STRIPS, N): sum of logits
    entropy_ptr,  # (STRIPS, N): sum of exp2(z - max) * z, base 2
    argmax_ptr,  # (STRIPS, N)
    tile_max_ptr,  # (word tiles, N): EXPONENTIALS
    tile_sum_ptr,
    row_tiles_ptr,  # row tiles to do, in a list
    num_row_tiles_ptr,  # and how many
    N,
    V,
    D,
    R,
    logit_scale,
    softcap,
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    EXTRAS: tl.constexpr,  # entropy and argmax
    TILES: tl.constexpr,  # maximum of each TILE of words
    TILE_SUMS: tl.constexpr,  # and its sum
    LISTED: tl.constexpr,
    EVEN_V: tl.constexpr,
    FLAT: tl.constexpr,
    STRIPS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_WORDS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    num_row_tiles = tl.load(num_row_tiles_ptr)
    num_word_tiles = tl.cdiv(V, BN)
    strip_tiles = tl.cdiv(num_word_tiles, STRIPS)
    # Groups of row tiles whose hidden states stay in the cache while all strips are walked.
    for item in range(tl.program_id(0), num_row_tiles * STRIPS, tl.num_programs(0)):
        first_tile = item // (GROUP * STRIPS) * GROUP
        group = min(num_row_tiles - first_tile, GROUP)
        within = item % (GROUP * STRIPS)
        index = first_tile + within % group
        strip = within // group
        row = index * BM
        if LISTED:
            row = tl.load(row_tiles_ptr + index) * BM
        rows = row + tl.arange(0, BM)
        # Finite, for a tile may hold nothing but the label: -inf less -inf is NaN.
        running_max = tl.full((BM,), -1e30, tl.float32)
        running_sum = tl.zeros((BM,), tl.float32)
        running_total = tl.zeros((BM,), tl.float32)
        running_entropy = tl.zeros((BM,), tl.float32)
        running_argmax = tl.zeros((BM,), tl.int32)
        if EPILOGUE != GRADIENT and not EXTRAS:
            label = tl.load(labels_ptr + rows, mask=rows < N, other=-1).to(tl.int32)
        if EPILOGUE != STATISTICS:
            reference = tl.load(reference_ptr + rows, mask=rows < N, other=float("inf")) * LOG2E
        if EPILOGUE == GRADIENT:
            g_lse = tl.load(g_lse_ptr + rows, mask=rows < N, other=0.0) * logit_scale
            if HAS_MEAN:
                g_mean = tl.load(g_mean_ptr + rows, mask=rows < N, other=0.0) * logit_scale
        first, last = strip * strip_tiles, min(num_word_tiles, (strip + 1) * strip_tiles)
        for tile in tl.range(first, last, flatten=FLAT):
            word = tile * BN
            acc = tl.zeros((BM, BN), tl.float32)
            for k in range(0, D, BK):
                acc = tl.dot(
                    hidden_desc.load([row, k]), weight_desc.load([word, k]).T, acc, input_precision="ieee"
                )
            if HAS_OUTER:
                for k in tl.range(0, R, BK, num_stages=1):
                    acc = tl.dot(
                        inner_desc.load([row, k]),
                        outer_desc.load([word, k]).T,
                        acc,
                        input_precision="ieee",
                    )
            words = word + tl.arange(0, BN)
            if HAS_BIAS:
                acc += tl.load(bias_ptr + words, mask=words < V, other=0.0).to(tl.float32)[None, :]
            capped = cap_logits(acc, logit_scale, softcap, HAS_CAP)
            if EPILOGUE == STATISTICS:
                if HAS_MEAN:
                    within_vocabulary = capped if EVEN_V else tl.where(words[None, :] < V, capped, 0.0)
                    running_total += tl.sum(within_vocabulary, 1)
                z = capped * LOG2E
                if not EVEN_V:
                    z = tl.where(words[None, :] < V, z, -float("inf"))
                if not EXTRAS:
                    z = tl.where(words[None, :] == label[:, None], -float("inf"), z)
                new_max = tl.maximum(running_max, tl.max(z, 1))
                shrink = tl.exp2(running_max - new_max)
                e = tl.exp2(z - new_max[:, None])
                running_sum = running_sum * shrink + tl.sum(e, 1)
                if EXTRAS:
                    finite = z if EVEN_V else tl.where(words[None, :] < V, z, 0.0)
                    running_entropy = running_entropy * shrink + tl.sum(e * finite, 1)
                    best = tl.argmax(z, 1).to(tl.int32) + word
                    running_argmax = tl.where(new_max > running_max, best, running_argmax)
                running_max = new_max
            else:
                e = tl.exp2(capped * LOG2E - reference[:, None])
                if not EVEN_V:
                    e = tl.where(words[None, :] < V, e, 0.0)
                if EPILOGUE == EXPONENTIALS:
                    e = tl.where(words[None, :] == label[:, None], 0.0, e)
                    running_sum += tl.sum(e, 1)
                    if TILES:
                        parts: tl.constexpr = BN // TILE_WORDS
                        tiled = tl.reshape(e, (BM, parts, TILE_WORDS))
                        part = tile * parts + tl.arange(0, parts)
                        place = part[None, :].to(tl.int64) * N + rows[:, None]
                        tl.store(tile_max_ptr + place, tl.max(tiled, 2), mask=rows[:, None] < N)
                        if TILE_SUMS:
                            tl.store(tile_sum_ptr + place, tl.sum(tiled, 2), mask=rows[:, None] < N)
                else:
                    e = e * g_lse[:, None]
                    if HAS_MEAN:
                        e += g_mean[:, None]
                if HAS_CAP:
                    e *= cap_slope(capped, softcap)
                out_desc.store([row, word], e.to(out_desc.dtype))
        at = strip * N + rows
        if EPILOGUE == STATISTICS:
            tl.store(max_ptr + at, running_max, mask=rows < N)
            if HAS_MEAN:
                tl.store(total_ptr + at, running_total, mask=rows < N)
            if EXTRAS:
                tl.store(entropy_ptr + at, running_entropy, mask=rows < N)
                tl.store(argmax_ptr + at, running_argmax, mask=rows < N)
        if EPILOGUE != GRADIENT:
            tl.store(sum_ptr + at, running_sum, mask=rows < N)


class RowTiles(NamedTuple):
    """Which tiles of rows a kernel works on; known to the device alone."""

    count: Tensor  # (1,) int32
    listed: Tensor | None = None  # (at least count,) int32; None: the first `count`
    most: int = 0  # the host's bound on count


def log_sum_exp_strips(
    tokens: Tokens,
    head: Head,
    tiles: RowTiles,
    *,
    need_mean: bool,
    extras: bool = False,
) -> dict[str, Tensor]:
    """Each strip's running statistics, `(strips, N)`, logits in base 2; rows outside `tiles` are not written.

    Without `extras` the label's word is left out of `max` and `sum`. Its logit is known from a product of its
    own, whose rounding differs: beside a sum that holds the label's other self, the difference of the two
    would be all that is left of a loss of a thousandth.

    Returns:
        `max`, `sum` (of `exp2(z - max)`), and where asked `total` (of logits), `entropy`, `argmax`.
    """
    strips, n = strips_of(tiles, head), tokens.hidden.shape[0]
    names = ["max", "sum", *(["total"] if need_mean else []), *(["entropy", "argmax"] if extras else [])]
    found = {
        name: torch.empty(
            strips, n, dtype=torch.int32 if name == "argmax" else torch.float32, device=head.weight.device
        )
        for name in names
    }
    _launch(STATISTICS, tokens, head, tiles, strips, statistics=found, extras=extras, need_mean=need_mean)
    return found


def exponentials(
    tokens: Tokens,
    head: Head,
    tiles: RowTiles,
    reference: Tensor,  # (N,)
    out: Tensor,  # (N, V rounded up to a tile)
    sums: Tensor,  # (strips, N)
    *,
    tile_max: Tensor | None = None,  # (word tiles, N)
    tile_sum: Tensor | None = None,
) -> None:
    """Write `exp(z - reference)`, times the soft cap's slope, and each strip's sum of the exponentials.

    The label's is 0 in both; see `log_sum_exp_strips`.
    """
    found = {"sum": sums, "tile_max": tile_max, "tile_sum": tile_sum}
    _launch(
        EXPONENTIALS,
        tokens,
        head,
        tiles,
        sums.shape[0],
        statistics=found,
        out=out,
        reference=reference,
    )


def logits_gradient(
    tokens: Tokens,
    head: Head,
    tiles: RowTiles,
    lse: Tensor,  # (N,), +inf for rows that do not count
    g_lse: Tensor,  # (N,)
    g_mean: Tensor | None,  # (N,), over V
    out: Tensor,  # (N, V rounded up to a tile)
) -> None:
    """Write the gradient of the raw logits, all but the label's own term."""
    _launch(
        GRADIENT,
        tokens,
        head,
        tiles,
        strips_of(tiles, head),
        statistics={},
        out=out,
        reference=lse,
        g_lse=g_lse,
        g_mean=g_mean,
        need_mean=g_mean is not None,
    )


def strips_of(tiles: RowTiles, head: Head) -> int:
    """Strips into which the head's words are cut; see `tuning.strips_for`."""
    word_tiles = triton.cdiv(head.weight.shape[0], LOGITS.columns)
    return strips_for(tiles.most, word_tiles, head.weight.shape[1], processors(head.weight))


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's device."""
    if tensor.is_cuda:
        return torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return 3  # the interpreter runs one program after the other


def _launch(
    epilogue: int,
    tokens: Tokens,
    head: Head,
    tiles: RowTiles,
    strips: int,
    *,
    statistics: dict[str, Tensor | None],
    out: Tensor | None = None,
    reference: Tensor | None = None,
    g_lse: Tensor | None = None,
    g_mean: Tensor | None = None,
    need_mean: bool = False,
    extras: bool = False,
) -> None:
    bm, bn, bk = LOGITS.rows, LOGITS.columns, LOGITS.inner
    (num_tokens, width), vocab_size = tokens.hidden.shape, head.weight.shape[0]
    hidden_desc = TensorDescriptor.from_tensor(tokens.hidden, [bm, bk])
    weight_desc = TensorDescriptor.from_tensor(head.weight, [bn, bk])
    adapted = head.outer is not None
    inner_desc = TensorDescriptor.from_tensor(tokens.inner, [bm, bk]) if adapted else hidden_desc
    outer_desc = TensorDescriptor.from_tensor(head.outer, [bn, bk]) if adapted else weight_desc
    out_desc = hidden_desc if out is None else TensorDescriptor.from_tensor(out, [bm, bn])
    programs = processors(head.weight)
    _logits_kernel[(programs,)](
        hidden_desc,
        weight_desc,
        inner_desc,
        outer_desc,
        out_desc,
        head.bias,
        tokens.labels,
        reference,
        g_lse,
        g_mean,
        statistics.get("max"),
        statistics.get("sum"),
        statistics.get("total"),
        statistics.get("entropy"),
        statistics.get("argmax"),
        statistics.get("tile_max"),
        statistics.get("tile_sum"),
        tiles.listed,
        tiles.count,
        num_tokens,
        vocab_size,
        width,
        head.outer.shape[1] if adapted else 0,
        float(head.logit_scale),
        float(head.softcap or 0.0),
        EPILOGUE=epilogue,
        HAS_BIAS=head.bias is not None,
        HAS_CAP=head.softcap is not None,
        HAS_MEAN=need_mean,
        HAS_OUTER=adapted,
        EXTRAS=extras,
        TILES=statistics.get("tile_max") is not None,
        TILE_SUMS=statistics.get("tile_sum") is not None,
        LISTED=tiles.listed is not None,
        EVEN_V=vocab_size % bn == 0,
        FLAT=not adapted,
        STRIPS=strips,
        GROUP=max(1, programs // strips),
        TILE_WORDS=TILE,
        BM=bm,
        BN=bn,
        BK=bk,
        num_warps=LOGITS.num_warps,
        num_stages=LOGITS.num_stages,
    )
