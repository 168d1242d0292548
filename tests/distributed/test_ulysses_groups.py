"""Groups of heads that ranks share: the numbers of one group, and what is alive as each is begun."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gloo import run_cases
from memory_samples import LiveBytes, exchanges_of_copies
from torch import Tensor

from longseq.distributed import ProcessGroups
from longseq.distributed.attention import AttentionOptions
from longseq.distributed.head_plan import plan_heads
from longseq.distributed.ulysses import UlyssesAttention

# Four processes are started.
pytestmark = pytest.mark.slow

RANKS, LENGTH, WIDTH = 4, 24, 8
CASES = {
    "a key/value head to all": {"num_heads": 32, "num_kv_heads": 8, "num_groups": 8},
    "one to all, uneven query heads": {"num_heads": 40, "num_kv_heads": 8, "num_groups": 8},
    "one to two": {"num_heads": 32, "num_kv_heads": 8, "num_groups": 4},
    "some to two": {"num_heads": 24, "num_kv_heads": 6, "num_groups": 2},
    "even": {"num_heads": 24, "num_kv_heads": 12, "num_groups": 3},
    "uneven, each to one": {"num_heads": 30, "num_kv_heads": 15, "num_groups": 3},
}


def groups_case(num_heads: int, num_kv_heads: int, num_groups: int) -> dict[str, Any]:
    """Differences from one group of all heads, and bytes alive beside results as each group is asked for."""
    groups = ProcessGroups.create(RANKS)
    attention, options = UlyssesAttention(groups), AttentionOptions(scale=WIDTH**-0.5)
    shard = LENGTH // RANKS
    mine = slice(groups.sp_rank * shard, (groups.sp_rank + 1) * shard)
    query, key, value, grad_out = (
        torch.randn(2, heads, LENGTH, WIDTH, dtype=torch.float64)[:, :, mine]
        for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    )
    local = query, key, value
    [(out, lse)] = attention.forward_groups([local], options)
    [wanted] = attention.backward_groups([(grad_out, *local, out, lse)], options)
    found = [torch.empty_like(tensor) for tensor in (out, *wanted)]
    log_sums: list[Tensor] = []
    alive: dict[str, list[int]] = {"forward": [], "backward": []}

    def cut(tensor: Tensor, index: int) -> Tensor:
        return tensor.chunk(num_groups, dim=1)[index]

    def made(name: str, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        for index in range(num_groups):
            results = sum(log_sum.untyped_storage().nbytes() for log_sum in log_sums)
            alive[name].append(live.now - results)
            own = log_sums[index : index + 1] if name == "backward" else []
            yield (*(cut(tensor, index).clone() for tensor in tensors), *own)

    with LiveBytes([*local, grad_out, out, *found]) as live, exchanges_of_copies():
        given = attention.forward_groups(made("forward", *local), options)
        for index in range(num_groups):
            part, log_sum = next(given)
            cut(found[0], index).copy_(part)
            log_sums.append(log_sum)
            del part, log_sum
        assert not list(given)
        grads = attention.backward_groups(made("backward", grad_out, *local, out), options)
        for index in range(num_groups):
            for whole, part in zip(found[1:], next(grads), strict=True):
                cut(whole, index).copy_(part)
            del part
        assert not list(grads)
    differences = [float((a - b).abs().max()) for a, b in zip(found, (out, *wanted), strict=True)]
    return {"differences": differences, **alive}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list]:
    return run_cases(RANKS, {name: (groups_case, case) for name, case in CASES.items()})


@pytest.mark.parametrize("name", CASES)
def test_groups_give_the_numbers_of_all_heads_at_once(outcomes: dict[str, list], name: str) -> None:
    for rank in outcomes[name]:
        assert max(rank["differences"]) < 1e-10, rank["differences"]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", CASES)
def test_groups_that_share_key_value_heads_are_alone(
    outcomes: dict[str, list], name: str, direction: str
) -> None:
    case = CASES[name]
    num_groups = case["num_groups"]
    plan = plan_heads(case["num_heads"] // num_groups, case["num_kv_heads"] // num_groups, RANKS)
    for rank in outcomes[name]:
        alive = rank[direction]
        assert len(alive) == num_groups
        assert alive[0] == 0
        if plan.shares_keys:
            assert alive == [0] * num_groups
        else:  # the group before is on its way
            assert min(alive[1:]) > 0
