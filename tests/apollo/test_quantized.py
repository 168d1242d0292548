"""Linear layers with 8-bit weights: nn.Linear of the values that they hold, in a quarter of the memory."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from layer_problems import assert_same_step, make_batch, make_model, take_step, with_lora
from numerics import relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longseq.apollo import Apollo, int8
from longseq.apollo.int8 import Groups
from longseq.apollo.quantized import (
    QuantizedLinear,
    dequantize_linears,
    plain_state_dict,
    quantize_linears,
)
from longseq.mst import apply_mini_sequence

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
SHAPES = [(5, 131), (3, 1), (2, 128), (70, 16), (1, 300), (1, 1)]
GROUP = 32


def quantized(value: Tensor, size: int = GROUP, key: int | None = None, first: int = 0) -> Groups:
    codes = torch.full(value.shape, 77, dtype=torch.uint8)
    scale, zero = torch.full((2, value.shape[0], -(-value.shape[1] // size)), -7.0)
    groups = Groups(codes, scale, zero, size)
    groups.quantize(value, key, first)
    return groups


def values(groups: Groups, dtype: torch.dtype = F64) -> Tensor:
    return groups.dequantize(torch.empty(groups.codes.shape, dtype=dtype))


def step_of_each(groups: Groups) -> Tensor:
    return groups.scale.repeat_interleave(groups.size, 1)[:, : groups.codes.shape[1]].double()


def make_layer(out: int = 300, width: int = 131, *, bias: bool = True, dtype: torch.dtype = F32):
    """A layer, and nn.Linear of its values."""
    layer = QuantizedLinear(width, out, bias, dtype=dtype, group_size=GROUP)
    plain = nn.Linear(width, out, bias, dtype=dtype)
    plain.load_state_dict(plain_state_dict(layer))
    return layer, plain


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 128 rows or columns."""
    monkeypatch.setattr(int8, "TILE_BYTES", 1)


# -- codes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_come_back_to_half_a_step(shape: tuple[int, int], size: int) -> None:
    value = torch.randn(shape) + 0.5
    groups = quantized(value, size)
    ends = torch.stack([part.aminmax().max - part.min() for part in value[0].split(size)])
    torch.testing.assert_close(groups.scale[0], ends / 255)
    error = (values(groups) - value).abs()
    assert (error <= step_of_each(groups) * 0.501 + 1e-7).all()
    # Stochastic rounding errs by less than a step, and leaves the extremes where they are.
    random = quantized(value, size, key=3)
    assert ((values(random) - value).abs() <= step_of_each(groups) * 1.001 + 1e-7).all()
    torch.testing.assert_close(values(random).min(), value.min().double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_was_dequantised_has_the_same_codes(shape: tuple[int, int]) -> None:
    groups = quantized(torch.randn(shape))
    again = quantized(values(groups, F32))
    assert torch.equal(again.codes, groups.codes)
    torch.testing.assert_close(again.scale, groups.scale)
    assert torch.equal(again.zero, groups.zero)


def test_stochastic_rounding_has_the_right_mean() -> None:
    value = torch.randn(3, 40)
    num_keys = 2000
    mean, step = torch.zeros(3, 40, dtype=F64), None
    for key in torch.randint(2**32, (num_keys,)).tolist():
        groups = quantized(value, key=key)
        mean += values(groups) / num_keys
        step = step_of_each(groups)
    deviation = (step / 2) / num_keys**0.5  # of a mean, at most
    assert ((mean - value).abs() < 4.5 * deviation + 1e-6).all()
    # Neighbours do not round together.
    assert ((mean - value).mean().abs() < 4.5 * deviation.mean() / 120**0.5 + 1e-6).item()


def test_which_way_an_element_is_rounded() -> None:
    """By the hash of its place that the bf16 weights' rounding uses, here with Python's integers."""
    key, first = 0xFEDCBA98, 2**33 + 5
    value = torch.rand(1, 16) * 255
    value[0, :2] = torch.tensor([0.0, 255.0])
    found = quantized(value, 16, key, first).codes[0].tolist()
    for place, number in enumerate(value[0].tolist()):
        word = ((first + place) * 0x9E3779B1 + key) % 2**32
        word = (word ^ word >> 16) * 0x7FEB352D % 2**32
        word = (word ^ word >> 15) * 0x846CA68B % 2**32
        assert found[place] == int(number) + (number % 1 > ((word >> 16) + 0.5) / 2**16)


def test_rows_alone_are_the_rows_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, other = make_layer()[0], make_layer()[0]
    value = torch.randn(300, 131)
    layer.weight.quantized.store(value, 2**31 + 7)
    monkeypatch.setattr(int8, "PIECE", 131 * 7)
    for rows in (slice(0, 1), slice(1, 200), slice(200, None)):
        other.weight.quantized.store(value[rows], 2**31 + 7, rows)
    assert all(torch.equal(*pair) for pair in zip(layer.groups[:3], other.groups[:3], strict=True))
    part = layer.weight.quantized.dequantize(slice(9, 31), dtype=BF16)
    assert torch.equal(part, layer.weight.quantized.dequantize(dtype=F32)[9:31].bfloat16())
    wide = QuantizedLinear(131, 300, group_size=GROUP)
    wide.weight.quantized.store(value.double(), 2**31 + 7)
    assert torch.equal(wide.weight_codes, layer.weight_codes)


@pytest.mark.parametrize("key", [None, 5])
def test_constant_groups_and_numbers_that_are_not_finite(key: int | None) -> None:
    value = torch.randn(6, 40)
    value[0, :16], value[1, :16], value[2, :16] = 0.3, 0.0, torch.arange(16) * 1e-40
    value[3, 5], value[4, 5], value[5, 5] = float("nan"), float("inf"), -float("inf")
    groups = quantized(value, 16, key)
    found = values(groups)
    assert torch.equal(found[:2, :16].float(), value[:2, :16])
    assert not groups.codes[:3, :16].any()  # of the third too, whose range is below float32's normal numbers
    assert found[3:, :16].isnan().all()
    assert found[:3].isfinite().all()
    assert found[3:, 16:].isfinite().all()


# -- the layer ------------------------------------------------------------------------------------------


def gradients(module: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor | None]:
    x = x.detach().requires_grad_()
    module.zero_grad()
    out = module(x)
    out.backward(upstream)
    return [out.detach(), x.grad, *(param.grad for param in module.parameters())]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 0), ()], ids=str)
def test_gradients_are_those_of_the_plain_layer(
    shape: tuple[int, ...], bias: bool, small_tiles: None
) -> None:
    layer, plain = make_layer(bias=bias, dtype=F64)
    x, upstream = torch.randn(*shape, 131, dtype=F64), torch.randn(*shape, 300, dtype=F64)
    # The other is one number a token, expanded.
    for grad in (upstream, upstream[..., :1].expand_as(upstream)):
        for mine, true in zip(gradients(layer, x, grad), gradients(plain, x, grad), strict=True):
            assert mine.shape == true.shape
            assert relative_error(mine, true) < 1e-14


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_results_are_rounded_once(dtype: torch.dtype, small_tiles: None) -> None:
    """As plain PyTorch rounds them: bf16 sums over tiles would be further from the truth."""
    layer, plain = make_layer(700, 515, dtype=dtype)
    x, upstream = torch.randn(9, 515, dtype=dtype), torch.randn(9, 700, dtype=dtype)
    true = gradients(copy.deepcopy(plain).double(), x.double(), upstream.double())
    for mine, other, truth in zip(
        gradients(layer, x, upstream), gradients(plain, x, upstream), true, strict=True
    ):
        assert mine.dtype == dtype
        assert relative_error(mine, truth) <= 1.02 * relative_error(other, truth) + 1e-8


def test_frozen_parts(small_tiles: None) -> None:
    layer, plain = make_layer()
    x = torch.randn(4, 131)
    for module in (layer, plain):
        module.weight.requires_grad_(False)
    upstream = torch.randn(4, 300)
    for mine, true in zip(gradients(layer, x, upstream), gradients(plain, x, upstream), strict=True):
        assert (mine is None) == (true is None)
        assert mine is None or relative_error(mine, true) < 1e-6
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x.requires_grad_())
    assert not saved
    layer.weight.requires_grad_()
    layer(x.detach()).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_memory() -> None:
    layer = QuantizedLinear(1000, 400, dtype=BF16)
    assert layer.weight.shape == (400, 1000)
    assert layer.weight.untyped_storage().nbytes() == 2
    assert layer.weight.quantized.nbytes == 400 * (1000 + 8 * 8)
    saved: list[Tensor] = []
    x = torch.randn(3, 1000, dtype=BF16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = layer(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]
    out.sum().backward()
    assert layer.weight.grad.is_contiguous()
    assert layer.weight.grad.untyped_storage().nbytes() == 400 * 1000 * 2


def test_hooks_accumulation_and_a_second_backward() -> None:
    layer, plain = make_layer(dtype=F64)
    x, fired = torch.randn(4, 131, dtype=F64), []
    layer.weight.register_post_accumulate_grad_hook(lambda param: fired.append(param.grad.clone()))
    for module in (layer, plain):
        out = module(x).square().sum() + module(2 * x).sum()
        out.backward(retain_graph=True)
        out.backward()
    assert len(fired) == 2  # once a backward, though the layer is used twice
    assert relative_error(fired[0], plain.weight.grad / 2) < 1e-14
    assert relative_error(layer.weight.grad, plain.weight.grad) < 1e-14
    assert torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0) > 1
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in layer.parameters()]).norm().item(), 1.0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_a_checkpoint(reentrant: bool) -> None:
    layer, plain = make_layer(dtype=F64)
    x = torch.randn(4, 131, dtype=F64, requires_grad=True)
    checkpoint(lambda a: layer(a.sin()).square(), x, use_reentrant=reentrant).sum().backward()
    found = x.grad
    x.grad = None
    plain(x.sin()).square().sum().backward()
    assert relative_error(found, x.grad) < 1e-14
    assert relative_error(layer.weight.grad, plain.weight.grad) < 1e-14


@pytest.mark.parametrize("backward_inside", [True, False])
def test_under_autocast(backward_inside: bool) -> None:
    layer, plain = make_layer()
    x, results = torch.randn(4, 131), []
    for module in (layer, plain):
        with torch.autocast("cpu", BF16):
            out = module(x)
            loss = out.float().square().sum()
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        results.append([out.detach(), *(param.grad for param in module.parameters())])
    for mine, other in zip(*results, strict=True):
        assert mine.dtype == other.dtype
        # The plain layer rounds its weight to bf16 once more than the layer does.
        assert relative_error(mine, other) < 2**-7


def test_a_backward_under_autocast_is_in_forwards_dtype() -> None:
    layer, _ = make_layer()
    x, found = torch.randn(4, 131), []
    for enabled in (False, True):
        out = layer(x)
        layer.zero_grad()
        with torch.autocast("cpu", BF16, enabled=enabled):
            out.backward(torch.ones_like(out))
        found.append(layer.weight.grad)
    assert torch.equal(*found)


def test_a_weight_written_before_backward_is_noticed() -> None:
    layer, _ = make_layer()
    out = layer(torch.randn(4, 131, requires_grad=True)).sum()
    layer.weight.quantized.store(torch.randn(300, 131))
    with pytest.raises(RuntimeError, match="between forward and backward"):
        out.backward()


def test_the_parameter_itself_does_not_pass_for_the_values() -> None:
    layer, _ = make_layer()
    assert torch.nn.utils.parameters_to_vector(layer.parameters()).isnan().any()
    assert "weight.quantized" in repr(layer)
    with pytest.raises(RuntimeError, match="single memory location"):
        nn.init.normal_(layer.weight)
    layer.zero_grad()
    layer.weight.grad = torch.ones(300, 131)
    for fused in (True, False):
        with pytest.raises((ValueError, RuntimeError), match=r"fused=True|single memory location"):
            torch.optim.AdamW(layer.parameters(), fused=fused).step()


def test_a_weight_that_was_replaced_is_noticed() -> None:
    """Else the values would stay what they are, whatever an optimizer does."""
    for replace in (
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(300, 131))),
        lambda layer: setattr(layer.weight, "data", torch.zeros(131, 300).t()),
    ):
        layer, plain = make_layer()
        replace(layer)
        with pytest.raises(RuntimeError, match="has been replaced"):
            layer(torch.randn(3, 131))
        with torch.no_grad():  # as where a probe casts what there is to float64
            torch.testing.assert_close(layer(torch.ones(3, 131)), plain(torch.ones(3, 131)))
    for shape in ((1, 1), (1, 7), (7, 1), (0, 3), (3, 0)):
        QuantizedLinear(*shape)(torch.randn(2, shape[0])).sum().backward()


def test_what_is_refused() -> None:
    layer, _ = make_layer()
    store = layer.weight.quantized.store
    refused: dict[str, Callable[[], object]] = {
        "group_size=100": lambda: QuantizedLinear(10, 10, group_size=100),
        "group_size=8": lambda: quantize_linears(nn.Sequential(nn.Linear(3, 3)), group_size=8),
        "these rows": lambda: store(torch.randn(300, 130)),
        r"\(5, 131\)": lambda: store(torch.randn(300, 131), rows=slice(0, 5)),
        "torch.int64": lambda: store(torch.ones(300, 131, dtype=torch.int64)),
        "x.dtype=torch.float64": lambda: layer(torch.randn(3, 131, dtype=F64)),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()
    orphan = make_layer()[0].weight
    with pytest.raises(RuntimeError, match="is gone"):
        orphan.quantized.dequantize()


# -- casts, copies, checkpoints -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, BF16, F64])
def test_casts_keep_scales_and_the_parameter(dtype: torch.dtype) -> None:
    layer, _ = make_layer()
    layer(torch.randn(3, 131)).sum().backward()
    weight, before = layer.weight, [x.clone() for x in layer.groups[:3]]
    names = [name for name, _ in layer.named_parameters()]
    layer.to(dtype)
    assert layer.weight is weight
    assert weight.dtype == weight.grad.dtype == layer.bias.dtype == dtype
    assert weight.untyped_storage().nbytes() == dtype.itemsize
    assert weight.grad.shape == weight.shape
    assert [name for name, _ in layer.named_parameters()] == names == ["weight", "bias"]
    for now, then in zip(layer.groups[:3], before, strict=True):
        assert now.dtype == then.dtype
        assert torch.equal(now, then)
    layer(torch.randn(3, 131, dtype=dtype)).sum().backward()


def test_copies_are_apart() -> None:
    layer = make_layer()[0].requires_grad_(False)
    twin = copy.deepcopy(nn.Sequential(layer, nn.ReLU()))[0]
    assert twin.weight.untyped_storage().nbytes() == 4
    assert not twin.weight.requires_grad
    assert twin.weight.quantized.layer is twin
    assert layer.weight.quantized.layer is layer
    before = layer.weight_codes.clone()
    twin.weight.quantized.store(torch.randn(300, 131))
    assert torch.equal(layer.weight_codes, before)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert buffer.getbuffer().nbytes < 60_000
    again = torch.load(buffer, weights_only=False)
    assert again.weight.quantized.layer is again
    assert torch.equal(again.weight.quantized.dequantize(), layer.weight.quantized.dequantize())


def test_a_layer_that_is_let_go_frees_its_memory_at_once() -> None:
    layer, _ = make_layer()
    codes = weakref.ref(layer.weight_codes)
    gc.disable()
    try:
        del layer
        assert codes() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("file", ["safetensors", "pt"])
def test_state_dicts(file: str, assign: bool, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(131, 40), nn.Linear(40, 7, bias=False))
    quantize_linears(model, group_size=GROUP)
    state = model.state_dict()
    kept = ["weight_codes", "weight_scale", "weight_zero"]
    assert sorted(state) == sorted(["0.bias", *(f"{i}.{name}" for i in (0, 1) for name in kept)])
    if file == "safetensors":
        save_file(state, tmp_path / "weights")
        state = load_file(tmp_path / "weights")
    else:
        torch.save(state, tmp_path / "weights")
        state = torch.load(tmp_path / "weights", weights_only=True)
    other = nn.Sequential(nn.Linear(131, 40), nn.Linear(40, 7, bias=False))
    quantize_linears(other, group_size=GROUP)
    names = [name for name, _ in other.named_parameters()]
    other.load_state_dict(state, assign=assign)
    assert [name for name, _ in other.named_parameters()] == names
    x = torch.randn(3, 131)
    assert torch.equal(other(x), model(x))
    sizes = nn.Sequential(nn.Linear(131, 40), nn.Linear(40, 7, bias=False))
    quantize_linears(sizes, group_size=2 * GROUP)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight_scale"):
        sizes.load_state_dict(state)


@pytest.mark.parametrize("assign", [True, False])
def test_a_plain_checkpoint_is_rounded_to_nearest(assign: bool) -> None:
    layer, _ = make_layer()
    plain = nn.Linear(131, 300)
    layer.load_state_dict(plain.state_dict(), assign=assign)
    assert torch.equal(layer.weight_codes, quantized(plain.weight.detach()).codes)
    assert torch.equal(layer.bias, plain.bias)
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: \(2, 2\)"):
        layer.load_state_dict({**plain.state_dict(), "weight": torch.ones(2, 2)})
    with pytest.raises(RuntimeError, match=r"Missing.*weight_codes"):
        layer.load_state_dict({"bias": plain.bias})
    with pytest.raises(RuntimeError, match=r'Unexpected.*"weight"'):
        layer.load_state_dict({**layer.state_dict(), "weight": plain.weight})


# -- models ---------------------------------------------------------------------------------------------


def quantized_model(**fields) -> nn.Module:
    model = make_model(**fields)
    quantize_linears(model, group_size=16)
    return model


def test_a_model_there_and_back() -> None:
    model = make_model(dtype=F32)
    weight = model.model.layers[1].mlp.down_proj.weight
    before = weight.detach().clone()
    report = quantize_linears(model)
    assert report.num_layers == 3 * 7
    assert report.bytes_before == sum(4 * m.in_features * m.out_features for m in layers_of(model))
    assert report.bytes_after == sum(m.weight.quantized.nbytes for m in layers_of(model))
    assert "21 linear layers" in str(report)
    assert type(model.lm_head) is nn.Linear
    assert model.model.layers[1].mlp.down_proj.weight is weight
    logits = model(**make_batch()).logits
    assert dequantize_linears(model) == 21
    assert not list(layers_of(model))
    assert model.model.layers[1].mlp.down_proj.weight is weight
    assert 0 < relative_error(weight, before) < 0.01
    assert not hasattr(weight, "quantized")
    torch.testing.assert_close(model(**make_batch()).logits, logits)


def layers_of(model: nn.Module) -> Iterator[QuantizedLinear]:
    return (module for module in model.modules() if isinstance(module, QuantizedLinear))


def test_weights_are_freed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    alive, store = [], QuantizedLinear._take_over

    def spy(layer: QuantizedLinear, group_size: int) -> None:
        store(layer, group_size)
        alive.append(sum(param.untyped_storage().nbytes() for param in model.parameters()))

    monkeypatch.setattr(QuantizedLinear, "_take_over", spy)
    quantize_linears(model)
    assert alive == [4 * (64 * 64 * left + 4 - left) for left in (3, 2, 1, 0)]


def test_which_layers_are_quantised() -> None:
    model = nn.ModuleDict({"up": nn.Linear(4, 4), "gate": nn.Linear(4, 4), "lora_A": nn.Linear(4, 4)})
    model["up"].register_forward_hook(lambda *args: None)
    quantize_linears(model, skip=["gate", "*lora_*"])
    assert [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)] == ["up"]
    assert len(model["up"]._forward_hooks) == 1
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        quantize_linears(model, skip=["*"])
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    patched = nn.Sequential(nn.Linear(4, 4))
    patched[0].forward = lambda x: x
    meta = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    for refused, message in ((tied, "0 is tied"), (patched, "replaced"), (meta, "1 is not whole")):
        with pytest.raises(ValueError, match=message):
            quantize_linears(refused)
        assert not list(layers_of(refused))
    quantize_linears(make_model(tie_word_embeddings=True))  # the head is not among them


def test_save_pretrained_saves_plain_weights(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = quantized_model(dtype=F32)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=F32, attn_implementation="eager")
    batch = make_batch()
    torch.testing.assert_close(again.train()(**batch).loss, model(**batch).loss)
    # And they quantise to what they were.
    codes = copy.deepcopy(model.model.layers[0].mlp.up_proj.weight_codes)
    model.load_state_dict(again.state_dict())
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight_codes, codes)


# -- mini-sequences -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cce", "logits"])
@pytest.mark.parametrize("checkpoints", ["none", "gpu", "host"])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_mini_sequences_keep_the_numbers(dtype: torch.dtype, checkpoints: str, loss: str) -> None:
    model, batch = quantized_model(dtype=dtype), make_batch()
    wanted = take_step(model, batch)
    fired: list[str] = []
    for name, param in model.named_parameters():
        param.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    apply_mini_sequence(model, tile_tokens=10, checkpoints=checkpoints, loss=loss)
    found = take_step(model, batch)
    assert sum(name.endswith("proj.weight") for name in found.grads) == 3 * 7
    # transformers' norms and loss are float32 even in float64.
    assert_same_step(found, wanted, tolerance=2e-5 if dtype == F32 else 2e-6)
    assert sorted(fired) == sorted(found.grads)


@pytest.mark.parametrize("family", ["qwen3", "phi3", "gemma2"])
def test_mini_sequences_of_other_families(family: str) -> None:
    model, batch = quantized_model(family=family), make_batch()
    wanted = take_step(model, batch)
    apply_mini_sequence(model, tile_tokens=10)
    assert_same_step(take_step(model, batch), wanted, tolerance=2e-6)


@pytest.mark.parametrize("checkpoints", ["none", "gpu"])
@pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj", "down_proj"]}])
def test_mini_sequences_keep_adapters(options: dict, checkpoints: str) -> None:
    pytest.importorskip("peft")
    model, batch = with_lora(make_model(), **options), make_batch()
    quantize_linears(model, group_size=16)
    wanted = take_step(model, batch)
    assert all("lora_" in name for name in wanted.grads)
    apply_mini_sequence(model, tile_tokens=10, checkpoints=checkpoints)
    # transformers' norms and loss are float32 even in float64, and adapters make activations large.
    assert_same_step(take_step(model, batch), wanted, tolerance=5e-5)


def test_a_step_in_backward() -> None:
    """Each weight is written as soon as its gradient is complete, as by an optimizer in the backward pass."""
    models = [quantized_model(dtype=F32) for _ in range(2)]
    apply_mini_sequence(models[1], tile_tokens=10)
    for model in models:
        for layer in layers_of(model):
            layer.weight.register_post_accumulate_grad_hook(write)
        take_step(model, make_batch())
        assert all(layer.weight.grad is None for layer in layers_of(model))
    for mine, other in zip(*map(layers_of, models), strict=True):
        step = step_of_each(mine.groups)
        difference = (values(mine.groups) - values(other.groups)).abs()
        # A rounding on the other side is a whole step, and rare.
        assert (difference <= 1.01 * step).all()
        assert (difference > 0.5 * step).double().mean() < 0.01


def write(param: nn.Parameter) -> None:
    for start in range(0, param.shape[0], 13):
        rows = slice(start, min(start + 13, param.shape[0]))
        value = param.quantized.dequantize(rows, dtype=F32)
        param.quantized.store(value - 0.1 * param.grad[rows], 1234, rows)
    param.grad = None


def trained_losses(model: nn.Module) -> list[float]:
    optimizer, batch = Apollo(model.named_parameters(), lr=3e-3, rank=4), make_batch()
    losses = []
    for _ in range(12):
        losses.append(float(take_step(model, batch).loss))
        optimizer.step()
    return losses


def test_apollo_trains_as_with_plain_weights() -> None:
    plain, quantised = make_model(dtype=F32), quantized_model(dtype=F32)
    wanted, found = trained_losses(plain), trained_losses(quantised)
    assert wanted[-1] < 0.3 * wanted[0]
    torch.testing.assert_close(found[-1], wanted[-1], rtol=0.03, atol=0)


def test_data_parallel(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(40, 9), nn.Linear(9, 5)), torch.randn(3, 40)
    quantize_linears(model, group_size=16)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/ranks", world_size=1, rank=0)
    try:
        ranks = nn.parallel.DistributedDataParallel(model, init_sync=False, broadcast_buffers=False)
        ranks(x).square().sum().backward()
        found = [param.grad.clone() for param in model.parameters()]
    finally:
        torch.distributed.destroy_process_group()
    model.zero_grad()
    model(x).square().sum().backward()
    for mine, true in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(mine, true.grad)
