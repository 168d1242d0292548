"""Several GPUs over NCCL: exchanges that run beside attention, engines, and the measured gradient scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo import run_cases
from torch import Tensor
from training_samples import MICRO_BATCHES, VOCAB, engine_step, tiny_llama

from longseq.distributed import ProcessGroups, apply_ulysses
from longseq.distributed.attention import AttentionOptions, local_attention
from longseq.distributed.check import compare_with_one_rank
from longseq.distributed.engine import Engine, LocalEngine
from longseq.distributed.probe import calibrate
from longseq.distributed.ulysses import UlyssesAttention
from longseq.distributed.zero_config import ZeroOptions
from longseq.mst import apply_mini_sequence

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_GPUS = min(4, torch.cuda.device_count())
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs"),
]

HEADS = ((8, 4), (8, 2), (8, 1), (7, 7))
LENGTH, WIDTH = 4096, 64
STREAMED: dict[str, dict[str, Any]] = {
    "gpu": {"checkpoints": "gpu"},
    "host, two groups": {"checkpoints": "host", "head_groups": 2},
    "everything saved": {"checkpoints": "gpu", "save_attention": "all"},
}
STAGES = (0, 1, 2, 3)


def attention_case(num_heads: int, num_kv_heads: int, num_groups: int) -> dict[str, list[float]]:
    """Errors of output and gradients in bfloat16, of the ranks together and of one: against float64."""
    groups = ProcessGroups.create(dist.get_world_size())
    draw = torch.Generator(DEVICE).manual_seed(1)
    whole = [
        torch.randn(1, heads, LENGTH, WIDTH, dtype=torch.bfloat16, device=DEVICE, generator=draw)
        for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    ]
    truth = _local([tensor.double() for tensor in whole])
    alone = _local(whole)
    shard = LENGTH // groups.sp_size
    mine = slice(groups.sp_rank * shard, (groups.sp_rank + 1) * shard)
    local = [tensor[:, :, mine].chunk(num_groups, 1) for tensor in whole]
    attention, options = UlyssesAttention(groups), AttentionOptions(scale=WIDTH**-0.5)
    worst = [0.0] * 4
    for _ in range(5):  # a race need not show the first time
        parts = list(zip(*local[:3], strict=True))
        outs = list(attention.forward_groups(parts, options))
        grads = list(
            attention.backward_groups(
                ((grad, *part, *out) for grad, part, out in zip(local[3], parts, outs, strict=True)),
                options,
            )
        )
        found = [torch.cat([out for out, _ in outs], 1)]
        found += [torch.cat([grad[index] for grad in grads], 1) for index in range(3)]
        errors = _errors([tensor[:, :, mine] for tensor in truth], found)
        worst = [max(pair) for pair in zip(worst, errors, strict=True)]
    return {"ranks": worst, "one": _errors(truth, alone)}


def _local(tensors: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    out = local_attention(*leaves, scale=WIDTH**-0.5)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


def _errors(truth: list[Tensor], found: list[Tensor]) -> list[float]:
    pairs = zip(truth, found, strict=True)
    return [float((a - b.double()).norm() / a.norm()) for a, b in pairs]


def make_engine(groups: ProcessGroups, stage: int, options: dict[str, Any]) -> Engine:
    heads = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = tiny_llama(torch.bfloat16 if stage else torch.float32, **heads).to(DEVICE)
    apply_ulysses(model, groups)
    apply_mini_sequence(model, tile_tokens=10, **options)
    optimizer = torch.optim.AdamW(model.parameters())
    accumulation = MICRO_BATCHES // groups.dp_size
    if stage == 0:
        return LocalEngine(model, optimizer, groups, accumulation_steps=accumulation, bf16=True)
    from longseq.distributed.zero import DeepSpeedEngine, init_deepspeed_communication

    init_deepspeed_communication()
    return DeepSpeedEngine(model, optimizer, groups, ZeroOptions(stage, accumulation, bf16=True))


def training_case(sp_size: int, stage: int, options: dict[str, Any]) -> dict:
    """Losses and norms of a few bfloat16 steps, and the measured divisor."""
    groups = ProcessGroups.create(sp_size)
    engine = make_engine(groups, stage, options)
    calibrate(engine, groups, VOCAB, DEVICE)
    steps = [engine_step(engine, groups, step, 1e-3, DEVICE) for step in range(2)]
    losses, norms = zip(*steps, strict=True)
    return {"losses": list(losses), "norms": list(norms), "divisor": engine.reducer_divisor}


def check_case() -> list[float | bool]:
    """What `longseq doctor` compares."""
    groups = ProcessGroups.create(dist.get_world_size())
    model = tiny_llama(torch.float64).to(DEVICE)
    ids = torch.randint(0, VOCAB, (1, 61), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    batch = {"input_ids": ids, "labels": ids, "document_offsets": torch.tensor([0, 17, 18, 61])}
    found = compare_with_one_rank(model, groups, batch, tolerance=1e-5)
    return [found.is_right, found.worst[1]]


def make_cases() -> dict[str, Any]:
    cases: dict[str, Any] = {"check": (check_case, {})}
    for heads, kv_heads in HEADS:
        for num_groups in (1, 2):
            if kv_heads % num_groups == 0 and heads // num_groups >= NUM_GPUS:
                cases[f"{heads}/{kv_heads} in {num_groups}"] = (
                    attention_case,
                    {"num_heads": heads, "num_kv_heads": kv_heads, "num_groups": num_groups},
                )
    for name, options in STREAMED.items():
        for stage in STAGES:
            for sp_size in {1, 2, NUM_GPUS} - {3}:
                cases[f"{name}, ZeRO {stage}, sp {sp_size}"] = (
                    training_case,
                    {"sp_size": sp_size, "stage": stage, "options": options},
                )
    return cases


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list]:
    return run_cases(NUM_GPUS, make_cases(), backend="nccl")


def test_attention_of_several_gpus_is_as_exact_as_of_one(outcomes: dict[str, list]) -> None:
    found = {name: ranks for name, ranks in outcomes.items() if " in " in name}
    assert len(found) > 4
    for name, ranks in found.items():
        for rank in ranks:
            for error, of_one in zip(rank["ranks"], rank["one"], strict=True):
                assert error <= 1.5 * of_one + 1e-6, (name, rank)


@pytest.mark.parametrize("options", STREAMED)
@pytest.mark.parametrize("stage", STAGES)
def test_engines_walk_alike_whatever_the_degree(outcomes: dict[str, list], stage: int, options: str) -> None:
    found = {name: ranks for name, ranks in outcomes.items() if name.startswith(f"{options}, ZeRO {stage}")}
    first = next(iter(found.values()))[0]
    assert min(first["losses"]) > 1
    for name, ranks in found.items():
        for rank in ranks:
            assert rank["divisor"] == (1 if stage == 0 else NUM_GPUS), name
            # bfloat16 rounds differently where a sum has other parts.
            assert rank["losses"] == pytest.approx(first["losses"], rel=5e-3), name
            assert rank["norms"][-1] == pytest.approx(first["norms"][-1], rel=5e-2), name


def test_ranks_of_a_sequence_give_the_numbers_of_one(outcomes: dict[str, list]) -> None:
    for is_right, difference in outcomes["check"]:
        assert is_right, difference
