"""Norms, rotations and gated activations with gradients by hand, against float64 autograd.

Each case runs as plain PyTorch and as Triton kernels, these in the interpreter where there is no GPU. What is
written is rounded once, so that the bound is that of one rounding, which plain PyTorch seldom keeps to.
"""

from __future__ import annotations

import importlib
import mmap
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from numerics import relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from longseq.mst.kernels import (
    activation_name,
    gated_activation,
    gated_activation_backward_,
    rms_norm,
    rms_norm_backward,
    rotate_,
)
from longseq.mst.kernels.dispatch import takes_triton

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAN = float("nan")
EPS = 1e-5
# In the interpreter, what a GPU does without a word.
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered in exp:RuntimeWarning", "ignore:divide by zero:RuntimeWarning"
)
FILES = ("rms_norm", "rope", "gated_activation")
MODULES = [importlib.import_module(f"longseq.mst.kernels.{name}") for name in FILES]
DTYPES = {"plain": [BF16, F16, F32, F64], "triton": [BF16, F16, F32]}
PATHS_AND_DTYPES = [(path, dtype) for path, dtypes in DTYPES.items() for dtype in dtypes]
each_path = pytest.mark.parametrize("path", list(DTYPES), indirect=True)
each_path_and_dtype = pytest.mark.parametrize(("path", "dtype"), PATHS_AND_DTYPES, indirect=["path"])


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device on which one of the two ways is now taken, whatever the tensors are."""
    is_triton = request.param == "triton"
    for module in MODULES:
        monkeypatch.setattr(module, "takes_triton", lambda *tensors: is_triton)
    return request.getfixturevalue("kernel_device") if is_triton else "cpu"


def assert_rounded_once(ours: Tensor, truth: Tensor, name: str = "") -> None:
    """Within one rounding of the dtype, and of some float32 roundings on the way."""
    assert ours.shape == truth.shape, f"{name}: {tuple(ours.shape)} is not {tuple(truth.shape)}"
    cut_off = ours.dtype == BF16 and not ours.is_cuda  # so does Triton's interpreter
    rounding = torch.finfo(ours.dtype).eps / (1 if cut_off else 2)
    on_the_way = 50 * torch.finfo(F64).eps if ours.dtype == F64 else 8 * torch.finfo(F32).eps
    error = relative_error(ours, truth)
    assert error <= rounding + on_the_way, f"{name}: relative error {error:.2e} in {ours.dtype}"


def assert_same(ours: Tensor, other: Tensor) -> None:
    """But for a sum's order and a last bit here and there, which compilers and vector units choose."""
    eps = torch.finfo(ours.dtype).eps
    tiny = 8 * eps if ours.dtype in (F32, F64) else eps / 8
    assert ours.dtype == other.dtype
    assert relative_error(ours, other) < tiny


def apart(values: Tensor) -> tuple[Tensor, Tensor]:
    """The values as a slice of the columns of a buffer that holds NaN otherwise, and that buffer.

    Of two such buffers the rows are not alike far apart.
    """
    rows, columns = values.shape[0], values[0].numel() if len(values) else 0
    buffer = torch.full(
        (rows, columns + int(torch.randint(10, 10_000, ()))), NAN, dtype=values.dtype, device=values.device
    )
    inside = buffer[:, 8 : 8 + columns].view(values.shape)
    inside.copy_(values)
    return inside, buffer


def assert_nothing_else_written(inside: Tensor, buffer: Tensor) -> None:
    assert int(buffer.isnan().sum()) == buffer.numel() - inside.numel()


def normal(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape).to(device, dtype)


def true_gradients(function: Callable[..., Tensor], upstream: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """In float64, by autograd."""
    leaves = [x.double().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves, upstream.double())


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


NORM_SHAPES = [(5, 131), (70, 16), (300, 2, 24), (7, 3, 40), (2, 4100), (3, 1, 1)]


@each_path_and_dtype
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, path: str) -> None:
    x, _ = apart(normal(*shape, dtype=dtype, device=path))
    weight = normal(shape[-1], dtype=dtype, device=path)
    truth = plain_rms_norm(x.double(), weight.double())
    ours = rms_norm(x, weight, EPS)
    assert ours.dtype == dtype
    assert ours.is_contiguous()
    assert_rounded_once(ours, truth)
    out, buffer = apart(torch.full_like(ours, NAN))
    assert rms_norm(x, weight, EPS, out=out) is out
    assert_same(out, ours)
    assert_nothing_else_written(out, buffer)
    inside, buffer = apart(x)
    rms_norm(inside, weight, EPS, out=inside)
    assert_same(inside, ours)
    assert_nothing_else_written(inside, buffer)


@each_path
def test_weights_of_rms_norm(path: str) -> None:
    x = normal(9, 72, dtype=BF16, device=path)
    weight = nn.Parameter(normal(72, dtype=F32, device=path))
    assert_rounded_once(rms_norm(x, None, EPS, weight_offset=1.0), plain_rms_norm(x.double(), 1.0))
    for offset in (0.0, 1.0):
        ours = rms_norm(x, weight, EPS, weight_offset=offset, out_dtype=F32)
        assert ours.dtype == F32
        assert not ours.requires_grad
        assert_rounded_once(ours, plain_rms_norm(x.double(), weight.detach().double() + offset))
    truth = plain_rms_norm(x.double(), 1.0, 0.5)
    assert_rounded_once(rms_norm(x.float(), None, 0.5, out=x), truth)


@each_path_and_dtype
@pytest.mark.parametrize("shape", NORM_SHAPES[:-1], ids=str)  # one element has no direction
def test_rms_norm_backward(shape: tuple[int, ...], dtype: torch.dtype, path: str) -> None:
    x, _ = apart(normal(*shape, dtype=dtype, device=path))
    grad_out, _ = apart(normal(*shape, dtype=dtype, device=path))
    residual, _ = apart(normal(*shape, dtype=dtype, device=path))
    weight = normal(shape[-1], dtype=dtype, device=path)
    before = normal(shape[-1], dtype=F64 if dtype == F64 else F32, device=path)
    d_x, d_weight = true_gradients(plain_rms_norm, grad_out, x, weight)
    weight_grad = before.clone()
    ours = rms_norm_backward(x, weight, grad_out, EPS, weight_grad=weight_grad)
    assert ours.dtype == dtype
    assert_rounded_once(ours, d_x, "dx")
    assert_rounded_once(weight_grad, before.double() + d_weight, "weight_grad")
    assert_same(ours, rms_norm_backward(x, weight, grad_out, EPS))
    added = rms_norm_backward(x, weight, grad_out, EPS, residual_grad=residual)
    assert_rounded_once(added, d_x + residual.double(), "dx + residual_grad")
    for name in ("new", "residual_grad", "grad_out", "x"):
        tensors = {"new": torch.full_like(x, NAN), "residual_grad": residual, "grad_out": grad_out, "x": x}
        copies = {key: apart(tensor) for key, tensor in tensors.items()}
        copy = {key: inside for key, (inside, _) in copies.items()}
        weight_grad = before.clone()
        out = rms_norm_backward(
            copy["x"], weight, copy["grad_out"], EPS,
            residual_grad=copy["residual_grad"], weight_grad=weight_grad, out=copy[name],
        )  # fmt: skip
        assert out is copy[name]
        assert_same(out, added)
        assert_nothing_else_written(*copies[name])
        assert_rounded_once(weight_grad, before.double() + d_weight, f"weight_grad, out={name}")


@each_path
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_backward_of_mixed_dtypes(offset: float, path: str) -> None:
    """As under autocast: a float32 residual stream, bf16 gradients."""
    x, weight = normal(37, 72, dtype=F32, device=path), normal(72, dtype=BF16, device=path)
    grad_out = normal(37, 72, dtype=BF16, device=path)
    residual = normal(37, 72, dtype=F16, device=path)
    d_x, d_weight = true_gradients(lambda a, b: plain_rms_norm(a, b + offset), grad_out, x, weight)
    weight_grad = torch.zeros(72, device=path)
    options = {"weight_offset": offset, "weight_grad": weight_grad, "residual_grad": residual}
    ours = rms_norm_backward(x, weight, grad_out, EPS, **options)
    assert ours.dtype == F32
    assert_rounded_once(ours, d_x + residual.double())
    assert_rounded_once(weight_grad, d_weight)
    rms_norm_backward(x, weight, grad_out, EPS, **options, out=grad_out)
    assert_rounded_once(grad_out, d_x + residual.double())
    assert_rounded_once(weight_grad, 2 * d_weight)


@each_path
def test_rms_norm_backward_without_a_weight(path: str) -> None:
    x, grad_out = (normal(5, 3, 40, dtype=F32, device=path) for _ in range(2))
    (d_x,) = true_gradients(lambda a: plain_rms_norm(a, 1.0), grad_out, x)
    assert_rounded_once(rms_norm_backward(x, None, grad_out, EPS, weight_offset=1.0), d_x)


@each_path
def test_rows_past_the_end_add_nothing_without_eps(path: str) -> None:
    x, grad_out = (normal(3, 40, dtype=F32, device=path) for _ in range(2))
    weight_grad, weight = torch.zeros(40, device=path), torch.ones(40, device=path)
    _, d_weight = true_gradients(lambda a, b: plain_rms_norm(a, b, 0.0), grad_out, x, weight)
    rms_norm_backward(x, weight, grad_out, 0.0, weight_grad=weight_grad)
    assert_rounded_once(weight_grad, d_weight)


def test_sums_of_many_programs(kernel_device: str) -> None:
    """More than are added at once, into memory that is not contiguous."""
    from longseq.mst.kernels import rms_norm_triton

    sums, out = torch.randn(300, 40).to(kernel_device), torch.randn(40, 2).to(kernel_device)
    expected, other = out[:, 0].double() + sums.double().sum(0), out[:, 1].clone()
    rms_norm_triton.add_sums(sums, out[:, 0])
    assert_rounded_once(out[:, 0], expected)
    assert torch.equal(out[:, 1], other)


ROPE_SHAPES = [
    (2, 13, 3, 16, 16),
    (2, 13, 3, 16, 8),
    (1, 70, 5, 20, 20),
    (3, 5, 1, 24, 6),
    (1, 1, 130, 64, 2),
]


def plain_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half, width = cos.shape[-1] // 2, cos.shape[-1]
    x1, x2, rest = x[..., :half], x[..., half:width], x[..., width:]
    turned = torch.cat([x1, x2], -1) * cos.unsqueeze(2) + torch.cat([-x2, x1], -1) * sin.unsqueeze(2)
    return torch.cat([turned, rest], -1)


@each_path_and_dtype
@pytest.mark.parametrize("layout", ["tokens first", "heads first", "columns of a buffer"])
@pytest.mark.parametrize("one_table", [True, False])
@pytest.mark.parametrize("shape", ROPE_SHAPES, ids=str)
def test_rotate(shape: tuple[int, ...], one_table: bool, layout: str, dtype: torch.dtype, path: str) -> None:
    batch, length, heads, width, turned = shape
    values = normal(batch, length, heads, width, dtype=dtype, device=path)
    x, buffer = values.clone(), values
    if layout == "heads first":
        x = values.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    elif layout == "columns of a buffer":
        x, buffer = apart(values.flatten(0, 1))
        x = x.unflatten(0, (batch, length))
    # Angles of one dtype for x of another; both halves, which need not be alike.
    angles = BF16 if dtype == F32 else F64 if dtype == F64 else F32
    cos, sin = (
        normal(1 if one_table else batch, length, turned, dtype=angles, device=path) for _ in range(2)
    )
    truth = plain_rope(values.double(), cos.double(), sin.double())
    out, out_buffer = apart(torch.full_like(values, NAN).flatten(0, 1))
    out = out.unflatten(0, (batch, length))
    rotate_(x, cos, sin, out=out)
    assert torch.equal(x, values)
    assert_nothing_else_written(out, out_buffer)
    rotate_(x, cos, sin)
    assert_rounded_once(x, truth, "forward")
    assert_same(out, x)
    assert torch.equal(x[..., turned:], values[..., turned:])
    upstream = normal(*values.shape, dtype=dtype, device=path)
    (d_x,) = true_gradients(lambda a: plain_rope(a, cos.double(), sin.double()), upstream, values)
    x.copy_(upstream)
    rotate_(x, cos, sin, inverse=True)
    assert_rounded_once(x, d_x, "inverse")
    assert torch.equal(x[..., turned:], upstream[..., turned:])
    if layout == "columns of a buffer":
        assert_nothing_else_written(x, buffer)


@each_path
def test_rotate_queries_and_keys_of_one_buffer(path: str) -> None:
    """Twice, or once with the heads beside each other, by angles that the batch shares."""
    buffer = normal(2, 9, 8 * 16, dtype=F32, device=path)
    values = buffer.unflatten(-1, (8, 16)).clone()
    cos, sin = (normal(1, 9, 16, dtype=F32, device=path) for _ in range(2))
    queries, keys = buffer[..., : 5 * 16].unflatten(-1, (5, 16)), buffer[..., 5 * 16 : 7 * 16]
    rotate_(queries, cos, sin)
    rotate_(keys.unflatten(-1, (2, 16)), cos.expand(2, -1, -1), sin.expand(2, -1, -1))
    both = values.clone()
    rotate_(both[:, :, :7], cos, sin)
    assert_same(buffer.unflatten(-1, (8, 16)), both)
    assert torch.equal(both[:, :, 7], values[:, :, 7])
    # A table whose last dimension is not contiguous.
    table = torch.stack([cos, sin], -1)
    rotate_(values[:, :, :7], table[..., 0], table[..., 1])
    assert_same(values, both)


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
GATED_SHAPES = [(5, 131), (70, 40), (2, 4101), (40, 1)]
each_activation = pytest.mark.parametrize("activation", list(ACTIVATIONS))


def gate_and_up(rows: int, width: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Halves of one buffer, and that buffer."""
    inside, buffer = apart(3 * normal(rows, 2 * width, dtype=dtype, device=device))
    return inside[:, :width], inside[:, width:], buffer


@each_path_and_dtype
@pytest.mark.parametrize("shape", GATED_SHAPES, ids=str)
@each_activation
def test_gated_activation(activation: str, shape: tuple[int, int], dtype: torch.dtype, path: str) -> None:
    gate, up, _ = gate_and_up(*shape, dtype, path)
    ours = gated_activation(gate, up, activation)
    assert ours.dtype == dtype
    assert ours.is_contiguous()
    assert_rounded_once(ours, ACTIVATIONS[activation](gate.double()) * up.double())
    out, buffer = apart(torch.full_like(ours, NAN))
    assert gated_activation(gate, up, activation, out=out) is out
    assert_same(out, ours)
    assert_nothing_else_written(out, buffer)
    same = gate.clone()
    assert_same(gated_activation(same, up, activation, out=same), ours)
    assert_same(gated_activation(gate, up, activation, out=up), ours)


@each_path_and_dtype
@pytest.mark.parametrize("shape", GATED_SHAPES, ids=str)
@pytest.mark.parametrize("product", ["none", "new", "grad_out"])
@each_activation
def test_gated_activation_backward(
    activation: str, product: str, shape: tuple[int, int], dtype: torch.dtype, path: str
) -> None:
    gate, up, buffer = gate_and_up(*shape, dtype, path)
    grad_out, grad_buffer = apart(normal(*shape, dtype=dtype, device=path))
    upstream = grad_out.clone()
    act = ACTIVATIONS[activation]
    expected = gated_activation(gate, up, activation)
    d_gate, d_up = true_gradients(lambda a, b: act(a) * b, upstream, gate, up)
    new, new_buffer = apart(torch.full_like(upstream, NAN))
    into = {"none": None, "new": new, "grad_out": grad_out}[product]
    gated_activation_backward_(gate, up, grad_out, activation, product=into)
    assert_rounded_once(gate, d_gate, "gate")
    assert_rounded_once(up, d_up, "up")
    assert int(buffer.isnan().sum()) == buffer.numel() - 2 * gate.numel()
    if into is not None:
        assert_same(into, expected)
        assert_nothing_else_written(into, new_buffer if product == "new" else grad_buffer)
    if product != "grad_out":
        assert torch.equal(grad_out, upstream)


@each_path
@each_activation
def test_gates_far_from_0(activation: str, path: str) -> None:
    far = torch.tensor([-1e4, -300.0, -90.0, -20.0, 0.0, 20.0, 90.0, 300.0, 1e4], device=path).unsqueeze(0)
    one = torch.ones_like(far)
    gate, up = far.clone(), one.clone()
    d_gate, d_up = true_gradients(lambda a, b: ACTIVATIONS[activation](a) * b, one, far, one)
    gated_activation_backward_(gate, up, one, activation)
    torch.testing.assert_close(gate.double(), d_gate, rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(up.double(), d_up, rtol=3e-6, atol=1e-6)


@each_path
def test_no_rows(path: str) -> None:
    x = torch.empty(0, 3, 8, device=path)
    weight_grad = torch.ones(8, device=path)
    assert rms_norm(x, weight_grad, EPS).shape == x.shape
    assert rms_norm_backward(x, weight_grad, x, EPS, weight_grad=weight_grad).shape == x.shape
    assert (weight_grad == 1.0).all()
    angles = torch.empty(1, 0, 8, device=path)
    rotate_(x.unsqueeze(0), angles, angles)
    assert gated_activation(x[:, 0], x[:, 1], "silu").shape == (0, 8)
    gated_activation_backward_(x[:, 0], x[:, 1], x[:, 2], "silu", product=x[:, 2])


@pytest.fixture
def far_apart(kernel_device: str) -> Tensor:
    """A float16 matrix of 5 x 300 whose rows lie 2^30 elements apart, in memory that is there when touched.

    As much lies before it: an offset that wraps around finds memory too.
    """
    if kernel_device == "cuda" or sys.platform != "linux":
        pytest.skip("for the interpreter, and memory that is not reserved")
    no_reserve = 0x4000  # MAP_NORESERVE, which older Pythons do not name
    try:
        memory = mmap.mmap(-1, 2 * (9 * 2**30), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    except OSError:
        pytest.skip("needs 18 GiB of address space")
    return torch.frombuffer(memory, dtype=F16).as_strided((5, 300), (2**30, 1), 4 * 2**30)


@pytest.mark.parametrize("path", ["triton"], indirect=True)
def test_offsets_past_2_to_the_31(far_apart: Tensor, path: str) -> None:
    def filled() -> Tensor:
        far_apart.copy_(torch.randn(5, 300))
        return far_apart.contiguous()

    near, weight = filled(), torch.randn(100)
    rms_norm(far_apart.view(5, 3, 100), weight, EPS, out=far_apart.view(5, 3, 100))
    assert torch.equal(far_apart.contiguous().view(5, 3, 100), rms_norm(near.view(5, 3, 100), weight, EPS))
    near, grad = filled(), torch.randn(5, 300)
    x, sums = far_apart, [torch.zeros(300), torch.zeros(300)]
    weight = torch.randn(300)
    expected = rms_norm_backward(near, weight, grad, EPS, residual_grad=near, weight_grad=sums[0])
    rms_norm_backward(x, weight, x.copy_(grad), EPS, residual_grad=grad, out=x)
    assert torch.equal(
        x.contiguous(), rms_norm_backward(grad.half(), weight, grad.half(), EPS, residual_grad=grad)
    )
    rms_norm_backward(x.copy_(near), weight, grad, EPS, residual_grad=x, weight_grad=sums[1], out=x)
    assert torch.equal(x.contiguous(), expected)
    assert torch.equal(*sums)
    near, (cos, sin) = filled(), torch.randn(2, 1, 5, 60)
    rotate_(far_apart.view(1, 5, 3, 100), cos, sin)
    rotate_(near.view(1, 5, 3, 100), cos, sin)
    assert torch.equal(far_apart.contiguous(), near)
    near, grad = filled(), torch.randn(5, 100).half()
    tensors = [x.view(5, 3, 100).unbind(1) for x in (far_apart, near)]
    for gate, up, product in tensors:
        gated_activation(gate, up, "silu", out=product)
    assert torch.equal(far_apart.contiguous(), near)
    for gate, up, product in tensors:
        gated_activation_backward_(gate, up, product.copy_(grad), "silu", product=product)
    assert torch.equal(far_apart.contiguous(), near)


def test_names_of_activations() -> None:
    from transformers.activations import ACT2FN

    names = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
    names |= {"gelu_new": "gelu_tanh", "relu": None, "quick_gelu": None, "gelu_10": None, "relu2": None}
    for name, ours in names.items():
        assert activation_name(name) == ours
        assert activation_name(ACT2FN[name]) == ours, name
        if ours is not None:
            x = torch.randn(50, dtype=F64)
            torch.testing.assert_close(ACT2FN[name](x), ACTIVATIONS[ours](x))
    assert activation_name("gelu_tanh") == "gelu_tanh"
    assert activation_name(nn.GELU()) == "gelu"
    assert activation_name(nn.GELU(approximate="tanh")) == "gelu_tanh"
    assert activation_name(nn.Identity()) is None
    assert activation_name(type("SiLUActivation", (nn.Module,), {})()) is None


def test_who_computes() -> None:
    pytest.importorskip("triton")

    def tensor(dtype: torch.dtype = BF16, is_cuda: bool = True) -> SimpleNamespace:
        return SimpleNamespace(dtype=dtype, is_cuda=is_cuda)

    assert takes_triton(tensor(), None, tensor(F32), tensor(F16))
    assert not takes_triton(tensor(), tensor(F64))
    assert not takes_triton(tensor(), tensor(is_cuda=False))


def test_what_is_refused() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8)
    cos = torch.randn(1, 4, 8)
    refused = {
        "x of shape": lambda: rms_norm(x[0], weight, EPS),
        "weight of shape": lambda: rms_norm(x, weight[:1], EPS),
        "out of shape": lambda: rms_norm(x, weight, EPS, out=x[:1]),
        "out_dtype": lambda: rms_norm(x, weight, EPS, out=x, out_dtype=BF16),
        r"x.stride\(-1\)": lambda: rms_norm(x.T, None, EPS),
        "residual_grad of shape": lambda: rms_norm_backward(x, weight, x, EPS, residual_grad=x[:1]),
        "must be torch.float32": lambda: rms_norm_backward(x, weight, x, EPS, weight_grad=weight.half()),
        "the weight, None": lambda: rms_norm_backward(x, None, x, EPS, weight_grad=weight),
        r"must be \(B, S, n, H\)": lambda: rotate_(x, cos, cos),
        "cos of shape": lambda: rotate_(x.view(1, 4, 2, 4), cos, cos),
        "sin of shape": lambda: rotate_(x.view(1, 4, 1, 8), cos, cos[..., :4]),
        r"rotate_: out \(4, 8\)": lambda: rotate_(x.view(1, 4, 1, 8), cos, cos, out=x),
        "R even": lambda: rotate_(x.view(1, 4, 1, 8), cos[..., :3], cos[..., :3]),
        "activation='relu'": lambda: gated_activation(x, x, "relu"),
        "up of shape": lambda: gated_activation(x, x[:1], "silu"),
        r"product.stride\(-1\)": lambda: gated_activation_backward_(
            x, x, x, "silu", product=torch.empty(8, 4).T
        ),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()


REAL_SIZES = [(4097, 4096), (2000, 14336), (1000, 16384), (517, 5120), (4097, 40, 128)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("shape", REAL_SIZES, ids=str)
def test_norms_of_real_sizes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    make = {"dtype": dtype, "device": "cuda"}
    x, grad_out, residual = (apart(normal(*shape, **make))[0] for _ in range(3))
    weight = normal(shape[-1], **make)
    assert_rounded_once(rms_norm(x, weight, EPS), plain_rms_norm(x.double(), weight.double()))
    d_x, d_weight = true_gradients(plain_rms_norm, grad_out, x, weight)
    sums = torch.zeros(2, shape[-1], device="cuda")
    # Strides alike: with others the compiler may lay rows out otherwise, and sum them in another order.
    options = {"residual_grad": residual}
    elsewhere = torch.empty_strided(residual.shape, residual.stride(), **make)
    first = rms_norm_backward(x, weight, grad_out, EPS, weight_grad=sums[0], out=elsewhere, **options)
    second = rms_norm_backward(x, weight, grad_out, EPS, weight_grad=sums[1], out=residual, **options)
    assert torch.equal(first, second)
    assert torch.equal(*sums)
    assert_rounded_once(sums[0], d_weight, "weight_grad")
    torch.testing.assert_close(
        rms_norm_backward(x, weight, grad_out, EPS).double(), d_x, rtol=torch.finfo(dtype).eps, atol=1e-5
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("turned", [128, 64])
def test_rotations_of_real_sizes(turned: int, dtype: torch.dtype) -> None:
    values = normal(2, 4097, 40, 128, dtype=dtype, device="cuda")
    cos, sin = (normal(1, 4097, turned, dtype=F32, device="cuda") for _ in range(2))
    truth = plain_rope(values.double(), cos.double(), sin.double())
    (d_x,) = true_gradients(lambda a: plain_rope(a, cos.double(), sin.double()), values, values)
    x, back = values.clone(), values.clone()
    rotate_(x[:, :, :32], cos, sin)
    rotate_(x[:, :, 32:], cos, sin)
    assert_rounded_once(x, truth)
    rotate_(back, cos, sin, inverse=True)
    assert_rounded_once(back, d_x)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("shape", [(2000, 14336), (517, 11008), (4097, 4864)], ids=str)
@each_activation
def test_gates_of_real_sizes(activation: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate, up, _ = gate_and_up(*shape, dtype, "cuda")
    grad_out = normal(*shape, dtype=dtype, device="cuda")
    act = ACTIVATIONS[activation]
    product = act(gate.double()) * up.double()
    assert_rounded_once(gated_activation(gate, up, activation), product)
    d_gate, d_up = true_gradients(lambda a, b: act(a) * b, grad_out, gate, up)
    gated_activation_backward_(gate, up, grad_out, activation, product=grad_out)
    for ours, truth in ((gate, d_gate), (up, d_up), (grad_out, product)):
        assert_rounded_once(ours, truth)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements() -> None:
    """The last rows of tensors too large for 32-bit offsets are those of the rows alone."""
    rows, width = 150_001, 14336
    assert rows * width > 2**31
    gate, up = (torch.randn(1, width, device="cuda").to(BF16).repeat(rows, 1) for _ in range(2))
    weight = torch.randn(width, device="cuda")
    alone = gate[-5:].clone(), up[-5:].clone()
    assert torch.equal(gated_activation(gate, up, "silu", out=up)[-5:], gated_activation(*alone, "silu"))
    assert torch.equal(rms_norm(gate, weight, EPS, out=up)[-5:], rms_norm(alone[0], weight, EPS))
    angles = torch.randn(2, 1, rows, 128, device="cuda")
    rotate_(gate.view(1, rows, 112, 128), *angles)
    turned = alone[0].view(1, 5, 112, 128)
    rotate_(turned, *angles[:, :, -5:])
    assert torch.equal(gate[-5:], turned.view(5, width))
