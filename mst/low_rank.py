"""What a linear layer is made of: a weight, a bias, and at most one low-rank adapter."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class LinearParts(NamedTuple):
    """`x @ (weight + scale * B @ A).T + bias`, with `lora = (A, B, scale)`.

    The weight is the parameter that gets the gradient; `weight_values` has its values.
    """

    weight: Tensor
    bias: Tensor | None
    lora: tuple[Tensor, Tensor, float] | None = None


def is_quantized(weight: Tensor) -> bool:
    """Whether a parameter's values are kept in 8 bits beside it (`apollo/quantized.py`)."""
    return hasattr(weight, "quantized")


def weight_values(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in the dtype to compute in: itself, or a copy for as long as it is needed."""
    return weight.quantized.dequantize(dtype=dtype) if is_quantized(weight) else weight.to(dtype)


def linear_parts(module: nn.Module) -> LinearParts | None:
    """The parts of a linear layer, adapted by peft's LoRA or not; None if it is anything else.

    Anything else: a layer quantised by others, several adapters at once, DoRA, dropout before the adapter, an
    adapter with a bias. Such a module's own forward is to be run.
    """
    if _is_linear(module):
        return LinearParts(module.weight, module.bias)
    if not type(module).__module__.startswith("peft.tuners.lora"):
        return None
    base = module.get_base_layer()
    if not _is_linear(base):
        return None
    off = module.disable_adapters or module.merged
    active = [] if off else [name for name in module.active_adapters if name in module.lora_A]
    if not active:
        return LinearParts(base.weight, base.bias)
    name = active[0]
    dropout = module.lora_dropout[name]
    a, b = module.lora_A[name], module.lora_B[name]
    special = getattr(module, "lora_variant", {}) or {}
    plain = type(a) is nn.Linear and type(b) is nn.Linear and a.bias is None and b.bias is None
    if len(active) > 1 or name in special or not plain:
        return None
    if not isinstance(dropout, nn.Identity) and not (isinstance(dropout, nn.Dropout) and dropout.p == 0.0):
        return None
    return LinearParts(base.weight, base.bias, (a.weight, b.weight, module.scaling[name]))


def _is_linear(module: nn.Module) -> bool:
    """Plain or in 8 bits. An adapter's layer shows the weight of the one inside, which is not its own."""
    return type(module) is nn.Linear or is_quantized(vars(module)["_parameters"].get("weight"))


def as_linear_head(head: nn.Module) -> LinearParts | None:
    """The parts of an LM head as cut cross-entropy takes them; None if it is no such layer.

    Nor is one in 8 bits, nor an adapted head whose weights ZeRO-3 has given to other ranks: nobody gathers an
    adapter's.
    """
    parts = linear_parts(head)
    if parts is not None and is_quantized(parts.weight):
        return None
    if parts is None or parts.lora is None:
        return parts
    if any(hasattr(param, "ds_id") for param in head.parameters()):
        return None
    a, b, scale = parts.lora
    # peft keeps adapters of a bf16 model in float32; their gradients stay so.
    return parts._replace(lora=(a.to(parts.weight.dtype), b.to(parts.weight.dtype), scale))
