"""The Llama that `optimizer_pretraining.py` trains: small enough to read, and compiled layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes; its vocabulary is the corpus's."""

    width: int
    inner: int
    heads: int
    layers: int


SHAPES = {"60m": Shape(512, 1376, 8, 8), "tiny": Shape(48, 80, 2, 2)}


class Block(nn.Module):
    """A decoder layer: attention with rotary positions, then SwiGLU, each behind an RMSNorm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.attention_norm = nn.RMSNorm(shape.width, eps=1e-6)
        self.mlp_norm = nn.RMSNorm(shape.width, eps=1e-6)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(shape.width, shape.width, bias=False))
        self.gate_proj = nn.Linear(shape.width, shape.inner, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.inner, bias=False)
        self.down_proj = nn.Linear(shape.inner, shape.width, bias=False)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states `(B, S, width)`."""
        normed = self.attention_norm(hidden)
        query, key, value = (
            proj(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (rotate(states, cos, sin).type_as(value) for states in (query, key))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.o_proj(mixed.transpose(1, 2).flatten(2))
        normed = self.mlp_norm(hidden)
        return hidden + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))


class Llama(nn.Module):
    """The papers' Llama: head and embeddings are not tied."""

    def __init__(self, shape: Shape, vocab_size: int, num_tokens: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, shape.width)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=1e-6)
        self.lm_head = nn.Linear(shape.width, vocab_size, bias=False)
        for name, param in self.named_parameters():
            if "norm" not in name:
                nn.init.normal_(param, std=0.02)
        half = shape.width // shape.heads // 2
        angles = torch.arange(num_tokens)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        # Not buffers: a bfloat16 model keeps them in float32.
        self.turns = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states `(B, S, width)` of token ids `(B, S)`, ready for the head."""
        hidden = self.embed_tokens(ids)
        for layer in self.layers:
            hidden = layer(hidden, *self.turns)
        return self.norm(hidden)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of `(B, heads, S, size)`, in float32."""
    first, second = states.float().chunk(2, -1)
    return states.float() * cos + torch.cat((-second, first), -1) * sin


def head_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Mean NLL; compiled, the logits stay in bfloat16."""
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1).float(), labels.flatten())
