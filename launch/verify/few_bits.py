"""bfloat16: as near to the truth as plain PyTorch in bfloat16, and no further for being cut into tiles."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...distributed.apply_ulysses import apply_ulysses
from ...distributed.groups import ProcessGroups
from ...mst.apply import apply_mini_sequence
from .bench import Bench
from .clone import Heads, small_config, small_model
from .compare import Row, Step, allowed_in, compare, tried
from .steps import logits_step, loss_step
from .truth import exact, plain_step

ONE = ProcessGroups()
SUMS = "bf16 sums over tiles"
NARROW_TILE = 2
"""Tokens of a tile where many are wanted: sums of many tiles in bfloat16 would be off by a hundredth."""
SUMS_TOLERANCE = 5e-3
"""Below bfloat16's spacing of 8e-3: sums of many tiles in float32 differ less, even of gradients that are
rounded to bfloat16 in each tile."""
FEW_NUMBERS = 4.0
"""Error that is allowed in tensors of one dimension, of plain PyTorch's: the errors of few numbers are large
or small by luck."""
GPU_HEAD_WIDTH = 64
"""Least width that all attention kernels of a GPU take."""


def in_bf16(bench: Bench) -> Iterator[Row]:
    """Rows for a config that trains in bfloat16; on the GPU where there is one, by the kernels that train."""
    config = bench.config
    if config.train.precision != "bf16":
        return
    if bench.streams or config.sequence.mini_sequence:
        case = f"{bench.long.name}, tiles of {NARROW_TILE} tokens beside one tile"
        yield tried(SUMS, case, lambda: _sums(bench, case))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "the CPU"
    case = f"{bench.long.name} on {name}, beside plain PyTorch in bf16"
    yield tried("bf16", case, lambda: beside_plain(bench, device, case))


def beside_plain(bench: Bench, device: str, case: str) -> Row:
    """`error(ours) <= 1.5 error(plain bf16)`, against the float64 truth."""
    base = bench.base if device == "cpu" else _wide_clone(bench)
    truth = bench.truth([bench.long]) if device == "cpu" else plain_step(exact(base), [bench.long.batch])
    batch = {
        name: tensor if name == "document_offsets" else tensor.to(device)
        for name, tensor in bench.long.batch.items()
    }
    narrow = copy.deepcopy(base).to(device, torch.bfloat16)
    plain = plain_step(narrow, [batch])
    tolerance = allowed_in(plain, truth, torch.bfloat16)
    for name, tensor in truth.tensors().items():
        if tensor.dim() == 1:
            tolerance[name] *= FEW_NUMBERS
    narrow.zero_grad()
    found = _step(narrow, batch, bench, tile_tokens=64, memory_mib=bench.config.sequence.loss_memory_mib)
    return compare("bf16", case, found, truth, tolerance=tolerance)


def _wide_clone(bench: Bench) -> nn.Module:
    """With heads that a GPU's kernels take, and no more of them than that asks for."""
    queries, keys = bench.heads
    heads = Heads(queries // keys * min(keys, 2), min(keys, 2))
    small = small_config(bench.original, heads=heads, head_width=GPU_HEAD_WIDTH)
    return small_model(small, "cpu", torch.float64, seed=bench.config.train.seed)


def _sums(bench: Bench, case: str) -> Row:
    one, many = (
        _step(
            copy.deepcopy(bench.base).bfloat16(), bench.long.batch, bench, tile_tokens=tile, memory_mib=memory
        )
        for tile, memory in ((None, None), (NARROW_TILE, 1))
    )
    return compare(SUMS, case, many, one, tolerance=SUMS_TOLERANCE)


def _step(
    model: nn.Module, batch: dict[str, Any], bench: Bench, *, tile_tokens: int | None, memory_mib: int | None
) -> Step:
    sequence = bench.config.sequence
    placement = "gpu" if bench.streams else "none"
    apply_ulysses(model, ONE)  # attention by the kernels that train, also where layers are not streamed
    apply_mini_sequence(
        model, tile_tokens=tile_tokens, checkpoints=placement, loss=sequence.loss, loss_memory_mib=memory_mib
    )
    return logits_step(model, batch) if sequence.loss == "logits" else loss_step(model, batch)
