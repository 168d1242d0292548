"""All that a plan may choose, as numbers: nothing in it is `auto`."""

from __future__ import annotations

from dataclasses import dataclass

from ...mst.layer_memory import SavedAttention
from ...mst.placement import Placement


@dataclass(frozen=True)
class Knobs:
    """How a step is run.

    Attributes:
        length: Tokens of a sequence, over all ranks that share it.
        micro_batch: Sequences that a group of `ulysses_degree` ranks takes at once.
        accumulation: Micro-batches of a step.
        ulysses_degree: Ranks that share a sequence.
        data_degree: Groups of such ranks.
        zero_stage: 0 to 3.
        offload_optimizer: States and step on the host.
        offload_parameters: Weights wait on the host.
        stream: Decoder layers are streamed; without, what autograd keeps stays on the GPU and the next three
            say nothing.
        head_groups: Of a layer's attention.
        inputs: Where layers' inputs wait.
        attention: What of attention is saved, and where.
        tile_tokens: Of an MLP's mini-sequence; None is one tile.
    """

    length: int
    micro_batch: int
    accumulation: int
    ulysses_degree: int
    data_degree: int
    zero_stage: int
    offload_optimizer: bool
    offload_parameters: bool
    stream: bool
    head_groups: int
    inputs: Placement
    attention: SavedAttention
    tile_tokens: int | None

    @property
    def tokens_a_gpu(self) -> int:
        """Tokens that one rank holds of a micro-batch, padding included."""
        return -(-self.length // self.ulysses_degree) * self.micro_batch

    @property
    def num_gpus(self) -> int:
        """Ranks in all."""
        return self.ulysses_degree * self.data_degree
