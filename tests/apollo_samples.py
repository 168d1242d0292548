"""Weights, gradients and a small model for tests of `Apollo`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longseq.apollo import Apollo

SIZES = (2, 3, 4)
KINDS = ("channel", "tensor")
TOLERANCE = 1e-10
STEPS = 6


def gradients(shape: Sequence[int], steps: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """They vanish and come back, so that growth is limited in some steps and not in others."""
    draw = torch.Generator().manual_seed(len(shape))
    sizes = (1.0, 0.01, 0.02, 0.01, 5.0)
    return [sizes[i % 5] * torch.randn(shape, generator=draw, dtype=dtype) for i in range(steps)]


def weight_of(shape: Sequence[int], dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    )


def walk(optimizer: Apollo, param: nn.Parameter, grads: Iterable[Tensor]) -> Tensor:
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach().clone()


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Embedding(13, 6), nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 6), nn.Linear(6, 13)
    ).to(dtype)


def net_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        ids = torch.randint(13, (4, 9), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(model(ids[:, :-1]).float().transpose(1, 2), ids[:, 1:]).backward()
        optimizer.step()


def elements(optimizer: Apollo) -> int:
    states = optimizer.state_dict()["state"].values()
    return sum(value.numel() for state in states for value in state.values())


def options_of(kind: str) -> dict[str, Any]:
    rank = 3 if kind == "channel" else 1
    return {"lr": 0.05, "rank": rank, "scale_type": kind, "update_gap": 2, "weight_decay": 0.1, "alpha": 1.5}


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == torch.float64
        assert (found[name] - value).abs().max() < TOLERANCE, name
