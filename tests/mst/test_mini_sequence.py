"""`mini_sequence` against the same function run at once: values, every gradient, and what is kept."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_as_accurate_as
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from longseq.mst import mini_sequence

D, FF = 13, 29


class Mlp(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, FF), nn.Linear(D, FF, bias=False), nn.Linear(FF, D)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(F.silu(self.gate(x)) * self.up(x)))


def grads(module: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    found = {name: param.grad for name, param in module.named_parameters()}
    found["x"] = x.grad
    return found


@pytest.mark.parametrize("tile_tokens", [1, 7, 36, 37, 38, 1000])
@pytest.mark.parametrize("shape", [(1, 37, D), (2, 37, D), (37, D), (74, 1, D)])
def test_equals_the_untiled_function(shape: tuple[int, ...], tile_tokens: int) -> None:
    mlp = Mlp().double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(shape, dtype=torch.float64)
    expected = mlp(x)
    expected.backward(upstream)
    wanted = grads(mlp, x)
    mlp.zero_grad()
    x.grad = None
    out = mini_sequence(mlp, x, mlp.parameters(), tile_tokens=tile_tokens)
    out.backward(upstream)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-14)
    for name, grad in grads(mlp, x).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-11, atol=1e-13, msg=name)


def test_many_tiles_in_bf16_stay_as_accurate_as_one() -> None:
    # 500 tiles summed in bf16 would be several times as far off as one product is.
    mlp = Mlp().bfloat16()
    x = torch.randn(1, 1000, D).bfloat16()
    upstream = torch.randn(1, 1000, D).bfloat16()
    truth_mlp = Mlp().double()
    truth_mlp.load_state_dict({name: value.double() for name, value in mlp.state_dict().items()})
    truth_mlp(x.double()).backward(upstream.double())
    mlp(x).backward(upstream)
    plain = {name: param.grad.clone() for name, param in mlp.named_parameters()}
    mlp.zero_grad()
    mini_sequence(mlp, x, mlp.parameters(), tile_tokens=2).backward(upstream)
    for name, param in mlp.named_parameters():
        truth = truth_mlp.get_parameter(name).grad
        assert_as_accurate_as(param.grad, plain[name], truth, name=name)


def test_only_inputs_are_kept_for_backward() -> None:
    mlp = Mlp()
    x = torch.randn(1, 4096, D, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mini_sequence(mlp, x, mlp.parameters(), tile_tokens=64)
    assert [tensor.shape for tensor in kept] == [x.shape]


def test_hooks_on_a_weight_fire_once_a_backward() -> None:
    mlp, fired = Mlp(), []
    for param in mlp.parameters():
        param.register_post_accumulate_grad_hook(lambda param: fired.append(param))
    x = torch.randn(1, 50, D)
    mini_sequence(mlp, x, mlp.parameters(), tile_tokens=7).sum().backward()
    assert len(fired) == len(list(mlp.parameters()))


def test_frozen_weights_and_frozen_input() -> None:
    mlp = Mlp().double()
    mlp.up.requires_grad_(False)
    x = torch.randn(1, 20, D, dtype=torch.float64)
    out = mini_sequence(mlp, x, mlp.parameters(), tile_tokens=6)
    out.sum().backward()
    assert mlp.up.weight.grad is None
    expected = torch.autograd.grad(mlp(x).sum(), mlp.gate.weight)[0]
    torch.testing.assert_close(mlp.gate.weight.grad, expected, rtol=1e-11, atol=1e-13)


def test_without_grad_nothing_is_recorded() -> None:
    mlp, x = Mlp(), torch.randn(1, 20, D)
    with torch.no_grad():
        out = mini_sequence(mlp, x, mlp.parameters(), tile_tokens=6)
    assert not out.requires_grad
    torch.testing.assert_close(out, mlp(x))


def test_second_backward_and_accumulation() -> None:
    mlp, x = Mlp().double(), torch.randn(1, 20, D, dtype=torch.float64, requires_grad=True)
    out = mini_sequence(mlp, x, mlp.parameters(), tile_tokens=6).square().sum()
    out.backward(retain_graph=True)
    first = mlp.down.weight.grad.clone()
    out.backward()
    assert torch.equal(mlp.down.weight.grad, 2 * first)


def test_dropout_has_the_same_masks_in_backward() -> None:
    mlp, x = Mlp(dropout=0.5).double().train(), torch.randn(1, 30, D, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    out = mini_sequence(mlp, x, mlp.parameters(), tile_tokens=8)
    drawn_after = torch.rand(())
    out.square().sum().backward()
    got = x.grad
    x.grad = None
    torch.manual_seed(3)
    expected = torch.cat([mlp(tile) for tile in x.split(8, dim=1)], dim=1)
    assert torch.equal(drawn_after, torch.rand(()))
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(got, x.grad)


def test_backward_leaves_the_random_state_alone() -> None:
    mlp, x = Mlp(dropout=0.5).train(), torch.randn(1, 30, D)
    out = mini_sequence(mlp, x, mlp.parameters(), tile_tokens=8)
    before = torch.get_rng_state()
    out.sum().backward()
    assert torch.equal(before, torch.get_rng_state())


def test_a_weight_that_is_not_listed_is_refused() -> None:
    mlp, x = Mlp(), torch.randn(1, 20, D)
    listed = [mlp.gate.weight, mlp.gate.bias]
    with pytest.raises(ValueError, match=r"weight of shape .* not in params"):
        mini_sequence(mlp, x, listed, tile_tokens=6).sum().backward()


def test_a_listed_weight_may_be_made_of_others() -> None:
    weight = torch.randn(D, D, dtype=torch.float64, requires_grad=True)
    x = torch.randn(1, 20, D, dtype=torch.float64)
    twice = weight * 2
    mini_sequence(lambda tile: tile @ twice, x, [twice], tile_tokens=6).sum().backward()
    expected = torch.autograd.grad((x @ (weight * 2)).sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected, rtol=1e-11, atol=1e-13)


def test_a_weight_that_no_tile_uses_has_no_gradient() -> None:
    mlp, x, spare = Mlp(), torch.randn(1, 20, D), nn.Parameter(torch.ones(3))
    mini_sequence(mlp, x, [*mlp.parameters(), spare], tile_tokens=6).sum().backward()
    assert spare.grad is None


def test_several_inputs_and_an_output_of_another_shape() -> None:
    head = nn.Linear(D, 17).double()
    hidden = torch.randn(2, 21, D, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 17, (2, 21))

    def losses(hidden_tile: Tensor, label_tile: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden_tile)[0], label_tile[0], reduction="none")[None]

    out = mini_sequence(losses, (hidden, labels), head.parameters(), tile_tokens=5)
    assert out.shape == (2, 21)
    out.sum().backward()
    got = hidden.grad.clone(), head.weight.grad.clone()
    hidden.grad = head.weight.grad = None
    F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="sum").backward()
    torch.testing.assert_close(got, (hidden.grad, head.weight.grad), rtol=1e-11, atol=1e-13)


def test_inside_a_layer_checkpoint() -> None:
    mlp, x = Mlp().double(), torch.randn(1, 20, D, dtype=torch.float64, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        return x + mini_sequence(mlp, F.layer_norm(x, (D,)), mlp.parameters(), tile_tokens=6)

    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    got = grads(mlp, x)
    mlp.zero_grad()
    x.grad = None
    (x + mlp(F.layer_norm(x, (D,)))).square().sum().backward()
    for name, grad in grads(mlp, x).items():
        torch.testing.assert_close(got[name], grad, rtol=1e-11, atol=1e-13, msg=name)


def test_autocast_is_the_same_in_backward() -> None:
    mlp, x = Mlp(), torch.randn(1, 20, D, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = mini_sequence(mlp, x, mlp.parameters(), tile_tokens=20)
        plain = mlp(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    got = mlp.up.weight.grad.clone()
    mlp.zero_grad()
    plain.sum().backward()
    assert got.dtype == torch.float32
    assert torch.equal(got, mlp.up.weight.grad)


def test_a_weight_met_again_outside_the_tiles_under_autocast() -> None:
    # autocast caches casts; one made in the tiles, without grad, must not be met outside with grad.
    mlp, x = Mlp(), torch.randn(1, 20, D)
    with torch.autocast("cpu", torch.bfloat16):
        mini_sequence(mlp, x, mlp.parameters(), tile_tokens=6)
        out = mlp(x)
    out.sum().backward()
    assert mlp.up.weight.grad is not None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda mlp, x: mini_sequence(mlp, x, mlp.parameters(), tile_tokens=0), "tile_tokens=0"),
        (lambda mlp, x: mini_sequence(lambda t: t.sum(1), x, [], tile_tokens=4), "token-wise"),
        (lambda mlp, x: mini_sequence(lambda a, b: a, (x, x[:, :3]), []), "disagree on their tokens"),
    ],
)
def test_wrong_calls_say_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(Mlp(), torch.randn(1, 20, D))


def test_an_empty_sequence() -> None:
    mlp, x = Mlp(), torch.zeros(1, 0, D, requires_grad=True)
    out = mini_sequence(mlp, x, mlp.parameters(), tile_tokens=6)
    out.sum().backward()
    assert out.shape == (1, 0, D)
    assert x.grad.shape == (1, 0, D)


@pytest.mark.gpu
def test_backward_peak_memory_does_not_grow_with_the_intermediate() -> None:
    width, wide, tokens = 256, 4096, 65536
    mlp = nn.Sequential(nn.Linear(width, wide), nn.SiLU(), nn.Linear(wide, width)).cuda().bfloat16()
    x = torch.randn(1, tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mini_sequence(mlp, x, mlp.parameters(), tile_tokens=4096).sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < tokens * wide * 2 / 2  # the plain one keeps two of these
