"""What an update rule is given: the part of a parameter that is here, its gradient and its state."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

Rounding = Literal["stochastic", "nearest", "master"]
"""How a weight narrower than float32 is written: `master` keeps a float32 copy of it in the state."""


@dataclass
class Slot:
    """Elements of one parameter that one process updates, as a tensor of one or two dimensions.

    Attributes:
        weight: Written in place; `(elements,)` or `(rows, columns)`, any strides.
        grad: Of the same shape.
        state: What the rule keeps; empty before its first step.
        key: Of the whole parameter (`projection.parameter_key`).
        first: Flat index of the first element in the whole parameter.
        row_stride: From a row to the next in the whole parameter; of no meaning in one dimension.
    """

    weight: Tensor
    grad: Tensor
    state: dict[str, Any] = field(default_factory=dict)
    key: int = 0
    first: int = 0
    row_stride: int = 0
