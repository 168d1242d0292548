"""A head split by vocabulary over processes is the head of one process: loss and every gradient."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo import run_cases
from head_problems import Problem, make, ours, plain, results
from numerics import assert_as_accurate_as

from longseq.cce import vocab_parallel
from longseq.cce.vocab_parallel import VocabShard

SPLITS = {2: [[130, 1], [40, 91]], 3: [[64, 1, 66], [1, 65, 65]]}
OF_HEAD = ("weight", "bias", "lora_b")
EVERYTHING = {
    "bias": True,
    "softcap": 3.0,
    "logit_scale": 1.7,
    "label_smoothing": 0.1,
    "z_loss": 0.02,
    "token_weights": True,
}
PROBLEMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum", "bias": True, "upstream": -3.0},
    "smoothing": {"label_smoothing": 0.3},
    "everything": EVERYTHING,
    "everything per token": EVERYTHING | {"reduction": "none", "return_lse": True, "rank": 3},
    "shifted": {"shift": True, "shape": (3, 25), "ignore_index": 7, "return_lse": True},
    "lora": {"rank": 3, "bias": True, "softcap": 3.0, "frozen": ("weight", "bias")},
    "lora whole": {"rank": 8, "label_smoothing": 0.1},
    "A frozen": {"rank": 2, "frozen": ("lora_a",)},
    "B frozen": {"rank": 2, "frozen": ("lora_b", "weight")},
    "hidden frozen": {"bias": True, "frozen": ("hidden",)},
    "head frozen": {"bias": True, "softcap": 3.0, "frozen": ("weight", "bias")},
    "all ignored": EVERYTHING | {"ignored": "all", "rank": 2},
    "no tokens": {"num_tokens": 0, "ignored": "none", "bias": True},
    "little memory": {"num_tokens": 700, "memory_mib": 1, "label_smoothing": 0.1},
    "bfloat16": {"dtype": torch.bfloat16, "bias": True, "rank": 4, "softcap": 3.0, "label_smoothing": 0.1},
    "float32": {"dtype": torch.float32, "bias": True, "reduction": "none"},
}


def whole_problem(sizes: list[int], options: dict[str, Any]) -> Problem:
    """The problem of one process, with a label at each border of the shards."""
    problem = make(**{"vocab_size": sum(sizes), **options})
    if options.get("ignored") is None and "shift" not in options:
        ends = list(accumulate(sizes))
        borders = sorted({0, *(end - 1 for end in ends), *ends[:-1]})
        problem.labels[1 : 1 + len(borders)] = torch.tensor(borders)
    return problem


def prepared(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The problem's options, and what goes to `Problem.to` and to the library alone."""
    options = dict(options)
    keys = {"dtype": torch.float64, "frozen": (), "memory_mib": None}
    return options, {key: options.pop(key, default) for key, default in keys.items()}


def rows_of(sizes: list[int], rank: int) -> slice:
    first = sum(sizes[:rank])
    return slice(first, first + sizes[rank])


def shard(problem: Problem, sizes: list[int]) -> Problem:
    rows = rows_of(sizes, dist.get_rank())
    parts = {name: part[rows] if name in OF_HEAD else part for name, part in problem.parts.items()}
    return Problem(parts, problem.labels, problem.upstream, problem.options)


def split_case(sizes: list[int], options: dict[str, Any]) -> dict[str, torch.Tensor]:
    options, apart = prepared(options)
    mine = shard(whole_problem(sizes, options), sizes).to(apart["dtype"], apart["frozen"])
    return results(mine, ours(mine, group=dist.group.WORLD, memory_mib=apart["memory_mib"]))


def count_case(sizes: list[int], options: dict[str, Any]) -> dict[str, int]:
    """Collectives of a weight's first forward, of its later ones, and of a backward."""
    options, apart = prepared(options)
    low = apart["dtype"] == torch.bfloat16  # by autocast, which makes a new weight for each call
    mine = shard(whole_problem(sizes, options), sizes).to(
        torch.float32 if low else torch.float64, apart["frozen"]
    )
    group, calls, real = dist.new_group(), [], dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs.get("group") is group)
        return real(*args, **kwargs)

    dist.all_reduce = counted
    counts = {}
    try:
        for name in ("first forward", "forward"):
            calls.clear()
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                answer = ours(mine, group=group)
            counts[name] = len(calls)
            assert all(calls)
        calls.clear()
        results(mine, answer)
        counts["backward"] = len(calls)
    finally:
        dist.all_reduce = real
    return counts


def shard_case(sizes: list[int]) -> dict[str, Any]:
    """Two heads on one group, each split in its own way, by the group and by their shards."""
    group, rank = dist.new_group(), dist.get_rank()
    turned = sizes[1:] + sizes[:1]
    first, other = (shard(whole_problem(s, {}), s).to(torch.float64) for s in (sizes, turned))
    own = VocabShard.of(sizes[rank], group, torch.device("cpu"))
    by_hand = VocabShard(group, sum(turned[:rank]), turned[rank], sum(turned))
    with pytest.raises(ValueError, match="rows") as refused:
        ours(other, group=own)
    pairs = [(first, group), (other, group), (first, own), (other, by_hand), (first, group)]
    return {
        "shard": list(own[1:]),
        "losses": [ours(problem, group=way)[0].detach() for problem, way in pairs],
        "refused": str(refused.value),
    }


def known_case(sizes: list[int]) -> list[int]:
    """Weights that are known: before, with one, again with it, and when it is gone."""
    group, other = dist.new_group(), dist.new_group()
    weight = torch.zeros(sizes[dist.get_rank()], 2)
    known = [len(vocab_parallel._known)]
    for asked in (group, group, other):
        assert vocab_parallel.shard_of(weight, asked).group is asked
        known.append(len(vocab_parallel._known))
    del weight
    return [*known, len(vocab_parallel._known)]


def no_words_case(sizes: list[int]) -> str:
    weight = torch.zeros(sizes[dist.get_rank()], 2)
    with pytest.raises(ValueError, match="word") as refused:
        vocab_parallel.shard_of(weight, dist.new_group())
    return str(refused.value)


def refusal_case(sizes: list[int], label: int, options: dict[str, Any]) -> str:
    problem = whole_problem(sizes, {"ignored": "none"})
    problem.labels[9] = label
    mine = shard(problem, sizes).to(torch.float64)
    with pytest.raises(ValueError, match="=") as refused:
        ours(mine, group=dist.group.WORLD, **options)
    return str(refused.value)


def cases_of(world_size: int) -> dict[str, Any]:
    cases: dict[str, Any] = {}
    for sizes in SPLITS[world_size]:
        for name, options in PROBLEMS.items():
            cases[f"{name} {sizes}"] = (split_case, {"sizes": sizes, "options": options})
    sizes = SPLITS[world_size][0]
    for name in ("plain", "everything per token", "hidden frozen", "lora", "B frozen", "bfloat16"):
        cases[f"count {name}"] = (count_case, {"sizes": sizes, "options": PROBLEMS[name]})
    cases["shard"] = (shard_case, {"sizes": sizes})
    cases["known"] = (known_case, {"sizes": sizes})
    cases["no words"] = (no_words_case, {"sizes": [*sizes[:-1], 0]})
    for label in (-1, 131, 200):
        cases[f"label {label}"] = (refusal_case, {"sizes": sizes, "label": label, "options": {}})
    for method in ("exact", "filtered", "reference"):
        options = {"method": method}
        cases[f"method {method}"] = (refusal_case, {"sizes": sizes, "label": 3, "options": options})
    return cases


@pytest.fixture(scope="module")
def outcomes() -> dict[int, dict[str, list]]:
    return {world_size: run_cases(world_size, cases_of(world_size)) for world_size in SPLITS}


SPLIT_PROBLEMS = [
    (world_size, sizes, name)
    for world_size, splits in SPLITS.items()
    for sizes in splits
    for name in PROBLEMS
]


@pytest.mark.parametrize(("world_size", "sizes", "name"), SPLIT_PROBLEMS)
def test_the_split_head_is_the_whole_one(
    outcomes: dict[int, dict[str, list]], world_size: int, sizes: list[int], name: str
) -> None:
    options, apart = prepared(PROBLEMS[name])
    true, low = (
        whole_problem(sizes, options).to(d, apart["frozen"]) for d in (torch.float64, apart["dtype"])
    )
    truth, theirs = results(true, plain(true)), results(low, plain(low))
    ranks = outcomes[world_size][f"{name} {sizes}"]
    assert all(found.keys() == truth.keys() for found in ranks)
    for key, true_value in truth.items():
        parts = [found[key] for found in ranks]
        if key in OF_HEAD:
            assert [len(part) for part in parts] == sizes
            value = torch.cat(parts)
        else:
            # What all processes hold is the same to the bit, or their copies would drift apart.
            assert all(torch.equal(part, parts[0]) for part in parts)
            value = parts[0]
        assert_as_accurate_as(value, theirs[key], true_value, slack=2.0, name=key)


@pytest.mark.parametrize("world_size", SPLITS)
def test_ignored_tokens_have_a_log_sum_exp_of_zero(
    outcomes: dict[int, dict[str, list]], world_size: int
) -> None:
    sizes = SPLITS[world_size][0]
    ignored = whole_problem(sizes, PROBLEMS["everything per token"]).labels == -100
    assert ignored.any()
    for found in outcomes[world_size][f"everything per token {sizes}"]:
        assert not found["lse"][ignored].any()


@pytest.mark.parametrize("world_size", SPLITS)
@pytest.mark.parametrize(
    ("name", "backward"),
    [
        ("plain", 1),
        ("everything per token", 2),
        ("hidden frozen", 0),
        ("lora", 2),
        ("B frozen", 2),
        ("bfloat16", 2),
    ],
)
def test_two_collectives_forward_and_one_for_what_reaches_hidden(
    outcomes: dict[int, dict[str, list]], world_size: int, name: str, backward: int
) -> None:
    """A low-rank adapter's activations reach the hidden states too: one more."""
    wanted = {"first forward": 3, "forward": 2, "backward": backward}
    assert outcomes[world_size][f"count {name}"] == [wanted] * world_size


@pytest.mark.parametrize("world_size", SPLITS)
def test_each_head_on_a_group_has_a_shard_of_its_own(
    outcomes: dict[int, dict[str, list]], world_size: int
) -> None:
    sizes = SPLITS[world_size][0]
    turned = sizes[1:] + sizes[:1]
    first, other = (
        plain(whole_problem(split, {}).to(torch.float64))[0].detach() for split in (sizes, turned)
    )
    for rank, found in enumerate(outcomes[world_size]["shard"]):
        assert found["shard"] == [sum(sizes[:rank]), sizes[rank], 131]
        for loss, truth in zip(found["losses"], (first, other, first, other, first), strict=True):
            torch.testing.assert_close(loss, truth, rtol=1e-12, atol=0)
        told = (
            f"weight has {turned[rank]} rows where the VocabShard has {sizes[rank]} of the group's 131 words"
        )
        assert found["refused"].startswith(told)
        assert "VocabShard.of(...)" in found["refused"]


@pytest.mark.parametrize("label", [-1, 131, 200])
@pytest.mark.parametrize("world_size", SPLITS)
def test_a_label_outside_the_whole_vocabulary_raises_everywhere(
    outcomes: dict[int, dict[str, list]], world_size: int, label: int
) -> None:
    for told in outcomes[world_size][f"label {label}"]:
        assert told.startswith(
            f"labels[9]={label} (flattened; 1 such) is outside the vocabulary of 131 words"
        )


@pytest.mark.parametrize("method", ["exact", "filtered", "reference"])
def test_methods_of_one_process_are_refused(outcomes: dict[int, dict[str, list]], method: str) -> None:
    for told in outcomes[2][f"method {method}"]:
        assert "group= needs method='recompute' or 'auto'" in told


@pytest.mark.parametrize("group", ["tp", 3, object()])
def test_what_is_no_group_is_named(group: object) -> None:
    with pytest.raises(
        ValueError, match=r"group=.* must be a torch.distributed.ProcessGroup or a VocabShard"
    ):
        ours(make(), group=group)


@pytest.mark.parametrize("world_size", SPLITS)
def test_a_process_without_words_raises_everywhere(
    outcomes: dict[int, dict[str, list]], world_size: int
) -> None:
    sizes = [*SPLITS[world_size][0][:-1], 0]
    for told in outcomes[world_size]["no words"]:
        assert told == f"each process of the group must hold a word at least; they hold {sizes}."


@pytest.mark.parametrize("world_size", SPLITS)
def test_a_shard_is_known_as_long_as_its_weight(
    outcomes: dict[int, dict[str, list]], world_size: int
) -> None:
    for before, first, again, other_group, after in outcomes[world_size]["known"]:
        assert first == again == other_group == before + 1
        assert after == before
