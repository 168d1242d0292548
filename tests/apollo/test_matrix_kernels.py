"""Steps of whole matrices as kernels, against float64: in the interpreter where there is no GPU.

The interpreter computes bfloat16 products wrong, so that products are looked at in float32 and float16, and
it cuts off what float32 loses on its way to bfloat16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cce_problems import fill_fresh_memory
from numerics import assert_as_accurate_as
from torch import Tensor

pytest.importorskip("triton")

from longseq.apollo.kernels import matrices as module
from longseq.apollo.kernels.matrices import Matrices, step_matrices
from longseq.apollo.kernels.projection import signs
from longseq.apollo.kernels.tuning import Tiles

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
WORD = 2**32 - 1
# Small, so that small matrices have several of each.
TILES = Tiles(
    channels=32,
    ranks=64,
    inner_bytes=64,
    vector_elements=512,
    vector_columns=32,
    vector_split=24,
    sum_elements=32,
    update_elements=1024,
    update_columns=32,
    sign_columns=32,
)
OPTIONS: dict[str, Any] = {
    "lr": 0.02,
    "betas": (0.9, 0.999),
    "eps": 1e-6,
    "weight_decay": 0.1,
    "alpha": 1.5,
    "norm_growth_limit": 1.01,
}
TALL, WIDE = (70, 37), (37, 70)
SHAPES = [TALL, WIDE, (32, 32), (33, 7), (64, 96)]
# In the interpreter, what a GPU does without a word.
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning", "ignore:invalid value encountered:RuntimeWarning"
)


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_fresh_memory(monkeypatch)


def philox(key: int, low: int, high: int) -> list[int]:
    """Philox-4x32-10 of the counter (low, high, 0, 0), as Salmon et al. define it."""
    words, keys = [low, high, 0, 0], [key & WORD, key >> 32]
    for _ in range(10):
        first, second = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [
            second >> 32 ^ words[1] ^ keys[0],
            second & WORD,
            first >> 32 ^ words[3] ^ keys[1],
            first & WORD,
        ]
        keys = [keys[0] + 0x9E3779B9 & WORD, keys[1] + 0xBB67AE85 & WORD]
    return words


def plain_signs(key: int, rank: int, columns: int) -> Tensor:
    blocks = [
        [philox(key, column, block) for column in range(columns)] for block in range(math.ceil(rank / 128))
    ]
    words = torch.tensor(blocks).permute(0, 2, 1)  # (blocks, 4, columns)
    bits = words.unsqueeze(2) >> torch.arange(32).view(1, 1, 32, 1) & 1
    return (1 - 2 * bits.reshape(-1, columns)[:rank]).double()


def noise(key: int, index: Tensor) -> Tensor:
    """16 bits for each index."""
    word = index * 0x9E3779B1 + key & WORD
    word ^= word >> 16
    word = word * 0x7FEB352D & WORD
    word ^= word >> 15
    word = word * 0x846CA68B & WORD
    return (word ^ word >> 16) >> 16


@dataclass
class Plain:
    """One matrix, as plain PyTorch steps it in its dtype."""

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    norm: Tensor

    def step(
        self,
        grad: Tensor,
        projection: Tensor,
        scale_type: str,
        step: int,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        alpha: float,
        norm_growth_limit: float | None,
    ) -> None:
        dtype = self.weight.dtype
        tall = grad.shape[0] >= grad.shape[1]
        channels = (grad if tall else grad.T).to(dtype)
        products = channels @ projection.T.to(dtype) / math.sqrt(len(projection))
        self.exp_avg = betas[0] * self.exp_avg + (1 - betas[0]) * products
        self.exp_avg_sq = betas[1] * self.exp_avg_sq + (1 - betas[1]) * products**2
        normalised = self.exp_avg / (self.exp_avg_sq.sqrt() + eps)
        if scale_type == "channel":
            scale = normalised.norm(dim=1, keepdim=True) / (products.norm(dim=1, keepdim=True) + 1e-8)
        else:
            scale = normalised.norm() / (products.norm() + 1e-8)
        scaled = channels * scale
        norm, limit = scaled.norm(), torch.ones((), dtype=dtype)
        if norm_growth_limit is not None and self.norm > 0:
            limit = torch.maximum(norm / (self.norm + 1e-8), limit * norm_growth_limit) / norm_growth_limit
        self.norm = norm / limit
        rate = lr * math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step) * alpha
        change = rate / limit * scaled
        self.weight = self.weight * (1 - lr * weight_decay) - (change if tall else change.T)


def problem(
    shape: tuple[int, int], rank: int, count: int, dtype: torch.dtype, grad_dtype: torch.dtype, device: str
) -> Matrices:
    """Random weights and gradients, of channels that differ in size; no step taken."""
    channels = max(shape)
    sizes = torch.logspace(-1.5, 0.5, channels)
    sizes = sizes[:, None] if shape[0] >= shape[1] else sizes

    def each(*size: int) -> list[Tensor]:
        return [torch.zeros(size, device=device) for _ in range(count)]

    return Matrices(
        weights=[torch.randn(shape).to(device, dtype) for _ in range(count)],
        grads=[(torch.randn(shape) * sizes).to(device, grad_dtype) for _ in range(count)],
        exp_avg=each(channels, rank),
        exp_avg_sq=each(channels, rank),
        update_norm=each(),
        projection_keys=[2**64 - 1 - 12345678901 * index for index in range(count)],
        rounding_keys=[2**32 - 1 - index for index in range(count)],
        first=[2**33 + 7 * index for index in range(count)],
    )


def plain_of(matrices: Matrices, dtype: torch.dtype) -> list[Plain]:
    tensors = zip(matrices.weights, matrices.exp_avg, matrices.exp_avg_sq, matrices.update_norm, strict=True)
    return [Plain(*(tensor.to("cpu", dtype, copy=True) for tensor in one)) for one in tensors]


def check(
    matrices: Matrices,
    rank: int,
    scale_type: str,
    *,
    steps: int = 3,
    tiles: Tiles = TILES,
    slack: float = 4.0,
    **options: Any,
) -> None:
    """Steps whose gradients grow too fast, with a fall between, and what is left after each of them."""
    truth, plain = plain_of(matrices, F64), plain_of(matrices, F32)
    inner = min(matrices.weights[0].shape)
    projections = [plain_signs(key, rank, inner) for key in matrices.projection_keys]
    for step, size in enumerate((1.0, 3.0, 0.3, 2.0)[:steps], start=1):
        for grad in matrices.grads:
            grad.copy_(grad * size + torch.roll(grad, 1, 0) * 0.25)
        step_matrices(
            matrices,
            rank=rank,
            scale_type=scale_type,
            step=step,
            rounding="nearest",
            tiles=tiles,
            **(OPTIONS | options),
        )
        for index, (exact, other) in enumerate(zip(truth, plain, strict=True)):
            grad = matrices.grads[index].cpu()
            for one in (exact, other):
                one.step(grad, projections[index], scale_type, step, **(OPTIONS | options))
            ours = {
                "weight": (matrices.weights[index], other.weight, exact.weight),
                "exp_avg": (matrices.exp_avg[index], other.exp_avg, exact.exp_avg),
                "exp_avg_sq": (matrices.exp_avg_sq[index], other.exp_avg_sq, exact.exp_avg_sq),
                "update_norm": (matrices.update_norm[index], other.norm, exact.norm),
            }
            for name, (mine, theirs, true) in ours.items():
                assert_as_accurate_as(mine.cpu(), theirs, true, slack=slack, name=f"{name}[{index}] {step}")


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step(shape: tuple[int, int], rank: int, kernel_device: str) -> None:
    """Every orientation, sizes that no tile divides, and the limit at work."""
    scale_type = "tensor" if rank == 1 else "channel"
    check(problem(shape, rank, 1, F32, F32, kernel_device), rank, scale_type)


@pytest.mark.parametrize("shape", [TALL, WIDE], ids=str)
@pytest.mark.parametrize(("rank", "scale_type"), [(1, "channel"), (5, "tensor")])
def test_several_matrices(shape: tuple[int, int], rank: int, scale_type: str, kernel_device: str) -> None:
    # A channel's one product may be nearly 0, and what is divided by it is as wrong as it is.
    slack = 100.0 if rank == 1 else 4.0
    check(problem(shape, rank, 3, F32, F32, kernel_device), rank, scale_type, steps=2, slack=slack)


@pytest.mark.parametrize("shape", [(140, 131), (133, 140)], ids=str)
def test_more_ranks_than_a_tile_has(shape: tuple[int, int], kernel_device: str) -> None:
    large = replace(TILES, channels=128, update_elements=4096)
    check(problem(shape, 130, 1, F32, F32, kernel_device), 130, "channel", steps=2, tiles=large)


@pytest.mark.parametrize("rank", [1, 300])
def test_default_tiles(rank: int, kernel_device: str) -> None:
    scale_type = "tensor" if rank == 1 else "channel"
    check(problem((301, 310), rank, 1, F32, F32, kernel_device), rank, scale_type, steps=2, tiles=Tiles())


@pytest.mark.parametrize(
    "options", [{"norm_growth_limit": None}, {"weight_decay": 0.0, "alpha": 0.3}], ids=str
)
@pytest.mark.parametrize("rank", [1, 4])
def test_options(rank: int, options: dict[str, Any], kernel_device: str) -> None:
    scale_type = "tensor" if rank == 1 else "channel"
    check(problem((20, 11), rank, 1, F32, F32, kernel_device), rank, scale_type, **options)


@pytest.mark.parametrize("shape", [TALL, WIDE], ids=str)
@pytest.mark.parametrize(("grad_dtype", "rank"), [(F16, 5), (BF16, 1), (F16, 1)], ids=str)
def test_narrow_gradients(
    shape: tuple[int, int], grad_dtype: torch.dtype, rank: int, kernel_device: str
) -> None:
    scale_type = "tensor" if rank == 1 else "channel"
    check(problem(shape, rank, 1, F32, grad_dtype, kernel_device), rank, scale_type)


def test_views(kernel_device: str) -> None:
    """Experts: matrices that begin where no wide load may, and what lies between them stays as it is."""
    matrices = problem((11, 7), 3, 4, F32, F32, kernel_device)
    stacked = {
        name: torch.stack(getattr(matrices, name)) for name in ("weights", "grads", "exp_avg", "exp_avg_sq")
    }
    stacked["update_norm"] = torch.stack(matrices.update_norm)
    views = {name: list(tensor.unbind())[1:3] for name, tensor in stacked.items()}
    keys = {name: getattr(matrices, name)[1:3] for name in ("projection_keys", "rounding_keys", "first")}
    before = stacked["weights"].clone()
    check(Matrices(**views, **keys), 3, "channel", steps=2)
    assert torch.equal(stacked["weights"][::3], before[::3])
    assert not stacked["update_norm"][::3].any()


@pytest.mark.parametrize("rank", [1, 5, 130])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_signs(rank: int, dtype: torch.dtype, kernel_device: str) -> None:
    matrices = problem((40, 37), rank, 2, dtype, dtype, kernel_device)
    matrices.projection_keys[1] = 2**40 + 3
    found = signs(module._table(matrices, rank, "nearest"), TILES)
    expected = torch.stack([plain_signs(key, rank, 37) for key in matrices.projection_keys])
    assert torch.equal(found.cpu().double(), expected)


def once(matrices: Matrices, rank: int = 1, **options: Any) -> None:
    options = {"scale_type": "tensor", "step": 1, "rounding": "nearest", "tiles": TILES} | options
    step_matrices(matrices, rank=rank, **(OPTIONS | options))


def narrow_and_wide(shape: tuple[int, int], dtype: torch.dtype, device: str) -> tuple[Matrices, Matrices]:
    """The same step of weights of this dtype, and of float32 ones of the same values."""
    narrow = problem(shape, 1, 2, dtype, F32, device)
    wide = replace(
        narrow,
        weights=[weight.float() for weight in narrow.weights],
        **{
            name: [x.clone() for x in getattr(narrow, name)]
            for name in ("exp_avg", "exp_avg_sq", "update_norm")
        },
    )
    return narrow, wide


@pytest.mark.parametrize("shape", [TALL, WIDE], ids=str)
def test_stochastic_rounding(shape: tuple[int, int], kernel_device: str) -> None:
    """Bit for bit what the hash makes of the float32 result; what is not finite stays so."""
    narrow, wide = narrow_and_wide(shape, BF16, kernel_device)
    for matrices in (narrow, wide):
        for column, value in enumerate((math.inf, -math.inf, math.nan, 0.0, -1e-40)):
            matrices.weights[0][3, column] = value
    once(narrow, rounding="stochastic")
    once(wide, rounding="stochastic")
    for index, (rounded, value) in enumerate(zip(narrow.weights, wide.weights, strict=True)):
        at = torch.arange(value.numel()).view(shape) + narrow.first[index]
        bits = value.cpu().view(torch.int32) + noise(narrow.rounding_keys[index], at).int()
        expected = (bits & -65536).view(F32)
        expected = torch.where(value.cpu().isfinite(), expected, value.cpu())
        assert torch.equal(rounded.cpu().float().nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(rounded.cpu().isnan(), value.cpu().isnan())


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_nearest_rounding(dtype: torch.dtype, kernel_device: str) -> None:
    narrow, wide = narrow_and_wide((20, 11), dtype, kernel_device)
    once(narrow)
    once(wide)
    cut_off = dtype == BF16 and kernel_device == "cpu"  # so does Triton's interpreter
    for rounded, value in zip(narrow.weights, wide.weights, strict=True):
        if cut_off:
            value = (value.view(torch.int32) & -65536).view(F32)
        assert torch.equal(rounded, value.to(dtype))


@pytest.mark.parametrize("rank", [1, 4])
def test_zero_gradients(rank: int, kernel_device: str) -> None:
    """Weights decay; a moment from before does not make anything of nothing."""
    matrices = problem((20, 11), rank, 1, F32, F32, kernel_device)
    before = matrices.weights[0].clone()
    matrices.grads[0].zero_()
    matrices.exp_avg[0].fill_(1.0)
    scale_type = "tensor" if rank == 1 else "channel"
    for step in (1, 2):
        once(matrices, rank, scale_type=scale_type, step=step)
    kept = (1 - OPTIONS["lr"] * OPTIONS["weight_decay"]) ** 2
    torch.testing.assert_close(matrices.weights[0], kept * before)
    assert matrices.update_norm[0] == 0


def test_a_nan_is_not_lost(kernel_device: str) -> None:
    """It reaches the whole matrix by the limit, as in plain PyTorch, and no other matrix."""
    matrices = problem((20, 11), 4, 2, BF16, F32, kernel_device)
    once(matrices, 4, scale_type="channel")
    matrices.grads[0].view(torch.int32)[2, 3] = 0x7FFFFFFF  # as GPUs make it: one more is no NaN
    once(matrices, 4, scale_type="channel", step=2, rounding="stochastic")
    assert matrices.weights[0].isnan().all()
    assert matrices.update_norm[0].isnan()
    assert matrices.weights[1].isfinite().all()


def test_refusals(kernel_device: str) -> None:
    once(Matrices(*([] for _ in range(8))))  # nothing to do
    with pytest.raises(ValueError, match="float16 has too few exponents"):
        once(problem((4, 3), 1, 1, F16, F32, kernel_device), rounding="stochastic")
    with pytest.raises(ValueError, match=r"grad\.dtype=torch\.float64"):
        once(problem((4, 3), 1, 1, F32, F64, kernel_device))
