"""8-bit weights in Triton: the codes, scales and values of plain PyTorch, bit for bit."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch
from compile_runs import run_compiler
from torch import Tensor

from longseq.apollo import int8
from longseq.apollo.int8 import Groups

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
NAN, INF = float("nan"), float("inf")
SHAPES = [(5, 131), (3, 1), (2, 128), (70, 16), (7, 300), (1, 513)]
KEYS = [None, 0, 12345, 2**32 - 1]
# In the interpreter, what a GPU does without a word.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def both(kernel_device: str, monkeypatch: pytest.MonkeyPatch):
    """Calls what it is given once for each way, "plain" and "triton", and returns both results."""

    def call(function) -> tuple:
        results = []
        for is_triton in (False, True):
            monkeypatch.setattr(int8, "takes_triton", lambda *tensors, is_triton=is_triton: is_triton)
            results.append(function(kernel_device))
        return tuple(results)

    return call


def empty_groups(rows: int, columns: int, size: int, device: str) -> Groups:
    """Of codes in the columns of a wider buffer; nothing that was there may be left."""
    codes = torch.full((rows, columns + 29), 77, dtype=torch.uint8, device=device)[:, 13 : 13 + columns]
    scale, zero = torch.full((2, rows, -(-columns // size)), -7.0, device=device)
    return Groups(codes, scale, zero, size)


def assert_bits_equal(ours: Groups, wanted: Groups) -> None:
    assert torch.equal(ours.codes, wanted.codes)
    for one, other in ((ours.scale, wanted.scale), (ours.zero, wanted.zero)):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("size", [16, 128, 8192])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize(shape: tuple[int, int], size: int, key: int | None, both) -> None:
    value = torch.randn(shape[0], shape[1] + 7)[:, 3 : 3 + shape[1]]

    def quantize(device: str) -> Groups:
        groups = empty_groups(*shape, size, device)
        groups.quantize(value.to(device), key, first=3 * shape[1])
        buffer = groups.codes._base
        assert (buffer[:, :13] == 77).all()
        assert (buffer[:, 13 + shape[1] :] == 77).all()
        return groups

    plain, ours = both(quantize)
    assert_bits_equal(ours, plain)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_quantize_narrower_values(dtype: torch.dtype, both) -> None:
    value = torch.randn(5, 131).to(dtype)

    def quantize(device: str) -> Groups:
        groups = empty_groups(5, 131, 32, device)
        groups.quantize(value.to(device), 7, first=0)
        return groups

    assert_bits_equal(*reversed(both(quantize)))


def special_values() -> Tensor:
    """A row for each: one number, zeros, ranges too small and too large, what is not finite."""
    value = torch.randn(9, 40)
    value[0, :16], value[1, :16] = 0.3, 0.0
    value[2, :16] = torch.arange(16) * 1e-40
    value[3, :16] = torch.linspace(-3e38, 3e38, 16)
    value[4, 5], value[5, 5], value[6, 5], value[7, 38] = NAN, INF, -INF, NAN
    value[8, :16] = torch.linspace(1000.0, 1000.01, 16)
    return value


@pytest.mark.parametrize("key", [None, 99])
def test_special_values(key: int | None, both) -> None:
    value = special_values()

    def quantize(device: str) -> Groups:
        groups = empty_groups(9, 40, 16, device)
        groups.quantize(value.to(device), key, first=0)
        return groups

    plain, ours = both(quantize)
    assert_bits_equal(ours, plain)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("columns", [slice(None), slice(32, 96), slice(64, 131)], ids=str)
def test_dequantize(columns: slice, dtype: torch.dtype, both) -> None:
    """Rows and columns of a weight, into a part of a buffer."""
    codes = torch.randint(256, (9, 131), dtype=torch.uint8)
    scale, zero = torch.rand(9, 5), torch.randn(9, 5)
    count = len(range(*columns.indices(131)))

    def dequantize(device: str) -> Tensor:
        groups = Groups(*(x.to(device) for x in (codes, scale, zero)), 32).part(slice(2, 9), columns)
        buffer = torch.full((7, count + 20), NAN, dtype=dtype, device=device)
        groups.dequantize(buffer[:, 8 : 8 + count])
        assert int(buffer.isnan().sum()) == 7 * 20
        return buffer[:, 8 : 8 + count]

    plain, ours = both(dequantize)
    if dtype == BF16 and not ours.is_cuda:  # the interpreter cuts off, and does not round
        torch.testing.assert_close(ours, plain, rtol=2**-7, atol=0)
    else:
        assert torch.equal(ours, plain)


def test_nothing_to_do(both) -> None:
    def call(device: str) -> int:
        for shape in ((0, 40), (3, 0)):
            groups = empty_groups(*shape, 16, device)
            groups.quantize(torch.empty(shape, device=device), 1, first=0)
            groups.dequantize(torch.empty(shape, device=device))
        return 1

    assert both(call) == (1, 1)


def test_autograd_sees_what_is_written(both) -> None:
    def versions(device: str) -> list[int]:
        groups = empty_groups(3, 40, 16, device)
        before = [x._version for x in groups[:3]]
        groups.quantize(torch.randn(3, 40, device=device), None, first=0)
        return [x._version > old for x, old in zip(groups[:3], before, strict=True)]

    assert both(versions) == ([True] * 3, [True] * 3)


def test_offsets_past_2_to_the_31(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes whose rows lie 2^30 apart, in memory that is there when touched; as much lies before it."""
    if kernel_device == "cuda" or sys.platform != "linux":
        pytest.skip("for the interpreter, and memory that is not reserved")
    no_reserve = 0x4000  # MAP_NORESERVE, which older Pythons do not name
    try:
        memory = mmap.mmap(-1, 9 * 2**30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    except OSError:
        pytest.skip("needs 9 GiB of address space")
    codes = torch.frombuffer(memory, dtype=torch.uint8).as_strided((5, 40), (2**30, 1), 4 * 2**30)
    monkeypatch.setattr(int8, "takes_triton", lambda *tensors: True)
    near, value = empty_groups(5, 40, 16, "cpu"), torch.randn(5, 40)
    far = near._replace(codes=codes)
    for groups in (near, far):
        groups.quantize(value, 5, first=0)
    assert torch.equal(far.codes.contiguous(), near.codes)
    assert torch.equal(far.dequantize(torch.empty(5, 40)), near.dequantize(torch.empty(5, 40)))


COMPILE = """
import json, torch, compile_kernels
seen = {}
if compile_kernels.can_compile(seen):
    from longseq.apollo.kernels import quantized
    on_gpu, F32 = compile_kernels.on_gpu, torch.float32
    for width, size, dtypes in ((4096, 128, (torch.bfloat16, F32)), (333, 16, (F32,))):
        codes, scale = on_gpu(300, width, dtype=torch.uint8), on_gpu(300, -(-width // size), dtype=F32)
        for dtype in dtypes:
            value = on_gpu(300, width, dtype=dtype)
            quantized.dequantize(codes, scale, scale, size, value)
            for key in (None, 5):
                quantized.quantize(value, codes, scale, scale, size, key, 0)
    print(json.dumps({"done": True}))
"""


@pytest.mark.slow  # 10 compilations: the user's cache must not answer for the compiler
def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    found = run_compiler(["-c", COMPILE], tmp_path)
    assert {line.get("kernel") for line in found} >= {"_dequantize_kernel", "_quantize_kernel"}


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 14336), (1000, 4099)], ids=str)
def test_a_gpu_writes_the_codes_of_the_cpu(shape: tuple[int, int]) -> None:
    value = torch.randn(shape)
    found = []
    for device in ("cpu", "cuda"):
        groups = empty_groups(*shape, 128, device)
        groups.quantize(value.to(device), 2**31 + 5, first=10 * shape[1])
        out = groups.dequantize(torch.empty(shape, dtype=BF16, device=device))
        found.append((Groups(*(x.cpu() for x in groups[:3]), 128), out.cpu()))
    assert_bits_equal(found[1][0], found[0][0])
    assert torch.equal(found[1][1], found[0][1])
