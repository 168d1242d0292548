"""8 bits an element: codes, and a scale for each group of consecutive elements of a row.

`value = zero + scale * code`, code 0 being the group's least value and code 255 its greatest. (The paper's
`(code - zero) * scale` with an integer zero is such a grid too, shifted so that 0 is on it; the extremes then
lie beyond its ends, and to clamp them would make the mean of stochastic rounding wrong.) Groups of 128 take
1.0625 bytes an element.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import has_triton
from .rounding import PIECE, random_16_bits

TILE_BYTES = 16 * 2**20
"""Of weights that a product dequantises at once: 2048 rows of 4096 in bf16, enough to fill a GPU."""

TILE_UNIT = 128
"""Rows or columns of a tile are a multiple of it: products are computed in blocks of so many."""


class Groups(NamedTuple):
    """Quantised rows: codes `(rows, columns)` uint8, scale and zero `(rows, groups)` float32."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    size: int
    """Elements of a group, a power of two; the last group of a row may be shorter."""

    def part(self, rows: slice, columns: slice = slice(None)) -> Groups:
        """Views of some rows, and of columns whose first one begins a group."""
        start, stop, _ = columns.indices(self.codes.shape[1])
        groups = slice(start // self.size, -(-stop // self.size))
        return Groups(
            self.codes[rows, start:stop], self.scale[rows, groups], self.zero[rows, groups], self.size
        )

    def equal_groups(self) -> Iterator[tuple[slice, slice, int]]:
        """Columns and groups of groups of one length: the whole ones, and the shorter last one."""
        width = self.codes.shape[1]
        whole = width // self.size
        if whole:
            yield slice(0, whole * self.size), slice(0, whole), self.size
        if width % self.size:
            yield slice(whole * self.size, width), slice(whole, whole + 1), width % self.size

    def dequantize(self, out: Tensor) -> Tensor:
        """The values into `out` `(rows, columns)`, computed in at least float32."""
        if takes_triton(self.codes, out):
            from .kernels import quantized as kernels

            kernels.dequantize(*self, out)
            return out
        wide = torch.promote_types(out.dtype, torch.float32)
        for columns, groups, size in self.equal_groups():
            place = out[:, columns].unflatten(1, (-1, size))
            value = place if out.dtype == wide else torch.empty_like(place, dtype=wide)
            value.copy_(self.codes[:, columns].unflatten(1, (-1, size)))
            value.mul_(self.scale[:, groups, None]).add_(self.zero[:, groups, None])
            if value is not place:
                place.copy_(value)
        return out

    def quantize(self, value: Tensor, key32: int | None, first: int) -> None:
        """Write values `(rows, columns)`, whole rows; `first` is the flat index of the first one."""
        if takes_triton(self.codes, value):
            from .kernels import quantized as kernels

            kernels.quantize(value, *self, key32, first)
            return
        columns = value.shape[1]
        rows = max(1, PIECE // max(columns, 1))
        for start in range(0, value.shape[0], rows):
            place = slice(start, start + rows)
            self.part(place)._quantize_plain(value[place].float(), key32, first + start * columns)

    def _quantize_plain(self, value: Tensor, key32: int | None, first: int) -> None:
        threshold = torch.full((1, 1), 0.5, device=value.device)
        if key32 is not None:
            threshold = _uniform(value.shape, key32, first, value.device)
        for columns, groups, size in self.equal_groups():
            elements = value[:, columns].unflatten(1, (-1, size))
            low, high = elements.aminmax(dim=-1, keepdim=True)
            step = (high - low) * (1 / 255)
            is_finite = step.isfinite()
            # Of a group without a range all codes are 0, so that it is what it was; so it is below float32's
            # normal numbers, whose inverse may be infinite.
            usable = is_finite & (step >= 2.0**-126)
            inverse = torch.where(usable, step.reciprocal(), 0.0)
            place = torch.where(usable, (elements - low) * inverse, 0.0)
            below = place.floor()
            limit = threshold if key32 is None else threshold[:, columns].unflatten(1, (-1, size))
            code = (below + (place - below > limit)).clamp_(max=255)
            self.codes[:, columns] = code.flatten(1).to(torch.uint8)
            self.scale[:, groups] = torch.where(is_finite, step, torch.nan).squeeze(-1)
            self.zero[:, groups] = torch.where(is_finite, low, torch.nan).squeeze(-1)


def _uniform(shape: torch.Size, key32: int, first: int, device: torch.device) -> Tensor:
    """Uniform numbers between 0 and 1, by each element's place in the weight."""
    bits = random_16_bits(shape, key32, first, shape[1], device)
    return (bits.float() + 0.5) * 2.0**-16


def takes_triton(codes: Tensor, other: Tensor) -> bool:
    """Whether the Triton kernels are run: on a GPU, for values of a dtype and layout that they know."""
    is_known = other.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return (
        codes.is_cuda
        and other.is_cuda
        and is_known
        and codes.stride(1) == other.stride(1) == 1
        and has_triton()
    )


def check_group_size(group_size: int) -> None:
    """Refuses sizes of which two could give scales of one shape, and be taken for each other when loaded.

    Raises:
        ValueError: It is no power of two, or below 16.
    """
    if group_size < 16 or group_size & (group_size - 1):
        raise ValueError(f"group_size={group_size}: must be a power of two, 16 or more, such as 128.")


class Product(torch.autograd.Function):
    """`x @ W.T + bias`, a tile of W at a time; each result is rounded once, as with the whole of W.

    Backward goes by columns of W, not by rows: sums over tiles would be rounded at each of them.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups) -> Tensor:
        num_rows, width = groups.codes.shape
        if any(ctx.needs_input_grad):
            # Not saved as tensors are: a checkpoint's hooks would copy or move them.
            ctx.groups, ctx.version = groups, groups.codes._version
            ctx.shape = x.shape
            ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        flat = x.reshape(-1 if width else x.shape[:-1].numel(), x.shape[-1])
        out = flat.new_empty(len(flat), num_rows)
        tiles = _tiles(num_rows, width * x.itemsize, TILE_UNIT)
        room = flat.new_empty(tiles[0].stop if tiles else 0, width)
        with torch.autocast(x.device.type, enabled=False):
            for rows in tiles:
                tile = groups.part(rows).dequantize(room[: rows.stop - rows.start])
                if bias is None:
                    torch.mm(flat, tile.t(), out=out[:, rows])
                else:
                    torch.addmm(bias[rows], flat, tile.t(), out=out[:, rows])
        return out.view(*x.shape[:-1], num_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        groups: Groups = ctx.groups
        if groups.codes._version != ctx.version:
            raise RuntimeError(
                "a quantised weight was written between forward and backward, whose gradients would be of "
                "neither; step the optimizer after backward."
            )
        num_rows, width = groups.codes.shape
        grad = grad.reshape(ctx.shape[:-1].numel(), num_rows).contiguous()
        (x,) = ctx.saved_tensors
        x_grad = weight_grad = bias_grad = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                x_grad = grad.new_empty(len(grad), width)
                tiles = _tiles(width, num_rows * grad.itemsize, max(TILE_UNIT, groups.size))
                room = grad.new_empty(num_rows, tiles[0].stop if tiles else 0)
                for columns in tiles:
                    place = room[:, : columns.stop - columns.start]
                    tile = groups.part(slice(None), columns).dequantize(place)
                    torch.mm(grad, tile, out=x_grad[:, columns])
                x_grad = x_grad.view(ctx.shape)
            if ctx.needs_input_grad[1]:
                weight_grad = grad.t() @ x.reshape(
                    len(grad), width
                )  # autograd casts it to the weight's dtype
            if ctx.needs_input_grad[2]:
                bias_grad = grad.sum(0)
        return x_grad, weight_grad, bias_grad, None


def _tiles(length: int, bytes_each: int, unit: int) -> list[slice]:
    step = max(TILE_BYTES // max(bytes_each, 1) // unit, 1) * unit
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
