"""The three ways to the gradient with this library's own kernels: bf16 on Hopper and later.

Logits leave the kernel that makes them as exponentials relative to a guess of each row's log-sum-exp.
bfloat16 has float32's range, so the guess need not be good: a row's true sum is known when the row is done,
and a factor a row turns its exponentials into probabilities. That factor goes to the hidden states in one
product and to the result in the other, so no pass over the logits is left.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .chunks import SORT_FROM_TOKENS, Chunks, words_per_chunk
from .head import IGNORED, Gradients, Head, Needs, Statistics, Tokens
from .kernels import labels, living_tiles, logits, products, rows, strips, weights
from .kernels.logits import RowTiles
from .kernels.tuning import LOGITS, TILE

CONTIGUOUS = torch.contiguous_format


class KeptExponentials(NamedTuple):
    """What the head's gradients are made from in backward, where that is smaller than a float32 sum."""

    exponentials: Tensor  # (N, V rounded up)
    hidden: Tensor  # (N, D): the tokens that count
    inner: Tensor | None  # (N, R)
    scale: Tensor  # (N,): of each row
    num_row_tiles: Tensor  # (1,) int32


class ExactResult(NamedTuple):
    """What `exact_loss` finds; gradients are for an upstream gradient of 1."""

    loss: Tensor  # summed
    gradients: Gradients
    lse: Tensor | None  # (N,), where backward remakes a gradient from it
    report: Tensor  # (4,) float64: living tiles, tiles, dropped probability, tokens that count
    words: Tensor | None = None  # (V,): the word of each row of the head's gradients, if not its own
    kept: KeptExponentials | None = None


def aligned(tokens: Tokens, head: Head) -> tuple[Tokens, Head]:
    """The same with rows as the kernels read them: dense, from addresses that are multiples of 16 bytes."""

    def dense(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        row_bytes = tensor.stride(0) * tensor.itemsize if tensor.dim() == 2 else 0
        apart = tensor.dim() == 1 or tensor.stride(0) >= tensor.shape[1]  # an expanded tensor's rows are one
        if tensor.stride(-1) == 1 and apart and row_bytes % 16 == 0 and tensor.data_ptr() % 16 == 0:
            return tensor
        return tensor.clone(memory_format=CONTIGUOUS)

    return (
        Tokens(dense(tokens.hidden), tokens.labels.contiguous(), dense(tokens.inner)),
        head._replace(weight=dense(head.weight), bias=dense(head.bias), outer=dense(head.outer)),
    )


def supports(tokens: Tokens, head: Head) -> bool:
    """Whether these kernels can take the problem: bf16, Hopper or Blackwell, rows of whole 16 bytes."""
    hidden = tokens.hidden
    if not hidden.is_cuda or hidden.dtype != torch.bfloat16 or hidden.shape[0] == 0:
        return False
    widths = [hidden.shape[1], *([] if head.outer is None else [head.outer.shape[1]])]
    if torch.version.hip is not None:  # its capabilities count otherwise
        return False
    return torch.cuda.get_device_capability(hidden.device)[0] in (9, 10) and all(w % 8 == 0 for w in widths)


def exact_loss(
    tokens: Tokens,
    head: Head,
    token_weights: Tensor,  # (N,) float32
    *,
    z_loss: float,
    needs: Needs,
    chunks: Chunks,
    filter_eps: float = 0.0,
    report_dropped: bool = False,
) -> ExactResult:
    """Loss, and gradients taken in forward, by chunks of the tokens that count."""
    tokens, head = aligned(tokens, head)
    num_tokens = tokens.hidden.shape[0]
    if chunks.defer_hidden:
        return _statistics_loss(tokens, head, token_weights, z_loss)
    words = None
    if filter_eps > 0 and num_tokens >= SORT_FROM_TOKENS:
        tokens, head, words = _in_order(tokens, head)
    order, counts = _compact(tokens.labels, chunks.num_tokens)
    work = _Workspace(tokens, head, needs, chunks, filtered=filter_eps > 0, report_dropped=report_dropped)
    lse = torch.empty(num_tokens, dtype=torch.float32, device=order.device) if chunks.defer_weight else None
    losses = torch.empty(len(counts), chunks.num_tokens, dtype=torch.float32, device=order.device)
    report = torch.zeros(4, dtype=torch.float64, device=order.device)
    for index, (count, num_tiles, again) in enumerate(counts):
        start = index * chunks.num_tokens
        tiles = RowTiles(count=num_tiles, most=chunks.num_tokens // TILE)
        target = rows.gather_rows(
            tokens, head, order, start, count, chunks.num_tokens, row_weights=token_weights, copies=work.rows
        )
        chunk = Tokens(work.rows["hidden"], work.rows["labels"], work.rows.get("inner"))
        _exponentials(chunk, head, tiles, work, target, count, again)
        found = rows.finalize_rows(
            {**work.rows, "target": target},
            work.sums,
            count,
            head,
            z_loss,
            work.exponentials,
            scaled=work.scaled,
            scaled_inner=work.scaled_inner,
        )
        losses[index] = found["loss"]
        if lse is not None:
            end = min(num_tokens, start + chunks.num_tokens)
            lse.index_copy_(0, order[start:end], found["lse"][: end - start])
        kept = _filter(work, head, found, count, num_tiles, filter_eps, report) if filter_eps > 0 else None
        work.add_gradients(head, tiles, found["scale"], order, start, count, kept, first=index == 0)
    late = None
    if chunks.keep:
        late = KeptExponentials(
            work.exponentials,
            work.rows["hidden"],
            work.rows.get("inner"),
            found["scale"],
            counts[0][1].clone(),
        )
    return ExactResult(losses.sum(), work.gradients, lse, report, words, late)


def kept_like(hidden: Tensor, weight: Tensor, inner: Tensor | None, num_rows: int) -> list[Tensor]:
    """Tensors of the shapes that `KeptExponentials` has, for a compiler."""
    (vocab_size, width), new = weight.shape, hidden.new_empty
    padded = -(-vocab_size // LOGITS.columns) * LOGITS.columns
    return [
        new(num_rows, padded),
        new(num_rows, width),
        new(0) if inner is None else new(num_rows, inner.shape[1]),
        new(num_rows, dtype=torch.float32),
        new(1, dtype=torch.int32),
    ]


def head_gradients(kept: KeptExponentials, vocab_size: int, factor: Tensor, needs: Needs) -> Gradients:
    """Gradients of weight, bias and outer, times `factor` `()`, from what forward kept."""
    tiles = RowTiles(kept.num_row_tiles)
    found = {}
    for name, values in (("weight", kept.hidden), ("outer", kept.inner)):
        if getattr(needs, name):
            scaled = torch.empty_like(values)
            weights.scale_rows(values, factor, scaled, scale=kept.scale)
            found[name] = values.new_empty(vocab_size, values.shape[1])
            products.columns_product(kept.exponentials, scaled, found[name], tiles)
    if needs.bias:
        total = kept.hidden.new_empty(vocab_size, dtype=torch.float32)
        weights.column_sums(kept.exponentials, kept.scale, total, tiles.count, TILE, add=False)
        found["bias"] = total * factor
    return Gradients(**found)


def _statistics_loss(tokens: Tokens, head: Head, token_weights: Tensor, z_loss: float) -> ExactResult:
    """The loss alone, all of its gradients left to backward."""
    found = statistics(tokens, head, need_mean=False)
    losses = token_weights * (found.lse - found.target + z_loss * found.lse.square())
    # An ignored token's weight may be anything; its statistics are 0.
    loss = losses.masked_fill(tokens.labels == IGNORED, 0.0).sum()
    report = torch.zeros(4, dtype=torch.float64, device=loss.device)
    return ExactResult(loss, Gradients(), found.lse, report, None)


class _Kept(NamedTuple):
    """What a filter leaves of a chunk."""

    living: living_tiles.Living
    apart: labels.LabelsApart


def _filter(
    work: _Workspace,
    head: Head,
    found: dict[str, Tensor],
    count: Tensor,
    num_tiles: Tensor,
    eps: float,
    report: Tensor,
) -> _Kept:
    living = living_tiles.find_living_tiles(work.tile_max, work.tile_sum, found["sum"], count, eps)
    apart = labels.labels_apart(
        living.alive, work.rows["labels"], found["of_label"], count, head.weight.shape[0]
    )
    report[0] += living.alive.sum()
    report[1] += num_tiles[0] * -(-head.weight.shape[0] // TILE)
    if living.dropped is not None:
        report[2] += living.dropped.sum()
    report[3] += count[0]
    return _Kept(living, apart)


def _in_order(tokens: Tokens, head: Head) -> tuple[Tokens, Head, Tensor]:
    """The words in order of how far any stretch of the tokens lifts them, so that the rest share tiles.

    The order is by the log-sum-exp, over stretches, of the mean logit in a stretch. On documents of 512
    tokens it leaves 36 % of the tiles alive where the mean over all tokens leaves 41 %, and no order 57 %
    (benchmarks/results/lm_head_tuning.md).
    """
    num_tokens = tokens.hidden.shape[0]
    num_stretches = max(1, min(64, num_tokens // 512))
    length = num_tokens // num_stretches
    whole = num_stretches * length
    counts = (tokens.labels[:whole] != IGNORED).view(num_stretches, 1, length)
    share = (counts / counts.sum(-1, keepdim=True).clamp(min=1)).to(tokens.hidden.dtype)

    def mean(values: Tensor) -> Tensor:
        return torch.bmm(share, values[:whole].view(num_stretches, length, -1)).squeeze(1)

    mean_logits = head.weight @ mean(tokens.hidden).T
    if head.outer is not None:
        mean_logits += head.outer @ mean(tokens.inner).T
    if head.bias is not None:
        mean_logits += head.bias.unsqueeze(-1)
    # NaN where an ignored token of the stretch holds one.
    mean_logits = (mean_logits.float() * head.logit_scale).nan_to_num(nan=-1e30)
    lifted = torch.logsumexp(mean_logits, dim=-1)
    words = torch.sort(lifted, dim=0, stable=True).indices
    place = torch.empty_like(words)
    place[words] = torch.arange(len(words), device=words.device)
    ordered = head._replace(
        weight=head.weight[words],
        bias=None if head.bias is None else head.bias[words],
        outer=None if head.outer is None else head.outer[words],
    )
    moved = torch.where(tokens.labels >= 0, place[tokens.labels.clamp(min=0)], tokens.labels)
    return tokens._replace(labels=moved), ordered, words


def statistics(tokens: Tokens, head: Head, *, need_mean: bool) -> Statistics:
    """Log-sum-exp, label's logit and mean logit of each token; no more memory than they take."""
    tokens, head = aligned(tokens, head)
    tiles = _living_rows(tokens.labels)
    running = logits.log_sum_exp_strips(tokens, head, tiles, need_mean=need_mean)
    target = _targets(tokens, head)
    found = strips.combine_strips(running, head.weight.shape[0], tokens.labels, target)
    return Statistics(found["lse"], target, found.get("mean"))


def look(tokens: Tokens, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the label, entropy and argmax of each token, `(N,)`, in one pass."""
    tokens, head = aligned(tokens, head)
    tiles = _living_rows(tokens.labels)
    running = logits.log_sum_exp_strips(tokens, head, tiles, need_mean=False, extras=True)
    found = strips.combine_strips(running, head.weight.shape[0], tokens.labels, None)
    return _targets(tokens, head) - found["lse"], found["entropy"], found["argmax"]


def statistics_backward(
    tokens: Tokens,
    head: Head,
    lse: Tensor,
    upstream: Statistics,
    needs: Needs,
    memory_mib: int | None,
) -> Gradients:
    """Gradients by chunks of words: each row of the weight's gradient is one sum over all tokens."""
    tokens, head = aligned(tokens, head)
    hidden = tokens.hidden
    (num_tokens, width), vocab_size = hidden.shape, head.weight.shape[0]
    tiles = _living_rows(tokens.labels)
    counts = tokens.labels != IGNORED
    reference = torch.where(counts, lse, torch.inf)
    g_lse, g_target = (torch.where(counts, g, 0.0).float() for g in (upstream.lse, upstream.target))
    g_mean = None if upstream.mean is None else torch.where(counts, upstream.mean, 0.0).float() / vocab_size
    target = _targets(tokens, head)
    num_words = words_per_chunk(
        num_tokens, vocab_size, width, needs, memory_mib, processors=logits.processors(hidden)
    )
    d_logits = hidden.new_empty(num_tokens, num_words)
    if needs.bias:
        d_logits.zero_()  # rows of tiles without a label are never written, and a plain sum would read them
    found = _zeros_to_add_to(tokens, head, needs)
    for first in range(0, vocab_size, num_words):
        last = min(vocab_size, first + num_words)
        part = head._replace(
            weight=head.weight[first:last],
            bias=None if head.bias is None else head.bias[first:last],
            outer=None if head.outer is None else head.outer[first:last],
        )
        logits.logits_gradient(tokens, part, tiles, reference, g_lse, g_mean, d_logits)
        labels.write_label_gradient(
            d_logits, head, tokens.labels, first, last - first, lse, target, g_lse, g_target, g_mean
        )
        if needs.hidden:
            products.rows_product(d_logits, part.weight, found["hidden"], tiles, add=True)
        if needs.inner:
            products.rows_product(d_logits, part.outer, found["inner"], tiles, add=True)
        if needs.weight:
            out = found["weight"][first:last]
            products.columns_product(d_logits, hidden, out, tiles)
        if needs.outer:
            out = found["outer"][first:last]
            products.columns_product(d_logits, tokens.inner, out, tiles)
        if needs.bias:
            torch.sum(d_logits[:, : last - first], dim=0, dtype=torch.float32, out=found["bias"][first:last])
    del d_logits
    return Gradients(
        *(
            None if value is None else value.reshape(like.shape).to(like.dtype)
            for value, like in (
                (found.get("hidden"), hidden),
                (found.get("weight"), head.weight),
                (found.get("bias"), head.bias),
                (found.get("inner"), tokens.inner),
                (found.get("outer"), head.outer),
            )
        )
    )


class _Workspace:
    """The buffers of a chunk, made once, and the gradients that chunks add up to."""

    def __init__(
        self,
        tokens: Tokens,
        head: Head,
        needs: Needs,
        chunks: Chunks,
        *,
        filtered: bool,
        report_dropped: bool,
    ) -> None:
        hidden, (vocab_size, width) = tokens.hidden, head.weight.shape
        num_rows = chunks.num_tokens
        new, wide = hidden.new_empty, {"dtype": torch.float32}
        padded = -(-vocab_size // LOGITS.columns) * LOGITS.columns
        self.exponentials = new(num_rows, padded)
        num_strips = logits.strips_of(RowTiles(hidden, most=num_rows // TILE), head)
        self.sums = new(num_strips, num_rows, **wide)
        self.rows = {
            "hidden": new(num_rows, width),
            "labels": new(num_rows, dtype=torch.int64),
            "row_weights": new(num_rows, **wide),
            "reference": new(num_rows, **wide),
        }
        self.tile_max = new(padded // TILE, num_rows, **wide) if filtered else None
        self.tile_sum = torch.empty_like(self.tile_max) if filtered and report_dropped else None
        late = chunks.defer_weight or chunks.keep
        weight, outer, bias = (need and not late for need in (needs.weight, needs.outer, needs.bias))
        self.scaled = self.rows["hidden"] if weight else None  # in place: they are done with by then
        self.parts = self._parts(num_rows, vocab_size, width, hidden) if needs.hidden else None
        self.scaled_inner = self.inner_parts = None
        if head.outer is not None:
            rank = head.outer.shape[1]
            self.rows["inner"] = new(num_rows, rank)
            self.scaled_inner = self.rows["inner"] if outer else None
            self.inner_parts = self._parts(num_rows, vocab_size, rank, hidden) if needs.inner else None
        self.gradients = Gradients(
            torch.zeros_like(hidden, memory_format=CONTIGUOUS) if needs.hidden else None,
            new(vocab_size, width, **wide) if weight else None,
            new(vocab_size, **wide) if bias else None,
            torch.zeros_like(tokens.inner, memory_format=CONTIGUOUS) if needs.inner else None,
            new(*head.outer.shape, **wide) if outer else None,
        )

    def _parts(self, num_rows: int, vocab_size: int, width: int, like: Tensor) -> Tensor:
        splits = products.num_splits(num_rows // TILE, vocab_size, width, like)
        return like.new_empty(splits, num_rows, width, dtype=torch.float32)

    def add_gradients(
        self,
        head: Head,
        tiles: RowTiles,
        scale: Tensor,
        order: Tensor,
        start: int,
        count: Tensor,
        kept: _Kept | None,
        *,
        first: bool,
    ) -> None:
        """Add a chunk's products to the gradients."""
        into, left = self.gradients, self.exponentials
        of_rows, of_words, apart = (None, None, None)
        if kept is not None:
            of_rows, of_words, apart = kept.living.of_rows, kept.living.of_words, kept.apart
        for parts, factor, out in (
            (self.parts, head.weight, into.hidden),
            (self.inner_parts, head.outer, into.inner),
        ):
            if out is not None:
                products.rows_product(left, factor, parts, tiles, living=of_rows)
                separate = {} if apart is None else {"apart": apart.elements, "factor": factor}
                rows.scatter_rows(
                    parts, scale, order, start, count, out, labels=self.rows["labels"], **separate
                )
        for scaled, out in ((self.scaled, into.weight), (self.scaled_inner, into.outer)):
            if out is not None:
                products.columns_product(left, scaled, out, tiles, living=of_words, add=not first)
                if apart is not None:
                    labels.add_labels_apart(apart, scaled, out)
        if into.bias is not None:
            weights.column_sums(left, scale, into.bias, tiles.count, TILE, add=not first)


def _exponentials(
    chunk: Tokens, head: Head, tiles: RowTiles, work: _Workspace, target: Tensor, count: Tensor, again: Tensor
) -> None:
    """Fill the workspace with exponentials; once more, from the true log-sum-exp, if a guess was too far off.

    The second time is decided on the device: its kernels find no tiles to do, all but always.
    """

    def run(which: RowTiles) -> None:
        logits.exponentials(
            chunk,
            head,
            which,
            work.rows["reference"],
            work.exponentials,
            work.sums,
            tile_max=work.tile_max,
            tile_sum=work.tile_sum,
        )

    run(tiles)
    reference, words = work.rows["reference"], chunk.labels
    strips.check_sums(work.sums, reference, target, words, count, tiles.count, again)
    repeat = tiles._replace(count=again)
    running = logits.log_sum_exp_strips(chunk, head, repeat, need_mean=False)
    strips.combine_strips(
        running, head.weight.shape[0], words, target, lse_out=reference, only_if=again, count=count
    )
    run(repeat)


def _compact(labels: Tensor, chunk_tokens: int) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """An order with the tokens that count in front; each chunk's tokens that count, its tiles, and a 0."""
    num_tokens = labels.shape[0]
    counts = labels != IGNORED
    ahead = counts.cumsum(0)
    positions = torch.arange(num_tokens, device=labels.device)
    place = torch.where(counts, ahead - 1, ahead[-1] + positions - ahead)
    order = torch.empty_like(place).scatter_(0, place, positions)
    starts = torch.arange(0, num_tokens, chunk_tokens, device=labels.device)
    of_chunk = (ahead[-1] - starts).clamp(0, chunk_tokens)
    # Four numbers apart: kernels are compiled anew for a pointer that is not a multiple of 16 bytes.
    table = torch.zeros(len(starts), 3, 4, dtype=torch.int32, device=labels.device)
    table[:, 0, 0] = of_chunk
    table[:, 1, 0] = (of_chunk + TILE - 1) // TILE
    return order, [(row[0, :1], row[1, :1], row[2, :1]) for row in table]


def _living_rows(labels: Tensor) -> RowTiles:
    """The tiles of tokens in which one counts."""
    num_tiles = -(-labels.shape[0] // TILE)
    counts = torch.nn.functional.pad(labels != IGNORED, (0, num_tiles * TILE - labels.shape[0]))
    alive = counts.view(num_tiles, TILE).any(1)
    listed = torch.sort(alive.to(torch.int8), dim=0, descending=True, stable=True).indices.to(torch.int32)
    listed = torch.nn.functional.pad(listed, (0, 1))  # kernels look one ahead
    return RowTiles(alive.sum(dtype=torch.int32).view(1), listed, num_tiles)


def _targets(tokens: Tokens, head: Head) -> Tensor:
    num_tokens = tokens.hidden.shape[0]
    order = torch.arange(num_tokens, device=tokens.hidden.device)
    count = torch.full((1,), num_tokens, dtype=torch.int32, device=order.device)
    return rows.gather_rows(tokens, head, order, 0, count, num_tokens)


def _zeros_to_add_to(tokens: Tokens, head: Head, needs: Needs) -> dict[str, Tensor]:
    """Float32 sums for what chunks of words add to; the weight's rows are each written once, in its dtype."""
    found, hidden = {}, tokens.hidden
    if needs.hidden:
        found["hidden"] = hidden.new_zeros(1, *hidden.shape, dtype=torch.float32)
    if needs.inner:
        found["inner"] = hidden.new_zeros(1, *tokens.inner.shape, dtype=torch.float32)
    if needs.weight:
        found["weight"] = hidden.new_empty(head.weight.shape)
    if needs.outer:
        found["outer"] = hidden.new_empty(head.outer.shape)
    if needs.bias:
        found["bias"] = hidden.new_empty(head.bias.shape, dtype=torch.float32)
    return found
