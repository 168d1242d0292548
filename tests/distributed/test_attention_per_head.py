"""Sinks and ALiBi slopes: every kernel against a softmax with one more column and a biased mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_problems import (
    PLAIN,
    PROBLEMS,
    SCALE,
    assert_equal,
    inputs,
    masked,
    ours,
    per_head_of,
    plain,
    problem,
    upstream_of,
)
from numerics import assert_as_accurate_as
from torch import Tensor

from longseq.distributed import blockwise_attention, per_head
from longseq.distributed.attention import attention_forward, choose_kernel, local_attention
from longseq.distributed.attention_kernels import AttentionOptions
from longseq.distributed.per_head import PerHead, add_sinks, sink_gradient

KINDS = [("sinks",), ("alibi_slopes",), ("sinks", "alibi_slopes")]


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_blockwise_is_a_masked_softmax(
    monkeypatch: pytest.MonkeyPatch, name: str, kinds: tuple[str, ...]
) -> None:
    monkeypatch.setattr(blockwise_attention, "BLOCK_ROWS", 7)
    tensors, options, rules = problem(name, "blockwise")
    numbers = per_head_of(tensors[0].shape[1], *kinds)
    got = ours(tensors, options, rules.get("documents"), numbers)
    assert_equal(got, plain(tensors, numbers, **rules))


@pytest.mark.parametrize("name", PLAIN)
def test_the_cpu_kernel_with_sinks_is_a_masked_softmax(name: str) -> None:
    tensors, options, rules = problem(name, "cpu")
    numbers = per_head_of(tensors[0].shape[1], "sinks")
    got = ours(tensors, options, rules.get("documents"), numbers)
    assert_equal(got, plain(tensors, numbers, **rules))


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize(
    ("name", "dtype"), [("causal", torch.bfloat16), ("all", torch.bfloat16), ("causal", torch.float32)]
)
def test_they_are_as_near_to_the_truth_as_plain_pytorch(
    name: str, dtype: torch.dtype, kinds: tuple[str, ...]
) -> None:
    tensors, options, rules = problem(name, "blockwise", dtype=dtype)
    numbers = per_head_of(tensors[0].shape[1], *kinds, dtype=torch.float32)
    got = ours(tensors, options, rules.get("documents"), numbers)
    truth = plain(tuple(tensor.double() for tensor in tensors), numbers, **rules)
    theirs = plain(tensors, numbers, **rules)
    # A sink rounds the log-sum-exp once more, from which the backward's probabilities come: float32 shows it.
    slack = 2.5 if dtype == torch.float32 else 1.5
    for part, value in got.items():
        assert_as_accurate_as(value, theirs[part], truth[part], slack=slack, name=part)


@pytest.mark.parametrize("layout", ["(B, N, L)", "(B, N, L, 1)", "(N, L)", "padded"])
def test_sinks_know_the_layouts_of_all_kernels(layout: str) -> None:
    tensors = inputs(rows=1 if layout == "(N, L)" else 2)
    numbers = per_head_of(4, "sinks")
    wanted, log_sums = masked(*tensors, sinks=numbers.sinks)
    out, rows = masked(*tensors)
    lse = {
        "(B, N, L)": rows.clone(),
        "(B, N, L, 1)": rows.clone().unsqueeze(-1),
        "(N, L)": rows[0].clone(),
        "padded": torch.nn.functional.pad(rows, (0, 27), value=torch.nan),
    }[layout]
    add_sinks(out, lse, numbers.sinks)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    got = sink_gradient(upstream_of(out), out, lse, numbers.sinks)
    torch.testing.assert_close(got, plain(tensors, numbers)["d_sinks"], rtol=1e-12, atol=1e-12)
    found = lse[..., : rows.shape[2]] if layout == "padded" else lse
    torch.testing.assert_close(found, log_sums.view_as(found), rtol=1e-12, atol=1e-12)


def test_a_sinks_gradient_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, numbers = inputs(rows=2), per_head_of(4, "sinks")
    out, lse = attention_forward(*tensors, AttentionOptions(SCALE), None, numbers)
    whole = sink_gradient(upstream_of(out), out, lse, numbers.sinks)
    monkeypatch.setattr(per_head, "CHUNK_ELEMENTS", 5 * 2 * 4 * 16)
    chunked = sink_gradient(upstream_of(out), out, lse, numbers.sinks)
    torch.testing.assert_close(chunked, whole, rtol=1e-13, atol=1e-13)


def test_sinks_that_are_far_away_are_no_nan() -> None:
    tensors = inputs(dtype=torch.float32)
    sinks = torch.tensor([-torch.inf, -1e30, 1e30, 5.0])
    got = ours(tensors, AttentionOptions(SCALE), None, PerHead(sinks=sinks))
    without = ours(tensors, AttentionOptions(SCALE))
    assert all(value.isfinite().all() for value in got.values())
    assert torch.equal(got["out"][:, :2], without["out"][:, :2])
    assert not got["out"][:, 2].any()
    assert not got["d_sinks"][:3].any()
    assert got["d_sinks"][3] != 0


@pytest.mark.parametrize(("rules", "documents"), [({}, None), ({"window": 3, "softcap": 0.8}, (0, 4, 9))])
def test_gradients_are_those_of_finite_differences(rules: dict, documents: tuple[int, ...] | None) -> None:
    offsets = None if documents is None else torch.tensor(documents)
    numbers = per_head_of(4, "sinks", "alibi_slopes")

    def run(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        return local_attention(
            *(query, key, value),
            scale=0.4,
            document_offsets=offsets,
            sinks=sinks,
            alibi_slopes=numbers.alibi_slopes,
            **rules,
        )

    leaves = [*inputs(length=9, width=3), numbers.sinks]
    assert torch.autograd.gradcheck(run, [leaf.detach().clone().requires_grad_() for leaf in leaves])


def test_a_gradient_has_its_sinks_dtype_and_frozen_sinks_have_none() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in inputs(dtype=torch.float32))
    sinks = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    local_attention(query, key, value, scale=SCALE, sinks=sinks).sum().backward()
    assert sinks.grad.dtype == torch.bfloat16
    assert sinks.grad.all()
    frozen = sinks.detach()
    local_attention(query, key, value, scale=SCALE, sinks=frozen).sum().backward()
    assert frozen.grad is None


def test_it_compiles_in_one_graph() -> None:
    numbers = per_head_of(4, "sinks", "alibi_slopes")
    leaves = [*inputs(), numbers.sinks]

    def run(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        slopes = numbers.alibi_slopes
        return local_attention(query, key, value, scale=SCALE, sinks=sinks, alibi_slopes=slopes)

    def outcome(function: Any) -> list[Tensor]:
        mine = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        out = function(*mine)
        return [out, *torch.autograd.grad(out, mine, upstream_of(out))]

    compiled = outcome(torch.compile(run, fullgraph=True, backend="aot_eager"))
    for got, wanted in zip(compiled, outcome(run), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_a_group_of_heads_takes_its_own() -> None:
    tensors, numbers = inputs(heads=(6, 3)), per_head_of(6, "sinks", "alibi_slopes")
    whole = ours(tensors, AttentionOptions(SCALE), None, numbers)
    for index in range(3):
        heads = slice(2 * index, 2 * index + 2)
        part = (tensors[0][:, heads], *(tensor[:, index : index + 1] for tensor in tensors[1:]))
        out, _ = attention_forward(*part, AttentionOptions(SCALE), None, numbers.select(heads))
        torch.testing.assert_close(out, whole["out"][:, heads], rtol=1e-12, atol=1e-12)
    nothing = PerHead().select(slice(2))
    assert (nothing.sinks, nothing.alibi_slopes) == (None, None)


def test_slopes_go_to_a_kernel_that_has_them() -> None:
    query, key, _ = inputs()
    numbers = per_head_of(4, "alibi_slopes")
    name, reason = choose_kernel(query, key, AttentionOptions(1.0), None, numbers)
    assert name == "blockwise"
    assert "not cudnn: it has no ALiBi slopes" in reason
    assert "not flash: its backward has no ALiBi slopes" in reason
    assert "not cpu: it has no ALiBi slopes" in reason
    with pytest.raises(ValueError, match="kernel='cpu' cannot do this attention: it has no ALiBi"):
        attention_forward(*inputs(), AttentionOptions(1.0, kernel="cpu"), None, numbers)
    assert choose_kernel(query, key, AttentionOptions(1.0), None, per_head_of(4, "sinks"))[0] == "cpu"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sinks": torch.ones(2)}, r"sinks are of 2 heads, the queries of 4; .*PerHead\.select"),
        ({"alibi_slopes": torch.ones(8)}, "alibi_slopes are of 8 heads, the queries of 4"),
        ({"sinks": torch.ones(4, 1)}, r"sinks are \(4, 1\); they must be \(N,\)"),
        ({"sinks": torch.ones(4), "alibi_slopes": torch.ones(2)}, "4 sinks, but 2 ALiBi slopes"),
        ({"alibi_slopes": torch.ones(4, requires_grad=True)}, r"constants: pass alibi_slopes\.detach\(\)"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        local_attention(*inputs(), scale=1.0, **fields)
    with pytest.raises(ValueError, match=message):
        attention_forward(*inputs(), AttentionOptions(1.0), None, PerHead(**fields))


GPU_PROBLEMS = [
    ("cudnn", {"length": 1000, "rows": 2}, {}, ("sinks",)),
    ("cudnn", {"length": 2999}, {}, ("sinks",)),
    ("flash", {"length": 1000, "rows": 2}, {}, ("sinks",)),
    ("flash", {"length": 2999}, {"window": 128}, ("sinks",)),
    ("flash", {"length": 2999}, {"documents": (0, 1000, 1001, 1001, 2999)}, ("sinks",)),
    ("fa4", {"length": 1000, "rows": 2}, {}, ("sinks",)),
    ("fa4", {"length": 2999}, {"window": 128}, ("sinks",)),
    ("fa4", {"length": 2999}, {"documents": (0, 1000, 1001, 1001, 2999)}, ("sinks",)),
    ("blockwise", {"length": 1777}, {"softcap": 5.0, "window": 600}, ("sinks", "alibi_slopes")),
    ("fa2", {"length": 1000, "rows": 2}, {}, ("sinks",)),
    ("fa2", {"length": 2999}, {"window": 700, "softcap": 5.0}, ()),
    ("fa2", {"length": 2999}, {"documents": (0, 1000, 1001, 1001, 2999)}, ("sinks",)),
    ("fa2", {"length": 2999}, {}, ("sinks", "alibi_slopes")),
    ("fa2", {"length": 2999}, {"documents": (0, 1000, 1001, 2999), "window": 300}, ("alibi_slopes",)),
    ("fa3", {"length": 1000, "rows": 2}, {}, ("sinks",)),
    ("fa3", {"length": 2999}, {"window": 700, "softcap": 5.0}, ()),
    ("fa3", {"length": 2999}, {"documents": (0, 1000, 1001, 1001, 2999)}, ("sinks",)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize(("kernel", "sizes", "rules", "kinds"), GPU_PROBLEMS)
def test_gpu_kernels_are_as_near_to_the_truth_as_plain_pytorch(
    kernel: str, sizes: dict, rules: dict, kinds: tuple[str, ...], heads: tuple[int, int]
) -> None:
    scale = 0.09  # of scores of standard deviation 4: peaked, not one-hot
    tensors = inputs(heads=heads, width=128, device="cuda", dtype=torch.bfloat16, **sizes)
    options = AttentionOptions(scale, rules.get("window"), rules.get("softcap"), kernel)
    numbers = per_head_of(heads[0], *kinds, device="cuda", dtype=torch.float32)
    offsets = torch.tensor(rules["documents"]) if "documents" in rules else None
    try:
        choose_kernel(*tensors[:2], options, offsets, numbers)
    except ValueError as refusal:
        pytest.skip(str(refusal))
    got = ours(tensors, options, rules.get("documents"), numbers)
    truth = plain(tuple(tensor.double() for tensor in tensors), numbers, scale=scale, **rules)
    theirs = plain(tensors, numbers, scale=scale, **rules)
    for part, value in got.items():
        assert_as_accurate_as(value, theirs[part], truth[part], name=part)


@pytest.mark.gpu
def test_sinks_on_a_gpu_need_no_copy_of_the_output() -> None:
    tensors = inputs(heads=(8, 2), length=16384, width=128, device="cuda", dtype=torch.bfloat16)
    options = AttentionOptions(0.02, kernel="flash")
    numbers = per_head_of(8, "sinks", device="cuda", dtype=torch.float32)
    attention_forward(*tensors, options, None, numbers)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out, lse = attention_forward(*tensors, options, None, numbers)
    assert torch.cuda.max_memory_allocated() - before < out.nbytes + 4 * lse.nbytes
