"""flash-attn 2 and 3 as far as longseq calls them, in plain PyTorch on the CPU and in any dtype.

What must be proved without a GPU is what they are told: layouts, packed documents, which tokens a window
leaves, scale, softcap, slopes, and that a backward uses the output and the log-sum-exp that it is given.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor


class Rules(NamedTuple):
    """What a call asks for, beside its tensors."""

    scale: float
    causal: bool
    left: int
    right: int
    softcap: float
    slopes: Tensor | None = None


def forward(
    query: Tensor, key: Tensor, value: Tensor, bounds: list[int], rules: Rules
) -> tuple[Tensor, Tensor]:
    """`(tokens, heads, H)` -> output and log-sum-exp `(heads, tokens)`."""
    rules = without_idle_window(bounds, rules)
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0])
    for part in documents(bounds):
        scores, _ = scores_of(query[part], key[part], rules)
        lse[:, part] = scores.logsumexp(-1)
        values = value[part].repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        out[part] = torch.einsum("nij,jnh->inh", scores.softmax(-1), values)
    return out, lse


def backward(
    tensors: tuple[Tensor, ...], lse: Tensor, grads: tuple[Tensor, ...], bounds: list[int], rules: Rules
) -> None:
    """Fill the three gradients from `grad_out, query, key, value, out` and the log-sum-exp."""
    rules = without_idle_window(bounds, rules)
    for part in documents(bounds):
        grad_out, query, key, value, out = (tensor[part] for tensor in tensors)
        groups = query.shape[1] // key.shape[1]
        scores, capped = scores_of(query, key, rules)
        weights = torch.exp(scores - lse[:, part].unsqueeze(-1))
        delta = (grad_out * out).sum(-1).T.unsqueeze(-1)
        values, keys = (tensor.repeat_interleave(groups, dim=1) for tensor in (value, key))
        grad_scores = weights * (torch.einsum("inh,jnh->nij", grad_out, values) - delta) * rules.scale
        if rules.softcap:
            grad_scores = grad_scores * (1 - (capped / rules.softcap) ** 2)
        found = (
            torch.einsum("nij,jnh->inh", grad_scores, keys),
            torch.einsum("nij,inh->jnh", grad_scores, query).unflatten(1, (-1, groups)).sum(2),
            torch.einsum("nij,inh->jnh", weights, grad_out).unflatten(1, (-1, groups)).sum(2),
        )
        for grad, of_part in zip(grads, found, strict=True):
            grad[part] = of_part


def without_idle_window(bounds: list[int], rules: Rules) -> Rules:
    """A window of all tokens of the longest document is none for any: so both packages take it."""
    longest = max(stop - start for start, stop in pairwise(bounds))
    return rules._replace(left=-1) if rules.left >= longest else rules


def documents(bounds: list[int]) -> Iterator[slice]:
    """The tokens of each document."""
    for start, stop in pairwise(bounds):
        assert start < stop, "an empty document"
        yield slice(start, stop)


def scores_of(query: Tensor, key: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """Scores `(heads, i, j)`, hidden ones -inf, and what they were before slopes."""
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = torch.einsum("inh,jnh->nij", query, keys) * rules.scale
    if rules.softcap:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    length, left, right = len(query), rules.left, 0 if rules.causal else rules.right
    row, column = torch.arange(length)[:, None], torch.arange(length)
    biased = scores
    if rules.slopes is not None:
        # What is causal without a window counts from the first key, not from the query.
        distance = column if left < 0 and right == 0 else -(row - column).abs()
        biased = scores + rules.slopes.to(scores.dtype)[:, None, None] * distance
    hidden = torch.zeros(length, length, dtype=torch.bool)
    if left >= 0:
        hidden |= column < row - left
    if right >= 0:
        hidden |= column > row + right
    return biased.masked_fill(hidden, -torch.inf), scores


def packed(tensor: Tensor) -> Tensor:
    """`(B, L, heads, H)` -> `(B x L, heads, H)`, after what the packages check of every tensor."""
    assert tensor.stride(-1) == 1, "rows in one piece"
    return tensor.flatten(0, 1) if tensor.dim() == 4 else tensor


def bounds_of(query: Tensor, offsets: Tensor | None, longest: int | None) -> list[int]:
    """The first token of each document and the end of the last, of packed rows or of a batch."""
    if offsets is None:
        assert query.dim() == 4
        return list(range(0, query.shape[0] * query.shape[1] + 1, query.shape[1]))
    assert query.dim() == 3
    assert offsets.dtype == torch.int32
    bounds = offsets.tolist()
    assert longest == max(stop - start for start, stop in pairwise(bounds))
    return bounds


def run_forward(
    tensors: tuple[Tensor, ...], offsets: Tensor | None, longest: int | None, rules: Rules
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in the layouts that both packages have: `(B, N, L)`, or `(N, tokens)` packed."""
    query = tensors[0]
    flat = [packed(tensor) for tensor in tensors]
    out, lse = forward(*flat, bounds_of(query, offsets, longest), rules)
    if offsets is None:
        lse = lse.unflatten(1, query.shape[:2]).transpose(0, 1).contiguous()
    return out.view(query.shape), lse


def run_backward(
    tensors: tuple[Tensor, ...],
    lse: Tensor,
    grads: tuple[Tensor, ...],
    offsets: Tensor | None,
    longest: int | None,
    rules: Rules,
) -> None:
    """Fill the gradients, as both packages do."""
    query = tensors[1]
    rows = lse if offsets is not None else lse.transpose(0, 1).flatten(1)
    found = [torch.empty_like(packed(grad)) for grad in grads]
    backward(tuple(map(packed, tensors)), rows, tuple(found), bounds_of(query, offsets, longest), rules)
    for grad, values in zip(grads, found, strict=True):
        grad.copy_(values.view(grad.shape))


def flash_attn_2() -> dict[str, ModuleType]:
    """Modules for `sys.modules`, with the functions of flash-attn 2.7.1 to 2.8.3."""

    def rules(scale, causal, left, right, softcap, slopes) -> Rules:
        assert slopes is None or (slopes.dtype == torch.float32 and slopes.is_contiguous())
        return Rules(scale, causal, left, right, softcap, slopes)

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        assert dropout_p == 0.0
        assert not return_softmax
        asked = rules(softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes)
        return *run_forward((q, k, v), None, None, asked), None, None

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None,
    ):  # fmt: skip
        assert dropout_p == 0.0
        assert (cu_seqlens_k.data_ptr(), max_seqlen_k) == (cu_seqlens_q.data_ptr(), max_seqlen_q)
        asked = rules(softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes)
        return *run_forward((q, k, v), cu_seqlens_q, max_seqlen_q, asked), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert dropout_p == 0.0
        asked = rules(softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes)
        run_backward((dout, q, k, v, out), softmax_lse, (dq, dk, dv), None, None, asked)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        deterministic, rng_state=None,
    ):  # fmt: skip
        assert dropout_p == 0.0
        assert (cu_seqlens_k.data_ptr(), max_seqlen_k) == (cu_seqlens_q.data_ptr(), max_seqlen_q)
        asked = rules(softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes)
        tensors = (dout, q, k, v, out)
        run_backward(tensors, softmax_lse, (dq, dk, dv), cu_seqlens_q, max_seqlen_q, asked)

    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.flash_attn_interface = interface
    for function in (
        _flash_attn_forward, _flash_attn_varlen_forward, _flash_attn_backward, _flash_attn_varlen_backward,
    ):  # fmt: skip
        setattr(interface, function.__name__, function)
    return {"flash_attn": package, "flash_attn.flash_attn_interface": interface}


def define_flash_attn_3() -> torch.library.Library:
    """flash-attn-3's operators, with the arguments of the package of February 2026, for the CPU."""
    longest = "int? max_seqlen_q=None, int? max_seqlen_k=None"
    mask = (
        "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1"
    )
    library = torch.library.Library("flash_attn_3", "DEF")
    library.define(
        "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, Tensor? q_v=None, "
        "Tensor? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
        "Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? seqused_k=None, "
        f"{longest}, Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, "
        "Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, "
        f"Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, {mask}, "
        "int attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False, "
        "Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    )
    library.define(
        "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
        "Tensor(dq!)? dq=None, Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, "
        f"Tensor? cu_seqlens_k=None, Tensor? seqused_q=None, Tensor? seqused_k=None, {longest}, {mask}, "
        "float softcap=0.0, bool deterministic=False, int sm_margin=0) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    library.impl("fwd", _fwd, "CPU")
    library.impl("bwd", _bwd, "CPU")
    return library


def _fwd(
    q, k, v, k_new=None, v_new=None, q_v=None, out=None, cu_seqlens_q=None, cu_seqlens_k=None,
    cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
    page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None,
    q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, is_causal=False, window_size_left=-1,
    window_size_right=-1, attention_chunk=0, softcap=0.0, is_rotary_interleaved=False,
    scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0,
):  # fmt: skip
    asked = Rules(softmax_scale, is_causal, window_size_left, window_size_right, softcap)
    out, lse = run_forward((q, k, v), cu_seqlens_q, max_seqlen_q, asked)
    return out, lse, q.new_empty(0), q.new_empty(0)


def _bwd(
    dout, q, k, v, out, softmax_lse, dq=None, dk=None, dv=None, cu_seqlens_q=None, cu_seqlens_k=None,
    seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None, is_causal=False,
    window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
):  # fmt: skip
    asked = Rules(softmax_scale, is_causal, window_size_left, window_size_right, softcap)
    run_backward((dout, q, k, v, out), softmax_lse, (dq, dk, dv), cu_seqlens_q, max_seqlen_q, asked)
    return tuple(q.new_empty(0) for _ in range(5))


def flash_attn_3() -> dict[str, ModuleType]:
    """Modules for `sys.modules`; the operators are `define_flash_attn_3`'s."""
    assert "flash_attn_interface" not in sys.modules
    return {"flash_attn_interface": ModuleType("flash_attn_interface")}
