"""The signs that gradients are multiplied with, from a key alone (Philox-4x32-10, Salmon et al. 2011)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .table import FIELDS, PROJECTION_KEY, TRITON_DTYPES, Table, entry, on_device
from .tuning import Tiles

WORD = tl.constexpr(32)
GENERATED = tl.constexpr(128)
"""Signs of a column that one call of the generator gives, as four words."""


def signs(table: Table, tiles: Tiles) -> Tensor:
    """`(count, rank, inner)` of +-1 in the gradients' dtype: `projection.signs` of each matrix's key."""
    out = table.scratch(table.count, table.rank, table.inner, dtype=table.grad)
    block = min(tiles.sign_columns, triton.next_power_of_2(table.inner))
    grid = (triton.cdiv(table.inner, block), triton.cdiv(table.rank, GENERATED.value), table.count)
    _signs_kernel[grid](
        table.entries,
        out,
        table.rank,
        table.inner,
        DTYPE=TRITON_DTYPES[table.grad],
        ROWS=min(WORD.value, triton.next_power_of_2(table.rank)),
        BLOCK=block,
    )
    return out


def signs_of(key: int, rank: int, columns: int, device: torch.device) -> Tensor:
    """`(rank, columns)` of +-1 in bfloat16: `projection.signs` from the first column on."""
    fields = [[0]] * FIELDS.value
    fields[PROJECTION_KEY.value] = [key]
    entries = on_device(fields, device)
    table = Table(entries, 1, columns, columns, rank, torch.bfloat16, torch.bfloat16, aligned=False)
    with torch.cuda.device_of(entries):
        return signs(table, Tiles())[0]


@triton.jit
def _signs_kernel(table_ptr, out_ptr, rank, K, DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group, matrix = tl.program_id(1), tl.program_id(2)
    key = entry(table_ptr, matrix, PROJECTION_KEY)
    words = tl.philox(key, columns, group, 0, 0)
    out_ptr += matrix.to(tl.int64) * rank * K
    for word in tl.static_range(4):
        bits = tl.arange(0, ROWS)
        ones = ((words[word][None, :] >> bits[:, None].to(tl.uint32)) & 1).to(tl.float32)
        rows = group * GENERATED + word * WORD + bits
        mask = (rows < rank)[:, None] & (columns < K)[None, :]
        tl.store(out_ptr + rows[:, None] * K + columns[None, :], (1.0 - 2.0 * ones).to(DTYPE), mask=mask)
