"""The bytes that a step's tensors come in, from a workload and its knobs: one place for every width."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...distributed.blockwise_attention import BLOCK_ELEMENTS
from ...distributed.head_plan import HeadPlan, plan_heads
from ...mst.projections import HeadShape
from .knobs import Knobs
from .workload import Kernel, Workload

BLOCKS = 4
"""Of scores, alive at once in attention by blocks (distributed/blockwise_attention.py)."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of what a rank's tokens and one layer's weights take.

    Attributes:
        tokens: Of this rank.
        hidden: Hidden states, in the dtype of the residual stream.
        input: The same in the dtype of products.
        queries: Queries of all heads, or attention's output.
        key_values: Keys and values of all heads.
        log_sums: Attention's log-sum-exp, float32.
        tile: Tokens of an MLP's tile.
        num_tiles: Tiles of a layer's MLP.
    """

    tokens: int
    hidden: int
    input: int
    queries: int
    key_values: int
    log_sums: int
    tile: int
    num_tiles: int

    @classmethod
    def of(cls, work: Workload, knobs: Knobs) -> Sizes:
        """Of one rank's micro-batch."""
        tokens, heads = knobs.tokens_a_gpu, work.layer.heads
        numbers = work.compute_bytes
        queries, keys, _ = heads.widths
        tile = min(knobs.tile_tokens or tokens, tokens)
        return cls(
            tokens=tokens,
            hidden=tokens * work.shape.hidden_size * work.weight_bytes(knobs.zero_stage),
            input=tokens * work.shape.hidden_size * numbers,
            queries=tokens * queries * numbers,
            key_values=2 * tokens * keys * numbers,
            log_sums=tokens * heads.num_heads * 4,
            tile=tile,
            num_tiles=-(-tokens // max(tile, 1)),
        )

    @property
    def heads(self) -> int:
        """Queries, keys and values of all heads."""
        return self.queries + self.key_values


def attending(sizes: Sizes, heads: HeadShape, degree: int, num_groups: int) -> Sizes:
    """The sizes where a sequence is whole and its heads are shared, on the rank that has most of them.

    With heads for all ranks alike they are what they were. Else one rank has more queries than another, or
    several have the same key/value head.
    """
    plan = group_plan(heads, degree, num_groups)
    if plan is None:
        return sizes
    queries, keys = heads.num_heads // num_groups, heads.num_kv_heads // num_groups
    most_queries, most_keys = max(plan.queries.counts), max(plan.keys.counts)
    return replace(
        sizes,
        queries=sizes.queries * degree * most_queries // queries,
        key_values=sizes.key_values * degree * most_keys // keys,
        log_sums=sizes.log_sums * degree * most_queries // queries,
    )


def group_plan(heads: HeadShape, degree: int, num_groups: int) -> HeadPlan | None:
    """How ranks share one group of heads; None where there is one rank, or too many for the group.

    Those are refused where the layers are made.
    """
    queries, keys = heads.num_heads // num_groups, heads.num_kv_heads // num_groups
    return None if degree == 1 or queries < degree or not keys else plan_heads(queries, keys, degree)


def exchanges_in_turn(heads: HeadShape, degree: int, num_groups: int) -> bool:
    """Whether each group is exchanged by itself, none beside another's attention (distributed/ulysses.py)."""
    plan = group_plan(heads, degree, num_groups)
    return num_groups > 1 and plan is not None and plan.shares_keys


def kernel_workspace(kernel: Kernel, sizes: Sizes, num_groups: int, query_to_key: int, numbers: int) -> int:
    """What the kernel of attention's backward allocates beside its results, for one group of heads.

    cuDNN and flash-attention 2 keep a float32 sum of the queries' gradient, keys' and values' gradients of
    each query head, and a float32 a row; flash-attn-3 and 4 float32 sums of all three, and two a row. Taken
    apart from what was measured (benchmarks/results/decoder_probe.md).
    """
    wide_queries = sizes.queries * 4 // numbers
    if kernel in ("fa3", "fa4"):
        whole = wide_queries + sizes.key_values * 4 // numbers + 2 * sizes.log_sums
    elif kernel in ("cudnn", "flash"):
        whole = wide_queries + sizes.key_values * query_to_key + sizes.log_sums
        if kernel == "flash" and num_groups > 1:
            whole += sizes.queries  # it takes the output in one piece, and a group's is columns of all
    elif kernel == "cpu":  # each gradient is made for every query head
        whole = 3 * sizes.queries
    else:  # blockwise: float32 keys, values and their gradients, and some blocks of scores
        wide = sizes.key_values * 4 // numbers
        return 2 * wide // num_groups + BLOCKS * 4 * BLOCK_ELEMENTS
    return whole // num_groups
