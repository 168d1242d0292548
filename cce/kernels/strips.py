"""From the running sums of each strip of words to numbers of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .logits import LN2, LOG2E

LARGEST_SUM = tl.constexpr(1e18)
SMALLEST_SUM = tl.constexpr(1e-18)


@triton.jit
def _check_sums_kernel(
    sums_ptr,
    reference_ptr,
    target_ptr,
    labels_ptr,
    count_ptr,
    tiles_ptr,
    again_ptr,
    N,
    STRIPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counts = rows < tl.load(count_ptr)
    has_label = counts & (tl.load(labels_ptr + rows, mask=counts, other=-1) >= 0)
    above = tl.load(target_ptr + rows, mask=counts, other=0.0)
    above -= tl.load(reference_ptr + rows, mask=counts, other=0.0)
    total = tl.where(has_label, tl.exp2(above * LOG2E), 0.0)
    for strip in range(STRIPS):
        total += tl.load(sums_ptr + strip * N + rows, mask=counts, other=0.0)
    # NaN compares false: such a row is done again too, and stays NaN.
    sound = ((total > SMALLEST_SUM) & (total < LARGEST_SUM)) | (rows >= tl.load(count_ptr))
    if tl.min(sound.to(tl.int32), 0) == 0:
        tl.store(again_ptr, tl.load(tiles_ptr))


def check_sums(
    sums: Tensor,  # (strips, N), without the label's word
    reference: Tensor,
    target: Tensor,
    labels: Tensor,
    count: Tensor,
    tiles: Tensor,
    again: Tensor,
) -> None:
    """Set `again` (0 before) to `tiles` if a row's sum is near the ends of what floats hold."""
    strips, num_rows = sums.shape
    _check_sums_kernel[(triton.cdiv(num_rows, 256),)](
        sums, reference, target, labels, count, tiles, again, num_rows, STRIPS=strips, BLOCK=256
    )


@triton.jit
def _combine_kernel(
    max_ptr,
    sum_ptr,
    total_ptr,
    entropy_ptr,
    argmax_ptr,
    labels_ptr,
    target_ptr,
    only_if_ptr,
    count_ptr,
    lse_out,
    mean_out,
    entropy_out,
    argmax_out,
    N,
    V,
    STRIPS: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    EXTRAS: tl.constexpr,
    CONDITIONAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < N
    label = tl.load(labels_ptr + rows, mask=inside, other=-2)
    inside = inside & (label != -2)
    if CONDITIONAL:
        inside = inside & (rows < tl.where(tl.load(only_if_ptr) > 0, tl.load(count_ptr), 0))
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    if not EXTRAS:
        # The strips left the label's word out.
        target = tl.load(target_ptr + rows, mask=inside, other=0.0) * LOG2E
        top = tl.where(label >= 0, target, top)
    best = tl.zeros((BLOCK,), tl.int32)
    for strip in range(STRIPS):
        strip_max = tl.load(max_ptr + strip * N + rows, mask=inside, other=0.0)
        if EXTRAS:
            strip_best = tl.load(argmax_ptr + strip * N + rows, mask=inside, other=0)
            best = tl.where(strip_max > top, strip_best, best)
        # A NaN must survive: maximum would drop it.
        top = tl.where((strip_max > top) | (strip_max != strip_max), strip_max, top)
    total = tl.zeros((BLOCK,), tl.float32)
    if not EXTRAS:
        total = tl.where(label >= 0, tl.exp2(target - top), 0.0)
    logits = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for strip in range(STRIPS):
        at = strip * N + rows
        # An empty strip has a maximum of -1e30 and a sum of 0.
        share = tl.exp2(tl.load(max_ptr + at, mask=inside, other=0.0) - top)
        total += tl.load(sum_ptr + at, mask=inside, other=1.0) * share
        if HAS_MEAN:
            logits += tl.load(total_ptr + at, mask=inside, other=0.0)
        if EXTRAS:
            weighted += tl.load(entropy_ptr + at, mask=inside, other=0.0) * share
    lse = (top + tl.log2(total)) * LN2
    if CONDITIONAL:
        tl.store(lse_out + rows, lse, mask=inside)
    else:
        tl.store(lse_out + rows, tl.where(inside, lse, 0.0), mask=rows < N)
        if HAS_MEAN:
            tl.store(mean_out + rows, tl.where(inside, logits / V, 0.0), mask=rows < N)
        if EXTRAS:
            # H = lse - sum p z, with z in base 2 here.
            entropy = lse - weighted / total * LN2
            tl.store(entropy_out + rows, tl.where(inside, entropy, 0.0), mask=rows < N)
            tl.store(argmax_out + rows, tl.where(inside, best, 0), mask=rows < N)


def combine_strips(
    strips: dict[str, Tensor],
    vocab_size: int,
    labels: Tensor,
    target: Tensor | None,
    *,
    lse_out: Tensor | None = None,
    only_if: Tensor | None = None,
    count: Tensor | None = None,
) -> dict[str, Tensor]:
    """From each strip's running statistics to `lse`, and `mean`, `entropy`, `argmax` where they are there.

    `target` is the label's logit, which strips without entropy left out. Rows whose label is IGNORED get 0.
    With `only_if`, only the first `count` rows of `lse_out` are written, and only if that is above 0.
    """
    num_strips, num_rows = strips["max"].shape
    like = strips["max"][0]
    found = {"lse": torch.empty_like(like) if lse_out is None else lse_out}
    if "total" in strips:
        found["mean"] = torch.empty_like(like)
    if "entropy" in strips:
        found["entropy"] = torch.empty_like(like)
        found["argmax"] = torch.empty_like(like, dtype=torch.int32)
    _combine_kernel[(triton.cdiv(num_rows, 256),)](
        strips["max"],
        strips["sum"],
        strips.get("total"),
        strips.get("entropy"),
        strips.get("argmax"),
        labels,
        target,
        only_if,
        count,
        found["lse"],
        found.get("mean"),
        found.get("entropy"),
        found.get("argmax"),
        num_rows,
        vocab_size,
        STRIPS=num_strips,
        HAS_MEAN="total" in strips,
        EXTRAS="entropy" in strips,
        CONDITIONAL=only_if is not None,
        BLOCK=256,
    )
    return found
