"""What DeepSpeed is asked for, that it does it, and that offloaded states take the same steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gloo import run_cases
from numerics import assert_as_accurate_as
from torch import nn
from training_samples import (
    MICRO_BATCHES,
    engine_training,
    plain_training,
    prepared_llama,
    tiny_llama,
    weights_of,
)

from longseq.distributed import ProcessGroups
from longseq.distributed.zero_config import PERSISTENT_NUMEL, GatheredSizes, ZeroOptions, gathered_sizes

OFFLOADED = {
    "ZeRO 1, optimizer": {"stage": 1, "offload_optimizer": True},
    "ZeRO 2, optimizer": {"stage": 2, "offload_optimizer": True},
    "ZeRO 3, optimizer": {"stage": 3, "offload_optimizer": True},
    "ZeRO 3, optimizer and parameters": {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
}
USERS = {
    "stage3_max_reuse_distance": 123,
    "stage3_prefetch_bucket_size": "auto",
    "sub_group_size": 999,
    "allgather_bucket_size": "auto",
}


def training_case(stage: int, user: dict[str, Any] | None = None, **offload: bool) -> dict:
    from longseq.distributed.zero import DeepSpeedEngine, init_deepspeed_communication

    init_deepspeed_communication()
    groups = ProcessGroups.create()
    model = prepared_llama(groups)
    options = ZeroOptions(stage, MICRO_BATCHES // groups.dp_size, user=user, **offload)
    engine = DeepSpeedEngine(model, torch.optim.SGD(model.parameters(), lr=9.0), groups, options)
    return {**engine_training(engine, groups), **state_of(engine, model)}


def state_of(engine: Any, model: nn.Module) -> dict:
    """The weights, where they and the masters live, and what the engine goes by."""
    import deepspeed

    params = [param for param in model.parameters() if hasattr(param, "ds_id")]
    with deepspeed.zero.GatheredParameters(params, enabled=bool(params)):
        weights = weights_of(model)
    zero = engine._engine._config.zero_config
    return {
        "weights": weights,
        "zero": {name: getattr(zero, name) for name in ("max_reuse_distance", "sub_group_size")},
        "communication": str(engine._engine.communication_data_type),
        "batch": engine._engine.train_batch_size(),
        "offloaded": [
            bool(engine._engine.zero_offload_optimizer()),
            bool(engine._engine.zero_offload_param()),
        ],
    }


def refused_case() -> list[str]:
    from longseq.distributed.zero_config import refuse_what_deepspeed_does

    said = []
    for user in (
        {"zero_optimization": {"stage3_prefetch_bucket": 1}},
        {"curriculum_learning": {}},
        {"communication_data_type": "bf8"},
        {"zero_optimization": {"sub_group_size": 10}, "fp16": {"enabled": "auto"}},
    ):
        try:
            refuse_what_deepspeed_does(ZeroOptions(3, user=user).deepspeed_config(2))
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list]:
    cases: dict[str, Any] = {name: (training_case, case) for name, case in OFFLOADED.items()}
    user = {"zero_optimization": USERS, "communication_data_type": "fp32", "train_batch_size": "auto"}
    cases["a user's own"] = (training_case, {"stage": 3, "user": user})
    cases["refused"] = (refused_case, {})
    return run_cases(2, cases)


# Processes are started that make an engine of DeepSpeed for every case.
@pytest.mark.slow
@pytest.mark.parametrize("name", [*OFFLOADED, "a user's own"])
def test_the_steps_are_those_of_plain_pytorch(outcomes: dict[str, list], name: str) -> None:
    start = weights_of(tiny_llama())
    (truth_losses, truth), (_, in_float32) = (plain(dtype) for dtype in (torch.float64, torch.float32))
    for rank in outcomes[name]:
        assert rank["losses"] == pytest.approx(truth_losses, rel=2e-6)
        for key, weight in rank["weights"].items():
            assert_as_accurate_as(weight - start[key], in_float32[key], truth[key], slack=2, name=key)


def plain(dtype: torch.dtype) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and changes of the weights."""
    model = tiny_llama().to(dtype)
    start = weights_of(model)
    losses = plain_training(model, torch.optim.SGD(model.parameters(), lr=9.0))
    return losses, {name: weight - start[name] for name, weight in weights_of(model).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFLOADED)
def test_what_is_to_be_offloaded_is(outcomes: dict[str, list], name: str) -> None:
    for rank in outcomes[name]:
        assert rank["offloaded"] == [True, "parameters" in name]


@pytest.mark.slow
def test_a_user_s_values_are_honoured_and_auto_is_filled_in(outcomes: dict[str, list]) -> None:
    for rank in outcomes["a user's own"]:
        assert rank["zero"] == {"max_reuse_distance": 123, "sub_group_size": 999}
        assert rank["communication"] == "torch.float32"
        assert rank["batch"] == MICRO_BATCHES


@pytest.mark.slow
def test_what_deepspeed_refuses_is_refused_before_it_is_needed(outcomes: dict[str, list]) -> None:
    for unknown, removed, dtype, taken in outcomes["refused"]:
        assert "parallel.deepspeed_config: DeepSpeed does not take it" in unknown
        assert "stage3_prefetch_bucket" in unknown
        assert "curriculum_learning" in removed
        assert "communication_data_type" in dtype
        assert taken == "nothing"


def test_user_s_values_lie_over_ours() -> None:
    ours = ZeroOptions(3, 4, clip_norm=0.5, bf16=True, offload_parameters=True)
    user = {
        "zero_optimization": {
            "stage": "auto",
            "offload_param": {"buffer_count": 7},
            "reduce_bucket_size": "auto",
            "overlap_comm": False,
        },
        "bf16": {"enabled": "auto", "immediate_grad_update": True},
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "gradient_clipping": "auto",
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": "auto",
        "steps_per_print": 10,
        "optimizer": {},
        "wandb": {"enabled": False},
    }
    plain_config = ours.deepspeed_config(2)
    config = ZeroOptions(**{**vars(ours), "user": user}).deepspeed_config(2)
    zero = config.pop("zero_optimization")
    assert zero.pop("offload_param") == {
        **plain_config["zero_optimization"]["offload_param"],
        "buffer_count": 7,
    }
    assert zero == {"stage": 3, "overlap_comm": False}
    assert config.pop("bf16") == {"enabled": True, "immediate_grad_update": True}
    assert config.pop("wandb") == {"enabled": False}
    kept = {key: value for key, value in plain_config.items() if key not in ("zero_optimization", "bf16")}
    assert config == {**kept, "steps_per_print": 10}


def test_small_weights_stay_whole_where_most_would_be_gathered_alone() -> None:
    norms = [nn.LayerNorm(8, bias=False) for _ in range(2)]
    tiled = nn.Sequential(nn.Linear(400, 400, bias=False), nn.Linear(400, 400))
    tiled._z3_leaf = True
    zero = ZeroOptions(3).deepspeed_config(2, nn.Sequential(*norms, tiled))["zero_optimization"]
    assert zero["stage3_param_persistence_threshold"] == PERSISTENT_NUMEL
    assert zero["stage3_prefetch_bucket_size"] == 2 * 400 * 400


def test_sizes_are_those_of_what_is_gathered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longseq.distributed.zero_config.PERSISTENT_NUMEL", 10)
    layer = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))  # 32 + 8 + 32 + 4
    norm, head = nn.LayerNorm(4, bias=False), nn.Linear(4, 100, bias=False)
    model = nn.Sequential(nn.Embedding(100, 4), layer, norm, head)
    assert gathered_sizes(model) == GatheredSizes(layer=400, sharded=400, beside=0, whole=10)
    layer._z3_leaf = True
    assert gathered_sizes(model) == GatheredSizes(layer=76, sharded=76, beside=4, whole=0)
    zero = ZeroOptions(3).deepspeed_config(2, model)["zero_optimization"]
    assert zero["stage3_param_persistence_threshold"] == 0
    assert zero["stage3_prefetch_bucket_size"] == 76 + 4
    assert zero["stage3_max_live_parameters"] == 152
    assert zero["reduce_bucket_size"] == 76
    assert set(ZeroOptions(2).deepspeed_config(2, model)["zero_optimization"]) == {
        "stage",
        "reduce_bucket_size",
    }
