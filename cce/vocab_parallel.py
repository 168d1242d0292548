"""The head split by vocabulary over a process group: each process holds some words' rows.

Statistics of the whole vocabulary come from each process' own by two small collectives; what reaches the
hidden states is summed over the group in backward. Every process has all the tokens, and gets the same loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .head import Statistics


class VocabShard(NamedTuple):
    """The words that this process' rows of the head are."""

    group: dist.ProcessGroup
    first: int
    size: int
    vocab_size: int

    @classmethod
    def of(cls, num_rows: int, group: dist.ProcessGroup, device: torch.device) -> VocabShard:
        """Ask the group who holds how many rows, in order of rank: one collective, and a wait for it."""
        sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
        rank = dist.get_rank(group)
        sizes[rank] = num_rows
        dist.all_reduce(sizes, group=group)
        counts = sizes.tolist()
        if 0 in counts:
            raise ValueError(f"each process of the group must hold a word at least; they hold {counts}.")
        return cls(group, sum(counts[:rank]), num_rows, sum(counts))


_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def shard_of(weight: Tensor, group: dist.ProcessGroup | VocabShard) -> VocabShard:
    """This process' words. The group is asked once for each weight, by all of its processes.

    Raises:
        ValueError: `group` is neither a process group nor a shard, or not the shard of this weight.
    """
    if isinstance(group, VocabShard):
        shard = group
    elif isinstance(group, dist.ProcessGroup):
        shard = _known.get(weight)
        if shard is None or shard.group is not group:
            shard = VocabShard.of(weight.shape[0], group, weight.device)
            _known[weight] = shard
    else:
        raise ValueError(f"group={group!r} must be a torch.distributed.ProcessGroup or a VocabShard.")
    if shard.size != weight.shape[0]:
        raise ValueError(
            f"weight has {weight.shape[0]} rows where the VocabShard has {shard.size} of the group's "
            f"{shard.vocab_size} words; make one for this weight by VocabShard.of(...)."
        )
    return shard


def sum_gradient(tensor: Tensor, shard: VocabShard) -> Tensor:
    """The tensor itself; in backward its gradient is summed over the group."""
    return _SumGradient.apply(tensor, shard.group)


def combine_statistics(own: Statistics, shard: VocabShard) -> Statistics:
    """Statistics over the whole vocabulary; two collectives of a few numbers a token."""
    share = shard.size / shard.vocab_size
    lse, target, mean = _Combine.apply(own.lse, own.target, own.mean, share, shard.group)
    return Statistics(lse, target, mean)


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        # In float32: a sum over many processes in bf16 would round once a process.
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.to(wide, copy=True)
        dist.all_reduce(total, group=ctx.group)
        return total.to(gradient.dtype), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lse, target, mean, share, group):
        top = lse.clone()
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        parts = [(lse - top).exp(), target] + ([] if mean is None else [mean * share])
        sums = torch.stack(parts)
        dist.all_reduce(sums, group=group)
        whole = top + sums[0].log()
        ctx.save_for_backward(lse, whole)
        ctx.share = share
        return whole, sums[1].clone(), None if mean is None else sums[2].clone()

    @staticmethod
    def backward(ctx, g_lse, g_target, g_mean):
        lse, whole = ctx.saved_tensors
        own = g_lse * (lse - whole).exp()
        return own, g_target, None if g_mean is None else g_mean * ctx.share, None, None
