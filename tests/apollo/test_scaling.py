"""Gradients times a number on the device: in Triton's interpreter where there is no GPU, and plain."""

from __future__ import annotations

import pytest
import torch

from longseq.apollo import scaling

DTYPES = [torch.float16, torch.float32, torch.bfloat16]


def scaled(values: torch.Tensor, factor: float, device: str) -> torch.Tensor:
    pytest.importorskip("triton")
    from longseq.apollo.kernels.scaling import scale_

    ours = values.to(device, copy=True)
    scale_(ours, torch.tensor(factor, device=device))
    return ours.cpu()


@pytest.mark.parametrize("shape", [(3, 5), (8192,), (8193,), (0,), (1,), (131, 257)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_factor_is_not_rounded_first(dtype: torch.dtype, shape: tuple[int, ...], kernel_device) -> None:
    values, factor = torch.randn(shape).to(dtype), 0.7319
    expected = (values.float() * torch.tensor(factor)).to(dtype)
    plain = values.clone()
    scaling.scale_(plain, torch.tensor(factor))
    assert torch.equal(plain, expected)
    ours = scaled(values, factor, kernel_device)
    if dtype == torch.bfloat16 and kernel_device == "cpu":  # the interpreter cuts off, and does not round
        torch.testing.assert_close(ours, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_nothing_broken_is_left_of_a_factor_of_zero(dtype: torch.dtype, bad: float, kernel_device) -> None:
    values = torch.randn(100).to(dtype)
    values[[0, 7, 99]] = bad
    assert not scaled(values, 0.0, kernel_device).any()
    plain = values.clone()
    scaling.scale_(plain, torch.tensor(0.0))
    assert not plain.any()


def test_a_factor_of_one_touches_nothing(kernel_device) -> None:
    values = torch.randn(10_000)
    values[3] = torch.nan
    assert torch.equal(scaled(values, 1.0, kernel_device).nan_to_num(5), values.nan_to_num(5))


def test_doubles_stay_doubles() -> None:
    values = torch.randn(10, dtype=torch.float64)
    expected = values * 0.1
    scaling.scale_(values, torch.tensor(0.1, dtype=torch.float64))
    assert torch.equal(values, expected)
