"""What a head is made of, where that is a linear layer and at most one low-rank adapter."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class LinearHead(NamedTuple):
    """`hidden @ (weight + scale * B @ A).T + bias`, with `lora = (A, B, scale)`."""

    weight: Tensor
    bias: Tensor | None
    lora: tuple[Tensor, Tensor, float] | None = None


def as_linear_head(head: nn.Module) -> LinearHead | None:
    """The parts of a linear head, adapted by peft's LoRA or not; None if it is anything else.

    Anything else: a quantised layer, several adapters at once, DoRA, dropout before the adapter, an adapter
    with a bias, weights that ZeRO-3 has given to other ranks. Such a head's own forward is run.
    """
    if type(head) is nn.Linear:
        return LinearHead(head.weight, head.bias)
    if not type(head).__module__.startswith("peft.tuners.lora"):
        return None
    base = head.get_base_layer()
    if type(base) is not nn.Linear or any(hasattr(p, "ds_id") for p in head.parameters()):
        return None
    off = head.disable_adapters or head.merged
    active = [] if off else [name for name in head.active_adapters if name in head.lora_A]
    if not active:
        return LinearHead(base.weight, base.bias)
    name = active[0]
    dropout = head.lora_dropout[name]
    a, b = head.lora_A[name], head.lora_B[name]
    special = getattr(head, "lora_variant", {}) or {}
    plain = type(a) is nn.Linear and type(b) is nn.Linear and a.bias is None and b.bias is None
    if len(active) > 1 or name in special or not plain:
        return None
    if not isinstance(dropout, nn.Identity) and not (isinstance(dropout, nn.Dropout) and dropout.p == 0.0):
        return None
    # peft keeps adapters of a bf16 model in float32; their gradients stay so.
    dtype = base.weight.dtype
    return LinearHead(base.weight, base.bias, (a.weight.to(dtype), b.weight.to(dtype), head.scaling[name]))
