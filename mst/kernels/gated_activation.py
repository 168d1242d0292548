"""`act(gate) * up` of a gated MLP, and its gradient in the place of what it was made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dispatch import check_rows, takes_triton, wide

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")

_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_TRANSFORMERS_CLASSES = {
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}


def activation_name(module_or_name: nn.Module | str) -> str | None:
    """Which of ACTIVATIONS this is, in Hugging Face's names or as a module; None if it is none of them."""
    if isinstance(module_or_name, str):
        return _NAMES.get(module_or_name)
    kind = type(module_or_name)
    if kind is nn.SiLU:
        return "silu"
    if kind is nn.GELU:
        return "gelu_tanh" if module_or_name.approximate == "tanh" else "gelu"
    # By name, so that transformers need not be imported; only its own, since a subclass may do anything.
    return _TRANSFORMERS_CLASSES.get(kind.__name__) if kind.__module__ == "transformers.activations" else None


@torch.no_grad()
def gated_activation(gate: Tensor, up: Tensor, activation: str, *, out: Tensor | None = None) -> Tensor:
    """`activation(gate) * up`, computed wide and rounded once.

    Args:
        gate, up: `(rows, F)`, rows contiguous and any distance apart; may be halves of one buffer.
        activation: One of ACTIVATIONS.
        out: Where the product goes, of the same shape; may be `gate` or `up` itself.

    Returns:
        `out`, or a new contiguous tensor of gate's dtype.

    Raises:
        ValueError: A shape, a stride or the activation is none of these.
    """
    if out is None:
        out = gate.new_empty(gate.shape)
    _check("gated_activation", activation, gate, up=up, out=out)
    if takes_triton(gate, up, out):
        from . import gated_activation_triton

        gated_activation_triton.forward(gate, up, activation, out)
        return out
    return out.copy_(_activate(wide(gate), activation) * wide(up))


@torch.no_grad()
def gated_activation_backward_(
    gate: Tensor, up: Tensor, grad_out: Tensor, activation: str, *, product: Tensor | None = None
) -> None:
    """Overwrite `gate` and `up` by their gradients, given that of `gated_activation(gate, up)`.

    Args:
        gate, up, activation: As `gated_activation` had them.
        grad_out: Gradient of the product, of the same shape.
        product: If given, the product is written to it, for the gradient of the projection that follows; may
            be `grad_out` itself.

    Raises:
        ValueError: A shape, a stride or the activation is none of these.
    """
    _check("gated_activation_backward_", activation, gate, up=up, grad_out=grad_out, product=product)
    if takes_triton(gate, up, grad_out, product):
        from . import gated_activation_triton

        gated_activation_triton.backward_(gate, up, grad_out, activation, product)
        return
    wide_gate, wide_up, gradient = wide(gate), wide(up), wide(grad_out)
    activated = _activate(wide_gate, activation)
    # All of them before the first is written: the wide tensors may be the given ones.
    d_gate = _activate_backward(gradient * wide_up, wide_gate, activation)
    d_up, wide_product = gradient * activated, activated * wide_up
    gate.copy_(d_gate)
    up.copy_(d_up)
    if product is not None:
        product.copy_(wide_product)


def _check(function: str, activation: str, gate: Tensor, **others: Tensor | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{function}: activation={activation!r} must be one of {', '.join(ACTIVATIONS)}; "
            "activation_name() says which of them a module is."
        )
    if gate.dim() != 2:
        raise ValueError(f"{function}: gate of shape {tuple(gate.shape)} must be (rows, F).")
    check_rows(function, gate.shape, gate=gate, **others)


def _activate(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activate_backward(gradient: Tensor, gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(gradient, gate)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(gradient, gate, approximate=approximate)
