"""Loss, statistics and their gradients by chunks of tokens: any device, any float dtype, any size.

A chunk's logits live only while their softmax and the gradient's products are made. The products are plain
PyTorch; so is the softmax, except on CUDA, where one Triton kernel overwrites the logits by their gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .head import IGNORED, Gradients, Head, Needs, Statistics, Tokens, wide_dtype

DEFAULT_MEMORY_MIB = 1024
"""Some 4,000 tokens of a 128,256-word head in bf16 on CUDA: cuBLAS is busy from 2,048 on."""
TILE = 128
"""Tokens, and words, of a tile of the gradient filter."""


def exact_loss(
    tokens: Tokens,
    head: Head,
    token_weights: Tensor,  # (N,)
    *,
    label_smoothing: float,
    z_loss: float,
    needs: Needs,
    memory_mib: int | None,
    filter_eps: float = 0.0,
) -> tuple[Tensor, Gradients, Tensor]:
    """Summed weighted loss and its gradients, in one pass: three products of the problem's size.

    Args:
        tokens: Hidden states and labels.
        head: What scores them.
        token_weights: Wide; a NaN makes the loss and what the token reaches NaN.
        label_smoothing: See `LossOptions`.
        z_loss: See `LossOptions`.
        needs: The gradients that are wanted.
        memory_mib: Memory that a chunk of logits may take; None for the default.
        filter_eps: Elements of the logits' gradient in dead tiles are set to 0, all but the labels' own. A
            tile is 128 tokens that count by 128 words, and alive if in it a probability of a word that is
            not its token's label reaches this. 0 is off.

    Returns:
        The loss, a wide scalar; gradients for an upstream gradient of 1; and the filter's report, `(4,)`:
        living tiles, tiles, summed probability in dead tiles without the labels' own, tokens that count
        (zeros without a filter).
        Gradients of the head are wide, those of the tokens in their dtype: wide for float16, which would
        lose small ones before a loss scale reaches them.
    """
    num_tokens, wide = tokens.labels.shape[0], wide_dtype(tokens.hidden.dtype)
    filtered = filter_eps > 0.0
    kept = _kept_rows(tokens.labels, filtered)
    tokens, token_weights = _take(tokens, kept), _take_rows(token_weights, kept)
    kernels = None if filtered else _row_kernels(tokens.hidden)
    sums = _Sums(tokens, head, needs, wide if tokens.hidden.dtype == torch.float16 else None)
    loss = torch.zeros((), dtype=wide, device=tokens.hidden.device)
    report = torch.zeros(4, dtype=_finest_float(loss.device), device=loss.device)
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss, "need_gradient": any(needs)}
    for rows in _chunks(tokens, head, kernels, memory_mib, TILE if filtered else 1):
        chunk, weights = sums.chunk(rows), token_weights[rows]
        logits = sums.logits(chunk, in_place=kernels is not None)
        if kernels is not None:
            losses = kernels.softmax_loss_(logits, chunk.labels, weights, head, **options)
        else:
            losses, logits = _plain_loss_(
                logits, chunk.labels, weights, head, **options, filter_eps=filter_eps, report=report
            )
        loss += losses.sum()
        if any(needs):
            sums.add(rows, chunk, logits)
        del logits  # or it would stand beside the next chunk's
    return loss, sums.gradients(kept, num_tokens), report


def statistics(tokens: Tokens, head: Head, *, need_mean: bool, memory_mib: int | None) -> Statistics:
    """Each token's log-sum-exp, label's logit and, if asked for, mean logit; see `Statistics`."""
    labels = tokens.labels
    kept = _kept_rows(labels, False)
    tokens = _take(tokens, kept)
    kernels = _row_kernels(tokens.hidden)
    sums = _Sums(tokens, head, Needs())
    found = []
    for rows in _chunks(tokens, head, kernels, memory_mib):
        chunk = sums.chunk(rows)
        logits = sums.logits(chunk, in_place=kernels is not None)
        if kernels is not None:
            found.append(kernels.softmax_statistics(logits, chunk.labels, head, need_mean=need_mean))
        else:
            softmax = _softmax_(_capped(logits, head), chunk.labels, need_mean=need_mean)
            found.append(Statistics(softmax.lse, softmax.target, softmax.mean))
        del logits
    lse, target, mean = (
        None if parts[0] is None else _put_back(torch.cat(parts), kept, labels.shape[0])
        for parts in zip(*found, strict=True)
    )
    if kernels is None:
        ignored = labels == IGNORED
        lse, target = lse.masked_fill(ignored, 0.0), target.masked_fill(ignored, 0.0)
        mean = None if mean is None else mean.masked_fill(ignored, 0.0)
    return Statistics(lse, target, mean)


def statistics_backward(
    tokens: Tokens, head: Head, lse: Tensor, upstream: Statistics, needs: Needs, memory_mib: int | None
) -> Gradients:
    """Gradients of tokens and head, each in its own dtype, given those of their statistics.

    The logits are computed again: with the forward, four products of the problem's size.
    """
    num_tokens = tokens.labels.shape[0]
    kept = _kept_rows(tokens.labels, False)
    tokens, lse = _take(tokens, kept), _take_rows(lse, kept)
    upstream = Statistics(*(_take_rows(part, kept) for part in upstream))
    kernels = _row_kernels(tokens.hidden)
    factor = None
    if tokens.hidden.dtype == torch.float16:
        # A mean's gradients are too small for float16 until they are sums: made larger, then smaller again.
        factor = _largest(upstream)
        upstream = Statistics(*(None if part is None else part / factor for part in upstream))
    sums = _Sums(tokens, head, needs, None if factor is None else factor.dtype)
    for rows in _chunks(tokens, head, kernels, memory_mib):
        chunk = sums.chunk(rows)
        logits = sums.logits(chunk, in_place=kernels is not None)
        row_upstream = Statistics(*(None if part is None else part[rows] for part in upstream))
        if kernels is not None:
            kernels.softmax_gradient_(logits, chunk.labels, lse[rows], row_upstream, head)
        else:
            z = _capped(logits, head)
            slope = _cap_slope(z, head)
            probabilities = z.sub_(lse[rows].unsqueeze(-1)).exp_()
            logits = _gradient_(probabilities, slope, chunk.labels, row_upstream, head)
            del z, slope, probabilities
        sums.add(rows, chunk, logits)
        del logits
    gradients = sums.gradients(kept, num_tokens)
    own = (tokens.hidden, head.weight, head.bias, tokens.inner, head.outer)
    return Gradients(
        *(
            None
            if gradient is None
            else (gradient if factor is None else gradient * factor).to(parameter.dtype)
            for gradient, parameter in zip(gradients, own, strict=True)
        )
    )


def _largest(upstream: Statistics) -> Tensor:
    """The largest magnitude, `()`; not 0, and 1 where there is nothing."""
    parts = [part.abs().amax() for part in upstream if part is not None and part.numel()]
    return torch.stack(parts).amax().clamp(min=1e-30) if parts else upstream.lse.new_ones(())


def chunk_tokens(
    vocab_size: int, dtype: torch.dtype, *, memory_mib: int | None, in_place: bool, softcap: bool = False
) -> int:
    """Tokens whose logits, with what is made of them, fit into `memory_mib`; a multiple of 128, or under it.

    Args:
        vocab_size: Words of the head.
        dtype: Of the hidden states.
        memory_mib: None for the default.
        in_place: The gradient overwrites the logits; else it has a wide buffer of its own.
        softcap: There is a cap, whose slope then needs another.
    """
    bytes_per_logit = dtype.itemsize
    if not in_place:
        bytes_per_logit += wide_dtype(dtype).itemsize * (2 if softcap else 1)
    tokens = (memory_mib or DEFAULT_MEMORY_MIB) * 2**20 // (vocab_size * bytes_per_logit)
    return max(1, tokens // TILE * TILE if tokens >= TILE else tokens)


def _chunks(
    tokens: Tokens, head: Head, kernels: ModuleType | None, memory_mib: int | None, at_least: int = 1
) -> Iterator[slice]:
    """Slices of tokens, alike in size; one, empty, where there is no token."""
    num_tokens = tokens.labels.shape[0]
    largest = chunk_tokens(
        head.weight.shape[0],
        tokens.hidden.dtype,
        memory_mib=memory_mib,
        in_place=kernels is not None,
        softcap=head.softcap is not None,
    )
    size = max(at_least, largest)
    if num_tokens > size and size >= TILE:
        # A last chunk of a few tokens would cost as much as one of hundreds.
        count = -(-num_tokens // size)
        size = -(-num_tokens // (count * TILE)) * TILE
    for start in range(0, max(1, num_tokens), size):
        yield slice(start, min(start + size, num_tokens))


class _Sums:
    """Makes the logits of a chunk, and gathers what their gradient gives tokens and head."""

    def __init__(
        self, tokens: Tokens, head: Head, needs: Needs, token_dtype: torch.dtype | None = None
    ) -> None:
        self.tokens, self.head = tokens, head
        dtype = token_dtype or tokens.hidden.dtype
        wide = wide_dtype(tokens.hidden.dtype)
        # What is not written by a first chunk has to be 0.
        self.is_empty = tokens.labels.shape[0] == 0

        def make(like: Tensor) -> Tensor:
            return (like.new_zeros if self.is_empty else like.new_empty)(like.shape, dtype=wide)

        self.hidden = tokens.hidden.new_empty(tokens.hidden.shape, dtype=dtype) if needs.hidden else None
        self.inner = tokens.inner.new_empty(tokens.inner.shape, dtype=dtype) if needs.inner else None
        self.weight = make(head.weight) if needs.weight else None
        self.outer = make(head.outer) if needs.outer else None
        self.bias = make(head.bias) if needs.bias else None
        self._buffer: Tensor | None = None

    def chunk(self, rows: slice) -> Tokens:
        """The tokens of a chunk; what IGNORED ones hold is put to 0, lest a NaN reach the head."""
        hidden, labels, inner = _take(self.tokens, rows)
        if not _drops_ignored(labels.device):
            ignored = (labels == IGNORED).unsqueeze(-1)
            hidden = hidden.masked_fill(ignored, 0.0)
            inner = None if inner is None else inner.masked_fill(ignored, 0.0)
        return Tokens(hidden, labels, inner)

    def logits(self, chunk: Tokens, *, in_place: bool) -> Tensor:
        """Raw logits without bias, `(T, V)`; `in_place` writes them over those of the chunk before."""
        head = self.head
        if not in_place:
            logits = chunk.hidden @ head.weight.T
        else:
            vocab_size = head.weight.shape[0]
            if self._buffer is None:
                # Rows begin at multiples of 16 elements: cuBLAS and the row kernel then load 16 bytes a time.
                padded = -(-vocab_size // 16) * 16
                self._buffer = chunk.hidden.new_empty(chunk.hidden.shape[0], padded)[:, :vocab_size]
            logits = self._buffer[: chunk.hidden.shape[0]]
            torch.mm(chunk.hidden, head.weight.T, out=logits)
        return logits if chunk.inner is None else logits.addmm_(chunk.inner, head.outer.T)

    def add(self, rows: slice, chunk: Tokens, gradient: Tensor) -> None:
        """Products of a chunk with the gradient of its raw logits, `(T, V)`."""
        if self.is_empty:
            return
        first = rows.start == 0
        if self.bias is not None:
            total = gradient.sum(0, dtype=self.bias.dtype)
            self.bias.copy_(total) if first else self.bias.add_(total)
        narrow = gradient
        if gradient.is_cuda or self.hidden is not None or self.inner is not None:
            narrow = gradient.to(chunk.hidden.dtype)
        # On the CPU the head's products are made in float32 anyhow: of a gradient that is not rounded.
        for_head = narrow if gradient.is_cuda else gradient
        if self.weight is not None:
            _add_product(self.weight, for_head.T, chunk.hidden, first)
        if self.outer is not None:
            _add_product(self.outer, for_head.T, chunk.inner, first)
        if self.hidden is not None:
            _product_into(self.hidden[rows], narrow, self.head.weight)
        if self.inner is not None:
            _product_into(self.inner[rows], narrow, self.head.outer)

    def gradients(self, kept: Tensor | None, num_tokens: int) -> Gradients:
        """What was gathered; tokens back where they were, 0 for those that were dropped."""
        return Gradients(
            _put_back(self.hidden, kept, num_tokens),
            self.weight,
            self.bias,
            _put_back(self.inner, kept, num_tokens),
            self.outer,
        )


def _add_product(accumulator: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """`accumulator += left @ right`, the sum kept in its precision; the first product is written."""
    dtype = accumulator.dtype
    if not (left.is_cuda and left.dtype != dtype):
        left, right = left.to(dtype), right.to(dtype)
        torch.mm(left, right, out=accumulator) if first else accumulator.addmm_(left, right)
    elif first:
        torch.mm(left, right, out_dtype=dtype, out=accumulator)
    else:
        # One product that adds in place: without it, each chunk would write and read a (V, D) of its own.
        torch.addmm(accumulator, left, right, out_dtype=dtype, out=accumulator)


def _product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def _drops_ignored(device: torch.device) -> bool:
    """Whether IGNORED rows are dropped first: elsewhere, their number would have to reach the host."""
    return device.type == "cpu"


def _kept_rows(labels: Tensor, filtered: bool) -> Tensor | None:
    """Rows to go through, in order; None for all as they are.

    Where IGNORED rows go along, only a filter, whose tiles hold tokens that count, has them moved to the end.
    """
    if _drops_ignored(labels.device):
        kept = (labels != IGNORED).nonzero().squeeze(-1)
        return kept if kept.numel() < labels.numel() else None
    return torch.argsort(labels == IGNORED, stable=True) if filtered else None


def _take(tokens: Tokens, rows: Tensor | slice | None) -> Tokens:
    return Tokens(*(_take_rows(part, rows) for part in tokens))


def _take_rows(values: Tensor | None, rows: Tensor | slice | None) -> Tensor | None:
    return values if values is None or rows is None else values[rows]


def _put_back(values: Tensor | None, kept: Tensor | None, num_tokens: int) -> Tensor | None:
    if values is None or kept is None:
        return values
    return values.new_zeros(num_tokens, *values.shape[1:]).index_copy_(0, kept, values)


class _Softmax(NamedTuple):
    """Of each row `(T,)`, wide; the peak is apart, so that differences lose nothing to its size."""

    peak: Tensor
    total: Tensor  # sum of exp(z - peak)
    target: Tensor
    mean: Tensor | None

    @property
    def lse(self) -> Tensor:
        return self.peak + self.total.log()

    @property
    def nll(self) -> Tensor:
        return self.total.log() - (self.target - self.peak)


def _plain_loss_(
    logits: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    head: Head,
    *,
    label_smoothing: float,
    z_loss: float,
    need_gradient: bool,
    filter_eps: float,
    report: Tensor,
) -> tuple[Tensor, Tensor]:
    """Weighted losses `(T,)` and, if needed, the gradient of the raw logits; the report is added to."""
    z = _capped(logits, head)
    slope = _cap_slope(z, head) if need_gradient else None
    softmax = _softmax_(z, labels, need_mean=label_smoothing != 0.0)
    lse = softmax.lse
    losses = (1.0 - label_smoothing) * softmax.nll + z_loss * lse.square()
    if softmax.mean is not None:
        losses += label_smoothing * (lse - softmax.mean)
    # masked_fill, not the weight of 0 alone: 0 * inf is NaN.
    losses = (losses * token_weights).masked_fill_(labels == IGNORED, 0.0)
    if not need_gradient and filter_eps == 0.0:
        return losses, logits
    probabilities = z.div_(softmax.total.unsqueeze(-1))
    dead = _dead_tiles(probabilities, labels, filter_eps, report) if filter_eps > 0.0 else None
    if not need_gradient:
        return losses, logits
    upstream = Statistics(
        token_weights * (1.0 + 2.0 * z_loss * lse),
        token_weights * (label_smoothing - 1.0),
        None if softmax.mean is None else token_weights * -label_smoothing,
    )
    gradient = _gradient_(probabilities, slope, labels, upstream, head)
    return losses, gradient if dead is None else _clear_tiles_(gradient, dead, labels)


def _capped(logits: Tensor, head: Head) -> Tensor:
    """Capped logits from raw ones, wide; those that are wide already are overwritten."""
    z = logits.to(wide_dtype(logits.dtype))
    if head.bias is not None:
        z += head.bias
    if head.logit_scale != 1.0:
        z *= head.logit_scale
    if head.softcap is not None:
        z = z.div_(head.softcap).tanh_().mul_(head.softcap)
    return z


def _cap_slope(z: Tensor, head: Head) -> Tensor | None:
    return None if head.softcap is None else (z / head.softcap).square_().neg_().add_(1.0)


def _softmax_(z: Tensor, labels: Tensor, *, need_mean: bool) -> _Softmax:
    """Overwrites capped logits by exp(z - peak)."""
    peak = z.amax(-1)
    target = z.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill_(labels < 0, 0.0)
    mean = z.mean(-1) if need_mean else None
    total = z.sub_(peak.unsqueeze(-1)).exp_().sum(-1)
    return _Softmax(peak, total, target, mean)


def _gradient_(
    probabilities: Tensor, slope: Tensor | None, labels: Tensor, upstream: Statistics, head: Head
) -> Tensor:
    """Overwrites probabilities by the gradient of the raw logits; `upstream` is that of each statistic."""
    ignored = labels == IGNORED
    g_lse, g_target, g_mean = (
        None if part is None else (part * head.logit_scale).masked_fill_(ignored, 0.0).unsqueeze(-1)
        for part in upstream
    )
    gradient = probabilities.mul_(g_lse)
    if g_mean is not None:
        gradient += g_mean / probabilities.shape[-1]
    labels = labels.unsqueeze(-1)
    gradient.scatter_add_(-1, labels.clamp(min=0), g_target.masked_fill(labels < 0, 0.0))
    return gradient if slope is None else gradient.mul_(slope)


def _dead_tiles(probabilities: Tensor, labels: Tensor, eps: float, report: Tensor) -> Tensor:
    """Which tiles of words are dead for each token, `(T, ceil(V / 128))`; what they are is reported.

    A label's own probability neither keeps its tile alive nor counts as dropped: its element is always kept.
    """
    num_tokens, vocab_size = probabilities.shape
    counts = labels != IGNORED
    if not _drops_ignored(labels.device):
        probabilities.masked_fill_(~counts.unsqueeze(-1), 0.0)
    at = labels.clamp(min=0).unsqueeze(-1)
    own = probabilities.gather(-1, at)
    # Times 0, not 0: of a row of NaN, a tile with nothing but the label is alive too.
    probabilities.scatter_(-1, at, own * (labels < 0).unsqueeze(-1))
    whole, row_tiles = vocab_size // TILE, -(-num_tokens // TILE)
    tiles = probabilities[:, : whole * TILE].unflatten(1, (whole, TILE))
    maxima, sums = tiles.amax(2), tiles.sum(2)
    rest = probabilities[:, whole * TILE :]
    if rest.shape[1]:
        maxima = torch.cat([maxima, rest.amax(1, keepdim=True)], 1)
        sums = torch.cat([sums, rest.sum(1, keepdim=True)], 1)
    probabilities.scatter_(-1, at, own)

    def by_tile(values: Tensor) -> Tensor:
        return F.pad(values, (0, 0, 0, -num_tokens % TILE)).unflatten(0, (row_tiles, TILE))

    # Not `>= eps`: NaN is alive, and reaches the gradients.
    alive = ~(by_tile(maxima).amax(1) < eps)
    exists = by_tile(counts.unsqueeze(-1)).any(1)
    dropped = by_tile(sums).to(report.dtype).sum(1).masked_fill(alive, 0.0).sum()
    report += torch.stack([alive.sum(), exists.sum() * alive.shape[1], dropped, counts.sum()])
    return ~alive.repeat_interleave(TILE, 0)[:num_tokens]


def _clear_tiles_(gradient: Tensor, dead: Tensor, labels: Tensor) -> Tensor:
    """Sets what dead tiles hold to 0, all but the labels' elements."""
    at = labels.clamp(min=0).unsqueeze(-1)
    own = gradient.gather(-1, at)
    whole = gradient.shape[1] // TILE
    tiles = gradient[:, : whole * TILE].unflatten(1, (whole, TILE))
    tiles.masked_fill_(dead[:, :whole].unsqueeze(-1), 0.0)
    gradient[:, whole * TILE :].masked_fill_(dead[:, whole:], 0.0)
    # A token without a label here has word 0 looked up: that stays as it is now.
    return gradient.scatter_(-1, at, torch.where(labels.unsqueeze(-1) >= 0, own, gradient.gather(-1, at)))


def _finest_float(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _row_kernels(hidden: Tensor) -> ModuleType | None:
    """The kernels that go through rows of logits in place, where they can run."""
    if not hidden.is_cuda or hidden.dtype == torch.float64 or not _has_triton():
        return None
    from .kernels import softmax_gradient

    return softmax_gradient


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
