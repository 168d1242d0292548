"""Heads of real sizes for tests on a GPU, and what eager makes of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from longseq.cce import linear_cross_entropy

LORA_SCALE = 2.0


@dataclass(frozen=True)
class Shape:
    """A head and its tokens."""

    num_tokens: int
    vocab_size: int
    width: int
    bias: bool = False
    rank: int = 0
    options: dict = field(default_factory=dict)


def make(
    shape: Shape, dtype: torch.dtype = torch.bfloat16, device: str = "cuda"
) -> tuple[dict[str, Tensor], Tensor]:
    """Hidden states that know something of their labels, and words of which later ones are rarer."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator, device=device) * scale

    num_tokens, vocab_size, width = shape.num_tokens, shape.vocab_size, shape.width
    share = torch.rand(num_tokens, generator=generator, device=device)
    labels = (share**3 * vocab_size).long()
    weight = random(vocab_size, width, scale=2.0 / width**0.5)
    hidden = random(num_tokens, width) + 3.0 * weight[labels]
    rarity = torch.log1p(torch.arange(vocab_size, device=device) * 50 / vocab_size)
    hidden[:, 0], weight[:, 0] = 8.0, rarity * (-2.0 / 8.0)
    labels[torch.rand(num_tokens, generator=generator, device=device) < 0.1] = -100
    parts = {"hidden": hidden, "weight": weight}
    if shape.bias:
        parts["bias"] = random(vocab_size)
    if shape.rank:
        parts["lora_a"] = random(shape.rank, width, scale=1.0 / width**0.5)
        parts["lora_b"] = random(vocab_size, shape.rank, scale=0.1)
    return {name: part.to(dtype) for name, part in parts.items()}, labels


def leaves(parts: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Copies that require a gradient."""
    return {n: p.detach().to(dtype or p.dtype, copy=True).requires_grad_() for n, p in parts.items()}


def plain_losses(parts: dict[str, Tensor], labels: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Eager: each token's loss, with the logits before and after what is done in float32."""
    raw = F.linear(parts["hidden"], parts["weight"], parts.get("bias"))
    if shape.rank:
        raw = raw + LORA_SCALE * F.linear(F.linear(parts["hidden"], parts["lora_a"]), parts["lora_b"])
    logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
    if shape.options.get("softcap"):
        logits = shape.options["softcap"] * torch.tanh(logits / shape.options["softcap"])
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=-100), logits, raw


def our_loss(parts: dict[str, Tensor], labels: Tensor, shape: Shape, **options: object) -> Tensor:
    """The library's answer."""
    lora = (parts["lora_a"], parts["lora_b"], LORA_SCALE) if shape.rank else None
    return linear_cross_entropy(
        parts["hidden"],
        parts["weight"],
        labels,
        bias=parts.get("bias"),
        lora=lora,
        **shape.options,
        **options,
    )


def gradients(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those that there are."""
    return {name: part.grad for name, part in parts.items() if part.grad is not None}
