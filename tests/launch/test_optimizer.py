from __future__ import annotations

import pytest
import torch
from torch import nn

from longseq.apollo import Apollo
from longseq.launch.config import ApolloConfig, OptimizerConfig
from longseq.launch.optimizer import build_optimizer


def model() -> nn.Module:
    layers = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    layers[2].weight.requires_grad_(False)
    return layers


def test_weights_decay_on_matrices_alone() -> None:
    layers = model()
    layers[2].weight.requires_grad_(True)
    optimizer = build_optimizer(layers, OptimizerConfig(lr=0.1, weight_decay=0.5))
    before = {name: param.detach().clone() for name, param in layers.named_parameters()}
    for param in layers.parameters():
        param.grad = torch.zeros_like(param)  # what moves, moves by decay
    optimizer.step()
    for name, param in layers.named_parameters():
        shrunk = 0.95 if name in ("0.weight", "2.weight") else 1.0
        torch.testing.assert_close(param.detach(), shrunk * before[name])


def test_frozen_weights_are_left_out_and_no_group_is_empty() -> None:
    layers = model()
    held = [
        param
        for group in build_optimizer(layers, OptimizerConfig()).param_groups
        for param in group["params"]
    ]
    assert {id(param) for param in held} == {id(p) for p in layers.parameters() if p.requires_grad}
    assert len(held) == 4
    only_vectors = nn.LayerNorm(4)
    assert len(build_optimizer(only_vectors, OptimizerConfig()).param_groups) == 1


def test_the_configs_numbers_reach_the_optimizer() -> None:
    config = OptimizerConfig(lr=0.25, betas=(0.5, 0.75), eps=1e-3, weight_decay=0.125)
    [matrices, vectors] = build_optimizer(model(), config).param_groups
    assert (matrices["lr"], matrices["betas"], matrices["eps"]) == (0.25, (0.5, 0.75), 1e-3)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.125, 0.0)


def test_apollos_numbers_are_its_own_where_the_config_has_none() -> None:
    layers = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 32), nn.LayerNorm(32))
    for name, scale_type, rank, alpha in (
        ("apollo", "channel", 256, 1.0),
        ("apollo-mini", "tensor", 1, 128**0.5),
    ):
        optimizer = build_optimizer(layers, OptimizerConfig(name=name), seed=5)
        assert isinstance(optimizer, Apollo)
        for group in optimizer.param_groups:
            assert (group["scale_type"], group["rank"], group["alpha"]) == (scale_type, rank, alpha)
            assert (group["eps"], group["update_gap"], group["seed"]) == (1e-6, 200, 5)
    assert build_optimizer(layers, OptimizerConfig()).param_groups[0]["eps"] == 1e-8


def test_matrices_too_narrow_for_the_rank_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """AdamW would update them, unseen. Embeddings that get AdamW by the config are none of them."""
    layers = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 32), nn.Linear(32, 32), nn.LayerNorm(32))
    for rank, told in ((32, "2 of the 2"), (None, "2 of the 2"), (16, "1 of the 2"), (15, None)):
        caplog.clear()
        build_optimizer(layers, OptimizerConfig(name="apollo", apollo=ApolloConfig(rank=rank)))
        expected = f"optimizer.apollo.rank={rank or 256} is not below the shorter side of {told} matrices"
        assert expected in caplog.text if told else not caplog.records


def test_the_configs_numbers_reach_apollo() -> None:
    layers = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 32), nn.LayerNorm(32))
    own = ApolloConfig(rank=3, update_gap=7, alpha=2, norm_growth_limit=None, embeddings="adamw_8bit")
    config = OptimizerConfig(
        name="apollo", lr=0.25, betas=(0.5, 0.75), eps=1e-3, weight_decay=0.125, apollo=own
    )
    groups = build_optimizer(layers, config).param_groups
    assert {name: group["rule"] for group in groups for name in group["names"]} == {
        "0.weight": "adamw_8bit",
        "1.weight": "low_rank",
        "1.bias": "adamw",
        "2.weight": "adamw",
        "2.bias": "adamw",
    }
    for group in groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.25, (0.5, 0.75), 1e-3)
        assert (group["rank"], group["update_gap"], group["alpha"]) == (3, 7, 2)
        assert group["norm_growth_limit"] is None
        assert group["weight_decay"] == (0.125 if group["names"][0] in ("0.weight", "1.weight") else 0.0)
