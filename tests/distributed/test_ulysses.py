"""Attention of a sequence that ranks share: the numbers of one process, two exchanges a layer."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from gloo import run_cases
from torch import Tensor, nn
from torch.nn import functional as F
from training_samples import packed_rows, plain_attention, tiny_llama

from longseq.distributed import ProcessGroups, apply_ulysses, shard_batch
from longseq.distributed.attention import AttentionOptions, local_attention
from longseq.distributed.ulysses import UlyssesAttention

# Six processes are started, each of which imports PyTorch and most transformers.
pytestmark = pytest.mark.slow

LENGTH, HEAD_DIM = 36, 8
CASES = {
    "grouped heads": {"num_heads": 4, "num_kv_heads": 2},
    "wide groups": {"num_heads": 8, "num_kv_heads": 4, "rows": 2},
    "as many keys as queries": {"num_heads": 4, "num_kv_heads": 4, "rows": 3},
    "packed": {"num_heads": 8, "num_kv_heads": 4, "documents": [0, 13, 14, 30, 36]},
    "packed with a short end": {"num_heads": 4, "num_kv_heads": 4, "documents": [0, 35, 36]},
    "window": {"num_heads": 8, "num_kv_heads": 4, "rows": 2, "window": 11},
    "packed, window, softcap": {
        **{"num_heads": 4, "num_kv_heads": 4, "documents": [0, 20, 36]},
        **{"window": 7, "softcap": 1.5},
    },
}
FITTING = {
    (world_size, name): case
    for world_size in (2, 4)
    for name, case in CASES.items()
    if case["num_kv_heads"] % world_size == 0
}


@contextmanager
def counted_exchanges():
    """Elements of each all-to-all, in the order of the calls."""
    calls, original = [], dist.all_to_all_single

    def counting(received: Tensor, sent: Tensor, **kwargs):
        calls.append(sent.nbytes)
        return original(received, sent, **kwargs)

    dist.all_to_all_single = counting
    try:
        yield calls
    finally:
        dist.all_to_all_single = original


def attention_case(
    num_heads: int,
    num_kv_heads: int,
    rows: int = 1,
    documents: list[int] | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> dict:
    """Largest differences from one process, and what the ranks exchanged: by a call, and explicitly."""
    groups = ProcessGroups.create(dist.get_world_size())
    whole = [
        torch.randn(rows, heads, LENGTH, HEAD_DIM, dtype=torch.float64, requires_grad=True)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    ]
    grad_out = torch.randn(rows, num_heads, LENGTH, HEAD_DIM, dtype=torch.float64)
    offsets = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    rules = {"scale": HEAD_DIM**-0.5, "window": window, "softcap": softcap}
    if window is None and softcap is None:
        out = plain_attention(*whole, documents)
    else:
        out = local_attention(*whole, **rules, document_offsets=offsets)
    wanted = [out, *torch.autograd.grad(out, whole, grad_out)]

    shard = LENGTH // groups.sp_size
    mine = slice(groups.sp_rank * shard, (groups.sp_rank + 1) * shard)
    local = [tensor.detach()[:, :, mine].requires_grad_() for tensor in whole]
    attention = UlyssesAttention(groups)
    with counted_exchanges() as exchanges:
        out = attention(*local, **rules, document_offsets=offsets)
        got = [out, *torch.autograd.grad(out, local, grad_out[:, :, mine])]
    with counted_exchanges() as explicit_exchanges:
        out, lse = attention.forward(*local, AttentionOptions(**rules), offsets)
        grads = attention.backward(grad_out[:, :, mine], *local, out, lse, AttentionOptions(**rules), offsets)
    explicit = [out, *grads]
    wanted = [tensor[:, :, mine] for tensor in wanted]
    return {
        "differences": [float((a - b).abs().max()) for a, b in zip(got, wanted, strict=True)],
        "explicit differences": [float((a - b).abs().max()) for a, b in zip(explicit, wanted, strict=True)],
        "exchanges": exchanges,
        "explicit exchanges": explicit_exchanges,
        "traced": any(tensor.requires_grad for tensor in explicit),
        "lse": [lse.numel(), lse.dtype == torch.float64],
    }


def shard_step(model: nn.Module, groups: ProcessGroups) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed loss over all ranks and the summed gradients of a packed row."""
    shard = shard_batch(packed_rows(0)[0], groups)
    out = model(**{name: value for name, value in shard.items() if name != "shift_labels"}, use_cache=False)
    nll = F.cross_entropy(out.logits.flatten(0, 1), shard["shift_labels"].flatten(), reduction="sum")
    model.zero_grad()
    nll.backward()
    grads = {name: groups.all_sum(param.grad.clone()) for name, param in model.named_parameters()}
    return groups.all_sum(nll.detach()), grads


def checkpointed_case() -> dict:
    """A model whose layers are rebuilt in backward: the exchanges are repeated there."""
    truth = tiny_llama(torch.float64)
    apply_ulysses(truth)
    wanted = shard_step(truth, ProcessGroups())
    groups = ProcessGroups.create(2)
    model = tiny_llama(torch.float64)
    apply_ulysses(model, groups)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with counted_exchanges() as exchanges:
        got = shard_step(model, groups)
    differences = [float((got[1][name] - grad).abs().max()) for name, grad in wanted[1].items()]
    return {
        "differences": [float((got[0] - wanted[0]).abs()), *differences],
        "largest": float(max(grad.abs().max() for grad in wanted[1].values())),
        "exchanges": len(exchanges),
    }


def autocast_case() -> list[int]:
    """Bytes of a layer's exchanges under autocast; rotary embedding makes queries float32 there."""
    groups = ProcessGroups.create(2)
    model = tiny_llama(num_hidden_layers=1)
    apply_ulysses(model, groups)
    shard = shard_batch(packed_rows(0)[1], groups)
    with counted_exchanges() as exchanges, torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(**{name: value for name, value in shard.items() if name != "shift_labels"}, use_cache=False)
    return exchanges


def refused_case() -> list[str]:
    """What inputs and models that would give wrong numbers are told."""
    groups = ProcessGroups.create(2)
    model = tiny_llama()
    apply_ulysses(model, groups)
    shard = shard_batch(packed_rows(0)[0], groups)
    no_offsets = {name: value for name, value in shard.items() if name != "document_offsets"}
    no_positions = {name: value for name, value in shard.items() if name != "position_ids"}
    unshifted = {**no_offsets, "labels": shard["input_ids"]}
    del unshifted["shift_labels"]
    messages = []
    for batch in (unshifted, no_positions, no_offsets):
        with pytest.raises(ValueError, match="shard") as refused:
            model(**batch)
        messages.append(str(refused.value))
    with pytest.raises(ValueError, match="heads") as refused:
        apply_ulysses(tiny_llama(num_key_value_heads=1), groups)
    messages.append(str(refused.value))
    return messages


@pytest.fixture(scope="module")
def outcomes() -> dict[int, dict[str, list]]:
    two = {name: (attention_case, CASES[name]) for world_size, name in FITTING if world_size == 2}
    four = {name: (attention_case, CASES[name]) for world_size, name in FITTING if world_size == 4}
    two |= {fn.__name__: (fn, {}) for fn in (checkpointed_case, autocast_case, refused_case)}
    return {2: run_cases(2, two), 4: run_cases(4, four)}


@pytest.mark.parametrize(("world_size", "name"), FITTING)
def test_output_and_gradients_are_those_of_one_process(
    outcomes: dict[int, dict[str, list]], world_size: int, name: str
) -> None:
    for rank in outcomes[world_size][name]:
        assert max(rank["differences"]) < 1e-12, rank["differences"]
        assert max(rank["explicit differences"]) < 1e-12, rank["explicit differences"]
        assert not rank["traced"]


@pytest.mark.parametrize(("world_size", "name"), FITTING)
def test_a_layer_exchanges_twice_each_way_and_sends_no_more_than_it_must(
    outcomes: dict[int, dict[str, list]], world_size: int, name: str
) -> None:
    case = CASES[name]
    rows, num_heads, num_kv_heads = case.get("rows", 1), case["num_heads"], case["num_kv_heads"]
    one_head = rows * LENGTH // world_size * HEAD_DIM * 8
    inputs, output = (num_heads + 2 * num_kv_heads) * one_head, num_heads * one_head
    for rank in outcomes[world_size][name]:
        assert rank["exchanges"] == [inputs, output, output, inputs]
        # Nothing was kept between the two: inputs and output go to the heads' ranks again.
        assert rank["explicit exchanges"] == [inputs, output, inputs + 2 * output, inputs]
        assert rank["lse"] == [rows * num_heads // world_size * LENGTH, True]


def test_layers_that_are_rebuilt_in_backward_keep_their_numbers(
    outcomes: dict[int, dict[str, list]],
) -> None:
    for rank in outcomes[2]["checkpointed_case"]:
        assert rank["largest"] > 0.1
        # Rotary embedding is float32 inside, so that the bound is above float64's rounding.
        assert max(rank["differences"]) < 1e-10
        assert rank["exchanges"] == 2 * (2 + 2 + 2), "two layers: forward, forward again, backward"


def test_the_exchange_is_bf16_under_autocast(outcomes: dict[int, dict[str, list]]) -> None:
    tokens = len(packed_rows(0)[1]["input_ids"][0]) // 2
    assert outcomes[2]["autocast_case"] == [[(4 + 2 + 2) * 8 * tokens * 2, 4 * 8 * tokens * 2]] * 2


def test_wrong_inputs_and_models_are_refused_on_every_rank(outcomes: dict[int, dict[str, list]]) -> None:
    for rank in outcomes[2]["refused_case"]:
        unshifted, no_positions, no_offsets, few_kv_heads = rank
        assert "pass shift_labels=" in unshifted
        assert "position_ids= are needed" in no_positions
        assert "pass the document_offsets of the whole sequence" in no_offsets
        assert "ulysses_degree=2 must divide both 4 query heads and 1 key/value heads; use 1." in few_kv_heads
