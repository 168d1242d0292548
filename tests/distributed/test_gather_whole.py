"""Modules that ZeRO-3 gathers whole: what hooks on them are told, and the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longseq.distributed.zero import gather_whole


def hook_of(package: str, calls: list[tuple[Any, Any]]) -> Any:
    def hook(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        calls.append((grad_input, grad_output))

    hook.__module__ = package
    return hook


@pytest.fixture
def module() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh())


def test_deepspeeds_hook_is_called_once_a_backward_without_gradients(module: nn.Module) -> None:
    gather_whole(module)
    calls: list[tuple[Any, Any]] = []
    handle = module.register_full_backward_hook(hook_of("deepspeed.runtime.zero.stage3", calls))
    x = torch.ones(2, 3, requires_grad=True)
    weights: list[Tensor | None] = []
    x.register_hook(lambda grad: weights.append(module[0].weight.grad))
    module(x).sum().backward()
    assert calls == [(None, None)]
    assert weights[0] is not None  # which is there by then
    with torch.no_grad():
        module(x)
    handle.remove()
    module(x).sum().backward()
    assert len(calls) == 1


def test_anybody_elses_hook_is_pytorchs_own(module: nn.Module) -> None:
    gather_whole(module)
    calls: list[tuple[Any, Any]] = []
    module.register_full_backward_hook(hook_of("somebody", calls))
    module(torch.ones(2, 3, requires_grad=True)).sum().backward()
    [((grad_input,), (grad_output,))] = calls
    assert grad_input.shape == grad_output.shape == (2, 3)


def test_what_is_taken_back_leaves_nothing(module: nn.Module) -> None:
    before = set(vars(module))
    take_back = gather_whole(module)
    assert set(vars(module)) > before
    take_back()
    assert set(vars(module)) == before
    assert not module._forward_pre_hooks
