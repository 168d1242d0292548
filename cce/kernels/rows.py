"""What is done once a token: gathering the ones that count, their scale, the way back to their place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..head import Head, Tokens
from .logits import LN2, LOG2E, cap_logits, cap_slope

REFERENCE_ABOVE_TARGET = 40.0
"""Exponentials are taken relative to the label's logit plus this. bfloat16 and float32 hold e^-87 to e^88, so
a token's loss may be anywhere between 0 and 80 before a row has to be done again."""

_ROW_BLOCK = 1024


@triton.jit
def _gather_kernel(
    order_ptr,  # (tokens,): those that count come first
    start,
    count_ptr,  # (1,): how many of this chunk's rows count
    hidden_ptr,
    inner_ptr,
    labels_ptr,
    row_weights_ptr,
    weight_ptr,
    outer_ptr,
    bias_ptr,
    hidden_out,
    inner_out,
    labels_out,
    row_weights_out,
    target_out,
    reference_out,
    hidden_stride,
    inner_stride,
    weight_stride,
    outer_stride,
    D,
    R,
    logit_scale,
    softcap,
    above_target,
    COPY: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    counts = row < tl.load(count_ptr)
    source = tl.load(order_ptr + start + row, mask=counts, other=0).to(tl.int64)
    label = tl.load(labels_ptr + source, mask=counts, other=-1).to(tl.int64)
    word = tl.maximum(label, 0)
    offsets = tl.arange(0, BLOCK)
    width, rank = tl.where(counts, D, 0), tl.where(counts, R, 0)
    products = tl.zeros((BLOCK,), tl.float32)
    for start_column in range(0, D, BLOCK):
        columns = start_column + offsets
        inside = columns < width
        values = tl.load(hidden_ptr + source * hidden_stride + columns, mask=inside, other=0.0)
        weights = tl.load(weight_ptr + word * weight_stride + columns, mask=inside, other=0.0)
        products += values.to(tl.float32) * weights.to(tl.float32)
        if COPY:
            tl.store(hidden_out + row.to(tl.int64) * D + columns, values, mask=columns < D)
    if HAS_OUTER:
        for start_column in range(0, R, BLOCK):
            columns = start_column + offsets
            inside = columns < rank
            values = tl.load(inner_ptr + source * inner_stride + columns, mask=inside, other=0.0)
            weights = tl.load(outer_ptr + word * outer_stride + columns, mask=inside, other=0.0)
            products += values.to(tl.float32) * weights.to(tl.float32)
            if COPY:
                tl.store(inner_out + row.to(tl.int64) * R + columns, values, mask=columns < R)
    logit = tl.sum(products, 0)
    if HAS_BIAS:
        logit += tl.load(bias_ptr + word).to(tl.float32)
    target = cap_logits(logit, logit_scale, softcap, HAS_CAP)
    target = tl.where(counts & (label >= 0), target, 0.0)
    tl.store(target_out + row, target)
    if COPY:
        tl.store(labels_out + row, label)
        tl.store(row_weights_out + row, tl.load(row_weights_ptr + source, mask=counts, other=0.0))
        tl.store(reference_out + row, tl.where(counts, target + above_target, float("inf")))


def gather_rows(
    tokens: Tokens,
    head: Head,
    order: Tensor,
    start: int,
    count: Tensor,
    num_rows: int,
    *,
    row_weights: Tensor | None = None,
    copies: dict[str, Tensor] | None = None,
) -> Tensor:
    """Capped logit of the label of rows `order[start:][:num_rows]`, `(num_rows,)`; 0 past `count`.

    With `copies` (hidden, inner, labels, row_weights, reference), the rows are gathered into them too: zeros,
    and a reference of infinity, past `count`.
    """
    target = torch.empty(num_rows, dtype=torch.float32, device=order.device)
    copies = copies or {}
    adapted = head.outer is not None
    _gather_kernel[(num_rows,)](
        order,
        start,
        count,
        tokens.hidden,
        tokens.inner,
        tokens.labels,
        row_weights,
        head.weight,
        head.outer,
        head.bias,
        copies.get("hidden"),
        copies.get("inner"),
        copies.get("labels"),
        copies.get("row_weights"),
        target,
        copies.get("reference"),
        tokens.hidden.stride(0),
        tokens.inner.stride(0) if adapted else 0,
        head.weight.stride(0),
        head.outer.stride(0) if adapted else 0,
        tokens.hidden.shape[1],
        head.outer.shape[1] if adapted else 0,
        float(head.logit_scale),
        float(head.softcap or 0.0),
        REFERENCE_ABOVE_TARGET,
        COPY=bool(copies),
        HAS_OUTER=adapted,
        HAS_BIAS=head.bias is not None,
        HAS_CAP=head.softcap is not None,
        BLOCK=_ROW_BLOCK,
        num_warps=4,
    )
    return target


@triton.jit
def _finalize_kernel(
    sums_ptr,  # (STRIPS, N)
    reference_ptr,
    target_ptr,
    labels_ptr,
    row_weights_ptr,
    count_ptr,
    exponentials_ptr,
    hidden_ptr,  # (N, D), and what it becomes: times the row's scale
    scaled_ptr,
    inner_ptr,
    scaled_inner_ptr,
    loss_out,
    lse_out,
    scale_out,
    sum_out,
    of_label_out,
    exponentials_stride,
    N,
    D,
    R,
    z_loss,
    logit_scale,
    softcap,
    HAS_CAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    SCALE_HIDDEN: tl.constexpr,
    SCALE_INNER: tl.constexpr,
    STRIPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    counts = row < tl.load(count_ptr)
    total = 0.0
    for strip in range(STRIPS):
        total += tl.load(sums_ptr + strip * N + row, mask=counts, other=0.0)
    reference = tl.load(reference_ptr + row, mask=counts, other=0.0)
    target = tl.load(target_ptr + row)
    weight = tl.load(row_weights_ptr + row)
    label = tl.load(labels_ptr + row)
    own = tl.where(counts & (label >= 0), tl.exp2((target - reference) * LOG2E), 0.0)
    rest = total
    total = tl.where(counts, rest + own, 1.0)
    lse = reference + tl.log2(total) * LN2
    lse = tl.where(counts, lse, 0.0)
    # log(1 + rest / own), by its series where 1 + would round what counts away.
    odds = rest / own
    small = odds * (1.0 - odds * (0.5 - odds * (1.0 / 3.0 - odds * 0.25)))
    nll = tl.where(odds < 0.04, small, lse - target)
    loss = weight * (nll + z_loss * lse * lse)
    tl.store(loss_out + row, tl.where(counts, loss, 0.0))
    tl.store(lse_out + row, lse)
    tl.store(sum_out + row, total)
    if GRADIENT:
        # d loss / d logit = weight * (1 + 2 z_loss lse) * p, and -weight more for the label.
        lift = 1.0 + 2.0 * z_loss * lse
        lift = tl.where(lift == 0.0, 1e-20, lift)
        scale = tl.where(counts, weight * lift * logit_scale / total, 0.0)
        tl.store(scale_out + row, scale)
        of_label = own * ((lift - 1.0) / lift) - rest / lift
        if HAS_CAP:
            of_label *= cap_slope(target, softcap)
        tl.store(of_label_out + row, of_label)
        place = exponentials_ptr + row.to(tl.int64) * exponentials_stride + tl.maximum(label, 0)
        tl.store(place, of_label.to(exponentials_ptr.dtype.element_ty), mask=counts & (label >= 0))
        offsets = tl.arange(0, BLOCK)
        if SCALE_HIDDEN:
            for start_column in range(0, D, BLOCK):
                columns = start_column + offsets
                at = row.to(tl.int64) * D + columns
                values = tl.load(hidden_ptr + at, mask=columns < D, other=0.0).to(tl.float32) * scale
                tl.store(scaled_ptr + at, values.to(scaled_ptr.dtype.element_ty), mask=columns < D)
        if SCALE_INNER:
            for start_column in range(0, R, BLOCK):
                columns = start_column + offsets
                at = row.to(tl.int64) * R + columns
                values = tl.load(inner_ptr + at, mask=columns < R, other=0.0).to(tl.float32) * scale
                tl.store(
                    scaled_inner_ptr + at, values.to(scaled_inner_ptr.dtype.element_ty), mask=columns < R
                )


def finalize_rows(
    rows: dict[str, Tensor],  # hidden, inner, labels, row_weights, reference, target of the chunk
    sums: Tensor,  # (strips, N)
    count: Tensor,
    head: Head,
    z_loss: float,
    exponentials: Tensor | None,
    *,
    scaled: Tensor | None = None,
    scaled_inner: Tensor | None = None,
) -> dict[str, Tensor]:
    """Each row's `loss`, `lse`, `sum` of exponentials, and the `scale` that makes them a gradient.

    `sums` and the exponentials leave the label out. Its element, `of_label`, is written into its place, so
    that the row times `scale` is the gradient of its raw logits: what is left for the label is the sum of the
    rest, and keeps its digits however small it is.
    `scaled` becomes `hidden * scale`, and may be `hidden` itself.
    """
    strips, num_rows = sums.shape
    names = ("loss", "lse", "sum", "scale", "of_label")
    found = {name: torch.empty(num_rows, dtype=torch.float32, device=sums.device) for name in names}
    hidden, inner = rows["hidden"], rows.get("inner")
    _finalize_kernel[(num_rows,)](
        sums,
        rows["reference"],
        rows["target"],
        rows["labels"],
        rows["row_weights"],
        count,
        exponentials,
        hidden,
        scaled,
        inner,
        scaled_inner,
        found["loss"],
        found["lse"],
        found["scale"],
        found["sum"],
        found["of_label"],
        0 if exponentials is None else exponentials.stride(0),
        num_rows,
        hidden.shape[1],
        0 if inner is None else inner.shape[1],
        z_loss,
        float(head.logit_scale),
        float(head.softcap or 0.0),
        HAS_CAP=head.softcap is not None,
        GRADIENT=exponentials is not None,
        SCALE_HIDDEN=scaled is not None,
        SCALE_INNER=scaled_inner is not None,
        STRIPS=strips,
        BLOCK=_ROW_BLOCK,
        num_warps=4,
    )
    return found


@triton.jit
def _scatter_kernel(
    parts_ptr,  # (SPLITS, N, D)
    scale_ptr,
    order_ptr,
    start,
    count_ptr,
    apart_ptr,  # (N,): the label's element of rows whose label is apart, else 0
    labels_ptr,
    factor_ptr,  # (V, D)
    out_ptr,
    part_size,
    factor_stride,
    out_stride,
    D,
    SPLITS: tl.constexpr,
    APART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    if row < tl.load(count_ptr):
        scale = tl.load(scale_ptr + row)
        if APART:
            apart = tl.load(apart_ptr + row)
            of_label = factor_ptr + tl.maximum(tl.load(labels_ptr + row), 0) * factor_stride
        to = tl.load(order_ptr + start + row).to(tl.int64)
        for start_column in range(0, D, BLOCK):
            columns = start_column + tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK,), tl.float32)
            for split in range(SPLITS):
                at = split * part_size + row.to(tl.int64) * D + columns
                total += tl.load(parts_ptr + at, mask=columns < D, other=0.0)
            if APART:
                elements = tl.zeros((BLOCK,), tl.float32) + apart
                inside = (columns < D) & (elements != 0.0)
                total += elements * tl.load(of_label + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(
                out_ptr + to * out_stride + columns,
                (total * scale).to(out_ptr.dtype.element_ty),
                mask=columns < D,
            )


def scatter_rows(
    parts: Tensor,  # (splits, N, D)
    scale: Tensor,
    order: Tensor,
    start: int,
    count: Tensor,
    out: Tensor,
    *,
    apart: Tensor | None = None,  # (N,)
    labels: Tensor | None = None,
    factor: Tensor | None = None,  # (V, D)
) -> None:
    """`out[order[start + i]] = scale[i] * parts[:, i].sum(0)` for the rows that count.

    With `apart`, `apart[i] * factor[labels[i]]` is part of the sum.
    """
    splits, num_rows, width = parts.shape
    _scatter_kernel[(num_rows,)](
        parts,
        scale,
        order,
        start,
        count,
        apart,
        labels,
        factor,
        out,
        parts.stride(0),
        0 if factor is None else factor.stride(0),
        out.stride(0),
        width,
        SPLITS=splits,
        APART=apart is not None,
        BLOCK=_ROW_BLOCK,
        num_warps=4,
    )
