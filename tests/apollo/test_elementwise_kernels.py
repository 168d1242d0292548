"""The kernel of AdamW against plain PyTorch, in Triton's interpreter where there is no GPU; and compiled."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compile_runs import run_compiler
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from longseq.apollo import elementwise
from longseq.apollo.elementwise import adamw, takes_triton
from longseq.apollo.kernels import elementwise as kernels
from longseq.apollo.projection import mixed
from longseq.apollo.rounding import stochastically_rounded
from longseq.apollo.slots import Slot

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
OPTIONS = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
SHAPES = [(3, 1000), (17,), (1,), (61, 67), (0,), (2048,), (5, 4096), (2, 3)]
WAYS = [
    (BF16, BF16, "stochastic"),
    (BF16, F32, "stochastic"),
    (BF16, BF16, "nearest"),
    (BF16, BF16, "master"),
    (F16, F16, "nearest"),
    (F16, F32, "master"),
    (F32, F32, "stochastic"),
    (F32, BF16, "nearest"),
]


@triton.jit
def _rounded_alone_kernel(value_ptr, out_ptr, count, start, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(value_ptr + at, mask=at < count, other=0.0)
    tl.store(out_ptr + at, kernels._rounded(value, at, start), mask=at < count)


def bits(value: Tensor) -> list[int]:
    return value.float().view(torch.int32).tolist()


def slots_of(
    dtype: torch.dtype, grad_dtype: torch.dtype, device: str, *, seed: int, offset: int = 0
) -> list[Slot]:
    """The same for the same seed; at an offset, tensors that begin at odd addresses."""
    torch.manual_seed(seed)
    slots = []
    for number, shape in enumerate(SHAPES):
        weight, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(grad_dtype)
        place = {"first": 2**33 + 1000 * number, "row_stride": shape[-1] + (3 if number == 3 else 0)}
        slots.append(
            Slot(at_offset(weight, offset, device), at_offset(grad, offset, device), key=number, **place)
        )
    return slots


def at_offset(value: Tensor, offset: int, device: str) -> Tensor:
    buffer = torch.full((value.numel() + 2 * offset,), float("nan"), dtype=value.dtype, device=device)
    inside = buffer[offset : offset + value.numel()].view(value.shape)
    return inside.copy_(value)


def assert_near(ours: Tensor, plain: Tensor, *, ulps: float, few: float) -> None:
    """Apart by no more than some places of the last bit, and by any in few elements only."""
    if ours.numel() == 0:
        return
    gap = (ours.double() - plain.double()).abs()
    # What cancels has the rounding of what was added up.
    assert (gap <= ulps * torch.finfo(ours.dtype).eps * plain.double().abs().clamp_min(0.1)).all()
    assert float((gap > 0).double().mean()) <= few


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(("dtype", "grad_dtype", "rounding"), WAYS)
def test_the_kernel_does_what_plain_pytorch_does(
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    rounding: str,
    offset: int,
    kernel_device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several steps, of slots of which some began later, some have their own launch, and some share one."""
    found = {}
    monkeypatch.setattr(kernels, "LARGE", 4000)
    for path in ("plain", "triton"):
        monkeypatch.setattr(elementwise, "takes_triton", lambda slot, path=path: path == "triton")
        slots = slots_of(dtype, grad_dtype, kernel_device, seed=3, offset=offset)
        torch.manual_seed(4)
        for step in range(3):
            for slot in slots:
                slot.grad.copy_(torch.randn(slot.grad.shape))
            adamw(slots[2 if step == 0 else 0 :], **OPTIONS, rounding=rounding)
        found[path] = slots
    # As the interpreter does with bf16.
    cut_off = dtype == BF16 and rounding in ("nearest", "master") and kernel_device == "cpu"
    for ours, plain in zip(found["triton"], found["plain"], strict=True):
        assert set(ours.state) == set(plain.state)
        assert ours.state["step"] == plain.state["step"]
        for name in set(ours.state) - {"step"}:
            assert_near(ours.state[name], plain.state[name], ulps=8, few=1.0)
        ulps = (4 if cut_off else 1) if dtype != F32 else 8
        few = 1.0 if cut_off or dtype == F32 or ours.weight.numel() < 500 else 0.02
        assert_near(ours.weight, plain.weight, ulps=ulps, few=few)
        for tensor in (ours.weight, ours.grad):
            around = torch.as_strided(tensor, (tensor.numel() + 2 * offset,), (1,), 0)
            assert around.isnan().sum() == 2 * offset


@pytest.mark.parametrize("first", [0, 2**40 + 77])
def test_rounding_alone_is_equal(first: int, kernel_device: str) -> None:
    """Bit for bit, with what is not finite, not normal or about to become infinite."""
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-42, -(2.0**-130), 3.4e38, -3.4e38]
    # NaN in a low bit, and the one that GPUs make: either is lost if anything is added to it.
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32).view(F32)
    value = torch.cat(
        [nans, torch.tensor(special), torch.randn(991) * 10.0 ** torch.randint(-30, 30, (991,))]
    )
    key32 = mixed(7, 5) & 0xFFFFFFFF
    ours = torch.empty_like(value, device=kernel_device)
    start = (first * kernels.PLACE + key32) & 0xFFFFFFFF
    _rounded_alone_kernel[(1,)](value.to(kernel_device), ours, len(value), start, BLOCK=1024)
    plain = stochastically_rounded(value, key32, first=first, row_stride=0)
    is_nan = value.isnan()
    assert is_nan.sum() == 3
    assert ours.cpu()[is_nan].isnan().all()
    assert plain[is_nan].isnan().all()
    assert bits(ours.cpu()[~is_nan]) == bits(plain[~is_nan])


@pytest.mark.parametrize("cuts", [[7, 2051], [1]], ids=str)
def test_parts_are_updated_as_the_whole(
    cuts: list[int], kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: where a slot begins, and what shares its launch, changes nothing."""
    monkeypatch.setattr(elementwise, "takes_triton", lambda slot: True)
    weight, grad = torch.randn(71, 53).to(kernel_device, BF16), torch.randn(71, 53).to(kernel_device, BF16)
    whole = Slot(weight.clone(), grad, key=5, first=100, row_stride=53)
    ends = [0, *cuts, weight.numel()]
    parts = [
        Slot(weight.flatten()[a:b].clone(), grad.flatten()[a:b].clone(), key=5, first=100 + a)
        for a, b in pairwise(ends)
    ]
    columns = Slot(weight[:, 9:30].contiguous(), grad[:, 9:30].contiguous(), key=5, first=109, row_stride=53)
    for _ in range(2):
        for slots in ([whole], parts, [columns]):
            adamw(slots, **OPTIONS, rounding="stochastic")
    assert torch.equal(torch.cat([part.weight for part in parts]), whole.weight.flatten())
    assert torch.equal(columns.weight, whole.weight[:, 9:30])


def test_zero_gradients(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "takes_triton", lambda slot: True)
    slot = Slot(torch.ones(33, device=kernel_device), torch.zeros(33, device=kernel_device))
    adamw([slot], **OPTIONS, rounding="nearest")
    assert torch.allclose(slot.weight.cpu(), torch.full((33,), 0.999))


@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_a_launch_finds_its_slots(count: int, kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each slot, of one program or several, is updated once and by its own gradient."""
    monkeypatch.setattr(elementwise, "takes_triton", lambda slot: True)
    monkeypatch.setattr(kernels, "BLOCK", 16)
    sizes = [1 + 37 * i % 50 for i in range(count)]
    slots = [
        Slot(torch.zeros(n, device=kernel_device), torch.full((n,), (-1.0) ** i, device=kernel_device))
        for i, n in enumerate(sizes)
    ]
    adamw(slots, **OPTIONS, rounding="nearest")
    for i, slot in enumerate(slots):
        expected = torch.full((sizes[i],), -0.01 * (-1.0) ** i)
        assert torch.allclose(slot.weight.cpu(), expected, rtol=1e-4)


def test_wide_loads_only_where_addresses_allow_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """And large slots have a launch of their own."""
    monkeypatch.setattr(kernels, "LARGE", 640)

    def slot(count: int) -> Slot:
        weight, grad, moment, square = (torch.zeros(count) for _ in range(4))
        return Slot(weight, grad, {"exp_avg": moment, "exp_avg_sq": square})

    def launches(*slots: Slot) -> list[tuple[int, bool]]:
        return [(len(group), aligned) for group, aligned in kernels._launches(list(slots), "nearest")]

    assert launches(slot(32), slot(33), slot(0), slot(48)) == [(2, True), (1, False)]
    assert launches(slot(32), slot(640), slot(641)) == [(1, True), (1, False), (1, True)]
    odd = slot(32)
    odd.grad = torch.zeros(33)[1:]
    assert launches(odd) == [(1, False)]


def test_who_takes_triton() -> None:
    def slot(dtype: torch.dtype = BF16, is_cuda: bool = True, contiguous: bool = True) -> SimpleNamespace:
        tensor = SimpleNamespace(dtype=dtype, is_cuda=is_cuda, is_contiguous=lambda: contiguous)
        good = SimpleNamespace(dtype=BF16, is_cuda=True, is_contiguous=lambda: True)
        return SimpleNamespace(weight=good, grad=tensor, state={})

    assert takes_triton(slot())
    assert takes_triton(slot(F32))
    assert not takes_triton(slot(F64))
    assert not takes_triton(slot(is_cuda=False))
    assert not takes_triton(slot(contiguous=False))
    kept = slot()
    kept.state["exp_avg"] = torch.zeros(4, 3).T
    assert not takes_triton(kept)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements() -> None:
    """The end of a slot too long for 32-bit offsets is updated as that end alone."""
    count, end = 2**31 + 4096 + 16, 5000
    weight, grad = torch.randn(end, device="cuda").to(BF16), torch.randn(end, device="cuda").to(BF16)
    long = Slot(*(torch.zeros(count, dtype=BF16, device="cuda") for _ in range(2)), key=5)
    long.weight[-end:], long.grad[-end:] = weight, grad
    alone = Slot(weight, grad, key=5, first=count - end)
    for slot in (long, alone):
        adamw([slot], **OPTIONS, rounding="stochastic")
    assert torch.equal(long.weight[-end:], alone.weight)


COMPILED = """
import json, sys
sys.path.insert(0, sys.argv[1])
import compile_kernels
seen = {}
if compile_kernels.can_compile(seen):
    import torch
    from compile_kernels import BF16, on_gpu
    from longseq.apollo.elementwise import adamw
    from longseq.apollo.slots import Slot
    options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    shapes = [(4096,), (16, 4096), (1024, 1024), (777,), (3, 259)]
    ways = [(BF16, BF16, "stochastic"), (BF16, BF16, "nearest"), (torch.float16, torch.float32, "master")]
    for dtype, grad_dtype, rounding in [*ways, (torch.float32, torch.float32, "stochastic")]:
        slots = [Slot(on_gpu(*s, dtype=dtype), on_gpu(*s, dtype=grad_dtype)) for s in shapes]
        for _ in range(2):
            adamw(slots, **options, rounding=rounding)
    print(json.dumps({"done": len(seen)}))
"""


@pytest.mark.slow  # eight compilations, which the user's cache must not answer
def test_the_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    """Every way of rounding, with and without wide loads; other scalars are no other kernels."""
    found = run_compiler(["-c", COMPILED, str(Path(__file__).parents[1])], tmp_path)
    assert found[-1] == {"done": 2 * 4 + 1}  # and the probe
