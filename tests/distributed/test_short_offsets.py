"""Kernels that count in 32 bits are handed no tensor that reaches further, and the numbers stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longseq.distributed import short_offsets
from longseq.distributed.attention import KERNELS
from longseq.distributed.attention_kernels import CPU, AttentionOptions, Documents, Kernel
from longseq.distributed.short_offsets import last_offset, with_short_offsets

LENGTH, WIDTH = 33, 8
OPTIONS = AttentionOptions(WIDTH**-0.5)
WHOLE = Documents.whole(LENGTH)


def problem(
    heads: tuple[int, int], row: int, *, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> list[Tensor]:
    """Gradient of the output, queries, keys and values as columns of rows of so many elements."""
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for count in (heads[0], heads[0], heads[1], heads[1]):
        rows = torch.empty(1, LENGTH, row, dtype=dtype, device=device)
        values = torch.randn(1, LENGTH, count * WIDTH, generator=generator, dtype=dtype)
        rows[..., -count * WIDTH :] = values.to(device)
        tensors.append(rows[..., -count * WIDTH :].unflatten(2, (count, WIDTH)).transpose(1, 2))
    return tensors


class Strict:
    """PyTorch's kernel for a CPU, that takes nothing that reaches far."""

    def __init__(self, most: int) -> None:
        self.most, self.calls = most, 0
        self.kernel = with_short_offsets(Kernel(CPU.refusal, self.forward, self.backward))

    def check(self, tensors: tuple[Any, ...]) -> None:
        self.calls += 1
        assert max(last_offset(one) for one in tensors if isinstance(one, Tensor)) <= self.most

    def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        self.check(args)
        return CPU.forward(*args)

    def backward(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.check(args)
        return CPU.backward(*args)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize(
    ("most", "calls"),
    [
        (10**6, lambda heads: 1),  # nothing reaches far
        (3 * LENGTH * WIDTH, lambda heads: heads[0] if heads == (4, 1) else heads[1]),
        (LENGTH * WIDTH, lambda heads: heads[0]),  # a query head is all that may be
    ],
)
def test_pieces_give_what_all_heads_together_give(
    monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int], most: int, calls: Any
) -> None:
    grad_out, *tensors = problem(heads, row=100)
    expected, expected_lse = CPU.forward(*tensors, OPTIONS, WHOLE)
    monkeypatch.setattr(short_offsets, "MOST_OFFSET", most)
    strict = Strict(most)
    out, lse = strict.kernel.forward(*tensors, OPTIONS, WHOLE)
    assert strict.calls == calls(heads)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-13, atol=1e-13)
    # The output as a column of all heads' output, as a layer has it.
    wide = torch.cat([torch.zeros_like(out), out], dim=1).transpose(1, 2).contiguous().transpose(1, 2)
    grads = strict.kernel.backward(grad_out, *tensors, wide[:, heads[0] :], lse, OPTIONS, WHOLE)
    truth = CPU.backward(grad_out, *tensors, expected, expected_lse, OPTIONS, WHOLE)
    for grad, one in zip(grads, truth, strict=True):
        assert grad.shape == one.shape
        torch.testing.assert_close(grad, one, rtol=1e-12, atol=1e-12)


def test_a_head_that_cannot_be_found_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = problem((4, 2), row=32)[1:]
    kernel = with_short_offsets(CPU)
    assert kernel.refusal(*tensors[:2], OPTIONS, WHOLE) is None
    monkeypatch.setattr(short_offsets, "MOST_OFFSET", LENGTH * WIDTH - 1)
    assert "counts in 32 bits" in kernel.refusal(*tensors[:2], OPTIONS, WHOLE)


def test_an_offset_is_that_of_the_last_element() -> None:
    rows = torch.empty(3, 100)
    assert last_offset(rows) == 299
    assert last_offset(rows[:, 20:30]) == 209
    assert last_offset(rows.t()) == 299


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cudnn", "fa4"])
def test_a_gpu_kernel_finds_what_lies_far_away(name: str) -> None:
    heads, row, length = (4, 2), 2**21, 1100  # the last row begins 2.3e9 elements behind the first
    grad_out, *tensors = (
        torch.empty(1, length, row, dtype=torch.bfloat16, device="cuda")[..., : count * 64]
        .normal_(generator=torch.Generator("cuda").manual_seed(count + index))
        .unflatten(2, (count, 64))
        .transpose(1, 2)
        for index, count in enumerate((heads[0], *heads, heads[1]))
    )
    options, whole = AttentionOptions(0.125), Documents.whole(length)
    kernel = KERNELS[name]
    if (reason := kernel.refusal(*tensors[:2], options, whole)) is not None:
        pytest.skip(reason)
    assert max(map(last_offset, tensors)) > short_offsets.MOST_OFFSET
    out, lse = kernel.forward(*tensors, options, whole)
    grads = kernel.backward(grad_out, *tensors, out, lse, options, whole)
    dense = [tensor.contiguous() for tensor in tensors]
    dense_out, dense_lse = kernel.forward(*dense, options, whole)
    truth = kernel.backward(grad_out.contiguous(), *dense, dense_out, dense_lse, options, whole)
    torch.testing.assert_close(out, dense_out, rtol=2**-7, atol=2**-9)
    for grad, one in zip(grads, truth, strict=True):
        assert (grad - one).float().norm() <= 0.01 * one.float().norm()
