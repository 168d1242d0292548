"""The fastest way that fits, and the longest sequence that does: a search of the few ways there are.

The order of the search is that of a lower bound: each way is first priced with all that layers leave on the
GPU, where nothing is copied and nothing rebuilt. Ways are then tried from the lowest bound on, each with what
it may move to the host or rebuild, until no bound is left under the best price that was found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...mst.layer_memory import SavedAttention
from ..config import RunConfig
from .costs import Costs
from .inside import NOTHING, most, placements, savings, whole_knobs, with_length
from .knobs import Knobs
from .layouts import layouts
from .machine import Machine
from .workload import Workload

UNIT_TOKENS = 1024
"""The longest sequence is looked for in steps of so many tokens, or of as many as its ranks can share."""
LONGEST_TOKENS = 2**30
"""No sequence is looked for beyond this: a billion tokens are a slip in the machine's figures."""


@dataclass(frozen=True)
class Choice:
    """One way to run, with the config that it is of: numbers for all that was `auto` there."""

    config: RunConfig
    knobs: Knobs


class Search:
    """All ways to run one config on one machine."""

    def __init__(self, config: RunConfig, work: Workload, machine: Machine) -> None:
        self.config, self.work, self.machine = config, work, machine
        self.costs = Costs(work, machine)
        groups = config.sequence.head_groups
        # Ranks that can share a sequence: each attends with one query head of a group at least.
        self.most_ranks = work.shape.num_heads // (1 if groups == "auto" else groups)

    def fastest(self, length: int) -> Choice | None:
        """Of the ways that fit, the one with the lowest price; None if none fits."""
        bounds = [
            (self.costs.price(whole), index, way, whole)
            for index, (way, whole) in enumerate(self._ways(length))
        ]
        best, best_price = None, math.inf
        for bound, _, way, whole in sorted(bounds, key=lambda item: item[:2]):
            if bound >= best_price:
                break
            for placed, line in self._lines(way, whole, best_price):
                knobs = self._cheapest(placed, line, best_price)
                if knobs is not None:
                    best, best_price = Choice(way, knobs), self.costs.price(knobs)
        return best

    def least(self, length: int) -> Choice:
        """The way that leaves the most room, which may still be too little."""
        choices = [Choice(way, knobs) for way, knobs in self._leanest(length)]
        return min(choices, key=lambda choice: self.costs.fullness(choice.knobs))

    def longest(self) -> int | None:
        """The longest sequence that some way fits, in whole steps; None if not even one step does."""
        best = 0
        # The last ways move most off the GPU: mostly the longest is theirs, and the others are asked for more
        # than that, once.
        for way, lean in reversed(list(self._leanest(self.step_tokens()))):
            step = math.lcm(UNIT_TOKENS, lean.ulysses_degree)

            def has_room(count: int, way: RunConfig = way, lean: Knobs = lean, step: int = step) -> bool:
                return self.costs.fits(with_length(way, lean, count * step))

            first = last = best // step + 1
            while has_room(last) and last * step < LONGEST_TOKENS:
                last *= 2
            found = most(first, last, has_room)
            best = max(best, (found or 0) * step)
        return best or None

    def step_tokens(self) -> int:
        """What a length is a multiple of, whatever the degree."""
        return math.lcm(UNIT_TOKENS, *self._degrees())

    def _degrees(self) -> set[int]:
        length = math.lcm(UNIT_TOKENS, *range(1, 1 + min(self.machine.num_gpus, self.most_ranks)))
        found = layouts(self.config, self.machine.num_gpus, length, self.most_ranks)
        return {way.parallel.ulysses_degree for way in found}

    def _ways(self, length: int) -> Iterator[tuple[RunConfig, Knobs]]:
        num_gpus = self.machine.num_gpus
        for way in layouts(self.config, num_gpus, length, self.most_ranks):
            for knobs in whole_knobs(way, self.work, num_gpus):
                yield way, knobs

    def _lines(
        self, way: RunConfig, whole: Knobs, limit: float
    ) -> Iterator[tuple[Knobs, list[SavedAttention]]]:
        """What a way may move off the GPU, as far as it may fit for a price below a limit.

        Where inputs wait, with lines of what is kept of attention, from the least memory to the lowest price.
        """
        layers = self.work.num_layers
        places = placements(way, whole.inputs, layers) if whole.stream else [whole.inputs]
        lines = savings(way, whole.attention, layers) if whole.stream else [[whole.attention]]
        lean = [replace(whole, inputs=inputs, attention=lines[0][0]) for inputs in places]
        # The last takes least of the card; of the host it takes most, and one before may fit.
        if self.costs.memory(lean[-1]).reserved_bytes > self.costs.card_room:
            return
        for placed in lean:
            bound = self.costs.price(replace(placed, attention=whole.attention))
            if bound < limit and self.costs.fits(placed):
                yield from ((placed, line) for line in lines)

    def _cheapest(self, placed: Knobs, line: list[SavedAttention], limit: float) -> Knobs | None:
        """With the last of a line that fits, if its price is below a limit."""

        def at(index: int) -> Knobs:
            return replace(placed, attention=line[index])

        # Prices are asked first: most lines end here, without a question for memory.
        last = len(line) - 1
        if self.costs.price(at(last)) >= limit:
            return None
        dear = most(0, last, lambda index: self.costs.price(at(index)) >= limit)
        found = most(0 if dear is None else dear + 1, last, lambda index: self.costs.fits(at(index)))
        return None if found is None else at(found)

    def _leanest(self, length: int) -> Iterator[tuple[RunConfig, Knobs]]:
        """Of each way to share the work, those that leave the most room."""
        num_gpus = self.machine.num_gpus
        for way in layouts(self.config, num_gpus, length, self.most_ranks):
            wholes = whole_knobs(way, self.work, num_gpus)
            for stream in dict.fromkeys(whole.stream for whole in wholes):
                last = [whole for whole in wholes if whole.stream == stream][-1]
                for whole in (one for one in wholes if one.stream == stream):
                    # All inputs or the fewest: what is between takes no less of the card or of the host.
                    if _tiling(whole) != _tiling(last) or whole.inputs not in (wholes[0].inputs, last.inputs):
                        continue
                    if stream and way.sequence.save_attention == "auto":
                        whole = replace(whole, attention=NOTHING)
                    yield way, whole
                    if stream:
                        moved = placements(way, whole.inputs, self.work.num_layers)[1:]
                        yield from ((way, replace(whole, inputs=inputs)) for inputs in moved)


def _tiling(knobs: Knobs) -> tuple[int, int | None]:
    return knobs.head_groups, knobs.tile_tokens
