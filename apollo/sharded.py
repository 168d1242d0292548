"""Two collectives a step by which ranks that share weights take the step that one rank would take.

The first brings the parts of each shared channel's statistics to the rank that keeps its moments. The second
gives everyone the scales of shared channels and the sums over each matrix that limits follow from. What the
ranks send follows from the layouts, so that nothing is told beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import Range
from .low_rank import Projected, Statistics


class Exchange:
    """Between the ranks of a process group, for the weights of one step, in the same order on every rank."""

    def __init__(self, weights: Sequence[Projected], group: dist.ProcessGroup) -> None:
        self._weights = list(weights)
        self._group = group
        self._ranks = range(dist.get_world_size(group))
        self._me = dist.get_rank(group)

    def to_owners(self, partial: Sequence[Statistics]) -> list[Statistics]:
        """Whole sums of the channels that this rank owns, from each rank's parts."""
        owned = [_own_part(one, part) for one, part in zip(self._weights, partial, strict=True)]
        if not any(one.layout.shared for one in self._weights):  # on no rank
            return owned
        sends = [self._parts_for(rank, partial) for rank in self._ranks]
        sizes = [self._size_from(rank) for rank in self._ranks]
        sent = self._flat([part for parts in sends for part in parts])
        received = sent.new_empty(sum(sizes))
        dist.all_to_all_single(
            received,
            sent,
            output_split_sizes=sizes,
            input_split_sizes=[sum(part.numel() for part in parts) for parts in sends],
            group=self._group,
        )
        received = received.to(partial[0].squares.device)
        for rank, values in zip(self._ranks, received.split(sizes), strict=True):
            self._add(owned, rank, values)
        return owned

    def to_all(
        self, scales: Sequence[Tensor | None], sums: Sequence[Tensor]
    ) -> tuple[list[Tensor | None], list[Tensor]]:
        """Scales of the channels that this rank touches, and sums over all ranks, from owners' own."""
        parts: list[Tensor] = []
        for one, scale, total in zip(self._weights, scales, sums, strict=True):
            parts.append(total.reshape(-1))
            for shared in one.layout.shared if scale is not None else ():
                part = total.new_zeros(shared.size)
                mine = shared & one.owned
                if mine.size:
                    part[_within(mine, shared)] = scale[_within(mine, one.owned)]
                parts.append(part)
        together = self._flat(parts)
        dist.all_reduce(together, group=self._group)
        summed = iter(together.to(sums[0].device).split([part.numel() for part in parts]))
        all_scales: list[Tensor | None] = []
        all_sums = []
        for one, scale, total in zip(self._weights, scales, sums, strict=True):
            all_sums.append(next(summed).view_as(total).to(total.dtype))
            all_scales.append(None if scale is None else self._touched_scale(one, scale, summed))
        return all_scales, all_sums

    def _touched_scale(self, one: Projected, owned: Tensor, summed) -> Tensor:
        scale = owned.new_zeros(one.touched.size)
        mine = one.touched & one.owned
        if mine.size:
            scale[_within(mine, one.touched)] = owned[_within(mine, one.owned)]
        for shared in one.layout.shared:
            values = next(summed)
            here = shared & one.touched
            if here.size:
                scale[_within(here, one.touched)] = values[_within(here, shared)].to(scale.dtype)
        return scale

    def _parts_for(self, rank: int, partial: Sequence[Statistics]) -> list[Tensor]:
        parts: list[Tensor] = []
        if rank == self._me:
            return parts
        for one, part in zip(self._weights, partial, strict=True):
            common = one.touched & one.layout.owned[rank]
            if common.size:
                place = _within(common, one.touched)
                parts += [part.projected[place], part.squares[place]]
        return parts

    def _from(self, one: Projected, rank: int) -> Range:
        """The channels owned here that another rank has parts of."""
        return Range(0, 0) if rank == self._me else one.layout.touched[rank] & one.owned

    def _size_from(self, rank: int) -> int:
        return sum(self._from(one, rank).size * (one.rank + 1) for one in self._weights)

    def _add(self, owned: list[Statistics], rank: int, values: Tensor) -> None:
        at = 0
        for one, total in zip(self._weights, owned, strict=True):
            common = self._from(one, rank)
            if not common.size:
                continue
            place, size = _within(common, one.owned), common.size * one.rank
            total.projected[place] += values[at : at + size].view(-1, one.rank).to(one.dtype)
            total.squares[place] += values[at + size : at + size + common.size].to(one.dtype)
            at += size + common.size

    def _flat(self, parts: list[Tensor]) -> Tensor:
        """All of it, in the widest dtype of the weights' arithmetic, where the group can send it from."""
        wide = max((one.dtype for one in self._weights), key=lambda dtype: dtype.itemsize)
        device = self._weights[0].grad.device
        if device.type == "cpu" and dist.get_backend(self._group) == "nccl":  # states that are offloaded
            device = torch.device("cuda", torch.cuda.current_device())
        empty = torch.zeros(0, dtype=wide, device=self._weights[0].grad.device)
        return torch.cat([empty, *(part.reshape(-1).to(wide) for part in parts)]).to(device)


def _own_part(one: Projected, partial: Statistics) -> Statistics:
    """This rank's own part of the channels that it owns."""
    if one.touched == one.owned:
        return partial
    total = Statistics(
        partial.projected.new_zeros(one.owned.size, one.rank), partial.squares.new_zeros(one.owned.size)
    )
    common = one.touched & one.owned
    if common.size:
        total.projected[_within(common, one.owned)] = partial.projected[_within(common, one.touched)]
        total.squares[_within(common, one.owned)] = partial.squares[_within(common, one.touched)]
    return total


def _within(part: Range, whole: Range) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)
