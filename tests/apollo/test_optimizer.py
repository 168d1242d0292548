"""`Apollo` on one process: its steps are the formulas, computed here in numpy, its options are checked."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from apollo_samples import elements, gradients, net, net_steps, walk, weight_of
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode

from longseq.apollo import Apollo, parameter_groups

SHAPES = [(11, 5), (5, 11), (7, 7), (3, 6, 4), (2, 3, 8)]
KINDS = ["channel", "tensor"]


# -- the formulas, in numpy ---------------------------------------------------------------------------------


def numpy_signs(key: int, rank: int, size: int) -> NDArray[np.float64]:
    """`(rank, size)`: bits of Philox-4x32-10, in Python's integers."""
    z, word = np.empty((rank, size)), 0xFFFFFFFF
    for column in range(size):
        for block in range(-(-rank // 128)):
            c, k = [column, block, 0, 0], [key & word, key >> 32]
            for _ in range(10):
                a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
                c = [(b >> 32) ^ c[1] ^ k[0], b & word, (a >> 32) ^ c[3] ^ k[1], a & word]
                k = [(k[0] + 0x9E3779B9) & word, (k[1] + 0xBB67AE85) & word]
            for row in range(128 * block, min(rank, 128 * block + 128)):
                z[row, column] = 1 - 2 * (c[row // 32 % 4] >> row % 32 & 1)
    return z


def key_of(seed: int, name: str, epoch: int) -> int:
    """BLAKE2 of the name, and SplitMix64 of that and the epoch."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")
    key = (key + (epoch + 1) * 0x9E3779B97F4A7C15) % 2**64
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB % 2**64
    return key ^ (key >> 31)


class Reference:
    """One matrix of a weight."""

    def __init__(self, weight: Tensor, name: str, **options: Any) -> None:
        self.weight, self.name, self.options = weight.double().numpy().copy(), name, options
        self.step, self.norm, self.limits = 0, 0.0, []
        shape = max(self.weight.shape), options["rank"]
        self.exp_avg, self.exp_avg_sq = np.zeros(shape), np.zeros(shape)

    def update(self, grad: Tensor) -> None:
        o, (beta_1, beta_2) = self.options, self.options["betas"]
        self.step += 1
        g = grad.double().numpy()
        tall = g.shape[0] >= g.shape[1]
        g = g if tall else g.T
        key = key_of(o["seed"], self.name, (self.step - 1) // o["update_gap"])
        r = g @ numpy_signs(key, o["rank"], g.shape[1]).T / np.sqrt(o["rank"])
        self.exp_avg = beta_1 * self.exp_avg + (1 - beta_1) * r
        self.exp_avg_sq = beta_2 * self.exp_avg_sq + (1 - beta_2) * r**2
        normed = self.exp_avg / (np.sqrt(self.exp_avg_sq) + o["eps"])
        axis = 1 if o["scale_type"] == "channel" else None
        norms = [np.sqrt((x**2).sum(axis=axis, keepdims=True)) for x in (normed, r)]
        update = norms[0] / (norms[1] + 1e-8) * g
        norm, growth = np.sqrt((update**2).sum()), o["norm_growth_limit"]
        limit = 1.0
        if growth is not None and self.norm > 0:
            limit = max(norm / (self.norm + 1e-8), growth) / growth
        self.limits.append(limit)
        self.norm = norm / limit
        bias = np.sqrt(1 - beta_2**self.step) / (1 - beta_1**self.step)
        update = update if tall else update.T
        self.weight = self.weight * (1 - o["lr"] * o["weight_decay"])
        self.weight = self.weight - o["lr"] * bias * o["alpha"] / limit * update


OPTIONS: dict[str, Any] = {
    "lr": 0.05,
    "rank": 2,
    "scale_type": "channel",
    "update_gap": 2,
    "alpha": 1.0,
    "betas": (0.9, 0.999),
    "eps": 1e-6,
    "weight_decay": 0.1,
    "norm_growth_limit": 1.01,
    "seed": 0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "alpha": {"alpha": 2.5},
    "betas": {"betas": (0.8, 0.95)},
    "no momentum": {"betas": (0.0, 0.99)},
    "eps": {"eps": 0.1},
    "no decay": {"weight_decay": 0.0},
    "no limit": {"norm_growth_limit": None},
    "a wide limit": {"norm_growth_limit": 1.2, "alpha": 3.0},
    "a gap of one": {"update_gap": 1},
    "a gap of three": {"update_gap": 3},
    "seed": {"seed": 5},
    "rank": {"rank": 1},
}


def matrices(value: Tensor) -> Tensor:
    return value if value.dim() == 3 else value.unsqueeze(0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_are_the_formulas(shape: tuple[int, ...], kind: str, variant: str) -> None:
    options = {**OPTIONS, "scale_type": kind, **VARIANTS[variant]}
    param, name = weight_of(shape), "layers.0.weight"
    references = [
        Reference(one, f"{name}[{i}]" if len(shape) == 3 else name, **options)
        for i, one in enumerate(matrices(param.detach()))
    ]
    optimizer = Apollo([(name, param)], **options)
    for grad in gradients(shape):
        param.grad = grad.clone()
        optimizer.step()
        assert param.grad.equal(grad), "it is the caller's"
        for reference, one in zip(references, matrices(grad), strict=True):
            reference.update(one)
        state = optimizer.state[param]
        found = {
            "weight": matrices(param.detach()),
            "exp_avg": matrices(state["exp_avg"]),
            "exp_avg_sq": matrices(state["exp_avg_sq"]),
            "norm": state["update_norm"].reshape(-1),
        }
        for key, values in found.items():
            wanted = torch.stack([torch.as_tensor(getattr(one, key)) for one in references])
            torch.testing.assert_close(values, wanted, rtol=1e-12, atol=1e-12, msg=key)
    limits = [limit > 1 for one in references for limit in one.limits]
    assert not all(limits)
    if variant in ("as it is", "alpha", "a wide limit", "no limit"):
        assert any(limits) == (variant != "no limit")


def test_a_rank_above_128() -> None:
    param, options = weight_of((150, 140)), {**OPTIONS, "rank": 131}
    reference = Reference(param.detach(), "w", **options)
    [grad] = gradients((150, 140), 1)
    reference.update(grad)
    found = walk(Apollo([("w", param)], **options), param, [grad])
    torch.testing.assert_close(found, torch.from_numpy(reference.weight), rtol=1e-12, atol=1e-12)


def test_defaults_are_the_papers() -> None:
    param = weight_of((300, 260))
    [group] = Apollo([param]).param_groups
    assert (group["rank"], group["alpha"], group["update_gap"]) == (256, 1.0, 200)
    assert (group["norm_growth_limit"], group["betas"], group["eps"]) == (1.01, (0.9, 0.999), 1e-6)
    [group] = Apollo([param], scale_type="tensor").param_groups
    assert group["rank"] == 1
    assert group["alpha"] == pytest.approx(math.sqrt(128))
    # An update then is as large as one of APOLLO, whose scale is sqrt(width) times as large in the mean.
    two = [walk(Apollo([param], lr=0.0, scale_type=kind), param, gradients((300, 260), 1)) for kind in KINDS]
    assert two[0].equal(two[1])


@pytest.mark.parametrize("kind", KINDS)
def test_equal_shapes_are_not_projected_alike(kind: str) -> None:
    one = weight_of((7, 5))
    two = nn.Parameter(one.detach().clone())
    optimizer = Apollo([("a", one), ("b", two)], rank=2, scale_type=kind)
    one.grad = gradients((7, 5), 1)[0]
    two.grad = one.grad.clone()
    optimizer.step()
    assert not optimizer.state[one]["exp_avg"].equal(optimizer.state[two]["exp_avg"])


# -- gradients that are zero, missing, late -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_zero_gradients_move_nothing_and_hold_nothing_down(kind: str, dtype: torch.dtype) -> None:
    options = {"rank": 2, "scale_type": kind, "lr": 0.1, "betas": (0.0, 0.0)}
    grad = torch.randn(9, 5).to(dtype)
    zero = torch.zeros_like(grad)
    param = weight_of((9, 5), dtype)
    before = param.detach().clone()
    optimizer = Apollo([("w", param)], **options)
    assert walk(optimizer, param, [zero, zero]).equal(before)
    moved = [walk(optimizer, param, [grad]) - before]
    walk(optimizer, param, [zero, zero])
    assert all(value.isfinite().all() for value in optimizer.state[param].values())
    assert optimizer.state[param]["update_norm"] == 0
    before = param.detach().clone()
    moved.append(walk(optimizer, param, [grad]) - before)
    # Without betas each step is the same but for rounding: no growth is limited after a step of zeros.
    first, second = (one.double().norm() for one in moved)
    assert first > 0
    assert second == pytest.approx(float(first), rel=0.05 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_vanishes_stays_finite(kind: str) -> None:
    """In float32 the scale of what is left of a momentum is large."""
    param = weight_of((64, 48), torch.float32)
    optimizer = Apollo([("w", param)], rank=16, scale_type=kind, lr=1e-3)
    for size in (1.0, 1e-12, 1e-30, 0.0, 1e-20, 1.0, 1e15, 1.0):
        walk(optimizer, param, [size * torch.randn(64, 48)])
        assert param.isfinite().all()
        assert all(value.isfinite().all() for value in optimizer.state[param].values())


def test_missing_late_and_frozen() -> None:
    params = {name: weight_of((7, 5)) for name in ("here", "late", "never", "frozen")}
    params["frozen"].requires_grad_(False)
    before = {name: param.detach().clone() for name, param in params.items()}
    optimizer = Apollo(params.items(), rank=2, lr=0.1, weight_decay=0.5, update_gap=2)
    alone = nn.Parameter(params["late"].detach().clone())
    grads = gradients((7, 5))
    for step, grad in enumerate(grads):
        params["here"].grad = grad.clone()
        params["late"].grad = grad.clone() if step >= 3 else None
        optimizer.step()
    assert params["never"].equal(before["never"])
    assert params["frozen"].equal(before["frozen"])
    assert set(optimizer.state) == {params["here"], params["late"]}
    # A parameter's steps are its own: late ones are its first.
    other = Apollo([("late", alone)], rank=2, lr=0.1, weight_decay=0.5, update_gap=2)
    assert walk(other, alone, grads[3:]).equal(params["late"])
    assert int(optimizer.state[params["late"]]["step"]) == 2


# -- what gets AdamW ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "rank"),
    [((), 2), ((7,), 2), ((3, 4, 2, 2), 2), ((5, 9), 5), ((9, 5), 6), ((4, 3, 9), 3)],
    ids=str,
)
def test_what_is_not_projected_is_as_with_adamw(shape: tuple[int, ...], rank: int) -> None:
    """Other dimensions than two and three, and a shorter side that the rank is not below."""
    settings: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    param = weight_of(shape)
    plain = nn.Parameter(param.detach().clone())
    optimizer, adamw = Apollo([("w", param)], rank=rank, **settings), torch.optim.AdamW([plain], **settings)
    for grad in gradients(shape):
        plain.grad = grad.clone()
        adamw.step()
        torch.testing.assert_close(walk(optimizer, param, [grad]), plain.detach(), rtol=1e-13, atol=1e-15)
    state = optimizer.state[param]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == param.shape


@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "master"])
def test_channels_last_is_as_channels_first(rounding: str) -> None:
    first, last = (weight_of((5, 3, 2, 4), torch.bfloat16) for _ in range(2))
    last.data = last.data.to(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    for param in (first, last):
        optimizer = Apollo([("kernel", param)], lr=0.1, rounding=rounding)
        walk(optimizer, param, gradients(param.shape, 3, torch.bfloat16))
    assert not last.is_contiguous()
    assert last.equal(first)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_around_a_step_changes_nothing(kind: str) -> None:
    first, second = (weight_of((9, 7), torch.float32) for _ in range(2))
    optimizers = [
        Apollo([("w", w)], rank=1 if kind == "tensor" else 2, scale_type=kind) for w in (first, second)
    ]
    walk(optimizers[0], first, gradients((9, 7), 3, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        walk(optimizers[1], second, gradients((9, 7), 3, torch.float32))
    assert second.equal(first)


def test_groups_have_options_of_their_own() -> None:
    shapes, grads = ((7, 5), (5, 8), (6, 6)), {}
    own: list[dict[str, Any]] = [
        {"rank": 3},
        {"scale_type": "tensor", "rank": None, "lr": 0.2, "weight_decay": 0.3, "update_gap": 1, "seed": 4},
        {"rule": "adamw", "betas": (0.5, 0.6), "eps": 1e-3},
    ]
    params = [weight_of(shape) for shape in shapes]
    groups = [
        {"params": [(f"w{i}", param)], **more}
        for i, (param, more) in enumerate(zip(params, own, strict=True))
    ]
    optimizer = Apollo(groups, lr=0.1, update_gap=2)
    others = [nn.Parameter(param.detach().clone()) for param in params]
    alone = [
        Apollo(
            [(f"w{i}", other)],
            **{"lr": 0.1, "update_gap": 2, **{k: v for k, v in more.items() if k != "rule"}},
        )
        for i, (other, more) in enumerate(zip(others, own, strict=True))
    ]
    alone[2] = torch.optim.AdamW([others[2]], lr=0.1, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.0)
    for step in range(3):
        for param, other, shape in zip(params, others, shapes, strict=True):
            grads = gradients(shape)[step]
            param.grad, other.grad = grads.clone(), grads.clone()
        optimizer.step()
        for one in alone:
            one.step()
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-13, atol=1e-15)


# -- schedules ----------------------------------------------------------------------------------------------


def test_schedules_and_a_closure() -> None:
    model, by_hand = net(), net()
    optimizer, plain = (Apollo(one.named_parameters(), rank=2, lr=0.1) for one in (model, by_hand))
    schedule = CosineAnnealingLR(optimizer, 5)
    for step in range(4):
        net_steps(model, optimizer, [step])
        schedule.step()
        plain.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * step / 5)) / 2
        net_steps(by_hand, plain, [step])
    for found, wanted in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found, wanted)
    LambdaLR(optimizer, lambda step: 0.0)
    before = [param.detach().clone() for param in model.parameters()]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.arange(13)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert all(now.equal(then) for now, then in zip(model.parameters(), before, strict=True)), "lr is 0"


# -- narrow weights -----------------------------------------------------------------------------------------


def bf16_walk(seed: int) -> tuple[Tensor, Apollo]:
    """Updates below what a bf16 weight is rounded to the nearest by."""
    param = nn.Parameter(torch.full((24, 16), 1.0, dtype=torch.bfloat16))
    optimizer = Apollo([("w", param)], rank=4, lr=1e-3, rounding="stochastic", seed=seed)
    walk(optimizer, param, bf16_grads())
    return param.detach().float(), optimizer


def bf16_grads() -> list[Tensor]:
    draw = torch.Generator().manual_seed(5)
    return [(1 + 0.1 * torch.randn(24, 16, generator=draw)).bfloat16() for _ in range(6)]


def float32_walk(seed: int) -> Tensor:
    param = nn.Parameter(torch.ones(24, 16))
    optimizer = Apollo([("w", param)], rank=4, lr=1e-3, seed=seed)
    return walk(optimizer, param, [grad.float() for grad in bf16_grads()])


def test_stochastic_rounding_moves_bf16_weights_by_the_mean() -> None:
    moved, wanted = torch.zeros(24, 16), torch.zeros(24, 16)
    count = 60
    for seed in range(count):
        found, optimizer = bf16_walk(seed)
        moved += (found - 1) / count
        wanted += (float32_walk(seed) - 1) / count
    # Steps below 1 are 2^-8: of 384 means of 60 walks of 6 roundings the largest error is some 4 deviations.
    deviation = 2**-8 * math.sqrt(6 / 4 / count)
    assert (moved - wanted).abs().max() < 4.5 * deviation
    assert (moved - wanted).mean().abs() < 4 * deviation / math.sqrt(384)
    assert wanted.mean() < -2 * deviation, "and it is no rounding to nothing"
    assert {value.dtype for value in optimizer.state_dict()["state"][0].values()} == {torch.float32}


def test_nearest_rounding_loses_small_updates() -> None:
    param = nn.Parameter(torch.ones(24, 16, dtype=torch.bfloat16))
    optimizer = Apollo([("w", param)], rank=4, lr=1e-4, rounding="nearest")
    assert walk(optimizer, param, bf16_grads()).eq(1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_master_is_the_float32_walk_and_the_weight_its_rounding(kind: str) -> None:
    param = nn.Parameter(torch.randn(24, 16, dtype=torch.bfloat16))
    wide = nn.Parameter(param.detach().float())
    options: dict[str, Any] = {"rank": 4, "scale_type": kind, "lr": 1e-3, "weight_decay": 0.1}
    optimizer = Apollo([("w", param)], **options, rounding="master")
    wanted = walk(Apollo([("w", wide)], **options), wide, [grad.float() for grad in bf16_grads()])
    found = walk(optimizer, param, bf16_grads())
    torch.testing.assert_close(optimizer.state[param]["master"], wanted, rtol=1e-6, atol=1e-7)
    assert found.equal(optimizer.state[param]["master"].bfloat16())
    assert elements(optimizer) == 2 * 24 * 4 + 2 + 24 * 16


@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "master"])
def test_many_rows_are_rounded_as_few(rounding: str) -> None:
    """A weight that needs a wider copy is taken in slices of rows."""
    torch.manual_seed(4)
    weight, grad = torch.randn(2100, 3).bfloat16(), torch.randn(2100, 3).bfloat16()
    found = []
    for transposed in (False, True):
        param = nn.Parameter(weight.clone())
        given = grad.clone()
        if transposed:  # the same values, of other strides
            param = nn.Parameter(weight.t().contiguous().t())
            given = grad.t().contiguous().t()
        optimizer = Apollo([("w", param)], rank=2, lr=0.1, rounding=rounding, weight_decay=0.1)
        param.grad = given
        optimizer.step()
        found.append(param.detach().clone())
    assert found[0].equal(found[1])
    wide = nn.Parameter(weight.float())
    wanted = walk(Apollo([("w", wide)], rank=2, lr=0.1, weight_decay=0.1), wide, [grad.float()])
    assert ((found[0].float() - wanted).abs() <= wanted.abs() / 128 + 1e-6).all()


# -- no step waits for a device -----------------------------------------------------------------------------


class NoReading(TorchDispatchMode):
    """Values of the tensors of a device may not be asked for; here that device is `meta`, which has none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        for arg in args:
            if isinstance(arg, Tensor) and arg.device.type == "meta":
                assert "_local_scalar_dense" not in name, "the step waits"
                assert "nonzero" not in name, "the step waits"
        if name.startswith("aten._to_copy") and args[0].device.type == "meta":
            assert (kwargs or {}).get("device") in (None, torch.device("meta")), "the step waits"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", [None, "adamw", "factored"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_nothing_of_the_device(kind: str, rule: str | None) -> None:
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in ((9, 5), (5, 9))]
    if rule != "factored":
        params += [nn.Parameter(torch.empty(shape, device="meta")) for shape in ((7,), (3, 6, 4))]
    optimizer = Apollo(
        [{"params": params, "rule": rule if rule != "adamw" else None}], rank=2, scale_type=kind
    )
    with NoReading():
        for _ in range(3):
            for param in params:
                param.grad = torch.empty_like(param)
            optimizer.step()
    assert all(state["step"].device.type == "cpu" for state in optimizer.state.values())
    with NoReading(), pytest.raises((AssertionError, RuntimeError)):
        float(params[0].sum())


# -- what is refused ----------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "lr": ({"lr": -1.0}, "lr=-1.0 must be 0 or above"),
    "lr NaN": ({"lr": math.nan}, "lr=nan must be 0 or above"),
    "rank": ({"rank": 0}, "rank=0 must be a whole number from 1"),
    "rank float": ({"rank": 2.0}, "rank=2.0 must be a whole number from 1"),
    "rank bool": ({"rank": True}, "rank=True must be a whole number from 1"),
    "scale_type": ({"scale_type": "row"}, "scale_type='row' must be 'channel' or 'tensor'"),
    "update_gap": ({"update_gap": 0}, "update_gap=0 must be a whole number from 1"),
    "alpha": ({"alpha": 0.0}, "alpha=0.0 must be above 0"),
    "betas": ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) must each be from 0 to below 1"),
    "eps": ({"eps": 0.0}, "eps=0.0 must be above 0"),
    "weight_decay": ({"weight_decay": -0.1}, "weight_decay=-0.1 must be 0 or above"),
    "norm_growth_limit": ({"norm_growth_limit": 1.0}, "norm_growth_limit=1.0 must be above 1, or None"),
    "rounding": ({"rounding": "up"}, r"rounding='up' must be one of \('stochastic', 'nearest', 'master'\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_option_out_of_range_is_named(name: str) -> None:
    options, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        Apollo([weight_of((4, 3))], **options)
    with pytest.raises(ValueError, match=message):
        Apollo([{"params": [weight_of((4, 3))], **options}])


def test_all_wrong_options_are_named_at_once() -> None:
    options = {key: value for given, _ in WRONG.values() for key, value in given.items()}
    with pytest.raises(ValueError, match="lr=") as raised:
        Apollo([{"params": [weight_of((4, 3))], "rule": "sgd"}], **options)
    assert str(raised.value).count("must") == len(options) + 1
    assert "rule='sgd' must be None or one of" in str(raised.value)


def test_names_are_the_parameters_own() -> None:
    params = [weight_of((4, 3)), weight_of((4, 3))]
    for names in (["a"], ["a", "a"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match="give each one its own name"):
            Apollo([{"params": params, "names": names}])
    with pytest.raises(ValueError, match="give each one its own name"):
        Apollo([{"params": [param], "names": ["a"]} for param in params])
    unnamed = Apollo([{"params": [param]} for param in params])
    assert [group["names"] for group in unnamed.param_groups] == [["0.0"], ["1.0"]]


def test_no_parameters_are_refused() -> None:
    given = nn.Linear(3, 4).parameters()
    assert list(given)  # and nothing is left in it
    with pytest.raises(ValueError, match="empty parameter list"):
        Apollo(given)


def test_a_sparse_gradient_is_refused() -> None:
    layer = nn.Embedding(7, 5, sparse=True)
    optimizer = Apollo([("table", layer.weight)], rank=2)
    layer(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="gradient of table is sparse; make its layer with sparse=False"):
        optimizer.step()


def test_step_parameters_knows_its_own() -> None:
    params = [weight_of((4, 3)), weight_of((4, 3))]
    optimizer = Apollo([("a", params[0])], rank=2)
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(KeyError):
        optimizer.step_parameters(params)
    optimizer.add_param_group({"params": [("b", params[1])]})
    optimizer.step_parameters(params)
    assert len(optimizer.state) == 2


# -- and it trains ------------------------------------------------------------------------------------------


VOCAB = 64


class NextToken(nn.Module):
    """Logits of what follows from two tokens."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, width)
        self.up, self.down = (nn.Linear(*size, bias=False) for size in ((2 * width, 128), (128, width)))
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        pairs = torch.cat([x[:, 1:], x[:, :-1]], dim=-1)
        return self.lm_head(self.norm(self.down(F.silu(self.up(pairs)))))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens as frequent as words are, most of them rare, which SGD learns last; and what follows."""
    draw = torch.Generator().manual_seed(step)
    frequencies = 1 / torch.arange(1.0, VOCAB + 1)
    ids = torch.multinomial(frequencies.expand(16, -1), 33, replacement=True, generator=draw)
    follows = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(9))
    return ids, follows[(ids[:, 1:] + 7 * (ids[:, :-1] % 2)) % VOCAB]


def trained(name: str, lr: float, steps: int = 40) -> float:
    """Mean loss of the last ten steps."""
    torch.manual_seed(0)
    model, losses = NextToken(), []
    optimizer: torch.optim.Optimizer
    if name in ("SGD", "AdamW"):
        optimizer = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}[name](model.parameters(), lr=lr)
    else:
        kind: Any = {"APOLLO": {"rank": 8}, "APOLLO-Mini": {"scale_type": "tensor"}}[name]
        optimizer = Apollo(parameter_groups(model), lr=lr, update_gap=10, **kind)
    for step in range(steps):
        ids, following = batch(step)
        loss = F.cross_entropy(model(ids).transpose(1, 2), following)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-10:]) / 10


def test_it_trains_as_adamw_does() -> None:
    adamw, apollo, mini = (trained(name, 0.03) for name in ("AdamW", "APOLLO", "APOLLO-Mini"))
    sgd = min(trained("SGD", lr) for lr in (0.5, 1.0, 2.0))  # no larger rate converges
    assert adamw < 0.1  # from log(64) = 4.2
    assert apollo < adamw + 0.15
    assert mini < adamw + 0.1
    assert sgd > 3 * max(apollo, mini)
