"""The process groups of a run, made once and passed on: there is no global state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

LONGEST_WAIT = timedelta(days=2)

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroups:
    """Who works with whom. Ranks that share a sequence (`sp`) are neighbours; the rest is data (`dp`)."""

    rank: int = 0
    world_size: int = 1
    sp_size: int = 1
    sp: dist.ProcessGroup | None = None
    """The ranks that share this rank's sequence, in the order of their shards; None where it is alone."""

    @property
    def sp_rank(self) -> int:
        """Which shard of its sequence this rank holds."""
        return self.rank % self.sp_size

    @property
    def dp_rank(self) -> int:
        """Which sequences this rank takes part in."""
        return self.rank // self.sp_size

    @property
    def dp_size(self) -> int:
        """Sequences that are worked on at once."""
        return self.world_size // self.sp_size

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    @classmethod
    def create(cls, ulysses_degree: int = 1) -> ProcessGroups:
        """Groups over the processes that `torch.distributed` knows (one, where it was not started).

        Raises:
            ValueError: The degree does not divide the number of processes.
        """
        if not dist.is_initialized():
            rank, world_size = 0, 1
        else:
            rank, world_size = dist.get_rank(), dist.get_world_size()
        if ulysses_degree < 1 or world_size % ulysses_degree:
            divisors = ", ".join(str(d) for d in range(1, world_size + 1) if world_size % d == 0)
            raise ValueError(
                f"parallel.ulysses_degree={ulysses_degree} does not divide {world_size} processes; use "
                f"{divisors}."
            )
        mine = None
        if ulysses_degree > 1:
            # Every rank makes every group, in the same order, as new_group asks.
            for first in range(0, world_size, ulysses_degree):
                ranks = list(range(first, first + ulysses_degree))
                group = dist.new_group(ranks)
                mine = group if rank in ranks else mine
        return cls(rank, world_size, ulysses_degree, mine)

    def all_sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place: one collective, none where the run is one process."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gathered(self, mine: Any) -> list[Any]:
        """What every rank says, in their order: one collective, none where the run is one process."""
        return gathered(mine) if self.world_size > 1 else [mine]

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()

    def main_first(self, work: Callable[[], None], name: str) -> None:
        """Let the main rank do something that may take hours while the others wait.

        They wait at the store, not in a collective, which gives up after minutes.

        Args:
            work: Called on the main rank.
            name: Of the work; each name is waited for once in a run.
        """
        if self.is_main:
            work()
        if self.world_size > 1:
            store = dist.distributed_c10d._get_default_store()
            if self.is_main:
                store.set(f"longseq/{name}", "done")
            else:
                store.wait([f"longseq/{name}"], LONGEST_WAIT)

    def each_in_its_time(self, work: Callable[[], T], name: str) -> T:
        """Do something on every rank that may take hours on one of them, and wait for all, at the store.

        Args:
            work: Called on every rank.
            name: Of the work; each name is waited for once in a run.

        Returns:
            What `work` returned here.

        Raises:
            ValueError: It failed on another rank.
        """
        if self.world_size == 1:
            return work()
        store, key = dist.distributed_c10d._get_default_store(), f"longseq/{name}"
        try:
            result = work()
        except Exception:
            store.set(key, f"failed on rank {self.rank}")
            raise
        if store.add(f"{key}/done", 1) == self.world_size:
            store.set(key, "done")
        store.wait([key], LONGEST_WAIT)
        verdict = store.get(key).decode()
        if verdict != "done":
            raise ValueError(f"{name}: {verdict}; look at what that says.")
        return result


def gathered(mine: Any) -> list[Any]:
    """What every process says, in their order, also before there are `ProcessGroups`; one collective.

    There is none without a process group, or in one of one.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    everyone = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone
