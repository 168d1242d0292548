"""Segments of layers: the lowest of each keeps its input, and those of the others are rebuilt from it.

Pure functions of numbers of layers.
"""

from __future__ import annotations


def rebuilt_on_host(start: int, stop: int, free_slots: int) -> range:
    """Of layers `start` to `stop` - 1, rebuilt from the first, those whose inputs wait on the host.

    The lowest, which backward wants last. The highest wants its own at once.

    Args:
        start: The layer whose input was kept.
        stop: The layer after the last that is rebuilt from it.
        free_slots: Inputs that there is room for on the host.
    """
    return range(start + 1, min(start + 1 + free_slots, stop - 1))


def fewest_waiting(num_layers: int) -> int:
    """The fewest inputs that must find room at once for no layer to be rebuilt twice (`kept_layers`)."""
    waiting = 0
    while waiting * (waiting + 3) // 2 < num_layers - 1:
        waiting += 1
    return waiting


def kept_layers(num_layers: int, waiting: int) -> tuple[int, ...]:
    """The layers that keep their inputs, so that at no time more than `waiting` inputs wait.

    The last layer keeps its own, which backward wants first of all: it never waits. Below it are `waiting`
    segments, each of which begins with a layer that keeps its input. With each segment that backward has
    done there is room for one input more: the i-th from above may have i + 1 layers. Then `waiting` - i + 1
    kept inputs wait, its own among them, and the i - 1 that were rebuilt for its layers but the highest,
    which is at work. Segments are as even as that allows, for what is rebuilt in short ones need not wait.

    Args:
        num_layers: Decoder layers.
        waiting: Inputs that there is room for, on the GPU and on the host, beside that of the layer at work.

    Raises:
        ValueError: `waiting` is too small (`fewest_waiting`).
    """
    fewest = fewest_waiting(num_layers)
    if waiting < fewest:
        raise ValueError(f"waiting={waiting} must be {fewest} or more for {num_layers} layers.")
    below = num_layers - 1
    limits = [number + 2 for number in range(min(waiting, below))]
    longest = next(n for n in range(num_layers + 1) if sum(min(limit, n) for limit in limits) >= below)
    lengths = [min(limit, longest) for limit in limits]
    for number in range(sum(lengths) - below):
        lengths[-1 - number] -= 1
    kept = [below]
    for length in lengths:
        kept.append(kept[-1] - length)
    return tuple(reversed(kept))
