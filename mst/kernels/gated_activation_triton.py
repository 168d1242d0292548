"""Gated activations in Triton: each element is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import parts_of_rows

ELEMENTS = 2048
"""Of a program's tile: 3 tensors are read and 3 written, and 14,336 columns are 7 of them."""


def forward(gate: Tensor, up: Tensor, activation: str, out: Tensor) -> None:
    """See `gated_activation.gated_activation`."""
    strides = gate.stride(0), up.stride(0), out.stride(0)
    _launch(_gated_activation_kernel, gate, (gate, up, out), strides, ACTIVATION=activation)


def backward_(gate: Tensor, up: Tensor, grad_out: Tensor, activation: str, product: Tensor | None) -> None:
    """See `gated_activation.gated_activation_backward_`."""
    strides = [x.stride(0) for x in (gate, up, grad_out, grad_out if product is None else product)]
    tensors, flags = (gate, up, grad_out, product), {"ACTIVATION": activation, "PRODUCT": product is not None}
    _launch(_gated_activation_backward_kernel, gate, tensors, strides, **flags)


def _launch(kernel, like: Tensor, tensors, strides, **flags) -> None:
    num_rows, width = like.shape
    if like.numel() == 0:
        return
    tile = parts_of_rows(width, ELEMENTS)
    # One dimension: a grid's second takes no more than 65,535, and neighbours should share rows.
    programs = triton.cdiv(num_rows, tile.rows) * triton.cdiv(width, tile.columns)
    with torch.cuda.device_of(like):
        kernel[(programs,)](
            *tensors,
            num_rows,
            width,
            *strides,
            **flags,
            ROWS=tile.rows,
            BLOCK=tile.columns,
            num_warps=tile.num_warps,
        )


@triton.jit(do_not_specialize=["num_rows"])
def _gated_activation_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    num_rows,
    F,
    gate_stride,
    up_stride,
    out_stride,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows, columns, mask = _place(num_rows, F, ROWS, BLOCK)
    gate = tl.load(gate_ptr + rows * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    activated, _ = _activate(gate, ACTIVATION)
    product = activated * up
    tl.store(out_ptr + rows * out_stride + columns, product.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _gated_activation_backward_kernel(
    gate_ptr,
    up_ptr,
    grad_ptr,
    product_ptr,
    num_rows,
    F,
    gate_stride,
    up_stride,
    grad_stride,
    product_stride,
    ACTIVATION: tl.constexpr,
    PRODUCT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows, columns, mask = _place(num_rows, F, ROWS, BLOCK)
    gate_at, up_at = gate_ptr + rows * gate_stride + columns, up_ptr + rows * up_stride + columns
    gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_at, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.load(grad_ptr + rows * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
    activated, slope = _activate(gate, ACTIVATION)
    tl.store(gate_at, (gradient * up * slope).to(gate_ptr.dtype.element_ty), mask=mask)
    tl.store(up_at, (gradient * activated).to(up_ptr.dtype.element_ty), mask=mask)
    if PRODUCT:
        product = (activated * up).to(product_ptr.dtype.element_ty)
        tl.store(product_ptr + rows * product_stride + columns, product, mask=mask)


@triton.jit
def _place(num_rows, F, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows `(ROWS, 1)`, 64 bits wide since rows times stride passes 2^31; columns `(1, BLOCK)`; the mask."""
    parts = tl.cdiv(F, BLOCK)
    program = tl.program_id(0)
    rows = (program // parts * ROWS + tl.arange(0, ROWS))[:, None]
    columns = (program % parts * BLOCK + tl.arange(0, BLOCK))[None, :]
    return rows.to(tl.int64), columns, (rows < num_rows) & (columns < F)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """The activation of float32 values, and its slope."""
    if ACTIVATION == "gelu":
        phi = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = phi + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) is sigmoid(2 u), which does not cancel where u is far below 0.
        twice_u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        phi = 1.0 / (1.0 + tl.exp(-twice_u))
        slope = phi + x * phi * (1.0 - phi) * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    else:
        tl.static_assert(ACTIVATION == "silu")
        phi = 1.0 / (1.0 + tl.exp(-x))
        slope = phi + x * phi * (1.0 - phi)
    return x * phi, slope
