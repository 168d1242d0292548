"""One APOLLO step of projected weights, in plain PyTorch: any dtype, device and layout.

The formulas, for a matrix G of gradients whose channels are its rows, as many as its longer side (the other
way round it is transposed), and step t from 1 (arXiv 2412.05270, algorithm 1; its released code corrects the
moments' bias in the step size):

    P = signs / sqrt(r)                             r x K, the same for `update_gap` steps
    R = G P^T                                       C x r
    M = b1 M + (1 - b1) R;  V = b2 V + (1 - b2) R^2;  N = M / (sqrt(V) + eps)
    s_j = |N_j| / |R_j|                             a channel's; APOLLO-Mini has one: s = |N| / |R|
    u = sqrt(sum_j s_j^2 |G_j|^2)                   norm of the scaled gradient
    l = max(u / u_before, g) / g                    limit of its growth (Fira, arXiv 2410.01623)
    u_before = u / l
    W = W (1 - lr wd) - lr sqrt(1 - b2^t) / (1 - b1^t) alpha / l * s G

All that passes between channels, or between ranks, are sums: of R and |G_j|^2 over parts of a channel, and of
a few numbers over channels. `sharded.py` has the places where ranks add theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .layout import Layout, Range, Rectangle
from .projection import mixed, parameter_key, signs
from .rounding import read, write
from .slots import Slot

if TYPE_CHECKING:
    from .sharded import Exchange

TINY = 1e-8
"""Added to norms that are divided by, as the released code does."""
ELEMENTS_AT_ONCE = 2**23
"""Of a weight whose arithmetic needs a wider copy of it: 32 MiB in float32."""


@dataclass
class Projected:
    """A projected weight, as far as it is here.

    Attributes:
        name: Of the parameter; it and the seed say how it is projected.
        weight: This rank's elements, written in place.
        grad: Of the same shape.
        state: What is kept of it: `exp_avg` and `exp_avg_sq` `(owned channels, rank)`, with a dimension
            before them for whole matrices of a batch, `update_norm` `()` or `(matrices,)`, and `step`.
        options: Of its parameter group.
        layout: Where its elements are.
        me: This rank in it.
        quantized: What holds the weight's values, where `weight` does not (`quantized.py`).
    """

    name: str
    weight: Tensor
    grad: Tensor
    state: dict[str, Any]
    options: dict[str, Any]
    layout: Layout
    me: int = 0
    quantized: Any = None

    @property
    def dtype(self) -> torch.dtype:
        """Of statistics and moments."""
        return torch.float64 if self.grad.dtype == torch.float64 else torch.float32

    @property
    def key(self) -> int:
        """Of the parameter, 64 bits."""
        return parameter_key(self.options["seed"], self.name)

    @property
    def rank(self) -> int:
        """Of the projection."""
        return self.options["rank"]

    @property
    def rectangles(self) -> list[Rectangle]:
        """What is here."""
        return self.layout.rectangles[self.me]

    @property
    def touched(self) -> Range:
        """The channels from the first to the last that have elements here."""
        return self.layout.touched[self.me]

    @property
    def owned(self) -> Range:
        """The channels whose moments are here."""
        return self.layout.owned[self.me]

    @property
    def step(self) -> int:
        """Steps taken, with the one that is under way."""
        return int(self.state["step"])

    def make_state(self) -> None:
        """What is kept, as before the first step."""
        state, device = self.state, self.grad.device
        count = self.layout.matrices.count
        is_batch = len(self.layout.shape) > 2
        state["step"] = torch.zeros((), dtype=torch.float32)
        for name in ("exp_avg", "exp_avg_sq"):
            moment = torch.zeros(self.owned.size, self.rank, dtype=self.dtype, device=device)
            if is_batch and self.layout.dim == 0:  # whole matrices
                moment = moment.view(-1, self.layout.matrices.channels, self.rank)
            state[name] = moment
        state["update_norm"] = torch.zeros((count,) if is_batch else (), dtype=self.dtype, device=device)

    def matrix_key(self, matrix: int, step: int) -> int:
        """Of the projection of one of its matrices, for as long as it stays."""
        name = f"{self.name}[{matrix}]" if len(self.layout.shape) > 2 else self.name
        key = parameter_key(self.options["seed"], name)
        return mixed(key, (step - 1) // self.options["update_gap"])


def start(weights: Sequence[Projected]) -> None:
    """Count the step of each weight; at its first, make its state."""
    for one in weights:
        if not one.state:
            one.make_state()
        is_narrow = one.weight.dtype.itemsize < 4 and one.quantized is None
        # Also where a run that had none goes on.
        if is_narrow and one.options["rounding"] == "master" and "master" not in one.state:
            one.state["master"] = one.weight.float()
    if weights:
        torch._foreach_add_([one.state["step"] for one in weights], 1.0)


@dataclass
class Statistics:
    """Of the channels that a rank touches, `touched` of them.

    Attributes:
        projected: Sums of gradient times projection, `(channels, rank)`.
        squares: Sums of squares of the gradient, `(channels,)`.
    """

    projected: Tensor
    squares: Tensor


def statistics(one: Projected) -> Statistics:
    """What this rank's elements add to the channels that it has any of."""
    total = Statistics(
        torch.zeros(one.touched.size, one.rank, dtype=one.dtype, device=one.grad.device),
        torch.zeros(one.touched.size, dtype=one.dtype, device=one.grad.device),
    )
    tall = one.layout.matrices.is_tall
    for rectangle in one.rectangles:
        grad = rectangle.view(one.grad)
        channels = one.layout.channels_of(rectangle)
        place = slice(channels.start - one.touched.start, channels.stop - one.touched.start)
        across = rectangle.columns if tall else rectangle.rows
        projection = signs(
            one.matrix_key(rectangle.matrix, one.step),
            one.rank,
            *across,
            dtype=grad.dtype,
            device=grad.device,
        )
        total.projected[place] += _product(grad if tall else grad.t(), projection.t(), one.dtype)
        total.squares[place] += _squares(grad, 1 if tall else 0, one.dtype)
    total.projected *= 1 / math.sqrt(one.rank)
    return total


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    if left.dtype != dtype and left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    # With `out`, autocast leaves it alone where a step is taken inside of it.
    out = left.new_empty(left.shape[0], right.shape[1], dtype=dtype)
    return torch.mm(left.to(dtype), right.to(dtype), out=out)


def _squares(grad: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.linalg.vector_norm(grad, dim=dim, dtype=dtype).square_()


def update_moments(one: Projected, owned: Statistics) -> tuple[Tensor | None, Tensor]:
    """Moments of the channels that this rank owns, and what their scale follows from.

    Returns:
        Each owned channel's scale, or None where the whole matrix has one; and what is to be summed over the
        ranks, for each matrix: `(count, 1)` or `(count, 3)`.
    """
    beta_1, beta_2 = one.options["betas"]
    exp_avg, exp_avg_sq = (one.state[name].view(-1, one.rank) for name in ("exp_avg", "exp_avg_sq"))
    exp_avg.mul_(beta_1).add_(owned.projected, alpha=1 - beta_1)
    exp_avg_sq.mul_(beta_2).addcmul_(owned.projected, owned.projected, value=1 - beta_2)
    normed = exp_avg / exp_avg_sq.sqrt().add_(one.options["eps"])
    if one.options["scale_type"] == "channel":
        scale = _norms(normed) / (_norms(owned.projected) + TINY)
        # Not scale^2 times squares: where a gradient vanishes, the scale's square may pass float32.
        return scale, _by_matrix(one, (scale * owned.squares.sqrt()).square_().unsqueeze(1))
    sums = [_norms(normed).square_(), _norms(owned.projected).square_(), owned.squares]
    return None, _by_matrix(one, torch.stack(sums, dim=1))


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1)


def _by_matrix(one: Projected, values: Tensor) -> Tensor:
    """Sums `(count, k)` over each matrix's channels of what is `(owned channels, k)`."""
    channels = one.layout.matrices.channels
    sums = values.new_zeros(one.layout.matrices.count, values.shape[1])
    first, before = divmod(one.owned.start, channels)
    last, after = -(-one.owned.stop // channels), -one.owned.stop % channels
    whole = torch.nn.functional.pad(values, (0, 0, before, after)).view(
        last - first, channels, values.shape[1]
    )
    sums[first:last] = whole.sum(1)
    return sums


def limited_factors(one: Projected, sums: Tensor) -> Tensor:
    """What each matrix's gradient is multiplied by, `(count,)`, before learning rate and alpha."""
    if one.options["scale_type"] == "channel":
        factor, norm = None, sums[:, 0].sqrt()
    else:
        normed, projected, gradient = sums.sqrt().unbind(1)
        factor = normed / (projected + TINY)
        norm = factor * gradient
    growth, before = one.options["norm_growth_limit"], one.state["update_norm"].view(-1)
    limit = torch.ones_like(norm)
    if growth is not None:
        # No norm before, or one of no gradient at all: there is no growth to limit.
        limit = torch.where(before > 0, (norm / (before + TINY)).clamp_min(growth) / growth, limit)
    before.copy_(norm / limit)
    return limit.reciprocal() if factor is None else factor / limit


def step_alone(one: Projected) -> None:
    """The step of a weight that is all here."""
    scale, sums = update_moments(one, statistics(one))
    update_weights(one, scale, limited_factors(one, sums))


def step_together(weights: Sequence[Projected], exchange: Exchange) -> None:
    """The step of weights that ranks share, each its part."""
    owned = exchange.to_owners([statistics(one) for one in weights])
    moments = [update_moments(one, whole) for one, whole in zip(weights, owned, strict=True)]
    scales, sums = exchange.to_all([scale for scale, _ in moments], [total for _, total in moments])
    for one, scale, total in zip(weights, scales, sums, strict=True):
        update_weights(one, scale, limited_factors(one, total))


def update_weights(one: Projected, scale: Tensor | None, factors: Tensor) -> None:
    """Take the step, on all elements that are here.

    Args:
        one: The weight.
        scale: Of the channels that this rank touches, or None.
        factors: Of its matrices, `(count,)`.
    """
    options, step = one.options, one.step
    beta_1, beta_2 = options["betas"]
    size = options["lr"] * options["alpha"] * math.sqrt(1 - beta_2**step) / (1 - beta_1**step)
    tall = one.layout.matrices.is_tall
    for rectangle in one.rectangles:
        factor = factors[rectangle.matrix] * -size
        if scale is not None:
            channels = one.layout.channels_of(rectangle)
            factor = factor * scale[channels.start - one.touched.start : channels.stop - one.touched.start]
            factor = factor.unsqueeze(1) if tall else factor
        grad = rectangle.view(one.grad)
        for rows in _row_slices(one, rectangle.rows.size):
            part = factor[rows] if scale is not None and tall else factor
            _update_rows(one, rectangle, rows, grad[rows], part, 1 - options["lr"] * options["weight_decay"])


def _row_slices(one: Projected, num_rows: int) -> list[slice]:
    if one.quantized is None and one.weight.dtype == one.dtype:
        return [slice(0, num_rows)]  # in place
    at_once = max(1, ELEMENTS_AT_ONCE // one.layout.matrices.columns)
    return [slice(row, min(row + at_once, num_rows)) for row in range(0, num_rows, at_once)]


def _update_rows(
    one: Projected, rectangle: Rectangle, rows: slice, grad: Tensor, factor: Tensor, decay: float
) -> None:
    if one.quantized is not None:
        value = one.quantized.dequantize(rows, dtype=one.dtype)
        value.mul_(decay).addcmul_(grad.to(one.dtype), factor)
        one.quantized.store(value, mixed(one.key, one.step) & 0xFFFFFFFF, rows)
        return
    columns = one.layout.matrices.columns
    first_row = rectangle.matrix * one.layout.matrices.rows + rectangle.rows.start + rows.start
    slot = Slot(
        rectangle.view(one.weight)[rows],
        grad,
        {"master": rectangle.view(one.state["master"])[rows]} if "master" in one.state else {},
        one.key,
        first_row * columns + rectangle.columns.start,
        columns,
    )
    rounding = one.options["rounding"]
    value = read(slot, rounding)
    value.mul_(decay).addcmul_(grad.to(value.dtype), factor.to(value.dtype))
    write(slot, value, rounding, one.step)
