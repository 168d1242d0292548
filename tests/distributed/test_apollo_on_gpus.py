"""APOLLO over several GPUs, over NCCL: every layout takes the steps of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gloo import run_cases
from torch import Tensor, nn
from training_samples import MICRO_BATCHES, engine_step, tiny_llama

from longseq.apollo import Apollo, parameter_groups
from longseq.distributed import ProcessGroups, apply_ulysses
from longseq.distributed.engine import LocalEngine
from longseq.distributed.zero_config import ZeroOptions
from longseq.mst import apply_mini_sequence

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_GPUS = min(4, torch.cuda.device_count())
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs"),
]

KINDS = {"apollo": ("channel", 4), "apollo-mini": ("tensor", 1)}
STAGES = (0, 1, 2, 3)
EMBEDDINGS = {"apollo": "low_rank", "apollo-mini": "adamw"}


def make_optimizer(model: nn.Module, kind: str) -> Apollo:
    scale_type, rank = KINDS[kind]
    groups = parameter_groups(model, embeddings=EMBEDDINGS[kind], weight_decay=0.1)
    return Apollo(groups, lr=0.01, rank=rank, scale_type=scale_type, update_gap=2, alpha=1.0)


def zero_case(kind: str, stage: int, offload: bool = False) -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_fp32_param

    groups = ProcessGroups.create()
    torch.manual_seed(0)
    model = tiny_llama(torch.float32).to(DEVICE)
    apply_ulysses(model, groups)
    apply_mini_sequence(model, tile_tokens=10)
    accumulation = MICRO_BATCHES // groups.dp_size
    optimizer = make_optimizer(model, kind)
    if stage == 0:
        engine: Any = LocalEngine(model, optimizer, groups, accumulation_steps=accumulation)
    else:
        from longseq.distributed.zero import DeepSpeedEngine, init_deepspeed_communication

        init_deepspeed_communication()
        options = ZeroOptions(stage, accumulation, offload_optimizer=offload)
        engine = DeepSpeedEngine(model, optimizer, groups, options)
    losses = [engine_step(engine, groups, step, 0.01, DEVICE)[0] for step in range(5)]
    weights = {
        name: (param.detach() if stage == 0 else safe_get_full_fp32_param(param)).cpu()
        for name, param in engine.module.named_parameters()
    }
    return {"losses": losses, "weights": weights}


def fsdp_case(kind: str, dim: int) -> dict[str, Any]:
    """Random gradients on a few weights, sharded by FSDP2, against the same on one GPU."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 24), nn.Linear(24, 72)).to(DEVICE)
    sharded = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 24), nn.Linear(24, 72)).to(DEVICE)
    sharded.load_state_dict(plain.state_dict())
    fully_shard(sharded, shard_placement_fn=lambda param: Shard(dim if param.dim() > dim else 0))
    optimizers = [make_optimizer(model, kind) for model in (plain, sharded)]
    for step in range(4):
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(step)).to(DEVICE)
        for model, optimizer in zip((plain, sharded), optimizers, strict=True):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(plain.parameters(), sharded.parameters(), strict=True)
    return {"difference": max(float((a - b.full_tensor()).abs().max()) for a, b in pairs)}


def make_cases() -> dict[str, Any]:
    cases: dict[str, Any] = {}
    for kind in KINDS:
        for stage in STAGES:
            cases[f"{kind}, ZeRO {stage}"] = (zero_case, {"kind": kind, "stage": stage})
        cases[f"{kind}, ZeRO 2, offload"] = (zero_case, {"kind": kind, "stage": 2, "offload": True})
        for dim in (0, 1):
            cases[f"{kind}, FSDP2 {dim}"] = (fsdp_case, {"kind": kind, "dim": dim})
    return cases


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list]:
    return run_cases(NUM_GPUS, make_cases(), backend="nccl")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", [1, 2, 3, "2, offload"])
def test_zero_takes_the_steps_of_one_gpu(outcomes: dict[str, list], stage: int | str, kind: str) -> None:
    truth = outcomes[f"{kind}, ZeRO 0"][0]
    for rank in outcomes[f"{kind}, ZeRO {stage}"]:
        assert rank["losses"] == pytest.approx(truth["losses"], rel=1e-5)
        for name, weight in truth["weights"].items():
            difference: Tensor = rank["weights"][name] - weight
            assert difference.norm() <= 1e-4 * weight.norm(), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [0, 1])
def test_fsdp_takes_the_steps_of_one_gpu(outcomes: dict[str, list], dim: int, kind: str) -> None:
    for rank in outcomes[f"{kind}, FSDP2 {dim}"]:
        assert rank["difference"] < 1e-4
