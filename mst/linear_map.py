"""Linear layers on tiles, with their gradients by hand: plain, with a LoRA adapter, or anything else."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from .low_rank import linear_parts, weight_values
from .mini_sequence import without_hooks
from .weight_sums import WeightSums


class LinearMap:
    """`x @ W.T + b + scale * (x @ A.T) @ B.T` of `(T, in)` tiles; weights are cast once, when it is made."""

    sliceable = True

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        lora: tuple[Tensor, Tensor, float] | None,
        dtype: torch.dtype,
    ) -> None:
        self._weight_param, self._bias_param, self._lora_params = weight, bias, lora
        self.weight = weight_values(weight, dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.lora = None if lora is None else (lora[0].to(dtype), lora[1].to(dtype), lora[2])

    def forward(self, x: Tensor, *, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """The map, plus a residual that is added before the result is rounded."""
        if residual is None or residual.dtype != x.dtype:
            y = torch.mm(x, self.weight.t(), out=out if residual is None else None)
        else:
            y = torch.addmm(residual, x, self.weight.t(), out=out)
        if self.bias is not None:
            y += self.bias
        if self.lora is not None:
            a, b, scale = self.lora
            y.addmm_(x @ a.t(), b.t(), alpha=scale)
        if residual is not None and residual.dtype != x.dtype:
            return torch.add(residual, y, out=out)
        return y

    def input_grad(
        self, grad: Tensor, *, columns: slice | None = None, add_to: Tensor | None = None
    ) -> Tensor:
        """Gradient of (columns of) the input, added to `add_to` if given."""
        columns = slice(None) if columns is None else columns
        weight = self.weight[:, columns]
        total = grad @ weight if add_to is None else add_to.addmm_(grad, weight)
        if self.lora is not None:
            a, b, scale = self.lora
            total.addmm_(grad @ b, a[:, columns], alpha=scale)
        return total

    def add_weight_grads(self, x: Tensor, grad: Tensor, sums: WeightSums, rows: slice | None = None) -> None:
        """Add a tile's weight gradients; `rows` says which outputs `grad` is of."""
        sums.add_product(self._weight_param, grad, x, rows)
        if sums.wants(self._bias_param):
            total = sums.buffer(self._bias_param)
            (total if rows is None else total[rows]).add_(grad.sum(0, dtype=total.dtype))
        if self.lora is not None:
            a, b, scale = self.lora
            b_rows = b if rows is None else b[rows]
            param_a, param_b, _ = self._lora_params
            sums.add_product(param_a, (grad @ b_rows).mul_(scale), x)
            sums.add_product(param_b, grad, (x @ a.t()).mul_(scale), rows)

    def backward(self, x: Tensor, grad: Tensor, sums: WeightSums, *, add_to: Tensor | None = None) -> Tensor:
        """Gradient of the input; those of the weights are added to their sums."""
        self.add_weight_grads(x, grad, sums)
        return self.input_grad(grad, add_to=add_to)


class ModuleMap:
    """Any token-wise module: run again with grad for its gradient, by autograd, one tile at a time."""

    sliceable = False

    def __init__(
        self, module: nn.Module, dtype: torch.dtype, autocast: tuple[str, torch.dtype] | None
    ) -> None:
        self._module, self._dtype, self._autocast = module, dtype, autocast
        self._params = [param for param in module.parameters() if param.requires_grad]

    def forward(self, x: Tensor, *, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """The module's own forward on `(T, in)`, plus a residual."""
        with torch.no_grad(), self._surroundings():
            y = self._module(x.unsqueeze(0)).squeeze(0)
        if residual is not None:
            y = residual + y
        return y if out is None else out.copy_(y)

    def backward(self, x: Tensor, grad: Tensor, sums: WeightSums, *, add_to: Tensor | None = None) -> Tensor:
        """As `LinearMap.backward`."""
        x = x.detach().requires_grad_()
        with torch.enable_grad(), self._surroundings():
            y = self._module(x.unsqueeze(0)).squeeze(0)
        with without_hooks(self._params):
            grads = torch.autograd.grad(y, [x, *self._params], grad.to(y.dtype), allow_unused=True)
        for param, param_grad in zip(self._params, grads[1:], strict=True):
            sums.add(param, param_grad)
        return grads[0] if add_to is None else add_to.add_(grads[0])

    def _surroundings(self) -> AbstractContextManager:
        if self._autocast is None:
            return nullcontext()
        device, dtype = self._autocast
        # Its cache is off: a cast made without grad must not be met with grad.
        return torch.autocast(device, dtype, cache_enabled=False)


TokenMap = LinearMap | ModuleMap


def token_map(module: nn.Module, dtype: torch.dtype, autocast: tuple[str, torch.dtype] | None) -> TokenMap:
    """A linear layer, adapted by LoRA or not, as a `LinearMap`; anything else as a `ModuleMap`."""
    parts = linear_parts(module)
    if parts is None:
        return ModuleMap(module, dtype, autocast)
    return LinearMap(parts.weight, parts.bias, parts.lora, dtype)


class JointMap:
    """Rows of several linear maps of one input, as one product: narrow products would each read it again."""

    def __init__(self, pieces: Sequence[tuple[LinearMap, slice]]) -> None:
        self._pieces = list(pieces)
        self._weight = torch.cat([linear.weight[rows] for linear, rows in pieces])
        biases = [linear.bias for linear, _ in pieces]
        self._bias = None
        if any(bias is not None for bias in biases):
            self._bias = torch.cat(
                [
                    linear.weight.new_zeros(rows.stop - rows.start)
                    if linear.bias is None
                    else linear.bias[rows]
                    for linear, rows in pieces
                ]
            )

    def forward(self, x: Tensor, out: Tensor) -> None:
        """All pieces side by side, `(T, sum of rows)`."""
        torch.mm(x, self._weight.t(), out=out)
        if self._bias is not None:
            out += self._bias
        start = 0
        for linear, rows in self._pieces:
            stop = start + rows.stop - rows.start
            if linear.lora is not None:
                a, b, scale = linear.lora
                out[:, start:stop] += (x @ a.t()) @ (b[rows].t() * scale)
            start = stop

    def input_grad(self, grad: Tensor, *, first: int = 0, add_to: Tensor | None = None) -> Tensor:
        """Gradient of the input from that of the outputs `first, first + 1, ...`: whole pieces."""
        weight = self._weight[first : first + grad.shape[1]]
        total = grad @ weight if add_to is None else add_to.addmm_(grad, weight)
        start = -first
        for linear, rows in self._pieces:
            stop = start + rows.stop - rows.start
            if linear.lora is not None and start >= 0 and stop <= grad.shape[1]:
                a, b, scale = linear.lora
                total.addmm_(grad[:, start:stop] @ b[rows], a, alpha=scale)
            start = stop
        return total

    def add_weight_grads(self, x: Tensor, grads: Sequence[Tensor], sums: WeightSums) -> None:
        """Add a tile's weight gradients, from the gradient of each piece."""
        for (linear, rows), grad in zip(self._pieces, grads, strict=True):
            linear.add_weight_grads(x, grad, sums, rows)
