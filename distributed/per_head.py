"""What each head has of its own beside its queries: a sink, an ALiBi slope.

A sink is one more logit in the denominator of a head's softmax, whose value is zero (gpt-oss, OpenAI 2025;
transformers calls it `s_aux`). No kernel need know of it: with the log-sum-exp `lse` of the scores alone,
`lse' = log(exp(lse) + exp(sink))` and `out' = out * exp(lse - lse')`. A kernel's backward then takes `out'`
and `lse'` as they are: it rebuilds probabilities from `lse'`, and the sink's zero value leaves
`rowsum(grad_out * out')` right.

An ALiBi slope (arXiv 2108.12409) lowers a score by `slope * (i - j)`, the tokens between query i and key j of
a document. It stands inside the softmax: a kernel has it or refuses it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**24
"""Of the output whose products are summed at once: 64 MiB in float32, of which there are two or three."""


@dataclass(frozen=True, eq=False)
class PerHead:
    """Numbers that the heads of an attention have one each; None where they have none.

    Raises:
        ValueError: Tensors that are not one number a head, or slopes that ask for a gradient.
    """

    sinks: Tensor | None = None
    """One more logit of each head's softmax, `(N,)`; see `sink_gradient`."""
    alibi_slopes: Tensor | None = None
    """`slope * (i - j)` is taken from each score, after its scale and softcap, `(N,)`; constants."""

    def __post_init__(self) -> None:
        for name, value in self._given():
            if value.dim() != 1:
                raise ValueError(f"{name} are {tuple(value.shape)}; they must be (N,), one a query head.")
        if len({len(value) for _, value in self._given()}) > 1:
            raise ValueError(
                f"{len(self.sinks)} sinks, but {len(self.alibi_slopes)} ALiBi slopes; both must be (N,)."
            )
        if self.alibi_slopes is not None and self.alibi_slopes.requires_grad:
            raise ValueError(
                "alibi_slopes ask for a gradient, which attention does not give; they are constants: pass "
                "alibi_slopes.detach()."
            )

    def select(self, heads: slice) -> PerHead:
        """Those of some query heads: of a rank, or of a group of heads."""
        return PerHead(**{name: value[heads] for name, value in self._given()})

    def check(self, num_heads: int) -> None:
        """Refuse numbers that are not those of these heads.

        Raises:
            ValueError: Another count.
        """
        for name, value in self._given():
            if len(value) != num_heads:
                raise ValueError(
                    f"{name} are of {len(value)} heads, the queries of {num_heads}; pass those of the same "
                    "heads (PerHead.select)."
                )

    def _given(self) -> list[tuple[str, Tensor]]:
        fields = (("sinks", self.sinks), ("alibi_slopes", self.alibi_slopes))
        return [(name, value) for name, value in fields if value is not None]


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Turn output and log-sum-exp of the scores alone into those with sinks, in place.

    Args:
        out: A kernel's output, `(B, N, L, H)`.
        lse: Its log-sum-exp, in its own layout.
        sinks: `(N,)`.
    """
    rows = _by_row(lse, out)
    sink = sinks.to(rows.dtype).unsqueeze(-1)
    # exp(lse - lse') is a sigmoid, which loses no digits where the two are nearly equal.
    out.mul_(torch.sigmoid(rows - sink).unsqueeze(-1))
    rows.copy_(torch.logaddexp(rows, sink))


@torch.no_grad()
def sink_gradient(
    grad_out: Tensor,  # (B, N, L, H)
    out: Tensor,  # (B, N, L, H)
    lse: Tensor,
    sinks: Tensor,  # (N,)
) -> Tensor:
    """Gradient of sinks, `-sum over rows of exp(sink - lse) * rowsum(grad_out * out)`.

    Args:
        grad_out: Gradient of the output.
        out: The output that `attention_forward` gave for these sinks.
        lse: The log-sum-exp that it gave.
        sinks: The sinks that it was given.

    Returns:
        `(N,)` in the log-sum-exp's dtype: float32, or float64 for float64, whatever the sinks are.
    """
    rows = _by_row(lse, out)
    sink = sinks.to(rows.dtype).unsqueeze(-1)
    total = torch.zeros(len(sinks), dtype=rows.dtype, device=out.device)
    batch, num_heads, length, width = out.shape
    # Products of a few tokens at a time: whole ones would be a float32 copy of the output.
    tokens = max(1, CHUNK_ELEMENTS // max(1, batch * num_heads * width))
    for start in range(0, length, tokens):
        part = slice(start, start + tokens)
        delta = (grad_out[:, :, part].to(rows.dtype) * out[:, :, part]).sum(-1)
        total -= (delta * torch.exp(sink - rows[:, :, part])).sum((0, 2))
    return total


def _by_row(lse: Tensor, out: Tensor) -> Tensor:
    """A view `(B, N, L)` of any kernel's log-sum-exp: `(N, L)` packed, `(B, N, L, 1)` cuDNN's, or padded."""
    rows = lse.unsqueeze(0) if lse.dim() == 2 else lse.squeeze(-1) if lse.dim() == 4 else lse
    return rows[:, :, : out.shape[2]]
