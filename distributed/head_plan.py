"""Which heads each rank of a sequence attends with: whole groups of query heads, as even as they go.

A group is one key/value head with the query heads that read it. With at least as many groups as ranks, each
rank has whole groups. With fewer, the ranks of a group divide its query heads, and only then is a key/value
head sent to more than one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Shares:
    """Heads in consecutive parts, and whose each part is.

    Attributes:
        counts: Heads of each part.
        of_rank: The part that each rank has; ranks may share one.
    """

    counts: tuple[int, ...]
    of_rank: tuple[int, ...]

    def num_heads(self, rank: int) -> int:
        """Heads of a rank."""
        return self.counts[self.of_rank[rank]]

    def heads(self, rank: int) -> slice:
        """Which heads of the model those are."""
        part = self.of_rank[rank]
        stop = list(accumulate(self.counts))[part]
        return slice(stop - self.counts[part], stop)


@dataclass(frozen=True)
class HeadPlan:
    """The heads of every rank: see `plan_heads`."""

    queries: Shares
    keys: Shares

    @property
    def num_ranks(self) -> int:
        """Ranks that share the heads."""
        return len(self.queries.of_rank)

    @property
    def is_even(self) -> bool:
        """Whether all ranks have as many heads, none of them sent twice."""
        return len(set(self.queries.counts)) == 1 and not self.shares_keys

    @property
    def shares_keys(self) -> bool:
        """Whether a key/value head is sent to more than one rank.

        Groups of heads are made that fine where memory is short: then ulysses.py exchanges one group after
        the other, with nothing of another beside it, and the plan counts it so.
        """
        return len(self.keys.counts) < self.num_ranks

    @property
    def imbalance(self) -> float:
        """Query heads of the busiest rank over the mean: what attention takes longer than evenly shared."""
        counts = self.queries.counts
        return max(counts) * len(counts) / sum(counts)


def plan_heads(num_heads: int, num_kv_heads: int, num_ranks: int) -> HeadPlan:
    """Share heads among ranks.

    Args:
        num_heads: Query heads N.
        num_kv_heads: Key/value heads K; K divides N.
        num_ranks: P, at most N.

    Raises:
        ValueError: More ranks than query heads, or K does not divide N.
    """
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_kv_heads} key/value heads do not divide {num_heads} query heads.")
    if num_ranks > num_heads:
        raise ValueError(
            f"parallel.ulysses_degree={num_ranks} is above the {num_heads} query heads that attention can be "
            f"shared by; use {num_heads} or less."
        )
    group = num_heads // num_kv_heads
    if num_ranks <= num_kv_heads:
        groups = even_parts(num_kv_heads, num_ranks)
        mine = tuple(range(num_ranks))
        return HeadPlan(Shares(tuple(count * group for count in groups), mine), Shares(groups, mine))
    ranks_of_group = even_parts(num_ranks, num_kv_heads)
    queries = tuple(count for ranks in ranks_of_group for count in even_parts(group, ranks))
    key_of_rank = tuple(head for head, ranks in enumerate(ranks_of_group) for _ in range(ranks))
    return HeadPlan(Shares(queries, tuple(range(num_ranks))), Shares((1,) * num_kv_heads, key_of_rank))


def even_parts(total: int, num_parts: int) -> tuple[int, ...]:
    """A total in parts that differ by one at the most, the larger ones first."""
    small, larger = divmod(total, num_parts)
    return (small + 1,) * larger + (small,) * (num_parts - larger)
