"""The exchange of DeepSpeed-Ulysses (arXiv 2309.14509): all heads of some tokens, some heads of all.

Several tensors go in one collective. What is packed for a rank has its tokens first, so that what came from
the ranks already is the whole sequence, and each tensor `(B, n, L, H)` is a view of it. Everything but the
collective itself, a custom op with a gradient, is plain PyTorch: autograd and torch.compile see through it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .head_plan import HeadPlan, Shares
from .short_offsets import MOST_OFFSET

Sizes = list[int]
WIDE = torch.complex128
"""Only its 16 bytes count."""
Found = TypeVar("Found")


@torch.library.custom_op("longseq::all_to_all", mutates_args=())
def _all_to_all(sent: Tensor, send_sizes: Sizes, receive_sizes: Sizes, group_name: str) -> Tensor:
    """Elements of the flat `sent` to each rank of a group, and those that came from each."""
    group = torch.distributed.distributed_c10d._resolve_process_group(group_name)
    received, _ = _start(sent, send_sizes, receive_sizes, group, wait=True)
    return received


@_all_to_all.register_fake
def _(sent: Tensor, send_sizes: Sizes, receive_sizes: Sizes, group_name: str) -> Tensor:
    return sent.new_empty(sum(receive_sizes))


def _keep_sizes(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, ctx.send_sizes, ctx.receive_sizes, ctx.group_name = inputs


def _send_back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    back = _all_to_all(grad.contiguous(), ctx.receive_sizes, ctx.send_sizes, ctx.group_name)
    return back, None, None, None


_all_to_all.register_autograd(_send_back, setup_context=_keep_sizes)


def _start(
    sent: Tensor, send_sizes: Sizes, receive_sizes: Sizes, group: dist.ProcessGroup, *, wait: bool
) -> tuple[Tensor, Any]:
    received = sent.new_empty(sum(receive_sizes))
    uneven = {}
    if len({*send_sizes, *receive_sizes}) > 1:
        uneven = {"output_split_sizes": receive_sizes, "input_split_sizes": send_sizes}
    work = dist.all_to_all_single(received, sent, group=group, async_op=not wait, **uneven)
    return received, work


class Arriving(Generic[Found]):
    """Tensors on their way, outside of autograd: the exchange runs beside what is started after it."""

    def __init__(self, received: Tensor, work: Any, unpack: Callable[[Tensor], Found]) -> None:
        self._coming: tuple[Tensor, Any, Callable[[Tensor], Found]] | None = (received, work, unpack)

    def wait(self) -> Found:
        """The tensors, once; what is started from here on waits for them (the host does not)."""
        assert self._coming is not None
        received, work, unpack = self._coming
        self._coming = None  # who holds this holds no memory any more
        work.wait()
        del work  # and with it what was packed
        return unpack(received)


class ArrivingApart(Arriving[tuple[Tensor, ...]]):
    """Tensors of which each comes in a collective of its own."""

    def __init__(self, each: list[Arriving[tuple[Tensor, ...]]]) -> None:
        self._each = each

    def wait(self) -> tuple[Tensor, ...]:
        """As `Arriving.wait`."""
        each, self._each = self._each, []
        return tuple(tensor for one in each for tensor in one.wait())


def as_wide(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Views of the same bytes in elements of 16, where all of them line up; else the tensors.

    PyTorch copies strided tensors element by element, and wide elements take fewer.
    """
    if any(_is_crooked(tensor) for tensor in tensors):
        return tensors
    return tuple(tensor.view(WIDE) for tensor in tensors)


def _is_crooked(tensor: Tensor) -> bool:
    places = [tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1]]
    return tensor.stride(-1) != 1 or any(place * tensor.itemsize % WIDE.itemsize for place in places)


def _side_by_side(blocks: list[Tensor]) -> Tensor:
    """Blocks `(P, S, B, n, H)` of several tensors, flat; one that lies as it is sent is not copied."""
    return (blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=3)).flatten()


class Exchange:
    """The two ways of the exchange for one plan of heads, on one rank.

    Tensors are named by what their heads are: "q" for query heads (queries, attention's output, gradients of
    both), "k" for key/value heads.
    """

    def __init__(self, plan: HeadPlan, rank: int, group: dist.ProcessGroup) -> None:
        self._plan, self._rank, self._group = plan, rank, group

    @property
    def shares_keys(self) -> bool:
        """Whether a key/value head is sent to more than one rank."""
        return self._plan.shares_keys

    def to_heads(self, kinds: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        """`(B, N | K, S, H)` of this rank's tokens -> `(B, n | k, P S, H)` of its heads; differentiable."""
        sent, sizes, unpack = self._pack_for_heads(kinds, tensors)
        return unpack(_all_to_all(sent, *sizes, self._group.group_name))

    def to_tokens(self, kinds: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The way back: `(B, n | k, P S, H)` -> `(B, N | K, S, H)`, laid out with heads behind tokens.

        What ranks have of the same key/value head is added up: these can only be gradients.
        """
        sent, sizes, unpack = self._pack_for_tokens(kinds, tensors)
        return unpack(_all_to_all(sent, *sizes, self._group.group_name))

    def start_to_heads(self, kinds: str, *tensors: Tensor) -> Arriving[tuple[Tensor, ...]]:
        """`to_heads` without autograd, beside what is computed until it is waited for."""
        if self._would_reach_far(kinds, tensors[0]):
            apart = [
                self._begin(self._pack_for_heads, kind, (tensor,))
                for kind, tensor in zip(kinds, tensors, strict=True)
            ]
            return ArrivingApart(apart)
        return self._begin(self._pack_for_heads, kinds, tensors)

    def start_to_tokens(self, kinds: str, *tensors: Tensor) -> Arriving[tuple[Tensor, ...]]:
        """`to_tokens` likewise."""
        return self._begin(self._pack_for_tokens, kinds, tensors)

    @torch.no_grad()
    def _begin(self, pack: Callable, kinds: str, tensors: tuple[Tensor, ...]) -> Arriving:
        dtype = tensors[0].dtype
        # What ranks have of one head is added up only where heads are uneven.
        moved = as_wide(tensors) if self._plan.is_even else tensors
        sent, (send, receive), unpack = pack(kinds, moved)
        ratio = moved[0].dtype.itemsize // dtype.itemsize
        sizes = [size * ratio for size in send], [size * ratio for size in receive]
        wide = moved[0].dtype
        received, work = _start(sent.view(dtype), *sizes, self._group, wait=False)

        def unpack_wide(received: Tensor) -> tuple[Tensor, ...]:
            return tuple(found.view(dtype) for found in unpack(received.view(wide)))

        return Arriving(received, work, unpack_wide)

    def _would_reach_far(self, kinds: str, tensor: Tensor) -> bool:
        """Whether some rank's tensors, side by side in one that arrives, would be too long for some kernels.

        They would be copied there, a head's at a time (short_offsets.py): apart, each arrives dense.
        """
        rows, _, length, width = tensor.shape
        shares, ranks = self._shares(kinds), self._plan.num_ranks
        most = max(sum(one.num_heads(rank) for one in shares) for rank in range(ranks))
        return len(kinds) > 1 and most * rows * ranks * length * width > MOST_OFFSET

    def _shares(self, kinds: str) -> list[Shares]:
        return [self._plan.queries if kind == "q" else self._plan.keys for kind in kinds]

    def _sizes_of_ranks(self, shares: list[Shares], shape: tuple[int, int, int]) -> Sizes:
        """Elements that each rank's heads have of `(B, S, H)`."""
        rows, length, width = shape
        counts = (sum(one.num_heads(rank) for one in shares) for rank in range(self._plan.num_ranks))
        return [count * rows * length * width for count in counts]

    def _pack_for_heads(
        self, kinds: str, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Sizes, Sizes], Callable[[Tensor], tuple[Tensor, ...]]]:
        shares, ranks = self._shares(kinds), self._plan.num_ranks
        rows, _, length, width = tensors[0].shape
        mine = [one.num_heads(self._rank) for one in shares]
        if self._plan.is_even:
            # (B, N, S, H) -> (P, S, B, N/P, H): block p holds the heads of rank p
            blocks = [tensor.unflatten(1, (ranks, -1)).permute(1, 3, 0, 2, 4) for tensor in tensors]
            sent = _side_by_side(blocks)
        else:
            parts = [
                tensor.permute(2, 0, 1, 3).split(one.counts, dim=2)
                for tensor, one in zip(tensors, shares, strict=True)
            ]
            sent = torch.cat(
                [
                    torch.cat(
                        [part[one.of_rank[rank]] for part, one in zip(parts, shares, strict=True)], dim=2
                    ).flatten()
                    for rank in range(ranks)
                ]
            )
        sizes = self._sizes_of_ranks(shares, (rows, length, width))

        def unpack(received: Tensor) -> tuple[Tensor, ...]:
            whole = received.view(ranks * length, rows, sum(mine), width)
            return whole.permute(1, 2, 0, 3).split(mine, dim=1)

        return sent, (sizes, [sizes[self._rank]] * ranks), unpack

    def _pack_for_tokens(
        self, kinds: str, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Sizes, Sizes], Callable[[Tensor], tuple[Tensor, ...]]]:
        shares, ranks = self._shares(kinds), self._plan.num_ranks
        rows, _, whole_length, width = tensors[0].shape
        length = whole_length // ranks
        # (B, n, P S, H) -> (P, S, B, n, H): each rank's tokens go home, with the heads of this rank
        blocks = [tensor.unflatten(2, (ranks, -1)).permute(2, 3, 0, 1, 4) for tensor in tensors]
        sent = _side_by_side(blocks)
        sizes = self._sizes_of_ranks(shares, (rows, length, width))
        counts = [tensor.shape[1] for tensor in tensors]

        def unpack(received: Tensor) -> tuple[Tensor, ...]:
            if not self._plan.is_even:
                return self._unpack_uneven(received, shares, sizes, (rows, length, width))
            parts = received.view(ranks, length, rows, sum(counts), width).split(counts, dim=3)
            return tuple(part.permute(2, 1, 0, 3, 4).flatten(2, 3).transpose(1, 2) for part in parts)

        return sent, ([sizes[self._rank]] * ranks, sizes), unpack

    def _unpack_uneven(
        self, received: Tensor, shares: list[Shares], sizes: Sizes, shape: tuple[int, int, int]
    ) -> tuple[Tensor, ...]:
        rows, length, width = shape
        of_ranks = []
        for rank, flat in enumerate(received.split(sizes)):
            counts = [one.num_heads(rank) for one in shares]
            of_ranks.append(flat.view(length, rows, sum(counts), width).split(counts, dim=2))
        found = []
        for index, one in enumerate(shares):
            parts: list[list[Tensor]] = [[] for _ in one.counts]
            for rank, pieces in enumerate(of_ranks):
                parts[one.of_rank[rank]].append(pieces[index])
            # torch sums low precision in float32
            sums = [part[0] if len(part) == 1 else torch.stack(part).sum(0) for part in parts]
            found.append(torch.cat(sums, dim=2).permute(1, 2, 0, 3))
        return tuple(found)
