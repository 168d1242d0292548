"""The knobs inside a GPU: which values each may take, for a config whose processes and length are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

from ...mst.layer_memory import SavedAttention
from ...mst.layer_places import ALL_ON_GPU
from ...mst.placement import Placement, spread_inputs
from ...mst.segments import fewest_waiting
from ...mst.tiling import MAX_TILE_TOKENS, MIN_TILE_TOKENS, TILE_MULTIPLE, number_of_tiles
from ..config import RunConfig
from .knobs import Knobs
from .workload import Workload

TILES = (MAX_TILE_TOKENS, 16384, 8192, MIN_TILE_TOKENS)
"""Tokens that a tile may have; under the least, products leave the GPU idle (see mst/tiling.py)."""
KEPT_EIGHTHS = (6, 4, 3, 2)
"""So many eighths of the inputs may be kept, where not all are, down to the fewest that spare layers a second
rebuilding."""
SHARES = 8
"""Of those that are kept, so many eighths may be on the GPU: in between there is little to win."""
NOTHING = SavedAttention()


def whole_knobs(config: RunConfig, work: Workload, num_gpus: int) -> list[Knobs]:
    """Each way to run a step in which all that a layer leaves stays on the GPU, the simplest first.

    It bounds the others: `placements` and `savings` move things off the GPU, which takes less memory and no
    less time.
    """
    sequence, train, parallel = config.sequence, config.train, config.parallel
    degree, length = parallel.ulysses_degree, sequence.length
    groups = num_gpus // degree
    made = []
    for stream in _streams(config):
        tokens = -(-length // degree) * train.micro_batch_sequences
        heads = head_groups(config, work, degree) if stream else [1]
        inputs = _whole_inputs(config, work.num_layers) if stream else [ALL_ON_GPU]
        attention = _whole_attention(config, work.num_layers) if stream else NOTHING
        made += [
            Knobs(
                length=length,
                micro_batch=train.micro_batch_sequences,
                accumulation=train.global_batch_sequences // (train.micro_batch_sequences * groups),
                ulysses_degree=degree,
                data_degree=groups,
                zero_stage=parallel.zero_stage,
                offload_optimizer=parallel.offload_optimizer == "cpu",
                offload_parameters=parallel.offload_parameters == "cpu",
                stream=stream,
                head_groups=num_groups,
                inputs=placement,
                attention=attention,
                tile_tokens=tile,
            )
            for placement, num_groups, tile in product(inputs, heads, tiles(config, tokens))
        ]
    return made


def _streams(config: RunConfig) -> list[bool]:
    sequence, lora = config.sequence, config.model.lora
    if sequence.checkpoints != "auto":
        return [sequence.checkpoints != "none"]
    if lora is not None and lora.dropout > 0:
        return [False]  # a streamed layer runs twice, and would drop others the second time
    if sequence.head_groups != "auto" or sequence.save_attention not in ("none", "auto"):
        return [True]  # what was asked for is of streamed layers
    return [False, True]


def tiles(config: RunConfig, tokens: int) -> list[int | None]:
    """Tokens that a tile may have, the largest first; None runs all at once.

    The sequence is cut evenly, as `choose_tile_tokens` does, so that no short tile is left over.
    """
    sequence = config.sequence
    if not sequence.mini_sequence:
        return [None]
    if sequence.tile_tokens != "auto":
        return [sequence.tile_tokens]
    cut = [-(-tokens // number_of_tiles(tokens, longest)) for longest in TILES]
    return list(dict.fromkeys(-(-even // TILE_MULTIPLE) * TILE_MULTIPLE for even in cut))


def with_length(config: RunConfig, knobs: Knobs, length: int) -> Knobs:
    """The same for another length, cut into the smallest tiles that a plan takes."""
    longer = replace(knobs, length=length)
    return replace(longer, tile_tokens=tiles(config, longer.tokens_a_gpu)[-1])


def with_parallel(knobs: Knobs, **values) -> Knobs:
    """Knobs with other values of the config's `parallel` keys; the batch stays what it was."""
    changed = {
        name: value == "cpu" if name.startswith("offload") else value for name, value in values.items()
    }
    if "ulysses_degree" in changed:
        groups = knobs.num_gpus // changed["ulysses_degree"]
        changed["data_degree"] = groups
        changed["accumulation"] = max(1, knobs.accumulation * knobs.data_degree // groups)
    return replace(knobs, **changed)


def head_groups(config: RunConfig, work: Workload, degree: int) -> list[int]:
    """Groups that attention may run in, fewest first."""
    asked = config.sequence.head_groups
    return possible_groups(work, degree) if asked == "auto" else [asked]


def refuse_groups(config: RunConfig, work: Workload) -> None:
    """Refuse groups of heads that the layers would refuse (mst/layer_parts.py).

    Raises:
        ValueError: They do not divide the key/value heads, or have fewer query heads than ranks.
    """
    asked = config.sequence.head_groups
    if asked == "auto" or True not in _streams(config):
        return
    degree = config.parallel.ulysses_degree
    ranks = 1 if degree == "auto" else degree
    fitting = possible_groups(work, ranks)
    if asked not in fitting:
        shared = f", or leaves a group fewer query heads than {ranks} processes need" if ranks > 1 else ""
        raise ValueError(
            f"sequence.head_groups={asked} does not divide the model's "
            f"{work.layer.heads.num_kv_heads} key/value heads{shared}; use "
            f"{', '.join(map(str, fitting)) or 'fewer processes a sequence'} or auto."
        )


def possible_groups(work: Workload, degree: int) -> list[int]:
    """Numbers of groups, fewest first: each has whole key/value heads, and a query head for every rank."""
    heads, keys = work.layer.heads.num_heads, work.layer.heads.num_kv_heads
    return [n for n in range(1, keys + 1) if keys % n == 0 and heads // n >= degree]


def _whole_inputs(config: RunConfig, num_layers: int) -> list[Placement]:
    sequence = config.sequence
    if sequence.checkpoints == "auto":
        return [ALL_ON_GPU, *(spread_inputs(num_layers, count, 0) for count in _fewer_inputs(num_layers))]
    on_host = sequence.checkpoints == "host"
    return [Placement(1 if on_host else 0, sequence.checkpoint_every, host=on_host)]


def _fewer_inputs(num_layers: int) -> list[int]:
    """Inputs that may wait where not all are kept, most first."""
    fewest, all_wait = fewest_waiting(num_layers), num_layers - 1
    counts = {fewest, *(max(fewest, all_wait * eighths // 8) for eighths in KEPT_EIGHTHS)}
    return sorted(counts - {all_wait}, reverse=True)


def _whole_attention(config: RunConfig, num_layers: int) -> SavedAttention:
    return {
        "none": NOTHING,
        "auto": SavedAttention(num_layers, everything=True),
        "gpu": SavedAttention(num_layers),
        "host": SavedAttention(host=True),
        "all": SavedAttention(num_layers, everything=True),
    }[config.sequence.save_attention]


def placements(config: RunConfig, whole: Placement, num_layers: int) -> list[Placement]:
    """Where inputs may wait, from all on the GPU to all but one layer's on the host."""
    waiting = whole.count("gpu", num_layers) - 1
    if config.sequence.checkpoints != "auto" or waiting == 0:
        return [whole]
    on_gpu = sorted({waiting * eighths // SHARES for eighths in range(SHARES)}, reverse=True)
    return [whole, *(spread_inputs(num_layers, count, waiting - count) for count in on_gpu)]


def savings(config: RunConfig, whole: SavedAttention, num_layers: int) -> list[list[SavedAttention]]:
    """Ways to keep something of attention, each from the least on the GPU to the most."""
    if config.sequence.save_attention != "auto":
        return [[whole]]
    layers = range(num_layers + 1)
    return [
        [NOTHING],
        [SavedAttention(n) for n in layers if n],
        [SavedAttention(n, host=n < num_layers) for n in layers],
        [SavedAttention(n, everything=True) for n in layers if n],
        [SavedAttention(n, host=n < num_layers, everything=True) for n in layers if n],
    ]


def most(least: int, greatest: int, holds: Callable[[int], bool]) -> int | None:
    """The largest number of a range for which something holds, as it does for all below; None if for none."""
    if least > greatest or not holds(least):
        return None
    while least < greatest:
        middle = (least + greatest + 1) // 2
        least, greatest = (middle, greatest) if holds(middle) else (least, middle - 1)
    return least
