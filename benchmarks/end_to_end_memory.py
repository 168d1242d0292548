"""The longest sequence whose training step fits in memory, found by whole steps that compute little.

Attention and the products of matrices take minutes at a million tokens, and no memory beyond what is known of
them. A stub takes their place: the allocator sees a whole step (forward, backward, clipping, optimizer, all
layers, host copies), and its peak is a real step's. That is checked at a length that was run for real.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from decoder_model import attempt, free
from end_to_end_rungs import SteeredChooser
from end_to_end_step import SMALL_TOKENS, Card, Training, undone
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longseq.launch.bench.stub_attention import StubAttention
from longseq.launch.bench.stub_products import StubProducts
from longseq.mst.placement import choose_placement

GRAINS = ((131072, 4096), (32768, 1024), (0, 512))
"""From so many tokens on lengths are multiples of so many: about `STEP` of them at the most."""
FINE_GRAIN = GRAINS[-1][1]
STEP = 0.03
"""A length that fits and one that does not are no further apart in the end, if there are tries enough."""
REACH = 2
"""Times the longest known one is the next tried at the most: at short ones the optimizer's step, or one tile,
has the peak, so that the slope between them says little of long ones. Such a probe takes seconds."""
HOST_REACH, FAR = 4, 16
"""The same where inputs wait on the host, and probes take minutes: until a probe has added to what is known,
and then."""
SPARE_SHARE, MORE_SPARE = 0.01, 0.015
"""Of the card, left for fragments when a length is guessed; and so much more after each that had no room."""
LADDER = (1024, 2048, 4096)


class _StubForTransformers(torch.autograd.Function):
    """What PyTorch's attention keeps, and what it takes in backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, stub: StubAttention) -> Tensor:
        out, log_sums = stub.kernel_forward(query, key, value, None)
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.stub = stub
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *ctx.stub.kernel_backward(grad, *ctx.saved_tensors, None), None


def stubbed(training: Training) -> Any:
    """A context in which attention and products take memory alone."""
    changes: list[Callable[[], Any]] = []
    stub = StubAttention(training.rung.kernel)
    if training.ready.chooser is None:
        real = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            return _StubForTransformers.apply(query, key, value, stub).transpose(1, 2).contiguous(), None

        ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
        changes.append(lambda: ALL_ATTENTION_FUNCTIONS.__setitem__("sdpa", real))
    else:
        for layer in training.model.model.layers:
            layer.self_attn.longseq_attention = stub
            changes.append(lambda module=layer.self_attn: delattr(module, "longseq_attention"))
    return undone(changes)


def probe(training: Training, num_tokens: int) -> dict[str, Any]:
    """A step's memory, by a step that computes little; a note where it has no room."""

    def work() -> dict[str, Any]:
        with stubbed(training), StubProducts():
            taken = training.step(num_tokens)
        return {
            "seconds": taken.seconds,
            "peak_bytes": taken.peak_bytes,
            "reserved_bytes": taken.reserved_bytes,
            "host_pinned_bytes": taken.host_bytes,
        }

    free()
    found = {"tokens": num_tokens} | attempt(work)
    if "note" in found:
        training.recover()
    return found


@dataclass
class Memory:
    """What is known of a rung's memory: measured peaks, and lines through them."""

    card: Card
    host_bytes: int
    num_layers: int
    row_bytes: int
    """Of one token in a layer's input."""
    points: dict[int, int] = field(default_factory=dict)
    """Peaks by tokens, of inputs placed as the rung says."""
    anchor_host_bytes: Callable[[int, int], int] | None = None
    on_host: bool = False
    spare_share: float = SPARE_SHARE
    knows_a_probe: bool = False

    def add(self, row: dict[str, Any]) -> None:
        """A step that was measured."""
        if row.get("peak_bytes") is not None:
            self.points[row["tokens"]] = row["peak_bytes"]

    def add_steered(self, row: dict[str, Any]) -> None:
        """A probe whose inputs were placed by room: as the rung's own placement would have been."""
        if row.get("peak_bytes") is not None and row.get("inputs") is not None:
            beside_one = max(0, row["inputs"]["gpu"] - 1) * row["tokens"] * self.row_bytes
            self.add({"tokens": row["tokens"], "peak_bytes": row["peak_bytes"] - beside_one})
            self.knows_a_probe = True

    def slope(self) -> float | None:
        """Bytes a token, between the two longest."""
        if len(self.points) < 2:
            return None
        before, last = sorted(self.points)[-2:]
        return (self.points[last] - self.points[before]) / (last - before)

    def peak_bytes(self, num_tokens: int) -> float:
        """Of a step, by the line through the two longest."""
        last = max(self.points)
        return self.points[last] + (self.slope() or 0.0) * (num_tokens - last)

    def most_bytes(self) -> float:
        """What a step may take."""
        room = self.card.room_bytes()
        return float("inf") if room is None else room * (1 - self.spare_share)

    def room_for_inputs(self, num_tokens: int) -> int:
        """On the GPU, beside all else; the rung's own placement has one there."""
        one = num_tokens * self.row_bytes
        if not self.points:
            return one
        return max(one, int(self.most_bytes() - self.peak_bytes(num_tokens)) + one)

    def can_fit(self, num_tokens: int) -> bool:
        """By what is known."""
        if self.peak_bytes(num_tokens) > self.most_bytes():
            return False
        if not self.host_fits(num_tokens):
            return False
        if not self.on_host:
            return True
        try:
            room = self.room_for_inputs(num_tokens)
            choose_placement(self.num_layers, num_tokens * self.row_bytes, room, self.host_bytes)
        except ValueError:
            return False
        return True

    def host_fits(self, num_tokens: int) -> bool:
        """Of an anchor, which would else take the whole machine's."""
        if self.anchor_host_bytes is None:
            return True
        return self.anchor_host_bytes(self.num_layers, num_tokens * self.row_bytes) <= self.host_bytes

    def guess(self, longest: int) -> int:
        """The longest that should fit, not far beyond the longest that did; that one, if little is known."""
        if len(self.points) < 2:
            return longest
        times = REACH if not self.on_host else FAR if self.knows_a_probe else HOST_REACH
        least, most = longest, times * longest
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if self.can_fit(middle) else (least, middle)
        return on_grain(most if self.can_fit(most) else least)


def grain(num_tokens: int) -> int:
    """What lengths about so long are multiples of."""
    return next(unit for least, unit in GRAINS if num_tokens >= least)


def on_grain(num_tokens: float) -> int:
    """The longest such length that is no longer."""
    return int(num_tokens) // grain(int(num_tokens)) * grain(int(num_tokens))


class Search:
    """Tries lengths until one that fits and one that does not are close."""

    def __init__(self, memory: Memory, tries: int, first: int | None = None) -> None:
        self.memory, self.tries = memory, tries
        self.first = 0 if first is None else on_grain(first)
        self.fits: int | None = None
        self.fails: int | None = None
        self.why: str | None = None
        self._failed_in_a_row = 0

    def took(self, row: dict[str, Any]) -> None:
        """A length was tried."""
        tokens = row["tokens"]
        self._failed_in_a_row = self._failed_in_a_row + 1 if "note" in row else 0
        if "note" in row and self.memory.on_host:
            # Inputs fill what room is thought to be there: a shorter sequence alone would fill it again.
            self.memory.spare_share += MORE_SPARE
        if "note" not in row:
            self.fits = max(tokens, self.fits or 0)
        elif self.fails is None or tokens < self.fails:
            self.fails, self.why = tokens, row["note"]

    def next(self) -> int | None:
        """The next length to try; None at the end."""
        if self.tries <= 0 or (self.fits is None and self.fails is not None and self.fails <= FINE_GRAIN):
            return None
        tokens = self._wanted()
        if tokens is not None and not self.memory.host_fits(tokens):
            self.why = self.why or "longer ones pin more than the host has"
            return None
        if tokens is None:
            return None
        self.tries -= 1
        return tokens

    def _wanted(self) -> int | None:
        if self.fails is None:
            longest = self.fits or SMALL_TOKENS
            if self.first > longest:
                return self.first
            return max(self.memory.guess(longest), a_step_above(longest))
        if self.fits is None:
            return on_grain(self.fails / 2)
        unit = grain(self.fits)
        if self.fails - self.fits <= max(unit, STEP * self.fits):
            return None
        guess = self.memory.guess(self.fits)
        if guess <= self.fits:  # all that is left is to show that there is no more
            guess = a_step_above(self.fits)
        elif guess >= self.fails:
            # A little less; where that has no room either, no lower than half of the way in proportion.
            less = self.fails * (1 - STEP * 4 ** max(0, self._failed_in_a_row - 1))
            guess = on_grain(max(less, math.sqrt(self.fits * self.fails)))
        return min(max(guess, self.fits + unit), self.fails - unit)


def a_step_above(num_tokens: int) -> int:
    """The next length that is worth a try where this one fits."""
    unit = grain(num_tokens)
    return on_grain(num_tokens) + max(unit, int(STEP * num_tokens) // unit * unit)


def steer(chooser: SteeredChooser | None, memory: Memory, *, on_host: bool) -> None:
    """From here on inputs are placed by measured room, in host memory of the size that was given."""
    if chooser is not None and on_host:
        chooser.inputs = "auto"
        chooser.room = memory.room_for_inputs


def placed(chooser: SteeredChooser | None, num_layers: int) -> dict[str, int] | None:
    """Where the last step's inputs were, in layers; None where no layer is streamed."""
    if chooser is None or chooser.last is None:
        return None
    return {where: chooser.last.inputs.count(where, num_layers) for where in ("gpu", "host", "rebuild")}


def saved(chooser: SteeredChooser | None, num_layers: int) -> str | None:
    """What of attention was saved in the last step, and where."""
    if chooser is None or chooser.last is None:
        return None
    attention = chooser.last.attention
    wheres = [attention.where(index, num_layers) for index in range(num_layers)]
    what = "all" if attention.everything else "outputs"
    return f"{what}: {wheres.count('gpu')} on the GPU, {wheres.count('host')} on the host"
