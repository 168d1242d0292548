"""Which rank works with which."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gloo import run_cases

from longseq.distributed import ProcessGroups


def layout_case(degree: int, note: str) -> dict:
    groups = ProcessGroups.create(degree)
    neighbours = None if groups.sp is None else dist.get_process_group_ranks(groups.sp)
    in_shard_order = None if groups.sp is None else dist.get_group_rank(groups.sp, groups.rank)
    groups.main_first(lambda: write_late(Path(note)), note)
    return {
        "ranks": [groups.sp_rank, groups.dp_rank, groups.sp_size, groups.dp_size],
        "neighbours": neighbours,
        "in_shard_order": in_shard_order,
        "is_main": groups.is_main,
        "sum": groups.all_sum(torch.tensor(groups.rank + 1)).item(),
        "saw": Path(note).read_text(),
    }


def write_late(note: Path) -> None:
    time.sleep(0.5)
    note.write_text("done by main")


def slow_node_case(note: str) -> dict:
    """The last rank takes its time, and then one of them fails."""
    groups = ProcessGroups.create()
    work = (lambda: write_late(Path(note))) if groups.rank == 3 else (lambda: None)
    groups.each_in_its_time(work, "slow")
    saw = Path(note).is_file()
    with pytest.raises(ValueError, match=r"slow too: failed on rank 2|three is wrong") as refused:
        groups.each_in_its_time(
            (lambda: int("three is wrong")) if groups.rank == 2 else (lambda: 3), "slow too"
        )
    assert groups.each_in_its_time(lambda: groups.rank, "quick") == groups.rank
    return {"saw": saw, "said": str(refused.value)}


def refusal_case(degree: int) -> str:
    with pytest.raises(ValueError, match="ulysses_degree") as refused:
        ProcessGroups.create(degree)
    return str(refused.value)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    folder = tmp_path_factory.mktemp("notes")
    degrees = {
        f"degree {degree}": (layout_case, {"degree": degree, "note": str(folder / str(degree))})
        for degree in (1, 2, 4)
    }
    refused = {f"refused {degree}": (refusal_case, {"degree": degree}) for degree in (0, 3, 8)}
    slow = {"slow node": (slow_node_case, {"note": str(folder / "slow")})}
    return run_cases(4, {**degrees, **refused, **slow})


def test_ranks_of_a_sequence_are_neighbours(outcomes: dict[str, list]) -> None:
    ranks = outcomes["degree 2"]
    assert [rank["ranks"] for rank in ranks] == [[0, 0, 2, 2], [1, 0, 2, 2], [0, 1, 2, 2], [1, 1, 2, 2]]
    assert [rank["neighbours"] for rank in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank["in_shard_order"] for rank in ranks] == [0, 1, 0, 1]
    assert [rank["neighbours"] for rank in outcomes["degree 4"]] == [[0, 1, 2, 3]] * 4
    assert [rank["ranks"] for rank in outcomes["degree 1"]] == [[0, r, 1, 4] for r in range(4)]
    assert [rank["is_main"] for rank in ranks] == [True, False, False, False]


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_sums_are_over_all_ranks_and_all_wait_for_main(outcomes: dict[str, list], degree: int) -> None:
    for rank in outcomes[f"degree {degree}"]:
        assert rank["sum"] == 10
        assert rank["saw"] == "done by main"


def test_all_wait_for_the_slowest_and_hear_of_one_that_fails(outcomes: dict[str, list]) -> None:
    ranks = outcomes["slow node"]
    assert all(rank["saw"] for rank in ranks)
    assert ["failed on rank 2" in rank["said"] for rank in ranks] == [True, True, False, True]


@pytest.mark.parametrize("degree", [0, 3, 8])
def test_a_degree_that_does_not_divide_is_refused_on_every_rank(
    outcomes: dict[str, list], degree: int
) -> None:
    wanted = f"parallel.ulysses_degree={degree} does not divide 4 processes; use 1, 2, 4."
    assert outcomes[f"refused {degree}"] == [wanted] * 4


def test_one_process_needs_no_process_group() -> None:
    groups = ProcessGroups.create()
    assert groups == ProcessGroups()
    assert groups.all_sum(torch.tensor(3)).item() == 3
    assert groups.each_in_its_time(lambda: 3, "quick") == 3
    with pytest.raises(ValueError, match=r"ulysses_degree=2 does not divide 1 processes; use 1\."):
        ProcessGroups.create(2)
