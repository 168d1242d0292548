"""What kernels know of the matrices of a call: a table of addresses and keys, and what all share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

WEIGHT = tl.constexpr(0)
GRAD = tl.constexpr(1)
EXP_AVG = tl.constexpr(2)
EXP_AVG_SQ = tl.constexpr(3)
UPDATE_NORM = tl.constexpr(4)
PROJECTION_KEY = tl.constexpr(5)
ROUNDING_KEY = tl.constexpr(6)
FIRST = tl.constexpr(7)
FIELDS = tl.constexpr(8)

TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
VECTOR_BYTES = 16
"""Of the widest load."""


class Table(NamedTuple):
    """The matrices of a call.

    Attributes:
        entries: `(count, FIELDS)` int64.
        count: Of matrices.
        rows: Of each matrix.
        columns: Of each matrix.
        rank: Of their projections.
        weight: Dtype of the weights.
        grad: Dtype of the gradients.
        aligned: Whether 16-byte loads may begin where each tensor does.
    """

    entries: Tensor
    count: int
    rows: int
    columns: int
    rank: int
    weight: torch.dtype
    grad: torch.dtype
    aligned: bool

    @property
    def tall(self) -> bool:
        """Whether channels are rows."""
        return self.rows >= self.columns

    @property
    def channels(self) -> int:
        return max(self.rows, self.columns)

    @property
    def inner(self) -> int:
        """Elements of a channel."""
        return min(self.rows, self.columns)

    def scratch(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.entries.device)


def on_device(columns: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """The fields of all matrices, `(count, FIELDS)` int64, by one copy that nothing waits for."""
    rows = [[_signed(value) for value in row] for row in zip(*columns, strict=True)]
    # Of memory that is not pinned CUDA takes a copy before it returns, and waits for nothing. Pinned memory
    # is not free again until the GPU comes to it, and each call would allocate more.
    return torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)


def _signed(value: int) -> int:
    """The 64 bits of a key as a number that int64 holds."""
    return value - 2**64 if value >= 2**63 else value


@triton.jit
def entry(table_ptr, matrix, FIELD: tl.constexpr):
    return tl.load(table_ptr + matrix * FIELDS + FIELD)


@triton.jit
def pointer(table_ptr, matrix, FIELD: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    found = entry(table_ptr, matrix, FIELD).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found
