"""Streamed layers of a sequence that ranks share: the loss and gradients of plain PyTorch on one."""

from __future__ import annotations

import itertools
from itertools import pairwise
from typing import Any

import pytest
import torch
from gloo import run_cases
from torch import Tensor, nn
from torch.nn import functional as F
from training_samples import VOCAB, packed_rows, tiny_llama

from longseq.distributed import ProcessGroups, apply_ulysses, shard_batch
from longseq.mst import apply_mini_sequence
from longseq.mst.layer_places import least_of_ranks, lockstep_group
from longseq.mst.placement import Placement

# Two processes are started, and train models by several engines.
pytestmark = pytest.mark.slow

CASES: dict[str, dict[str, Any]] = {
    "one group": {"head_groups": 1},
    "two groups": {"head_groups": 2},
    "a group a key/value head, which ranks divide": {"head_groups": 4},
    "groups chosen": {},
    "two groups, saved": {"head_groups": 2, "save_attention": True},
    "the last layer's saved": {"head_groups": 2, "save_attention": 1},
    "layers rebuilt": {"head_groups": 2, "checkpoints": Placement(every=2, host=False)},
    "one tile": {"tile_tokens": None, "save_attention": True},
    "MLPs alone": {"checkpoints": "none"},
    "everything saved": {"head_groups": 1, "save_attention": "all"},
    "everything saved, two groups": {"head_groups": 2, "save_attention": "all"},
    "norms of heads": {"head_groups": 2, "model": "qwen3"},
    "norms of heads, a group a head": {"head_groups": 4, "model": "qwen3"},
    "norms of heads, everything saved": {"head_groups": 2, "save_attention": "all", "model": "qwen3"},
}
BATCHES = ("packed", "rows")


def make_model(family: str = "llama") -> nn.Module:
    heads = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4}
    if family == "llama":
        return tiny_llama(torch.float64, **heads)
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 80, "vocab_size": VOCAB, "head_dim": 8}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, max_position_embeddings=256))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "Qwen3RMSNorm":  # float32 inside
                norm = nn.RMSNorm(child.weight.shape[0], child.variance_epsilon)
                setattr(parent, name, norm)
                nn.init.uniform_(norm.weight, 0.5, 1.5)
    return model.to(torch.float64).train()


def make_batch(kind: str) -> dict[str, Tensor]:
    """One row of three documents, or two rows; neither length can be shared without padding."""
    if kind == "packed":
        return packed_rows(0)[0]
    ids = torch.randint(0, VOCAB, (2, 37), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[0, :30] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.grad.clone() for name, param in model.named_parameters()}


def shared_case(kind: str, options: dict[str, Any], apply_first: bool = False) -> dict:
    """Loss and gradients, summed over the ranks of the sequence, of the second of two passes."""
    groups = ProcessGroups.create(2)
    options = dict(options)
    model = make_model(options.pop("model", "llama"))
    changes = [
        lambda: apply_ulysses(model, groups),
        lambda: apply_mini_sequence(model, **{"tile_tokens": 10, **options}),
    ]
    for change in reversed(changes) if apply_first else changes:
        change()
    shard = shard_batch(make_batch(kind), groups)
    for _ in range(2):
        model.zero_grad()
        loss = model(**shard, num_items_in_batch=7).loss
        loss.backward()
    return {
        "loss": groups.all_sum(loss.detach()),
        "grads": {name: groups.all_sum(grad) for name, grad in gradients(model).items()},
    }


def refused_case() -> list[str]:
    """Groups whose key/value heads the ranks cannot share."""
    model = make_model()
    apply_ulysses(model, ProcessGroups.create(2))
    with pytest.raises(ValueError, match="head_groups") as refused:
        apply_mini_sequence(model, head_groups=3)
    return [
        str(refused.value),
        *(name for name, module in model.named_modules() if "forward" in vars(module)),
    ]


def least_case() -> dict[str, Any]:
    """What ranks of one sequence agree on before they choose where things are kept."""
    groups, model = ProcessGroups.create(2), make_model()
    alone = lockstep_group(model)
    apply_ulysses(model, groups)
    group, rank = lockstep_group(model), groups.rank
    return {
        "alone": alone is None,
        "shared": group is groups.sp,
        "least": least_of_ranks([10 + rank, 7 - rank, -5 * rank], group, torch.device("cpu")),
    }


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list]:
    cases: dict[str, Any] = {
        f"{kind}, {name}": (shared_case, {"kind": kind, "options": options})
        for name, options in CASES.items()
        for kind in BATCHES
    }
    first = {"kind": "packed", "options": {"head_groups": 2}, "apply_first": True}
    cases["packed, applied first"] = (shared_case, first)
    cases["refused"] = (refused_case, {})
    cases["least"] = (least_case, {})
    return run_cases(2, cases)


@pytest.fixture(scope="module")
def truths() -> dict[tuple[str, str], tuple[Tensor, dict[str, Tensor]]]:
    """Every document goes through the plain model alone."""
    found = {}
    for family, kind in itertools.product(("llama", "qwen3"), BATCHES):
        model, batch = make_model(family), make_batch(kind)
        offsets = batch.get("document_offsets", torch.tensor([0, 37])).tolist()
        loss = torch.zeros((), dtype=torch.float64)
        for start, stop in pairwise(offsets):
            logits = model(input_ids=batch["input_ids"][:, start:stop], use_cache=False).logits[:, :-1]
            labels = batch["labels"][:, start + 1 : stop]
            loss = loss + F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / 7
        loss.backward()
        found[family, kind] = loss.detach(), gradients(model)
    return found


@pytest.mark.parametrize(
    "name", [*(f"{kind}, {name}" for name in CASES for kind in BATCHES), "packed, applied first"]
)
def test_ranks_get_the_gradients_of_one(
    outcomes: dict[str, list], truths: dict[tuple[str, str], tuple], name: str
) -> None:
    kind, _, case = name.partition(", ")
    loss, grads = truths[CASES.get(case, {}).get("model", "llama"), kind]
    for rank in outcomes[name]:
        torch.testing.assert_close(rank["loss"], loss, rtol=1e-11, atol=0)
        assert rank["grads"].keys() == grads.keys()
        for key, grad in rank["grads"].items():
            assert grads[key].any()
            torch.testing.assert_close(grad, grads[key], rtol=1e-9, atol=1e-12, msg=key)


def test_groups_that_ranks_cannot_share_are_refused_on_every_rank(outcomes: dict[str, list]) -> None:
    for message, *patched in outcomes["refused"]:
        assert "head_groups=3 does not divide 4 key/value heads" in message
        assert "use 1, 2, 4 or 'auto'" in message
        assert patched == []


def test_ranks_of_a_sequence_agree_on_the_memory_there_is(outcomes: dict[str, list]) -> None:
    for rank in outcomes["least"]:
        assert rank == {"alone": True, "shared": True, "least": [10, 6, -5]}
