"""Method `filtered`: which part of the gradient is left out, and what is known about it.

Cut Your Losses, section 4.3 (arXiv 2411.09009): an element of the softmax below the precision of what it
is added to changes nothing. Tiles of 128 tokens x 128 words whose every probability is below `eps` are left
out of the gradient, all but their tokens' labels. The loss is exact, and so is each kept element. On a GPU
the words of a long call are put in order first, so that those that no token lifts share tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor


def resolve_eps(filter_eps: float | str, dtype: torch.dtype) -> float:
    """The threshold as a number: "auto" is a 32nd of the dtype's epsilon (2^-12 in bfloat16).

    Raises:
        ValueError: It is neither "auto" nor a number in (0, 1).
    """
    if filter_eps == "auto":
        return torch.finfo(dtype).eps / 32
    if isinstance(filter_eps, (int, float)) and 0.0 < filter_eps < 1.0:
        return float(filter_eps)
    raise ValueError(
        f"filter_eps={filter_eps!r} must be 'auto' (a 32nd of the dtype's epsilon) or a number in (0, 1); "
        "method='exact' leaves nothing out."
    )


class FilterReport:
    """What a filter kept and dropped, summed over the calls that were given it.

    Reading a number waits for the GPU; being given to a call does not.

    Example:
        report = FilterReport()
        loss = linear_cross_entropy(hidden, weight, labels, method="filtered", filter_report=report)
        print(report.living_share, report.dropped_probability)
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, sums: Tensor) -> None:
        """Add a call's living tiles, tiles, dropped probability and tokens, `(4,)`, where they are."""
        sums = sums.detach()
        self._sums = sums.clone() if self._sums is None else self._sums + sums

    def reset(self) -> None:
        """Forget all calls so far."""
        self._sums = None

    @property
    def tiles(self) -> int:
        """Tiles of 128 tokens that count by 128 words."""
        return int(self._read()[1])

    @property
    def living_share(self) -> float:
        """Share of the tiles whose products were made."""
        living, tiles, _, _ = self._read()
        return living / tiles if tiles else 0.0

    @property
    def dropped_probability(self) -> float:
        """Mean over the tokens of the probability that lies in tiles that were left out."""
        _, _, dropped, tokens = self._read()
        return dropped / tokens if tokens else 0.0

    def _read(self) -> list[float]:
        return [0.0] * 4 if self._sums is None else self._sums.tolist()
