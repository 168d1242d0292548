"""How rows are cut for the Triton kernels, all of which are bound by memory.

A program takes whole rows of up to `ELEMENTS` elements, several where they are short, so that a head's row of
128 does not get a program of its own. 16 elements a thread keep two 16-byte loads of bf16 for each tensor in
flight and leave registers for the float32 values. These are estimates for an H200, not measurements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

ELEMENTS = 4096
"""Of a tile, where a row is not longer: 8 KiB of bf16, and 8 warps."""

MAX_WIDTH = 65536
"""Elements of a row that a program holds at once."""

LIVING_WARPS = 16
"""Warps that a processor has room for where a thread takes 128 registers (65,536 / 128 / 32)."""

PREFETCHED_BYTES = 80 * 1024
"""Shared memory for a program's next rows: two such programs fit on an H200, one on most GPUs."""


class Tile(NamedTuple):
    """Rows and columns (powers of two) of a program's tile, and the warps that it is shared by."""

    rows: int
    columns: int
    num_warps: int


def whole_rows(width: int, elements: int = ELEMENTS) -> Tile:
    """A tile as wide as a row is.

    Raises:
        ValueError: A row is longer than `MAX_WIDTH`.
    """
    if width > MAX_WIDTH:
        raise ValueError(f"rows of width={width} are longer than the {MAX_WIDTH} elements that kernels hold.")
    columns = triton.next_power_of_2(max(width, 16))
    return _tile(max(1, elements // columns), columns)


def parts_of_rows(width: int, elements: int = ELEMENTS) -> Tile:
    """A tile of any rows' columns, for what looks at each element by itself."""
    columns = min(elements, triton.next_power_of_2(max(width, 16)))
    return _tile(elements // columns, columns)


def _tile(rows: int, columns: int) -> Tile:
    # Past 16 warps a thread has 64 registers, too few for the values of three tensors and a sum.
    most = 16 if columns <= 16384 else 32
    return Tile(rows, columns, max(1, min(most, rows * columns // 512)))


def persistent_programs(tensor: Tensor, num_tiles: int, num_warps: int) -> int:
    """How many programs share the tiles where each keeps a sum: as many as run at once, or one a tile."""
    return min(num_tiles, max(1, LIVING_WARPS // num_warps) * processors(tensor))


def stages(tile: Tile, *tensors: Tensor | None) -> int:
    """2, so that a program's next rows come while it works on these, where they have room; else 1.

    A processor has few programs with sums of their own: by themselves they would leave the memory idle
    while they reduce.
    """
    row_bytes = sum(tensor.element_size() for tensor in tensors if tensor is not None)
    return 2 if tile.rows * tile.columns * row_bytes <= PREFETCHED_BYTES else 1


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's GPU."""
    if tensor.is_cuda:
        return torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return 1  # the interpreter runs one program after the other
