"""`mini_sequence` against the same function run at once: values, every gradient, and what is kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from numerics import assert_as_accurate_as
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
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


class Counted:
    """A function and the tokens of each tile it was called with."""

    def __init__(self, fn: Callable) -> None:
        self.fn, self.tiles = fn, []

    def __call__(self, *tiles: Tensor):
        self.tiles.append(tiles[0].shape[1])
        return self.fn(*tiles)


def rows(*shape: int, requires_grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)


def taken_grads(module: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """The gradients, which are None afterwards."""
    found = {name: param.grad for name, param in module.named_parameters()}
    found["x"], x.grad = x.grad, None
    module.zero_grad()
    return found


def assert_same(got: object, expected: object) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("tile_tokens", [1, 7, 36, 37, 38, 1000])
@pytest.mark.parametrize("shape", [(1, 37, D), (2, 37, D), (37, D), (74, 1, D)])
def test_equals_the_untiled_function(shape: tuple[int, ...], tile_tokens: int) -> None:
    mlp, x, upstream = Mlp().double(), rows(*shape), rows(*shape, requires_grad=False)
    expected = mlp(x)
    expected.backward(upstream)
    wanted = taken_grads(mlp, x)
    out = mini_sequence(mlp, x, mlp.parameters(), tile_tokens=tile_tokens)
    out.backward(upstream)
    assert_same(out, expected)
    assert_same(taken_grads(mlp, x), wanted)


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


@pytest.mark.parametrize("frozen", [("up.weight", "x"), ("down.bias",), "all weights"])
def test_frozen_weights_and_frozen_input(frozen: tuple[str, ...] | str) -> None:
    mlp, x = Mlp().double(), rows(1, 20, D)
    for name, tensor in [*mlp.named_parameters(), ("x", x)]:
        tensor.requires_grad_(name not in frozen if frozen != "all weights" else name == "x")
    mini_sequence(mlp, x, mlp.parameters(), tile_tokens=6).square().sum().backward()
    got = taken_grads(mlp, x)
    mlp(x).square().sum().backward()
    assert_same(got, taken_grads(mlp, x))


def test_without_grad_nothing_is_recorded() -> None:
    mlp, x = Mlp(), torch.randn(1, 20, D)
    with torch.no_grad():
        out = mini_sequence(mlp, x, mlp.parameters(), tile_tokens=6)
    assert not out.requires_grad
    torch.testing.assert_close(out, mlp(x))


def test_second_backward_and_accumulation() -> None:
    mlp, x, upstream = Mlp().double(), rows(1, 20, D), rows(1, 20, D, requires_grad=False)
    out = mini_sequence(mlp, x, mlp.parameters(), tile_tokens=6)
    out.backward(torch.ones_like(out), retain_graph=True)
    out.backward(upstream)
    got = taken_grads(mlp, x)
    mlp(x).backward(1 + upstream)
    assert_same(got, taken_grads(mlp, x))
    with pytest.raises(RuntimeError, match="second time"):
        out.backward(upstream)


def test_a_retained_graph_keeps_no_gradients() -> None:
    mlp, x = Mlp().double(), rows(1, 20, D)
    out = mini_sequence(mlp, x, mlp.parameters(), tile_tokens=6)
    upstream = rows(1, 20, D, requires_grad=False)
    memory = StorageWeakRef(upstream.untyped_storage())
    out.backward(upstream, retain_graph=True)
    del upstream
    assert memory.expired()


def test_a_backward_that_failed_leaves_nothing_to_the_next() -> None:
    mlp, x, fails = Mlp().double(), rows(1, 20, D), [True]

    def fail_once(tile: Tensor) -> Tensor:
        if torch.is_grad_enabled() and fails:
            fails.clear()
            raise ArithmeticError("once")
        return mlp(tile)

    out = mini_sequence(fail_once, x, mlp.parameters(), tile_tokens=6)
    with pytest.raises(ArithmeticError, match="once"):
        out.backward(rows(1, 20, D), retain_graph=True)
    out.sum().backward()
    assert_same(x.grad, torch.autograd.grad(mlp(x).sum(), x)[0])


def test_a_second_derivative_is_refused() -> None:
    mlp, x = Mlp(), torch.randn(1, 20, D, requires_grad=True)
    loss = mini_sequence(mlp, x, mlp.parameters(), tile_tokens=6).sum()
    with pytest.raises(ValueError, match="no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


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
    torch.rand(())  # else backward would end where forward did
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
    x, twice = rows(1, 20, D, requires_grad=False), weight * 2
    mini_sequence(lambda tile: tile @ twice, x, [twice], tile_tokens=6).sum().backward()
    assert_same(weight.grad, torch.autograd.grad((x @ (weight * 2)).sum(), weight)[0])


def test_a_weight_that_no_tile_uses_has_no_gradient() -> None:
    mlp, x, spare = Mlp(), torch.randn(1, 20, D), nn.Parameter(torch.ones(3))
    mini_sequence(mlp, x, [*mlp.parameters(), spare], tile_tokens=6).sum().backward()
    assert spare.grad is None


def test_weights_whose_gradients_are_one_tensor() -> None:
    # Both get the same first gradient from autograd; sums in place would put each tile into it twice.
    first, second, x = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D)), torch.randn(1, 20, D)
    mini_sequence(lambda tile: tile + (first + second), x, [first, second], tile_tokens=6).sum().backward()
    assert torch.equal(first.grad, torch.full((D,), 20.0))
    assert torch.equal(second.grad, torch.full((D,), 20.0))


@pytest.mark.parametrize("order", ["hidden first", "labels first"])
def test_several_inputs_and_an_output_of_another_shape(order: str) -> None:
    head = nn.Linear(D, 17).double()
    hidden, labels = rows(2, 21, D), torch.randint(0, 17, (2, 21))

    def losses(hidden_tile: Tensor, label_tile: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden_tile)[0], label_tile[0], reduction="none")[None]

    if order == "hidden first":
        out = mini_sequence(losses, (hidden, labels), head.parameters(), tile_tokens=5)
    else:
        out = mini_sequence(lambda y, x: losses(x, y), [labels, hidden], head.parameters(), tile_tokens=5)
    assert out.shape == (2, 21)
    out.sum().backward()
    got = hidden.grad.clone(), head.weight.grad.clone()
    hidden.grad = head.weight.grad = None
    F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="sum").backward()
    assert_same(got, (hidden.grad, head.weight.grad))


def several_outputs(mlp: Mlp) -> Callable:
    def fn(*, hidden: Tensor, scale: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        out = mlp(hidden) * scale[..., None]
        best = out.argmax(-1)
        return out, out.norm(dim=-1), best, best == labels, out.float()[..., :3, None], out.detach()

    return fn


@pytest.mark.parametrize("tile_tokens", [5, 100])
@pytest.mark.parametrize("used", [(0,), (1,), (4,), (0, 1), (0, 1, 4, 5), (5,)])
def test_inputs_by_name_and_several_outputs(used: tuple[int, ...], tile_tokens: int) -> None:
    mlp = Mlp().double()
    inputs = {"hidden": rows(2, 21, D), "scale": rows(2, 21), "labels": torch.randint(0, D, (2, 21))}
    leaves = [inputs["hidden"], inputs["scale"], *mlp.parameters()]
    fn = several_outputs(mlp)
    outs = mini_sequence(fn, inputs, mlp.parameters(), tile_tokens=tile_tokens)
    wanted = fn(**inputs)
    assert_same(outs, wanted)
    assert [out.dtype for out in outs] == [out.dtype for out in wanted]
    assert [out.requires_grad for out in outs[2:4]] == [False, False]
    upstream = [torch.randn_like(wanted[index]) for index in used]
    got = torch.autograd.grad([outs[index] for index in used], leaves, upstream, allow_unused=True)
    if used == (5,):
        assert got == (None,) * len(leaves)
        return
    kept = [index for index in used if index != 5]
    expected = torch.autograd.grad([wanted[index] for index in kept], leaves, upstream[: len(kept)])
    assert_same(got, expected)


def test_a_single_output_in_a_tuple_stays_a_tuple() -> None:
    mlp, x = Mlp(), torch.randn(1, 20, D)
    for tile_tokens in (6, 20):
        outs = mini_sequence(lambda tile: (mlp(tile),), x, mlp.parameters(), tile_tokens=tile_tokens)
        assert [type(outs), len(outs)] == [tuple, 1]


@pytest.mark.parametrize("token_dims", [None, 2])
def test_tokens_are_what_the_first_input_says(token_dims: int | None) -> None:
    table, ids = nn.Embedding(11, D).double(), torch.randint(0, 11, (3, 7))
    counted = Counted(table)
    out = mini_sequence(counted, ids, table.parameters(), tile_tokens=10, token_dims=token_dims)
    assert counted.tiles == [10, 10, 1]
    assert torch.equal(out, table(ids))
    x = rows(3, 7, 4, D)
    cut = mini_sequence(lambda tile: tile.sum((-1, -2)), x, [], tile_tokens=10, token_dims=2)
    assert_same(cut, x.sum((-1, -2)))


@pytest.mark.parametrize("tile_tokens", [6, 20])
def test_outputs_are_no_views_of_inputs_or_of_each_other(tile_tokens: int) -> None:
    x = rows(1, 20, D)
    inner = x * 1

    def fn(tile: Tensor) -> tuple[Tensor, ...]:
        double = tile * 2
        return tile, tile[..., :2], double, double, (tile * 2).view(1, -1, 1, D)

    outs = mini_sequence(fn, inner, [], tile_tokens=tile_tokens)
    before, weights = inner.detach().clone(), [1.0, 3.0, 5.0, 7.0, 11.0]
    for out in outs:
        out.add_(1)
    assert torch.equal(inner, before)
    torch.testing.assert_close(outs[3], 2 * before + 1)
    sum(weight * out.sum() for weight, out in zip(weights, outs, strict=True)).backward()
    expected = torch.full((D,), 1.0 + 2 * (5 + 7 + 11), dtype=torch.float64)
    expected[:2] += 3
    torch.testing.assert_close(x.grad, expected.expand_as(x))


def test_a_tile_that_changes_its_input_in_place_is_refused() -> None:
    x = rows(1, 20, D)
    with pytest.raises(RuntimeError, match="inplace"):
        mini_sequence(lambda tile: tile.mul_(2), x * 1, [], tile_tokens=6).sum().backward()


def test_an_input_that_some_tiles_do_not_use() -> None:
    x, gate = rows(1, 20, D), rows(1, 20, D)

    def fn(tile: Tensor, gate_tile: Tensor) -> Tensor:
        # A rule of the values, as routers have: some tiles have nothing for the gate to do.
        return tile * gate_tile if tile[0, 0, 0] > 0 else tile * 2

    with torch.no_grad():
        x[0, :, 0] = torch.tensor([-1.0] * 6 + [1.0] * 6 + [-1.0] * 8)
    mini_sequence(fn, (x, gate), [], tile_tokens=6).sum().backward()
    expected = x.detach().clone()
    expected[:, :6] = expected[:, 12:] = 0
    assert torch.equal(gate.grad, expected)


@pytest.mark.parametrize("tile_tokens", [6, 100])
@pytest.mark.parametrize(
    ("norm", "use_reentrant", "forwards"), [("pre", False, 2), ("post", False, 3), ("pre", True, 3)]
)
def test_inside_a_layer_checkpoint(norm: str, use_reentrant: bool, forwards: int, tile_tokens: int) -> None:
    mlp, x, upstream = Mlp().double(), rows(1, 20, D), rows(1, 20, D, requires_grad=False)
    counted = Counted(mlp)

    def layer(x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        x = x + torch.tanh(x)
        return x + (run(F.layer_norm(x, (D,))) if norm == "pre" else F.layer_norm(run(x), (D,)))

    def tiled(x: Tensor) -> Tensor:
        return layer(x, lambda y: mini_sequence(counted, y, mlp.parameters(), tile_tokens=tile_tokens))

    # Two layers: the second one's gradient must reach the first through its checkpoint.
    out = checkpoint(tiled, checkpoint(tiled, x, use_reentrant=use_reentrant), use_reentrant=use_reentrant)
    out.backward(upstream)
    tiles = [6, 6, 6, 2] if tile_tokens == 6 else [20]
    assert counted.tiles == tiles * forwards * 2
    got = taken_grads(mlp, x)
    layer(layer(x, mlp), mlp).backward(upstream)
    assert_same(got, taken_grads(mlp, x))


def test_a_layer_checkpoint_that_is_retained() -> None:
    mlp, x = Mlp().double(), rows(1, 20, D)

    def layer(x: Tensor) -> Tensor:
        return x + mini_sequence(mlp, F.layer_norm(x, (D,)), mlp.parameters(), tile_tokens=6)

    out = checkpoint(layer, x, use_reentrant=False)
    out.sum().backward(retain_graph=True)
    once = x.grad.clone()
    out.backward(torch.full_like(out, 2.0))
    assert_same(x.grad, 3 * once)


@pytest.mark.parametrize("post_norm", [False, True])
def test_dropout_inside_a_layer_checkpoint(post_norm: bool) -> None:
    mlp, x = Mlp(dropout=0.5).double().train(), rows(1, 30, D)

    def layer(x: Tensor) -> Tensor:
        out = mini_sequence(mlp, F.dropout(x, 0.1), mlp.parameters(), tile_tokens=8)
        return x + (F.layer_norm(out, (D,)) if post_norm else out)

    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(3)
        out = run(x)
        out.square().sum().backward()
        found.append((out.detach(), x.grad, mlp.up.weight.grad))
        x.grad = None
        mlp.zero_grad()
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


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


def test_backward_under_autocast_rebuilds_a_forward_without() -> None:
    mlp, x, seen = Mlp(), torch.randn(1, 20, D, requires_grad=True), []

    def fn(tile: Tensor) -> Tensor:
        seen.append(mlp.up(tile).dtype)
        return mlp(tile)

    out = mini_sequence(fn, x, mlp.parameters(), tile_tokens=20)
    with torch.autocast("cpu", torch.bfloat16):
        out.sum().backward()
    assert seen == [torch.float32] * 2


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
        (lambda mlp, x: mini_sequence(lambda t: (t, t.sum(1)), x, [], tile_tokens=4), "token-wise"),
        (lambda mlp, x: mini_sequence(lambda t: {"out": t}, x, [], tile_tokens=4), "fn returned a dict"),
        (lambda mlp, x: mini_sequence(lambda t: t[..., : t.shape[1]], x, [], tile_tokens=7), "earlier one"),
        (lambda mlp, x: mini_sequence(lambda a, b: a, (x, x[:, :3]), []), "disagree on their tokens"),
        (lambda mlp, x: mini_sequence(lambda: 0, (), []), "has no tensor"),
        (lambda mlp, x: mini_sequence(mlp, x, [], tile_tokens=6), "not in params"),
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
    # The plain one keeps two intermediates whole; beside its tiles, ours has input, output and workspaces.
    assert peak < tokens * wide * 2


@pytest.mark.gpu
def test_inside_a_layer_checkpoint_on_a_gpu() -> None:
    width, tokens = 256, 4099
    mlp = nn.Sequential(nn.Linear(width, 1024), nn.SiLU(), nn.Dropout(0.1), nn.Linear(1024, width))
    mlp, counted = mlp.cuda().bfloat16(), Counted(mlp)
    x = torch.randn(1, tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        return x + mini_sequence(counted, F.layer_norm(x, (width,)), mlp.parameters(), tile_tokens=512)

    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(3)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # backward must keep to the stream of forward
            out = run(x)
        torch.cuda.current_stream().wait_stream(side)
        out.float().square().sum().backward()
        found.append((out.detach(), x.grad, mlp[0].weight.grad))
        x.grad = None
        mlp.zero_grad()
        assert len(counted.tiles) == 2 * 9
        counted.tiles.clear()
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
