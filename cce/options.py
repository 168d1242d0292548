"""What the loss is, apart from its tensors; shared by every method that computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class LossOptions:
    """The scalar options of `linear_cross_entropy`, checked once.

    With `u = logit_scale * (hidden @ weight.T + bias)`, logits are `z = softcap * tanh(u / softcap)` (or
    `u`), and the loss of a token with label `y` and weight `w` over `V` words is

        w * ((1 - s) * (lse - z_y) + s * (lse - mean(z)) + z_loss * lse**2)

    with `lse = logsumexp(z)` and `s = label_smoothing`.

    `reduction="mean"` divides the sum by the sum of the weights of the tokens that count (their number,
    where there are no weights), and is 0 when none counts.
    """

    ignore_index: int = -100
    softcap: float | None = None
    logit_scale: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    reduction: str = "mean"

    def __post_init__(self) -> None:
        problems = []
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            problems.append(f"softcap={self.softcap} must be positive and finite; None turns it off")
        if not math.isfinite(self.logit_scale):
            problems.append(f"logit_scale={self.logit_scale} must be finite")
        if not 0.0 <= self.label_smoothing < 1.0:
            problems.append(f"label_smoothing={self.label_smoothing} must be in [0, 1)")
        if not 0.0 <= self.z_loss < math.inf:
            problems.append(f"z_loss={self.z_loss} must be 0 or more, and finite")
        if self.reduction not in REDUCTIONS:
            problems.append(f"reduction={self.reduction!r} must be one of {', '.join(REDUCTIONS)}")
        if problems:
            raise ValueError("; ".join(problems) + ".")
