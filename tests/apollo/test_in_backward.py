"""Optimizers stepped in backward: the ordinary loop's trajectory, with one gradient alive at a time."""

from __future__ import annotations

import copy
import itertools
import math
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo import run_cases
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode

from longseq.apollo.in_backward import InBackwardHandle, step_in_backward

WIDTHS = (7, 13, 5, 3)
STEPS = 4
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": SGD,
    "momentum": partial(SGD, momentum=0.9, nesterov=True),
    "adamw": partial(AdamW, foreach=False),
    "adamw-foreach": partial(AdamW, foreach=True),
    "adamw-fused": partial(AdamW, fused=True),
    "adamw-tensor-lr": lambda groups, lr: AdamW(groups, lr=torch.tensor(lr)),
    "adafactor": torch.optim.Adafactor,
}


def make_model() -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Linear(*sizes) for sizes in itertools.pairwise(WIDTHS)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())]).double()


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(11, WIDTHS[0], dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    return model(x).square().sum()


def make_optimizer(make: Callable[..., Optimizer], model: nn.Module) -> tuple[Optimizer, LambdaLR]:
    """Of two groups, with a schedule that every step changes."""
    weights, biases = (
        [one for one in model.named_parameters() if name in one[0]] for name in ("weight", "bias")
    )
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 0.01}]
    optimizer = make(groups, lr=0.05)
    return optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))


def ordinary_step(model: nn.Module, optimizer: Optimizer, step: int) -> Tensor:
    optimizer.zero_grad()
    loss_of(model, step).backward()
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]))
    optimizer.step()
    return norm


def step_by(handle: InBackwardHandle, model: nn.Module, step: int) -> Tensor:
    loss_of(model, step).backward()
    return handle.finish_step()


def assert_equal(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


# -- the same trajectory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_trajectory_is_the_ordinary_one_bit_for_bit(name: str) -> None:
    plain, model = make_model(), make_model()
    plain_optimizer, plain_schedule = make_optimizer(OPTIMIZERS[name], plain)
    optimizer, schedule = make_optimizer(OPTIMIZERS[name], model)
    handle = step_in_backward(optimizer, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a schedule that saw no step before its own
        for step in range(STEPS):
            wanted = ordinary_step(plain, plain_optimizer, step)
            plain_schedule.step()
            torch.testing.assert_close(step_by(handle, model, step), wanted, rtol=1e-14, atol=0)
            schedule.step()
            assert all(param.grad is None for param in model.parameters())
    assert_equal(model.state_dict(), plain.state_dict())
    got, wanted = optimizer.state_dict(), plain_optimizer.state_dict()
    assert_equal(got["state"], wanted["state"])
    assert got["param_groups"] == wanted["param_groups"]


@pytest.mark.parametrize("first_in_backward", [False, True])
def test_a_checkpoint_resumes_either_way(first_in_backward: bool) -> None:
    plain, model = make_model(), make_model()
    plain_optimizer, _ = make_optimizer(AdamW, plain)
    for step in range(4):
        ordinary_step(plain, plain_optimizer, step)
    saved: dict[str, Any] = {}
    for steps, in_backward in ((range(2), first_in_backward), (range(2, 4), not first_in_backward)):
        optimizer, _ = make_optimizer(AdamW, model)
        optimizer.zero_grad()
        handle = step_in_backward(optimizer) if in_backward else None
        if saved:  # after the hooks: loading gives the optimizer other dicts of groups
            optimizer.load_state_dict(saved)
        for step in steps:
            step_by(handle, model, step) if handle else ordinary_step(model, optimizer, step)
        if handle:
            handle.remove()
        saved = optimizer.state_dict()
    assert_equal(model.state_dict(), plain.state_dict())


def test_after_remove_gradients_stay_for_the_optimizer() -> None:
    model = make_model()
    optimizer, _ = make_optimizer(SGD, model)
    handle = step_in_backward(optimizer)
    step_by(handle, model, 0)
    handle.remove()
    before = copy.deepcopy(model.state_dict())
    loss_of(model, 1).backward()
    assert_equal(model.state_dict(), before)
    assert all(param.grad is not None for param in model.parameters())


# -- the optimizer's own ways -------------------------------------------------------------------------------


class Counting(SGD):
    """Keeps a count in its groups, as some optimizers do, and checks the lists that name parameters."""

    broken = False

    @torch.no_grad()
    def step(self, closure=None) -> None:
        if self.broken:
            raise ArithmeticError("broken step")
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for param, *names in zip(group["params"], group["names"], group["param_names"], strict=True):
                if param.grad is not None:
                    assert names == [self.state[param]["name"]] * 2
                    param.sub_(param.grad, alpha=group["lr"] * group["count"])


def make_counting(model: nn.Module) -> Counting:
    optimizer = Counting(list(model.named_parameters()), lr=0.01)
    for name, param in model.named_parameters():
        optimizer.state[param]["name"] = name
    optimizer.param_groups[0]["names"] = list(optimizer.param_groups[0]["param_names"])
    return optimizer


def test_lists_of_a_group_are_cut_and_its_counts_count_steps() -> None:
    plain, model = make_model(), make_model()
    plain_optimizer, optimizer = make_counting(plain), make_counting(model)
    handle = step_in_backward(optimizer)
    for step in range(STEPS):
        ordinary_step(plain, plain_optimizer, step)
        step_by(handle, model, step)
    assert_equal(model.state_dict(), plain.state_dict())
    assert optimizer.state_dict()["param_groups"] == plain_optimizer.state_dict()["param_groups"]


def test_an_error_in_a_step_leaves_the_groups_whole() -> None:
    model = make_model()
    optimizer = make_counting(model)
    groups = optimizer.param_groups
    optimizer.broken = True
    step_in_backward(optimizer)
    with pytest.raises(ArithmeticError, match="broken step"):
        loss_of(model, 0).backward()
    assert optimizer.param_groups is groups
    assert len(groups[0]["params"]) == len(list(model.parameters()))


def test_threads_of_several_devices_take_turns() -> None:
    class Slow(SGD):
        def step(self, closure=None) -> None:
            time.sleep(0.02)
            super().step()

    model = make_model()
    optimizer = Slow(model.parameters(), lr=1.0)
    groups, before = optimizer.param_groups, copy.deepcopy(model.state_dict())
    handle = step_in_backward(optimizer)
    # Backward runs on the caller's thread on a CPU, and on one a device elsewhere.
    threads = [threading.Thread(target=param.sum().backward) for param in model.parameters()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert optimizer.param_groups is groups
    assert_equal(dict(model.named_parameters()), {name: value - 1 for name, value in before.items()})
    handle.finish_step()


def test_step_hooks_see_one_step() -> None:
    model, seen = make_model(), []
    optimizer, _ = make_optimizer(AdamW, model)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    step_by(step_in_backward(optimizer), model, 0)
    assert seen == ["before", "after"]


def test_an_optimizer_that_steps_given_parameters_is_asked_to() -> None:
    class Stepping(SGD):
        def step_parameters(self, params: list[nn.Parameter]) -> None:
            stepped.extend(params)

    stepped: list[nn.Parameter] = []
    model = make_model()
    step_by(step_in_backward(Stepping(model.parameters(), lr=0.1)), model, 0)
    assert {id(param) for param in stepped} == {id(param) for param in model.parameters()}
    assert_equal(model.state_dict(), make_model().state_dict())


# -- which gradients ----------------------------------------------------------------------------------------


def test_one_gradient_is_alive_at_a_time() -> None:
    model = nn.Sequential(*[nn.Linear(31, 31, bias=False) for _ in range(5)])
    alive: list[int] = []

    def count(_: Tensor) -> None:
        alive.append(sum(param.grad.nbytes for param in model.parameters() if param.grad is not None))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(count)
    handle = step_in_backward(AdamW(model.parameters()))
    model(torch.randn(3, 31)).square().sum().backward()
    handle.finish_step()
    assert alive == [31 * 31 * 4] * 5


def test_frozen_and_unused_parameters_stay() -> None:
    model = nn.ModuleDict({name: nn.Linear(5, 5) for name in ("used", "frozen", "unused")}).double()
    model["frozen"].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    optimizer = AdamW(model.parameters(), lr=0.1)
    handle = step_in_backward(optimizer)
    for _ in range(2):
        model["frozen"](model["used"](torch.randn(3, 5).double())).sum().backward()
        handle.finish_step()
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {"used.weight", "used.bias"}
    assert set(optimizer.state) == set(model["used"].parameters())


def test_a_second_gradient_is_refused_and_moves_nothing() -> None:
    model = make_model()
    optimizer, _ = make_optimizer(SGD, model)
    handle = step_in_backward(optimizer, model)
    loss_of(model, 0).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"(?s)4\.(weight|bias) has a second gradient before finish_step"):
        loss_of(model, 1).backward()
    assert_equal(model.state_dict(), before)
    handle.finish_step()
    assert_equal(model.state_dict(), before)
    step_by(handle, model, 2)


@pytest.mark.parametrize("make", [torch.optim.SparseAdam, SGD])
def test_a_sparse_gradient_is_refused(make: Callable[..., Optimizer]) -> None:
    model = nn.Sequential(nn.Embedding(9, 3, sparse=True))
    before = model[0].weight.detach().clone()
    handle = step_in_backward(make(list(model.parameters()), lr=0.1), model, clip_norm=1.0)
    with pytest.raises(RuntimeError, match=r"the gradient of 0\.weight is sparse; make its layer"):
        model(torch.tensor([1, 7, 1])).sum().backward()
    assert_equal(model[0].weight.detach(), before)
    handle.remove()


def test_a_step_without_gradients_is_refused() -> None:
    handle = step_in_backward(SGD(make_model().parameters()))
    with pytest.raises(RuntimeError, match="call backward before"):
        handle.finish_step()


def test_a_gradient_from_before_is_refused() -> None:
    model = make_model()
    loss_of(model, 0).backward()
    model[0].weight.grad = None
    with pytest.raises(ValueError, match=r"0\.bias has a gradient already"):
        step_in_backward(SGD(model.parameters()), model)
    loss_of(model, 0).backward()
    assert model[0].weight.grad is not None  # its hook is gone


def test_a_gradient_that_no_hook_took_is_refused() -> None:
    model = make_model()
    model[0].requires_grad_(False)
    handle = step_in_backward(SGD(model.parameters()), model)
    model[0].requires_grad_(True)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"0\.weight has a gradient that was not stepped"):
        handle.finish_step()


# -- norms --------------------------------------------------------------------------------------------------


def test_clipping_is_by_the_norm_of_the_step_before_or_the_own() -> None:
    plain, model = make_model(), make_model()
    clip_norm, previous, factors = 3.0, 0.0, []
    handle = step_in_backward(SGD(model.parameters(), lr=0.01), clip_norm=clip_norm)
    for step, scale in enumerate((1, 1, 50, 1)):  # a norm that jumps, too
        grads = torch.autograd.grad(scale * loss_of(plain, step), list(plain.parameters()))
        norm = math.sqrt(sum(grad.square().sum().item() for grad in grads))
        with torch.no_grad():
            for param, grad in zip(plain.parameters(), grads, strict=True):
                factors.append(min(1.0, clip_norm / max(previous, grad.norm().item())))
                param.sub_(0.01 * factors[-1] * grad)
        previous = norm
        (scale * loss_of(model, step)).backward()
        assert handle.finish_step().item() == pytest.approx(norm, rel=1e-12)
    assert {1.0} < set(factors)  # some are clipped, and some are not
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-14)


def test_nothing_of_a_graph_of_gradients_is_kept() -> None:
    model = make_model()
    handle = step_in_backward(SGD(model.parameters(), lr=0.01))
    loss_of(model, 0).backward(create_graph=True)
    assert not handle.finish_step().requires_grad


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("clip_norm", [None, 3.0])
def test_a_broken_gradient_counts_as_zero(bad: float, clip_norm: float | None) -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    handle = step_in_backward(optimizer, clip_norm=clip_norm)
    first_norm = step_by(handle, model, 0)
    before = copy.deepcopy(model.state_dict())
    momentum = optimizer.state[model[2].weight]["momentum_buffer"].clone()

    def spoil(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad[1, 2] = bad
        return grad

    spoiler = model[2].weight.register_hook(spoil)
    assert not step_by(handle, model, 1).isfinite()
    torch.testing.assert_close(model[2].weight, before["2.weight"] - 0.01 * 0.9 * momentum)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert not model[0].weight.equal(before["0.weight"])
    assert_equal(handle.previous_norm, first_norm)
    spoiler.remove()
    assert step_by(handle, model, 2).isfinite()
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_norms_of_bf16_are_summed_in_float32() -> None:
    layer = nn.Linear(100, 100, bias=False).bfloat16()
    layer(torch.ones(1, 100).bfloat16()).sum().backward()
    wanted = layer.weight.grad.float().norm()
    layer.weight.grad = None
    handle = step_in_backward(SGD(layer.parameters(), lr=0.1))
    layer(torch.ones(1, 100).bfloat16()).sum().backward()
    assert_equal(handle.finish_step(), wanted)


class NoHostSync(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device() -> None:
    model = make_model()
    handle = step_in_backward(SGD(model.parameters(), lr=0.1, momentum=0.9), clip_norm=1.0)
    with NoHostSync():
        for step in range(2):
            step_by(handle, model, step)


# -- models and layouts -------------------------------------------------------------------------------------


def llama_trajectory(
    make: Callable[..., Optimizer], in_backward: bool, tie: bool, checkpoints: Any = "auto"
) -> tuple[dict, dict]:
    """Weights after three steps of a tiny Llama with mini-sequences, and how often each hook fired."""
    from training_samples import VOCAB, tiny_llama

    from longseq.mst import apply_mini_sequence

    model = tiny_llama(torch.float64, tie_word_embeddings=tie, num_hidden_layers=4)
    model.model.layers[0].mlp.up_proj.requires_grad_(False)
    apply_mini_sequence(model, tile_tokens=10, checkpoints=checkpoints)
    fired = dict.fromkeys((name for name, param in model.named_parameters() if param.requires_grad), 0)

    def count(name: str, _: Tensor) -> None:
        fired[name] += 1

    for name, param in model.named_parameters():
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(partial(count, name))
    optimizer = make(list(model.named_parameters()), lr=0.01)
    handle = step_in_backward(optimizer, model) if in_backward else None
    for step in range(3):
        ids = torch.randint(0, VOCAB, (1, 37), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        (handle.finish_step if handle else optimizer.step)()
        optimizer.zero_grad()
    return {name: param.detach() for name, param in model.named_parameters()}, fired


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_mini_sequences_hand_out_each_gradient_once(every: int, tie: bool) -> None:
    from longseq.mst.placement import Placement

    wanted, _ = llama_trajectory(AdamW, False, tie, Placement(every=every))
    got, fired = llama_trajectory(AdamW, True, tie, Placement(every=every))
    assert_equal(got, wanted)
    assert set(fired.values()) == {3}


def test_apollo_steps_in_backward() -> None:
    from longseq.apollo.optimizer import Apollo

    wanted, _ = llama_trajectory(Apollo, False, tie=True)
    got, _ = llama_trajectory(Apollo, True, tie=True)
    assert_equal(got, wanted)


def quantized_model() -> nn.Module:
    from longseq.apollo.quantized import quantize_linears

    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(33, 65), nn.Tanh(), nn.Linear(65, 31))
    quantize_linears(model)
    return model


def test_quantised_weights_are_stepped_in_backward() -> None:
    from longseq.apollo.optimizer import Apollo

    plain, model = quantized_model(), quantized_model()
    plain_optimizer, optimizer = (Apollo(one.named_parameters(), rank=3) for one in (plain, model))
    handle = step_in_backward(optimizer, model)
    before = copy.deepcopy(model.state_dict())
    for _ in range(STEPS):
        x = torch.randn(5, 33)
        plain(x).square().sum().backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        model(x).square().sum().backward()
        handle.finish_step()
    assert_equal(model.state_dict(), plain.state_dict())
    assert all(not value.equal(before[name]) for name, value in model.state_dict().items() if "codes" in name)


def test_a_fused_optimizer_of_quantised_weights_is_refused() -> None:
    model = quantized_model()
    step_in_backward(AdamW(model.parameters(), fused=True), model)
    with pytest.raises(ValueError, match=r"cannot write the quantised 2\.weight"):
        model(torch.randn(5, 33)).sum().backward()


class _Engine(nn.Module):
    def zero_optimization(self) -> bool:
        return True


def test_what_cannot_be_stepped_in_backward_is_refused() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="above 0"):
        step_in_backward(SGD(model.parameters()), clip_norm=0.0)
    with pytest.raises(ValueError, match="optimizer=LBFGS"):
        step_in_backward(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="DeepSpeed"):
        step_in_backward(SGD(model.parameters()), _Engine())
    model[2].bias.ds_id = 0
    with pytest.raises(ValueError, match="DeepSpeed"):
        step_in_backward(SGD(model.parameters()))


def sharded_case(
    in_backward: bool,
    mesh_shape: tuple[int, ...] = (2,),
    clip_norm: float | None = None,
    apollo: bool = False,
) -> dict:
    """Weights and norms of steps over ranks that take different rows."""
    from torch.distributed.fsdp import fully_shard

    from longseq.apollo.optimizer import Apollo

    model = make_model()
    if in_backward:
        names = ("replicate", "shard")[-len(mesh_shape) :]
        mesh = dist.init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
    optimizer, schedule = make_optimizer(partial(Apollo, rank=2) if apollo else AdamW, model)
    handle = step_in_backward(optimizer, model, clip_norm=clip_norm) if in_backward or clip_norm else None
    world, norms = dist.get_world_size(), []
    for step in range(STEPS):
        if in_backward:
            loss_of(model, world * step + dist.get_rank()).backward()
        else:
            sum(loss_of(model, world * step + rank) for rank in range(world)).div(world).backward()
        if handle:
            norms.append(handle.finish_step())
        else:
            norms.append(nn.utils.get_total_norm([param.grad for param in model.parameters()]))
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
    whole = {
        name: value.full_tensor() if in_backward else value for name, value in model.state_dict().items()
    }
    return {"weights": whole, "norms": norms}


def refused_case() -> list[str]:
    """Reasons for which wrapped models are refused."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    reasons = []
    for wrap in (DistributedDataParallel, partial(FullyShardedDataParallel, device_id=torch.device("cpu"))):
        model = nn.Sequential(wrap(make_model()))
        try:
            step_in_backward(SGD(model.parameters()), model)
        except ValueError as error:
            reasons.append(str(error))
    return reasons


@pytest.mark.slow  # two processes are started, and DTensor meets every operation for the first time
def test_over_ranks() -> None:
    cases: dict[str, Any] = {"refused": (refused_case, {})}
    settings: dict[str, dict[str, Any]] = {
        "adamw": {},
        "hybrid": {"mesh_shape": (2, 1)},
        "clipped": {"clip_norm": 3.0},
        "apollo": {"apollo": True},
    }
    for name, options in settings.items():
        for in_backward in (False, True):
            cases[f"{name} {in_backward}"] = sharded_case, {"in_backward": in_backward, **options}
    returned = run_cases(2, cases)
    for rank in range(2):
        for name in settings:
            got, wanted = (returned[f"{name} {in_backward}"][rank] for in_backward in (True, False))
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        reasons = [reason.split()[0] for reason in returned["refused"][rank]]
        assert reasons == ["DistributedDataParallel", "FullyShardedDataParallel"]
    weights = [returned[f"{name} False"][0]["weights"]["0.weight"] for name in ("adamw", "clipped", "apollo")]
    assert not any(one.equal(other) for one, other in itertools.combinations(weights, 2))
