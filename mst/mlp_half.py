"""The second half of a decoder layer, `h + post_norm(mlp(norm(h)))`, one tile of tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.gated_activation import gated_activation, gated_activation_backward_
from .linear_map import LinearMap, ModuleMap
from .token_norm import TokenNorm
from .weight_sums import WeightSums


class GatedMLP:
    """`down(act(gate(x)) * up(x))` of linear maps; gate and up may be one map, halves of its output."""

    def __init__(self, gate_up: list[LinearMap], down: LinearMap, activation: str) -> None:
        self._gate_up, self._down, self._activation = gate_up, down, activation

    def forward(self, x: Tensor, *, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """The MLP of `(T, D)`, plus a residual."""
        gate, up = self._gate_and_up(x)
        product = gated_activation(gate, up, self._activation, out=gate)
        return self._down.forward(product, residual=residual, out=out)

    def output(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The output, and what `backward` needs of the way to it."""
        gate, up = self._gate_and_up(x)
        return self._down.forward(gated_activation(gate, up, self._activation)), (gate, up)

    def backward(
        self, x: Tensor, grad: Tensor, sums: WeightSums, way: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Gradient of `x`. The down projection's output is not needed, so it is not computed again."""
        gate, up = self._gate_and_up(x) if way is None else way
        product = self._down.input_grad(grad)
        # One pass: the gradient of the product becomes the product, gate and up become their gradients.
        gated_activation_backward_(gate, up, product, self._activation, product=product)
        self._down.add_weight_grads(product, grad, sums)
        del product
        if len(self._gate_up) == 1:
            both = gate.as_strided((gate.shape[0], 2 * gate.shape[1]), gate.stride())
            return self._gate_up[0].backward(x, both, sums)
        total = self._gate_up[0].backward(x, gate, sums)
        return self._gate_up[1].backward(x, up, sums, add_to=total)

    def _gate_and_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if len(self._gate_up) == 1:
            gate, up = self._gate_up[0].forward(x).chunk(2, dim=-1)
            return gate, up
        return self._gate_up[0].forward(x), self._gate_up[1].forward(x)


class ModuleMLP:
    """Any token-wise MLP, by autograd: its forward is run once more in backward."""

    def __init__(self, module_map: ModuleMap) -> None:
        self._map = module_map

    def forward(self, x: Tensor, *, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """As `GatedMLP.forward`."""
        return self._map.forward(x, residual=residual, out=out)

    def output(self, x: Tensor) -> tuple[Tensor, None]:
        """As `GatedMLP.output`."""
        return self._map.forward(x), None

    def backward(self, x: Tensor, grad: Tensor, sums: WeightSums, way: None = None) -> Tensor:
        """As `GatedMLP.backward`."""
        return self._map.backward(x, grad, sums)


class MLPHalf:
    """Norm, MLP, the norm behind it where the family has one, and the residual."""

    INTERMEDIATES = 3
    """Tensors of `(T, F)` alive at once: gate, up, and their product or its gradient."""

    def __init__(
        self,
        norm: TokenNorm | None,
        mlp: GatedMLP | ModuleMLP,
        post_norm: TokenNorm | None,
        dtype: torch.dtype,
    ) -> None:
        self._norm, self._mlp, self._post_norm, self._dtype = norm, mlp, post_norm, dtype

    def forward(self, hidden: Tensor, out: Tensor) -> None:
        """A tile `(T, D)`, into `out`."""
        x = hidden.to(self._dtype) if self._norm is None else self._norm.forward(hidden)
        if self._post_norm is None:
            self._mlp.forward(x, residual=hidden, out=out)
        else:
            y = self._post_norm.forward(self._mlp.forward(x), dtype=hidden.dtype)
            out.copy_(y.add_(hidden))

    def backward(self, hidden: Tensor, grad: Tensor, out: Tensor, sums: WeightSums) -> None:
        """Gradient of a tile, from its output's, into `out` (which may be `grad`): forward and backward."""
        x = hidden.to(self._dtype) if self._norm is None else self._norm.forward(hidden)
        way, mlp_grad = None, grad
        if self._post_norm is not None:
            y, way = self._mlp.output(x)
            mlp_grad = self._post_norm.backward(y, mlp_grad, sums)
            del y
        x_grad = self._mlp.backward(x, mlp_grad.to(self._dtype), sums, way)
        if self._norm is None:
            out.copy_(grad + x_grad)
        else:
            self._norm.backward(hidden, x_grad, sums, residual_grad=grad, out=out)
