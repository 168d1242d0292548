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

from longseq.distributed import ProcessGroups, apply_ulysses, shard_batch, unshard
from longseq.distributed.attention import AttentionOptions, local_attention
from longseq.distributed.head_plan import plan_heads
from longseq.distributed.ulysses import UlyssesAttention

# Nine processes are started, for many cases each.
pytestmark = pytest.mark.slow

LENGTH, HEAD_DIM = 36, 8
RULES = {
    "rows": {"rows": 2},
    "packed": {"documents": [0, 13, 14, 30, 36]},
    "packed with a short end": {"documents": [0, 35, 36]},
    "window": {"rows": 2, "window": 11},
    "packed, window, softcap": {"documents": [0, 20, 36], "window": 7, "softcap": 1.5},
}
HEADS = ((4, 4), (4, 2), (8, 4), (8, 2), (8, 1), (6, 3), (6, 2), (7, 7))
CASES = {
    f"{heads}/{kv_heads} heads, {name}": {"num_heads": heads, "num_kv_heads": kv_heads, **rules}
    for heads, kv_heads in HEADS
    for name, rules in RULES.items()
}
FITTING = [(world_size, name) for world_size in (2, 3, 4) for name in CASES]


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
        options = AttentionOptions(**rules)
        [(out, lse)] = attention.forward_groups([local], options, offsets)
        [grads] = attention.backward_groups([(grad_out[:, :, mine], *local, out, lse)], options, offsets)
    explicit = [out, *grads]
    wanted = [tensor[:, :, mine] for tensor in wanted]
    return {
        "differences": [float((a - b).detach().abs().max()) for a, b in zip(got, wanted, strict=True)],
        "explicit differences": [float((a - b).abs().max()) for a, b in zip(explicit, wanted, strict=True)],
        "exchanges": exchanges,
        "explicit exchanges": explicit_exchanges,
        "traced": any(tensor.requires_grad for tensor in explicit),
        "lse": [lse.numel(), lse.dtype == torch.float64],
    }


def per_head_case(num_heads: int, num_kv_heads: int) -> list[float]:
    """Sinks and ALiBi slopes follow their heads: differences of output and all gradients, sinks' too."""
    groups = ProcessGroups.create(dist.get_world_size())
    whole = [
        torch.randn(1, heads, LENGTH, HEAD_DIM, dtype=torch.float64, requires_grad=True)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    ]
    sinks = torch.randn(num_heads, dtype=torch.float64, requires_grad=True)
    rules = {"scale": HEAD_DIM**-0.5, "alibi_slopes": torch.rand(num_heads, dtype=torch.float64), "window": 9}
    grad_out = torch.randn(1, num_heads, LENGTH, HEAD_DIM, dtype=torch.float64)
    out = local_attention(*whole, **rules, sinks=sinks)
    wanted = [out, *torch.autograd.grad(out, [*whole, sinks], grad_out)]
    shard = LENGTH // groups.sp_size
    mine = slice(groups.sp_rank * shard, (groups.sp_rank + 1) * shard)
    local = [tensor.detach()[:, :, mine].requires_grad_() for tensor in whole]
    out = UlyssesAttention(groups)(*local, **rules, sinks=sinks)
    got = [out, *torch.autograd.grad(out, [*local, sinks], grad_out[:, :, mine])]
    got[-1] = groups.all_sum(got[-1].clone())  # each rank has its own heads' part
    wanted = [*(tensor[:, :, mine] for tensor in wanted[:-1]), wanted[-1]]
    return [float((a - b).detach().abs().max()) for a, b in zip(got, wanted, strict=True)]


def compiled_case() -> list[float]:
    """One graph of torch.compile for attention and what is around it, also when documents change."""
    groups = ProcessGroups.create(dist.get_world_size())
    attention = UlyssesAttention(groups)
    weight = torch.randn(12, 8, 8, dtype=torch.float64, requires_grad=True)

    def loss(hidden: Tensor, offsets: Tensor) -> Tensor:
        heads = torch.einsum("bsd,nde->bnse", hidden, weight).split([6, 3, 3], 1)
        return attention(*heads, scale=0.3, document_offsets=offsets).square().sum()

    compiled, differences = torch.compile(loss, backend="aot_eager", fullgraph=True), []
    for bounds in ([0, 5, LENGTH], [0, 20, LENGTH], [0, 1, 2, LENGTH]):
        offsets = torch.tensor(bounds, dtype=torch.int32)
        hidden = torch.randn(1, LENGTH // groups.sp_size, 8, dtype=torch.float64)
        found = [torch.autograd.grad(fn(hidden, offsets), weight)[0] for fn in (loss, compiled)]
        assert found[0].abs().max() > 0.1
        differences.append(float((found[0] - found[1]).abs().max()))
    return differences


def unshard_case() -> dict:
    """A batch cut and put together again, and the gradient of a loss of the whole."""
    groups = ProcessGroups.create(dist.get_world_size())
    batch = packed_rows(0)[0]
    shard = shard_batch(batch, groups, multiple=4)
    whole = unshard(shard["input_ids"], groups, batch["input_ids"].shape[1])
    weight = torch.linspace(1, 2, 7, dtype=torch.float64, requires_grad=True)
    hidden = shard["input_ids"][..., None].double() * weight
    loss = unshard(hidden, groups).square().sum()
    (grad,) = torch.autograd.grad(loss, weight)
    wanted = 2 * weight.detach() * batch["input_ids"].double().square().sum()
    return {
        "same": torch.equal(whole, batch["input_ids"]),
        "shard": shard["input_ids"].shape[1] % 4,
        "difference": float((groups.all_sum(grad) - wanted).abs().max() / wanted.max()),
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
        apply_ulysses(tiny_llama(num_attention_heads=1, num_key_value_heads=1), groups)
    messages.append(str(refused.value))
    return messages


@pytest.fixture(scope="module")
def outcomes() -> dict[int, dict[str, list]]:
    cases = {name: (attention_case, case) for name, case in CASES.items()}
    two = cases | {fn.__name__: (fn, {}) for fn in (checkpointed_case, autocast_case, refused_case)}
    for heads, kv_heads in HEADS:
        cases[f"per head, {heads}/{kv_heads}"] = (
            per_head_case,
            {"num_heads": heads, "num_kv_heads": kv_heads},
        )
    three = cases | {fn.__name__: (fn, {}) for fn in (compiled_case, unshard_case)}
    return {2: run_cases(2, two), 3: run_cases(3, three), 4: run_cases(4, cases)}


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
    plan = plan_heads(num_heads, num_kv_heads, world_size)
    sent_keys = sum(plan.keys.num_heads(rank) for rank in range(world_size))
    # Each head once, but for key/value heads whose query heads several ranks divide.
    assert sent_keys == max(num_kv_heads, world_size)
    inputs, output = (num_heads + 2 * sent_keys) * one_head, num_heads * one_head
    for index, rank in enumerate(outcomes[world_size][name]):
        mine = plan.queries.num_heads(index) * world_size * one_head
        back = mine + 2 * plan.keys.num_heads(index) * world_size * one_head
        assert rank["exchanges"] == [inputs, mine, output, back]
        # Nothing was kept between the two: inputs and output go to the heads' ranks again.
        assert rank["explicit exchanges"] == [inputs, mine, inputs + 2 * output, back]
        assert rank["lse"] == [rows * plan.queries.num_heads(index) * LENGTH, True]


@pytest.mark.parametrize("world_size", [3, 4])
@pytest.mark.parametrize("heads", HEADS)
def test_sinks_and_slopes_follow_their_heads(
    outcomes: dict[int, dict[str, list]], world_size: int, heads: tuple[int, int]
) -> None:
    for rank in outcomes[world_size][f"per head, {heads[0]}/{heads[1]}"]:
        assert max(rank) < 1e-12, rank


def test_attention_compiles_into_one_graph(outcomes: dict[int, dict[str, list]]) -> None:
    for rank in outcomes[3]["compiled_case"]:
        assert max(rank) < 1e-12, rank


def test_a_sequence_is_put_together_again(outcomes: dict[int, dict[str, list]]) -> None:
    for rank in outcomes[3]["unshard_case"]:
        assert rank["same"]
        assert rank["shard"] == 0
        assert rank["difference"] < 1e-14


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
        unshifted, no_positions, no_offsets, few_heads = rank
        assert "pass shift_labels=" in unshifted
        assert "position_ids= are needed" in no_positions
        assert "pass the document_offsets of the whole sequence" in no_offsets
        assert "parallel.ulysses_degree=2 is above the 1 query heads" in few_heads
