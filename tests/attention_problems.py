"""Problems of attention on one device, and their solution by a mask and a softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longseq.distributed.attention import attention_backward, attention_forward
from longseq.distributed.attention_kernels import AttentionOptions
from longseq.distributed.per_head import PerHead, sink_gradient

LENGTH, SCALE = 37, 0.3
NAMES = ("out", "d_query", "d_key", "d_value")
PROBLEMS: dict[str, dict[str, Any]] = {
    "causal": {},
    "rows of a batch": {"rows": 3},
    "one key head": {"heads": (4, 1)},
    "no groups": {"heads": (3, 3), "rows": 2},
    "one token": {"length": 1},
    "no token": {"length": 0, "rows": 2},
    "documents": {"documents": (0, 13, 14, 37)},
    "empty documents": {"documents": (0, 0, 20, 20, 37, 37)},
    "window": {"window": 5, "rows": 2},
    "window of one": {"window": 1},
    "window as long as the sequence": {"window": 37},
    "window over documents": {"window": 8, "documents": (0, 13, 14, 37)},
    "softcap": {"softcap": 0.7},
    "all": {"softcap": 0.7, "window": 6, "documents": (0, 20, 37), "heads": (6, 2)},
}
PLAIN = [name for name, problem in PROBLEMS.items() if not {"window", "softcap"} & set(problem)]


def masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float = SCALE,
    window: int | None = None,
    softcap: float | None = None,
    documents: tuple[int, ...] | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention by a mask and a softmax, and the log-sum-exp of its scores, `(B, N, L)`.

    A sink is one more column of the scores, without a value.
    """
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    token = torch.arange(length, device=query.device)
    starts = torch.tensor((documents or (0, length))[1:-1], dtype=torch.long, device=query.device)
    document = torch.bucketize(token, starts, right=True)
    back = token[:, None] - token
    seen = (back >= 0) & (document[:, None] == document) & (back < (window or length))
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores - slopes.to(scores.dtype)[:, None, None] * back
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), dim=-1)
    return scores.softmax(-1)[..., :length] @ value, scores.logsumexp(-1)


def inputs(
    heads: tuple[int, int] = (4, 2), length: int = LENGTH, rows: int = 1, width: int = 16, **where: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values: columns of one buffer, as a projection makes them."""
    num_heads, num_kv_heads = heads
    draw = torch.Generator().manual_seed(length)
    columns = [count * width for count in (num_heads, num_kv_heads, num_kv_heads)]
    buffer = 2 * torch.randn(rows, length, sum(columns), generator=draw, dtype=torch.float64)
    parts = buffer.to(**{"dtype": torch.float64, **where}).split(columns, dim=-1)
    return tuple(part.unflatten(-1, (-1, width)).transpose(1, 2) for part in parts)


def upstream_of(query: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(query.shape, generator=draw, dtype=torch.float64).to(query)


def per_head_of(num_heads: int, *kinds: str, **where: Any) -> PerHead:
    """Sinks near the scores' log-sum-exp, and slopes as ALiBi has them: exact in float32."""
    draw = torch.Generator().manual_seed(2)
    sinks = 2 + torch.randn(num_heads, generator=draw, dtype=torch.float64)
    numbers = {"sinks": sinks.to(**where), "alibi_slopes": 2.0 ** -torch.arange(num_heads).to(**where)}
    return PerHead(**{kind: numbers[kind] for kind in kinds})


def problem(name: str, kernel: str, **where: Any) -> tuple[tuple[Tensor, ...], AttentionOptions, dict]:
    """Inputs, options and documents of one of `PROBLEMS`."""
    fields = dict(PROBLEMS[name])
    rules = {key: fields.pop(key) for key in ("window", "softcap", "documents") if key in fields}
    options = AttentionOptions(SCALE, rules.get("window"), rules.get("softcap"), kernel)
    return inputs(**fields, **where), options, rules


def ours(
    tensors: tuple[Tensor, ...],
    options: AttentionOptions,
    documents: Any = None,
    per_head: PerHead | None = None,
) -> dict[str, Tensor]:
    """Output and gradients; what is kept between the two is copied, as to the host and back."""
    offsets = torch.tensor(documents, dtype=torch.int32) if isinstance(documents, tuple) else documents
    out, lse = attention_forward(*tensors, options, offsets, per_head)
    kept, lse, upstream = out.contiguous(), lse.cpu().to(lse.device), upstream_of(tensors[0])
    grads = attention_backward(upstream, *tensors, kept, lse, options, offsets, per_head)
    found = dict(zip(NAMES, (out, *grads), strict=True))
    if per_head is not None and per_head.sinks is not None:
        found["d_sinks"] = sink_gradient(upstream, kept, lse, per_head.sinks)
    return found


def plain(tensors: tuple[Tensor, ...], per_head: PerHead | None = None, **rules: Any) -> dict[str, Tensor]:
    """The same by `masked` and autograd."""
    per_head = per_head or PerHead()
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    sinks = None if per_head.sinks is None else per_head.sinks.clone().requires_grad_()
    out, _ = masked(*leaves, **rules, sinks=sinks, slopes=per_head.alibi_slopes)
    names = NAMES[1:] if sinks is None else (*NAMES[1:], "d_sinks")
    grads = torch.autograd.grad(out, leaves if sinks is None else [*leaves, sinks], upstream_of(out))
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, value in got.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-11, atol=1e-12, msg=name)
