"""What only a GPU shows: the kernels on real memory, and that no step waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from numerics import relative_error
from torch import Tensor, nn

from longseq.apollo import Apollo, quantize_linears, step_in_backward
from longseq.apollo.projection import signs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

KINDS = [("channel", 5), ("channel", 64), ("channel", 300), ("tensor", 1)]
SHAPES = [(1024, 640), (640, 1024), (513, 511), (333, 1000), (3, 384, 512)]


def options(scale_type: str, rank: int, **others: Any) -> dict[str, Any]:
    return {
        "lr": 0.02,
        "rank": rank,
        "scale_type": scale_type,
        "alpha": 1.0,
        "update_gap": 2,
        "weight_decay": 0.1,
        **others,
    }


def gradients(shape: tuple[int, ...], steps: int) -> list[Tensor]:
    draw = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(shape, generator=draw, device="cuda") * (1 + step) for step in range(steps)]


def walk(weight: Tensor, grads: list[Tensor], **given: Any) -> tuple[Tensor, dict[str, Tensor]]:
    param = nn.Parameter(weight.clone())
    optimizer = Apollo([("layer.weight", param)], **given)
    for grad in grads:
        param.grad = grad.to(param.dtype)
        optimizer.step()
    return param.detach(), optimizer.state[param]


@contextmanager
def waiting_forbidden() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize(("scale_type", "rank"), KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_kernels_take_the_plain_step(
    dtype: torch.dtype, shape: tuple[int, ...], scale_type: str, rank: int
) -> None:
    grads = [grad.to(dtype) for grad in gradients(shape, 4)]
    start = gradients(shape, 1)[0].to(dtype)
    given = options(scale_type, rank)
    ours, state = walk(start, grads, **given)
    truth, true_state = walk(start.double(), grads, **given)
    # float64 takes the plain way, on any device.
    assert true_state["exp_avg"].dtype == torch.float64
    for name in ("exp_avg", "exp_avg_sq", "update_norm"):
        assert relative_error(state[name], true_state[name]) < 2e-5, name
    if dtype == torch.float32:
        assert relative_error(ours - start, truth - start) < 2e-5
        return
    # Each step rounds up or down by less than a spacing, and by chance, which has no side.
    spacing, num_steps = torch.finfo(dtype).eps * truth.abs(), len(grads)
    assert (ours - truth).norm() < num_steps * spacing.norm()
    assert (ours - truth).mean().abs() < 5 * (num_steps / ours.numel()) ** 0.5 * spacing.mean()


@pytest.mark.parametrize("offset", [1, 8])
def test_matrices_may_begin_anywhere_in_memory(offset: int) -> None:
    shape, given = (320, 256), options("channel", 16)
    whole, _ = walk(torch.ones(shape, device="cuda"), gradients(shape, 2), **given)
    buffer = torch.ones(320 * 256 + offset, device="cuda")
    param = nn.Parameter(buffer[offset:].view(shape))
    optimizer = Apollo([("layer.weight", param)], **given)
    for grad in gradients(shape, 2):
        moved = torch.empty(320 * 256 + offset, device="cuda")[offset:].view(shape)
        param.grad = moved.copy_(grad)
        optimizer.step()
    torch.testing.assert_close(param.detach(), whole, rtol=1e-6, atol=1e-7)


def test_a_gradient_that_is_not_finite_shows() -> None:
    [grad] = gradients((256, 192), 1)
    grad[3, 5] = torch.nan
    for scale_type, rank in (("channel", 8), ("tensor", 1)):
        _, state = walk(torch.ones(256, 192, device="cuda"), [grad], **options(scale_type, rank))
        assert state["update_norm"].isnan()


@pytest.mark.parametrize("rank", [1, 33, 256, 300])
def test_signs_are_those_of_the_cpu(rank: int) -> None:
    key = 0xFEDCBA9876543210
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        ours = signs(key, rank, 17, 1000, dtype=dtype, device="cuda")
        assert ours.dtype == dtype
        assert torch.equal(ours.cpu(), signs(key, rank, 17, 1000, dtype=dtype, device="cpu"))


@pytest.mark.parametrize(
    "given",
    [
        options("channel", 32),
        options("tensor", 1),
        options("tensor", 1, rounding="master"),
        options("channel", 32, rule="adamw"),
    ],
    ids=lambda given: "-".join(str(given.get(key)) for key in ("scale_type", "rounding", "rule")),
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_step_waits_for_the_gpu(dtype: torch.dtype, given: dict[str, Any]) -> None:
    shapes = {"tall": (512, 256), "wide": (256, 512), "norm": (256,), "experts": (2, 96, 128)}
    params = {
        name: nn.Parameter(torch.randn(shape, device="cuda").to(dtype)) for name, shape in shapes.items()
    }
    given = dict(given)
    matrices = {"names": ["tall", "wide", "experts"], "rule": given.pop("rule", "low_rank")}
    optimizer = Apollo([{"params": [params[name] for name in matrices["names"]], **matrices}], **given)
    optimizer.add_param_group({"params": [params["norm"]], "names": ["norm"], "rule": "adamw"})
    for param in params.values():
        param.grad = torch.randn_like(param)
    optimizer.step()  # compiles
    with waiting_forbidden():
        for _ in range(3):
            optimizer.step()


def test_no_step_in_backward_waits_for_the_gpu() -> None:
    layers = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).to("cuda", torch.bfloat16)
    optimizer = Apollo(layers.named_parameters(), rank=1, scale_type="tensor")
    handle = step_in_backward(optimizer, layers, clip_norm=1.0)
    x = torch.randn(8, 64, device="cuda", dtype=torch.bfloat16)
    layers(x).square().mean().backward()
    handle.finish_step()
    with waiting_forbidden():
        for _ in range(3):
            layers(x).square().mean().backward()
            handle.finish_step()


def test_a_run_goes_on_on_another_device() -> None:
    shape, given = (96, 64), options("channel", 8)
    grads = gradients(shape, 5)
    there = {}
    for first, second in (("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")):
        param = nn.Parameter(torch.ones(shape, device=first))
        optimizer = Apollo([("layer.weight", param)], **given)
        for step, grad in enumerate(grads):
            if step == 3:
                state = optimizer.state_dict()
                param = nn.Parameter(param.detach().to(second))
                optimizer = Apollo([("layer.weight", param)], **given)
                optimizer.load_state_dict(state)
            param.grad = grad.to(param.device)
            optimizer.step()
        there[first, second] = param.detach().cpu()
    for moved in there.values():
        torch.testing.assert_close(moved, there["cuda", "cuda"], rtol=1e-5, atol=1e-6)


def test_weights_in_8_bits_train() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(96, 160), nn.GELU(), nn.Linear(160, 96)).to("cuda", torch.bfloat16)
    quantize_linears(layers, group_size=32)
    optimizer = Apollo(layers.named_parameters(), lr=0.01, rank=1, scale_type="tensor")
    x = torch.randn(256, 96, device="cuda", dtype=torch.bfloat16)
    y = torch.roll(x, 1, dims=1)
    losses = []
    for _ in range(60):
        loss = (layers(x) - y).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_scratch_memory_is_a_fraction_of_the_weights() -> None:
    param = nn.Parameter(torch.randn(4096, 4096, device="cuda").bfloat16())
    param.grad = torch.randn_like(param)
    optimizer = Apollo([("layer.weight", param)], rank=128)
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    # The signs, rank x 4,096 in bf16, and a few numbers a row.
    assert torch.cuda.max_memory_allocated() - before < 128 * 4096 * 2 + 4096 * 64
