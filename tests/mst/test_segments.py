"""Layers that keep their inputs: as many as there is room for, and never more waits than that."""

from __future__ import annotations

from itertools import pairwise

import pytest

from longseq.mst.placement import Placement, spread_inputs
from longseq.mst.segments import fewest_waiting, kept_layers, rebuilt_on_host


def walk(placed: Placement, num_layers: int) -> list[tuple[int, int]]:
    """Inputs that wait on the GPU and on the host, beside that of the layer at work, through a backward.

    Layers are rebuilt one by one, and only from an input that is there.
    """
    places = placed.all_places(num_layers)
    kept = {index: place for index, place in enumerate(places) if place != "rebuild"}
    waiting: dict[int, str] = dict(kept)
    seen = []

    def look(at_work: int) -> None:
        others = [place for index, place in waiting.items() if index != at_work]
        seen.append((others.count("gpu"), others.count("host")))

    for index in range(num_layers - 1, -1, -1):
        if index not in waiting:
            start = max(layer for layer in kept if layer < index)
            slots = list(kept.values()).count("host") - list(waiting.values()).count("host")
            on_host = rebuilt_on_host(start, index + 1, slots)
            for made in range(start + 1, index + 1):
                # The one below is at work, and has its place besides.
                seen.append((list(waiting.values()).count("gpu"), list(waiting.values()).count("host")))
                waiting[made] = "host" if made in on_host else "gpu"
                assert waiting[made] == placed.waits(num_layers)[made]
        look(index)
        del waiting[index]
    assert not waiting
    return seen


@pytest.mark.parametrize("num_layers", [*range(1, 20), 28, 32, 36, 61, 80, 126])
def test_never_more_inputs_wait_than_there_is_room_for(num_layers: int) -> None:
    fewest = fewest_waiting(num_layers)
    for count in range(fewest, num_layers + 2):
        for on_gpu in {0, 1, count // 2, count}:
            placed = spread_inputs(num_layers, on_gpu, max(0, count - on_gpu))
            on_host = placed.count("host", num_layers)
            seen = walk(placed, num_layers)
            assert max(gpu for gpu, _ in seen) <= on_gpu
            # What forward has kept there is the most that there ever is.
            assert max(host for _, host in seen) == on_host <= max(0, count - on_gpu)
            # With the last layer's, which does not wait.
            assert num_layers - placed.count("rebuild", num_layers) == min(count + 1, num_layers)


@pytest.mark.parametrize("num_layers", [*range(1, 20), 32, 80])
def test_fewer_inputs_would_have_layers_rebuilt_twice(num_layers: int) -> None:
    """Tried for all lengths of segments: one input fewer, and in some segment too many wait."""
    waiting = fewest_waiting(num_layers) - 1
    if waiting < 0:
        return
    longest = sum(number + 2 for number in range(waiting))  # each as long as it may be
    assert longest < num_layers - 1
    with pytest.raises(ValueError, match=f"waiting={waiting} must be {waiting + 1} or more for {num_layers}"):
        kept_layers(num_layers, waiting)


def test_segments_that_are_full_may_not_be_longer() -> None:
    """3 inputs, 10 layers: 2, 3 and 4 below the last. A layer more in any of them, and 4 wait."""
    assert kept_layers(10, 3) == (0, 4, 7, 9)
    for kept in ((0, 5, 8, 10), (0, 4, 8, 10), (0, 4, 7, 10)):
        seen = walk(Placement(0, kept=kept), 11)
        assert max(gpu + host for gpu, host in seen) == 4


@pytest.mark.parametrize("num_layers", [5, 12, 32, 80])
def test_segments_are_even(num_layers: int) -> None:
    for waiting in range(fewest_waiting(num_layers), num_layers):
        kept = kept_layers(num_layers, waiting)
        lengths = [above - below for below, above in pairwise(kept)][::-1]
        longest = max(lengths)
        assert all(length in (min(number + 2, longest), longest - 1) for number, length in enumerate(lengths))
    assert kept_layers(num_layers, num_layers - 1) == tuple(range(num_layers))


@pytest.mark.parametrize(
    ("slots", "on_host"), [(0, []), (1, [5]), (2, [5, 6]), (3, [5, 6, 7]), (4, [5, 6, 7]), (99, [5, 6, 7])]
)
def test_the_lowest_wait_on_the_host_and_the_highest_never(slots: int, on_host: list[int]) -> None:
    assert list(rebuilt_on_host(4, 9, slots)) == on_host
    assert list(rebuilt_on_host(4, 5, slots)) == list(rebuilt_on_host(4, 6, slots)) == []
