"""Linear maps, norms and MLPs on tiles: their gradients by hand are those of autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from layer_problems import make_model
from numerics import relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from longseq.mst.linear_map import JointMap, LinearMap, ModuleMap, token_map
from longseq.mst.mlp_half import GatedMLP, MLPHalf, ModuleMLP
from longseq.mst.token_norm import ModuleNorm, RMSNorm, is_rms_norm, token_norm
from longseq.mst.weight_sums import WeightSums, add_product

T, IN, OUT = 13, 12, 20
F64 = torch.float64
KINDS = ["plain", "bias", "lora", "lora with bias", "lora, frozen base", "dora", "other module"]


@pytest.fixture(autouse=True)
def _outside_of_autograd() -> Iterator[None]:
    """As the code that is tested runs."""
    with torch.no_grad():
        yield


class Squared(nn.Module):
    """A token-wise module that is no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).square()


def make_layer(kind: str) -> nn.Module:
    if kind == "other module":
        return Squared().to(F64)
    linear = nn.Linear(IN, OUT, bias="bias" in kind)
    if kind in ("plain", "bias"):
        return linear.to(F64)
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["0"], use_dora=kind == "dora")
    layer = peft.get_peft_model(nn.Sequential(linear), config).base_model.model[0].to(F64)
    nn.init.normal_(layer.lora_B["default"].weight)
    layer.get_base_layer().requires_grad_(kind != "lora, frozen base")
    return layer


def by_autograd(function: Callable, x: Tensor, grad: Tensor, params: list[Tensor]) -> tuple[Tensor, ...]:
    """Output, and the gradients of x and of the weights."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        y = function(x)
    return (y.detach(), *torch.autograd.grad(y, [x, *params], grad))


def trained(module: nn.Module) -> list[Tensor]:
    return [param for param in module.parameters() if param.requires_grad]


def assert_close(found: list[Any], wanted: tuple[Tensor, ...]) -> None:
    assert len(found) == len(wanted)
    for number, (mine, true) in enumerate(zip(found, wanted, strict=True)):
        assert relative_error(mine, true) < 1e-12, number


# -- linear maps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiles", [(T,), (5, 5, 3), (1, 12, 0)])
def test_a_map_and_its_gradients(kind: str, tiles: tuple[int, ...]) -> None:
    layer = make_layer(kind)
    x, grad, residual, seed = (torch.randn(T, n, dtype=F64) for n in (IN, OUT, OUT, IN))
    wanted = by_autograd(layer, x, grad, trained(layer))
    one, sums = token_map(layer, F64, None), WeightSums(layer.parameters())
    assert isinstance(one, ModuleMap if kind in ("dora", "other module") else LinearMap)
    outputs, grads = [], []
    for part, part_grad, rest, start in zip(
        *(t.split(tiles) for t in (x, grad, residual, seed)), strict=True
    ):
        outputs.append(one.forward(part, residual=rest) - rest)
        assert torch.equal(one.forward(part, out=torch.full_like(part_grad, torch.nan)), one.forward(part))
        grads.append(one.backward(part, part_grad, sums, add_to=start.clone()) - start)
    assert_close([torch.cat(outputs), torch.cat(grads), *sums.totals(trained(layer))], wanted)


@pytest.mark.parametrize("kind", ["plain", "bias", "lora with bias"])
def test_gradients_of_columns_and_rows(kind: str) -> None:
    """Columns of the input's gradient, and the weights' from rows of the output."""
    layer = make_layer(kind)
    x, grad = torch.randn(T, IN, dtype=F64), torch.randn(T, OUT, dtype=F64)
    wanted = by_autograd(layer, x, grad, trained(layer))
    one, sums = token_map(layer, F64, None), WeightSums(layer.parameters())
    columns = [one.input_grad(grad, columns=slice(start, start + 4)) for start in (0, 4, 8)]
    for rows in (slice(0, 7), slice(7, OUT)):
        one.add_weight_grads(x, grad[:, rows], sums, rows)
    assert_close([torch.cat(columns, dim=1), *sums.totals(trained(layer))], wanted[1:])


def test_a_residual_of_a_wider_dtype_is_added_wide() -> None:
    one = LinearMap(torch.randn(OUT, IN), torch.randn(OUT), None, torch.bfloat16)
    x, residual = torch.randn(T, IN).bfloat16(), torch.randn(T, OUT)
    y = one.forward(x, residual=residual)
    assert y.dtype == torch.float32
    assert torch.equal(y, residual + one.forward(x))


@pytest.mark.parametrize("kinds", [("plain",) * 3, ("bias", "plain", "lora with bias"), ("lora",) * 3])
def test_maps_of_one_input_as_one_product(kinds: tuple[str, ...]) -> None:
    layers = [make_layer(kind) for kind in kinds]
    rows = [slice(0, 20), slice(4, 9), slice(10, 20)]
    params = [param for layer in layers for param in trained(layer)]
    x = torch.randn(T, IN, dtype=F64)
    grads = [torch.randn(T, row.stop - row.start, dtype=F64) for row in rows]

    def apart(x: Tensor) -> Tensor:
        return torch.cat([layer(x)[:, row] for layer, row in zip(layers, rows, strict=True)], dim=1)

    wanted = by_autograd(apart, x, torch.cat(grads, dim=1), params)
    joint = JointMap([(token_map(layer, F64, None), row) for layer, row in zip(layers, rows, strict=True)])
    out, sums = torch.full((T, 35), torch.nan, dtype=F64), WeightSums(params)
    joint.forward(x, out)
    joint.add_weight_grads(x, grads, sums)
    assert_close([out, joint.input_grad(torch.cat(grads, dim=1)), *sums.totals(params)], wanted)
    # Piece by piece, as where the queries' gradient lies apart from the others'.
    first = joint.input_grad(grads[0])
    both = joint.input_grad(torch.cat(grads[1:], dim=1), first=20, add_to=first)
    assert relative_error(both, wanted[1]) < 1e-12


def test_one_weight_in_several_maps_gets_the_sum() -> None:
    layer = make_layer("bias")
    x, grad = torch.randn(T, IN, dtype=F64), torch.randn(T, OUT, dtype=F64)
    wanted = by_autograd(lambda x: layer(x) + layer(2 * x), x, grad, trained(layer))
    sums = WeightSums(layer.parameters())
    for factor in (1.0, 2.0):
        token_map(layer, F64, None).add_weight_grads(factor * x, grad, sums)
        sums.finish()  # rounded in between
    assert_close(sums.totals(trained(layer)), wanted[2:])


# -- sums -----------------------------------------------------------------------------------------------


def test_small_gradients_of_many_tiles_are_not_lost() -> None:
    """In bfloat16, 256 + 1 is 256."""
    weight = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    sums, one = WeightSums([weight]), torch.ones(1, 1, dtype=torch.bfloat16)
    for _ in range(1000):
        sums.add_product(weight, one, one)
    (total,) = sums.totals([weight])
    assert total.dtype == torch.bfloat16
    assert total.item() == 1000


def test_who_is_summed() -> None:
    frozen, trained, other = (torch.zeros(3, requires_grad=bool(n)) for n in range(3))
    sums = WeightSums([frozen, trained])
    assert [sums.wants(param) for param in (frozen, trained, other, None)] == [False, True, False, False]
    sums.add(frozen, torch.ones(3))
    sums.add(other, torch.ones(3))
    sums.add(trained, None)
    assert sums.totals([trained]) == [None]
    sums.add(trained, torch.ones(3))
    assert torch.equal(sums.totals([trained])[0], torch.ones(3))
    assert sums.totals([trained]) == [None]  # handed out once


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64], ids=str)
def test_a_product_is_added_in_the_precision_of_the_sum(dtype: torch.dtype) -> None:
    left, right = torch.randn(5, T).to(dtype), torch.randn(T, 7).to(dtype)
    total = torch.randn(5, 7, dtype=torch.promote_types(dtype, torch.float32))
    wanted = total.double() + left.double() @ right.double()
    add_product(total, left, right)
    assert relative_error(total, wanted) < (1e-14 if dtype == F64 else 1e-6)


def test_a_sum_of_a_transposed_weight() -> None:
    weight = torch.zeros(IN, OUT, dtype=F64).t().requires_grad_()
    sums = WeightSums([weight])
    grad, x = torch.randn(T, OUT, dtype=F64), torch.randn(T, IN, dtype=F64)
    sums.add_product(weight, grad, x)
    assert relative_error(sums.totals([weight])[0], grad.t() @ x) < 1e-14


# -- norms ----------------------------------------------------------------------------------------------


def norms() -> dict[str, nn.Module]:
    found = {
        "llama": make_model("llama").model.layers[0].input_layernorm,
        "gemma2": make_model("gemma2").model.layers[0].input_layernorm,
        "torch": nn.RMSNorm(48, eps=1e-5),
        "layer norm": nn.LayerNorm(48),
    }
    for norm in found.values():
        for param in norm.parameters():
            nn.init.normal_(param)
    return {name: norm.to(F64) for name, norm in found.items()}


@pytest.mark.parametrize("name", ["llama", "gemma2", "torch", "layer norm"])
@pytest.mark.parametrize("shape", [(T, 48), (T, 3, 48), (0, 48)], ids=str)
def test_a_norm_and_its_gradients(name: str, shape: tuple[int, ...]) -> None:
    module = norms()[name]
    x, grad, beside = (torch.randn(shape, dtype=F64) for _ in range(3))
    wanted = by_autograd(module, x, grad, trained(module))
    norm, sums = token_norm(module, F64, None), WeightSums(module.parameters())
    assert isinstance(norm, ModuleNorm if name == "layer norm" else RMSNorm)
    # transformers' norms are float32 inside.
    tolerance = 1e-6 if name in ("llama", "gemma2") else 1e-12
    found = [norm.forward(x), norm.backward(x, grad, sums), *sums.totals(trained(module))]
    for mine, true in zip(found, wanted, strict=True):
        assert relative_error(mine, true) < tolerance
    # With what flows past it, in the place of either gradient.
    total = found[1] + beside
    for place in (beside.clone(), grad.clone()):
        here = norm.backward(
            x,
            place if torch.equal(place, grad) else grad,
            WeightSums([]),
            residual_grad=place if torch.equal(place, beside) else beside,
            out=place,
        )
        assert here is place
        assert relative_error(place, total) < 1e-12


def test_what_is_an_rms_norm() -> None:
    assert [is_rms_norm(norm) for norm in norms().values()] == [True, True, True, False]
    assert not is_rms_norm(nn.RMSNorm(8, elementwise_affine=False))
    assert token_norm(None, F64, None) is None


# -- MLPs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
@pytest.mark.parametrize("around", [(True, False), (True, True), (False, True)], ids=str)
@pytest.mark.parametrize("by_hand", [True, False])
def test_an_mlp_half(family: str, around: tuple[bool, bool], by_hand: bool) -> None:
    """With a norm before it, behind it, and both; the output's gradient may be written over."""
    mlp = copy.deepcopy(make_model(family).model.layers[0].mlp)
    first, last = (nn.RMSNorm(48, eps=1e-5, dtype=F64) if there else None for there in around)

    def half(h: Tensor) -> Tensor:
        y = mlp(h if first is None else first(h))
        return h + (y if last is None else last(y))

    params = [p for module in (first, mlp, last) if module is not None for p in trained(module)]
    h, grad = torch.randn(T, 48, dtype=F64), torch.randn(T, 48, dtype=F64)
    wanted = by_autograd(half, h, grad, params)
    if by_hand:
        fused = getattr(mlp, "gate_up_proj", None)
        maps = [fused] if fused is not None else [mlp.gate_proj, mlp.up_proj]
        gate_up = [token_map(module, F64, None) for module in maps]
        inner = GatedMLP(
            gate_up, token_map(mlp.down_proj, F64, None), "gelu_tanh" if family == "gemma2" else "silu"
        )
    else:
        inner = ModuleMLP(ModuleMap(mlp, F64, None))
    ours = MLPHalf(token_norm(first, F64, None), inner, token_norm(last, F64, None), F64)
    out, sums = torch.full_like(h, torch.nan), WeightSums(params)
    for tile in (slice(0, 5), slice(5, 10), slice(10, T)):
        ours.forward(h[tile], out[tile])
        ours.backward(h[tile], grad[tile], grad[tile], sums)
    assert_close([out, grad, *sums.totals(params)], wanted)


def test_a_module_under_autocast_is_run_as_in_the_forward() -> None:
    module = nn.Sequential(nn.Linear(IN, OUT), nn.GELU())
    x, grad = torch.randn(T, IN), torch.randn(T, OUT)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = by_autograd(module, x, grad.bfloat16(), trained(module))
    one, sums = ModuleMap(module, torch.bfloat16, ("cpu", torch.bfloat16)), WeightSums(module.parameters())
    found = [one.forward(x), one.backward(x, grad, sums), *sums.totals(trained(module))]
    assert found[0].dtype == torch.bfloat16
    for mine, true in zip(found, wanted, strict=True):
        assert torch.equal(mine, true)


def test_fewer_bits_than_the_weights_have() -> None:
    """Weights are cast once, when a map is made; their gradients have the weights' own dtype."""
    layer = make_layer("bias").float()
    one, sums = token_map(layer, torch.bfloat16, None), WeightSums(layer.parameters())
    x, grad = torch.randn(T, IN).bfloat16(), torch.randn(T, OUT).bfloat16()
    assert torch.equal(one.forward(x), F.linear(x, layer.weight.bfloat16()) + layer.bias.bfloat16())
    one.backward(x, grad, sums)
    weight, bias = sums.totals([layer.weight, layer.bias])
    assert weight.dtype == bias.dtype == torch.float32
    assert relative_error(weight, grad.double().t() @ x.double()) < 1e-6
    assert relative_error(bias, grad.double().sum(0)) < 1e-6
