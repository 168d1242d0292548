"""What the final norm, the LM head and the embedding take."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from ...cce.chunks import plan
from ...cce.head import Needs
from ...cce.kernels.tuning import LOGITS, TILE, max_splits, splits_for, strips_for
from ...mst.lm_head import HEAD_TILE_LOGITS
from .knobs import Knobs
from .memory_sizes import Sizes
from .workload import Workload

HAS_KERNELS = re.compile(r"\b(?:G?H200|H[18]00|H20|B100|G?B[23]00)\b")
"""Names of GPUs of compute capability 9 and 10, for which cut cross-entropy has kernels (cce/fused.py)."""
PROCESSORS = 132
"""Multiprocessors of an H100 or H200, which the loss cuts its chunks for."""
CHUNK_LOGITS_BYTES = 2**30
"""Logits at once where the fused kernels cannot run (cce/portable.py)."""
PARTIAL_ROWS = 1.0
"""Float32 rows of a gradient that torch's embedding backward keeps for each token: one for each word that
differs, at most."""

_plan = lru_cache(maxsize=4096)(plan)


@dataclass(frozen=True)
class HeadMemory:
    """Bytes that the loss takes beside the last layer's output.

    Attributes:
        forward: At its peak in forward, the normalised hidden states included.
        backward: At its peak in backward, with what forward left.
    """

    forward: int
    backward: int


def head_memory(work: Workload, knobs: Knobs, sizes: Sizes, gpu: str) -> HeadMemory:
    """Of the final norm and the loss, on a GPU of this name."""
    if work.loss == "logits":
        return _whole_logits(work, sizes)
    if work.loss == "mini_sequence":
        return _tiled_logits(work, sizes)
    return _Cce(work, knobs, sizes, gpu).memory()


class _Cce:
    """Cut cross-entropy by the method that "auto" takes in training, `exact`."""

    def __init__(self, work: Workload, knobs: Knobs, sizes: Sizes, gpu: str) -> None:
        self.work, self.sizes = work, sizes
        self.fused = work.is_bf16 and work.shape.hidden_size % 8 == 0 and bool(HAS_KERNELS.search(gpu))
        self.width, self.vocab_size = work.shape.hidden_size, work.shape.vocab_size
        self.numel = self.width * self.vocab_size
        self.trained = bool(work.numel("head", "embedding", trained=True)) and not work.has_adapters
        self.weight_bytes = work.weight_bytes(knobs.zero_stage)
        # Under autocast hidden states and weight are cast; their gradients are cast back.
        self.is_cast = self.weight_bytes != work.compute_bytes
        self.numbers = work.compute_bytes

    def memory(self) -> HeadMemory:
        given = self.sizes.hidden  # normalised, and alive until the model's forward is over
        if self.is_cast:
            given += self.sizes.input + self.numel * self.numbers
        forward, left, backward = self._fused() if self.fused else self._portable()
        if self.is_cast:
            # Their backward has narrow gradients beside wide ones, once what forward left is gone.
            narrow = self.sizes.input + (self.numel * self.numbers if self.trained else 0)
            backward = max(left + backward, narrow + self.sizes.hidden + self._weight_gradient())
        else:
            backward += left
        return HeadMemory(given + forward, backward)

    def _weight_gradient(self) -> int:
        return self.numel * self.weight_bytes if self.trained else 0

    def _fused(self) -> tuple[int, int, int]:
        """Peak in forward, what is left of it, and what backward adds."""
        tokens, width, words = self.sizes.tokens, self.width, self.vocab_size
        memory_mib = self.work.loss_memory_mib
        needs = Needs(hidden=True, weight=self.trained)
        chunks = _plan(tokens, words, width, needs, memory_mib, processors=PROCESSORS)
        rows, narrow, hidden = chunks.num_tokens, self.numel * 2, self.sizes.input
        if chunks.defer_hidden:
            budget = (memory_mib or 0) * 2**20
            # They wait for backward, whose budget is their float32 gradient and a chunk's logits.
            return 16 * tokens, hidden, max(budget, 2 * hidden) + narrow + hidden
        tiles = rows // TILE
        padded = -(-words // LOGITS.columns) * LOGITS.columns
        strips = strips_for(tiles, -(-words // LOGITS.columns), width, PROCESSORS)
        columns = -(-width // LOGITS.columns)
        splits = splits_for(tiles * columns, PROCESSORS, max_splits(tiles, words, width))
        exponentials, copies = rows * padded * 2, rows * (width * 2 + 16)
        of_rows = exponentials + copies + rows * 4 * (strips + splits * width) + 28 * tokens
        sums = 0 if chunks.keep or chunks.defer_weight or not self.trained else 2 * narrow
        left = hidden + sums
        backward = hidden + (narrow if self.trained else 0)
        if chunks.keep:
            left += exponentials + copies
            backward += copies
        if chunks.defer_weight:
            left += hidden  # the hidden states themselves
            backward = narrow + (memory_mib or 0) * 2**20
        return of_rows + hidden + sums, left, backward

    def _portable(self) -> tuple[int, int, int]:
        hidden, numbers = self.sizes.input, self.numbers
        budget = (
            CHUNK_LOGITS_BYTES if self.work.loss_memory_mib is None else self.work.loss_memory_mib * 2**20
        )
        logits = min(budget, self.sizes.tokens * self.vocab_size * numbers)
        sums = self.numel * 4 if self.trained else 0
        left = hidden + sums
        return left + logits, left, hidden + (self.numel * numbers if self.trained else 0)


def _tiled_logits(work: Workload, sizes: Sizes) -> HeadMemory:
    """The head's own forward on tiles: nothing is left of a tile but its losses."""
    mib, words = work.loss_memory_mib, work.shape.vocab_size
    logits = HEAD_TILE_LOGITS if mib is None else mib * 2**20 // 4
    elements = min(sizes.tokens, max(1, logits // words)) * words
    numel = 0 if work.has_adapters else words * work.shape.hidden_size
    # Logits, their float32 copy and log-softmax; in backward the gradients of the two as well.
    forward = elements * (work.compute_bytes + 8)
    backward = elements * (2 * work.compute_bytes + 12) + numel * (4 + work.compute_bytes)
    return HeadMemory(sizes.hidden + forward, sizes.hidden + backward)


def _whole_logits(work: Workload, sizes: Sizes) -> HeadMemory:
    """transformers' own: all logits, in float32 too."""
    elements = sizes.tokens * work.shape.vocab_size
    numel = 0 if work.has_adapters else work.shape.vocab_size * work.shape.hidden_size
    forward = elements * (work.compute_bytes + 8)
    backward = elements * 12 + numel * work.compute_bytes
    return HeadMemory(sizes.hidden + forward, sizes.hidden + backward)


def embedding_backward(work: Workload, sizes: Sizes) -> int:
    """Beside its own gradient: tokens sorted by word, and partial sums."""
    if not work.numel("embedding", "head", trained=True):
        return 0
    rows = min(sizes.tokens, work.shape.vocab_size) * PARTIAL_ROWS
    return int(rows * work.shape.hidden_size * 4) + 32 * sizes.tokens
