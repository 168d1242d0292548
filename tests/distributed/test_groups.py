"""Which rank works with which."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from gloo import run_cases

from longseq.distributed import ProcessGroups


def layout_case(degree: int) -> dict:
    groups = ProcessGroups.create(degree)
    neighbours = None if groups.sp is None else dist.get_process_group_ranks(groups.sp)
    in_shard_order = None if groups.sp is None else dist.get_group_rank(groups.sp, groups.rank)
    return {
        "ranks": [groups.sp_rank, groups.dp_rank, groups.sp_size, groups.dp_size],
        "neighbours": neighbours,
        "in_shard_order": in_shard_order,
        "is_main": groups.is_main,
        "sum": groups.all_sum(torch.tensor(groups.rank + 1)).item(),
        "one_says_yes": groups.agree(groups.rank == 2, torch.device("cpu")),
        "none_says_yes": groups.agree(False, torch.device("cpu")),
    }


def refusal_case(degree: int) -> str:
    with pytest.raises(ValueError, match="ulysses_degree") as refused:
        ProcessGroups.create(degree)
    return str(refused.value)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list]:
    degrees = {f"degree {degree}": (layout_case, {"degree": degree}) for degree in (1, 2, 4)}
    refused = {f"refused {degree}": (refusal_case, {"degree": degree}) for degree in (0, 3, 8)}
    return run_cases(4, {**degrees, **refused})


def test_ranks_of_a_sequence_are_neighbours(outcomes: dict[str, list]) -> None:
    ranks = outcomes["degree 2"]
    assert [rank["ranks"] for rank in ranks] == [[0, 0, 2, 2], [1, 0, 2, 2], [0, 1, 2, 2], [1, 1, 2, 2]]
    assert [rank["neighbours"] for rank in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank["in_shard_order"] for rank in ranks] == [0, 1, 0, 1]
    assert [rank["neighbours"] for rank in outcomes["degree 4"]] == [[0, 1, 2, 3]] * 4
    assert [rank["ranks"] for rank in outcomes["degree 1"]] == [[0, r, 1, 4] for r in range(4)]
    assert [rank["is_main"] for rank in ranks] == [True, False, False, False]


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_sums_and_votes_are_over_all_ranks(outcomes: dict[str, list], degree: int) -> None:
    for rank in outcomes[f"degree {degree}"]:
        assert rank["sum"] == 10
        assert rank["one_says_yes"] is True
        assert rank["none_says_yes"] is False


@pytest.mark.parametrize("degree", [0, 3, 8])
def test_a_degree_that_does_not_divide_is_refused_on_every_rank(
    outcomes: dict[str, list], degree: int
) -> None:
    wanted = f"parallel.ulysses_degree={degree} does not divide 4 processes; use 1, 2, 4."
    assert outcomes[f"refused {degree}"] == [wanted] * 4


def test_one_process_needs_no_process_group() -> None:
    groups = ProcessGroups.create()
    assert groups == ProcessGroups()
    assert groups.agree(True, torch.device("cpu")) is True
    assert groups.all_sum(torch.tensor(3)).item() == 3
    with pytest.raises(ValueError, match=r"ulysses_degree=2 does not divide 1 processes; use 1\."):
        ProcessGroups.create(2)
