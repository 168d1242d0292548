"""Attention on one device: each document alone, by kernels that make no mask."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_as_accurate_as
from torch import Tensor
from training_samples import plain_attention

from longseq.distributed.attention import local_attention
from longseq.distributed.attention_kernels import Documents
from longseq.distributed.blockwise_attention import BLOCK_ELEMENTS

HEADS = [(4, 4), (4, 2), (8, 1)]
DOCUMENTS = [None, (0, 37), (0, 13, 14, 37), (0, 0, 20, 20, 37)]
"""None is one document; the last has empty ones."""


def inputs(
    num_heads: int, num_kv_heads: int, length: int = 37, rows: int = 1, head_dim: int = 16, **where
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, drawn on the CPU so that every device has the same."""
    draw = torch.Generator().manual_seed(length)
    shapes = [(rows, heads, length, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    where = {"dtype": torch.float64, **where}
    return tuple(
        torch.randn(shape, generator=draw, dtype=torch.float64).to(**where).requires_grad_()
        for shape in shapes
    )


def upstream(out: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out)


def outcome(out: Tensor, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    grads = torch.autograd.grad(out, tensors, upstream(out))
    return {"out": out.detach(), **dict(zip(("d_query", "d_key", "d_value"), grads, strict=True))}


def ours(tensors: tuple[Tensor, ...], documents: tuple[int, ...] | None) -> Tensor:
    offsets = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    return local_attention(*tensors, scale=tensors[0].shape[-1] ** -0.5, document_offsets=offsets)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
def test_it_is_masked_softmax_attention(
    num_heads: int, num_kv_heads: int, documents: tuple[int, ...] | None
) -> None:
    tensors = inputs(num_heads, num_kv_heads)
    got = outcome(ours(tensors, documents), tensors)
    wanted = outcome(plain_attention(*tensors, documents), tensors)
    for name, value in got.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-12, atol=1e-12, msg=name)


def test_rows_of_a_batch_are_documents() -> None:
    tensors = inputs(4, 2, rows=3)
    got, wanted = outcome(ours(tensors, None), tensors), outcome(plain_attention(*tensors), tensors)
    for name, value in got.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-12, atol=1e-12, msg=name)


def test_the_scale_is_the_one_given() -> None:
    query, key, value = inputs(4, 2)
    got = local_attention(query, key, value, scale=0.5)
    wanted = plain_attention(query * 0.5 * 16**0.5, key, value)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_a_document_does_not_see_another_change() -> None:
    tensors = inputs(4, 2)
    before = ours(tensors, (0, 13, 37))
    edited = tuple(tensor.detach().clone() for tensor in tensors)
    for tensor in edited:
        tensor[:, :, :13] = torch.randn_like(tensor[:, :, :13])
    after = ours(edited, (0, 13, 37))
    assert torch.equal(before[:, :, 13:], after[:, :, 13:])
    assert not torch.equal(before[:, :, :13], after[:, :, :13])


@pytest.mark.parametrize(
    ("rules", "documents"),
    [({}, None), ({"window": 3, "softcap": 0.8}, (0, 4, 9)), ({"window": 4}, None), ({"softcap": 2.0}, None)],
)
def test_gradients_are_those_of_finite_differences(rules: dict, documents: tuple[int, ...] | None) -> None:
    offsets = None if documents is None else torch.tensor(documents)

    def run(*tensors: Tensor) -> Tensor:
        return local_attention(*tensors, scale=0.4, document_offsets=offsets, **rules)

    assert torch.autograd.gradcheck(run, inputs(4, 2, length=9, head_dim=3))


def test_documents_may_be_prepared_once() -> None:
    tensors = inputs(4, 2)
    offsets = torch.tensor((0, 13, 14, 37))
    prepared = local_attention(*tensors, scale=0.25, document_offsets=Documents.of(offsets))
    assert torch.equal(prepared, local_attention(*tensors, scale=0.25, document_offsets=offsets))


@pytest.mark.parametrize("rules", [{}, {"window": 5, "softcap": 2.0}])
def test_it_compiles_in_one_graph(rules: dict) -> None:
    tensors = inputs(4, 2)

    def run(*tensors: Tensor) -> Tensor:
        return local_attention(*tensors, scale=0.25, **rules)

    got = outcome(torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    for name, value in outcome(run(*tensors), tensors).items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_decoding_with_a_cache_is_refused() -> None:
    query, key, value = inputs(4, 2)
    with pytest.raises(ValueError, match=r"1 queries against 37 keys.*undo\(\)"):
        local_attention(query[:, :, -1:], key, value, scale=1.0)


def test_packed_documents_in_several_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="not a batch of 2"):
        ours(inputs(4, 2, rows=2), (0, 13, 37))


@pytest.mark.parametrize("documents", [(0, 13, 36), (0, 13, 38), (0, 36), (3, 13, 37)])
def test_documents_that_are_not_the_sequence_are_refused(documents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must run from 0 to the 37 tokens"):
        ours(inputs(4, 2), documents)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("documents", [None, (0, 500, 501, 501, 1111, 1537)])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(8, 8), (8, 2)])
def test_gpu_kernels_are_as_near_to_the_truth_as_plain_pytorch(
    num_heads: int, num_kv_heads: int, documents: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    sizes = {"length": 1537, "head_dim": 64, "device": "cuda"}
    low = inputs(num_heads, num_kv_heads, dtype=dtype, **sizes)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in low)
    got = outcome(ours(low, documents), low)
    plain = outcome(plain_attention(*low, documents), low)
    truth = outcome(plain_attention(*exact, documents), exact)
    for name, value in got.items():
        assert_as_accurate_as(value, plain[name], truth[name], name=name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("packed", [False, True])
def test_gpu_memory_holds_no_square_of_the_length(packed: bool, dtype: torch.dtype) -> None:
    # float32 goes by blocks of a bounded size: the square must be larger than those.
    length, blocks = (16384, 0) if dtype == torch.bfloat16 else (65536, 5 * 4 * BLOCK_ELEMENTS)
    tensors = inputs(4, 2, length=length, head_dim=64, device="cuda", dtype=dtype)
    size = tensors[0].nbytes
    documents = (0, 100, 9000, length) if packed else None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ours(tensors, documents).sum().backward()
    # A dozen tensors like the queries; one byte for each pair of tokens would be 32 of them and more.
    assert torch.cuda.max_memory_allocated() - before < min(16 * size + blocks, length**2)
