"""Which heads each rank attends with: every one once, in whole groups, as even as they go."""

from __future__ import annotations

import pytest

from longseq.distributed.head_plan import even_parts, plan_heads

SHAPES = [(heads, kv) for heads in range(1, 41) for kv in range(1, heads + 1) if heads % kv == 0]


@pytest.mark.parametrize("num_ranks", range(1, 17))
def test_every_query_head_has_one_rank_and_its_own_key_there(num_ranks: int) -> None:
    for heads, kv_heads in SHAPES:
        if num_ranks > heads:
            continue
        plan = plan_heads(heads, kv_heads, num_ranks)
        seen = []
        for rank in range(num_ranks):
            queries, keys = plan.queries.heads(rank), plan.keys.heads(rank)
            count, kv_count = plan.queries.num_heads(rank), plan.keys.num_heads(rank)
            assert (queries.stop - queries.start, keys.stop - keys.start) == (count, kv_count)
            assert count % kv_count == 0, "a kernel takes groups of one size"
            seen += range(queries.start, queries.stop)
            for place, head in enumerate(range(queries.start, queries.stop)):
                wanted = head * kv_heads // heads
                assert keys.start + place // (count // kv_count) == wanted
        assert seen == list(range(heads))


@pytest.mark.parametrize(
    ("shape", "queries", "keys"),
    [
        ((32, 8, 4), (8, 8, 8, 8), (2, 2, 2, 2)),  # Llama-3-8B
        ((28, 4, 8), (4, 3, 4, 3, 4, 3, 4, 3), (1,) * 8),  # Qwen2-7B: two ranks a key/value head
        ((14, 2, 4), (4, 3, 4, 3), (1,) * 4),
        ((8, 1, 3), (3, 3, 2), (1, 1, 1)),
        ((6, 3, 2), (4, 2), (2, 1)),
        ((6, 3, 4), (1, 1, 2, 2), (1, 1, 1, 1)),
        ((7, 7, 4), (2, 2, 2, 1), (2, 2, 2, 1)),
    ],
)
def test_heads_are_as_even_as_whole_groups_allow(
    shape: tuple[int, int, int], queries: tuple[int, ...], keys: tuple[int, ...]
) -> None:
    plan = plan_heads(*shape)
    assert tuple(plan.queries.num_heads(rank) for rank in range(shape[2])) == queries
    assert tuple(plan.keys.num_heads(rank) for rank in range(shape[2])) == keys
    assert plan.imbalance == pytest.approx(max(queries) * shape[2] / shape[0])
    assert plan.is_even == (len(set(queries)) == 1 and sum(keys) == shape[1])
    assert plan.shares_keys == (sum(keys) > shape[1])


def test_more_ranks_than_query_heads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ulysses_degree=9 is above the 8 query heads.*use 8 or less"):
        plan_heads(8, 4, 9)


def test_parts_differ_by_one_at_the_most() -> None:
    assert even_parts(7, 3) == (3, 2, 2)
    assert even_parts(2, 4) == (1, 1, 0, 0)
