from __future__ import annotations

import torch
from torch import nn

from longseq.launch.config import OptimizerConfig
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
