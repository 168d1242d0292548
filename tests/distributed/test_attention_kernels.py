"""Attention's explicit forward and backward: every kernel against a mask and a softmax in float64."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_problems import (
    LENGTH,
    NAMES,
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
from numerics import assert_as_accurate_as, relative_error
from torch.nn import functional as F

from longseq.distributed import (
    attention,
    attention_kernels,
    blockwise_attention,
    flash_attention_2,
    flash_attention_3,
    flash_attention_4,
)
from longseq.distributed.attention import attention_backward, attention_forward, choose_kernel
from longseq.distributed.attention_kernels import AttentionOptions, Documents


@pytest.fixture(autouse=True)
def _new_memory_is_nan() -> Iterator[None]:
    """What a kernel allocates and leaves unwritten shows."""
    if torch.cuda.is_available():  # cuDNN's backward has no deterministic form, and refuses
        yield
        return
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("block", ["small", "real"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_blockwise_is_a_masked_softmax(monkeypatch: pytest.MonkeyPatch, name: str, block: str) -> None:
    if block == "small":
        monkeypatch.setattr(blockwise_attention, "BLOCK_ROWS", 7)
        monkeypatch.setattr(blockwise_attention, "BLOCK_ELEMENTS", 4 * 30 * 5)
    tensors, options, rules = problem(name, "blockwise")
    assert_equal(ours(tensors, options, rules.get("documents")), plain(tensors, **rules))


@pytest.mark.parametrize("name", ["causal", "all"])
def test_the_log_sum_exp_is_that_of_the_scores(name: str) -> None:
    tensors, options, rules = problem(name, "blockwise")
    _, lse = attention_forward(*tensors, options, torch.tensor(rules.get("documents", (0, LENGTH))))
    torch.testing.assert_close(lse, masked(*tensors, **rules)[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PLAIN)
def test_the_cpu_kernel_is_a_masked_softmax(name: str) -> None:
    tensors, options, rules = problem(name, "cpu")
    assert_equal(ours(tensors, options, rules.get("documents")), plain(tensors, **rules))


# A token that sees itself alone has no gradient of its scores: a softmax gives an exact zero, and the
# backward from the log-sum-exp a rounding, which in float32 shows where such tokens are many.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in PROBLEMS]
    + [(name, torch.float32) for name in ("causal", "rows of a batch", "window", "softcap", "all")],
)
def test_blockwise_is_as_near_to_the_truth_as_plain_pytorch(name: str, dtype: torch.dtype) -> None:
    tensors, options, rules = problem(name, "blockwise", dtype=dtype)
    got = ours(tensors, options, rules.get("documents"))
    truth = plain(tuple(tensor.double() for tensor in tensors), **rules)
    theirs = plain(tensors, **rules)
    for part, value in got.items():
        assert_as_accurate_as(value, theirs[part], truth[part], name=part)
    assert attention_forward(*tensors, options, documents_of(rules))[1].dtype == torch.float32


def documents_of(rules: dict) -> Documents | None:
    return Documents.of(torch.tensor(rules["documents"])) if "documents" in rules else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_cpu_kernel_is_as_near_to_the_truth_as_pytorchs_attention(rows: int, dtype: torch.dtype) -> None:
    tensors = inputs(rows=rows, dtype=dtype)
    truth = plain(tuple(tensor.double() for tensor in tensors))
    # Not a mask and a softmax: in float32 PyTorch's kernel is two to three times further from the truth.
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    query, key, value = leaves[0], *(leaf.repeat_interleave(2, dim=1) for leaf in leaves[1:])
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALE)
    theirs = (out.detach(), *torch.autograd.grad(out, leaves, upstream_of(out)))
    got = ours(tensors, AttentionOptions(SCALE, kernel="cpu"))
    for part, reference in zip(NAMES, theirs, strict=True):
        assert_as_accurate_as(got[part], reference, truth[part], name=part)


@pytest.mark.parametrize("kernel", ["cpu", "blockwise"])
def test_large_scores_do_not_overflow(kernel: str) -> None:
    tensors = tuple(tensor * 40 for tensor in inputs(dtype=torch.float32))
    wide = tuple(tensor.double() for tensor in tensors)
    truth, got = plain(wide), ours(tensors, AttentionOptions(SCALE, kernel=kernel))
    largest = float((wide[0] @ wide[1].repeat_interleave(2, dim=1).mT * SCALE).abs().max())
    assert largest > 1e4
    for part, value in got.items():
        # A score of this size is known to so much, and is the exponent of a probability.
        assert relative_error(value, truth[part]) < largest * torch.finfo(torch.float32).eps, part


@pytest.mark.parametrize("name", ["causal", "documents", "window", "all"])
def test_autograd_never_sees_the_explicit_calls(name: str) -> None:
    tensors, options, rules = problem(name, "auto")
    leaves = tuple(tensor.clone().requires_grad_() for tensor in tensors)
    assert not any(tensor.requires_grad for tensor in ours(leaves, options, rules.get("documents")).values())


def test_a_block_is_bounded_and_meets_only_what_it_sees() -> None:
    shape = torch.empty(1, 32, 1, 1, device="meta").expand(1, 32, 2**17, 128)
    documents = Documents.of(torch.tensor([0, 100_000, 2**17]))
    for window in (None, 4096):
        seen = 0
        for rows, keys in blockwise_attention._blocks(shape, AttentionOptions(1.0, window), documents):
            assert rows.start == seen
            seen = rows.stop
            start = 0 if rows.start < 100_000 else 100_000
            assert keys.stop == rows.stop
            assert keys.start == max(start, rows.start - (window or 2**17) + 1)
            scores = 32 * (rows.stop - rows.start) * (keys.stop - keys.start)
            assert scores <= blockwise_attention.BLOCK_ELEMENTS
            assert rows.stop - rows.start >= 8 or rows.stop in (100_000, 2**17)
        assert seen == 2**17


@pytest.mark.parametrize(
    ("kernel", "rules", "kinds"),
    [
        ("cpu", {}, ("sinks",)),
        ("cpu", {"documents": (0, 10, 4000, 4096)}, ("sinks",)),
        ("blockwise", {}, ("sinks", "alibi_slopes")),
        ("blockwise", {"window": 900, "softcap": 2.0, "documents": (0, 10, 4000, 4096)}, ("alibi_slopes",)),
    ],
)
def test_nothing_of_the_length_squared_is_allocated(
    monkeypatch: pytest.MonkeyPatch, kernel: str, rules: dict, kinds: tuple[str, ...]
) -> None:
    monkeypatch.setattr(blockwise_attention, "BLOCK_ELEMENTS", 2**18)
    tensors = inputs(heads=(2, 1), length=4096, width=8, dtype=torch.float32)
    options = AttentionOptions(SCALE, rules.get("window"), rules.get("softcap"), kernel)
    seen = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with seen:
        ours(tensors, options, rules.get("documents"), per_head_of(2, *kinds, dtype=torch.float32))
    events = seen.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    # Blocks of a fixed size, the kernel's own among them; a byte for each pair of tokens would be 2**24.
    assert 2**18 <= max(sizes) <= 2**21


HOPPER, AMPERE = (9, 0), (8, 0)
BF16 = {"dtype": torch.bfloat16}
CHOICES = [
    (BF16, {}, None, HOPPER, "cudnn"),
    (BF16, {"window": 64}, None, HOPPER, "cudnn"),  # the window is wider than the sequence
    (BF16, {"window": 63}, None, HOPPER, "flash"),
    (BF16, {}, (0, 30, 64), HOPPER, "flash"),
    (BF16, {}, (0, 0, 64), HOPPER, "cudnn"),
    (BF16, {"softcap": 5.0}, None, HOPPER, "blockwise"),
    ({**BF16, "width": 256}, {}, None, HOPPER, "flash"),
    ({**BF16, "width": 20}, {}, None, HOPPER, "blockwise"),
    ({**BF16, "length": 1}, {}, None, HOPPER, "flash"),
    (BF16, {}, None, AMPERE, "flash"),
    (BF16, {}, None, (7, 5), "blockwise"),
    (BF16, {"kernel": "cudnn"}, None, AMPERE, "cudnn"),
    ({"dtype": torch.float32}, {}, None, HOPPER, "blockwise"),
]
NEWER_CHOICES = [
    (BF16, {}, None, HOPPER, "fa4"),
    (BF16, {"softcap": 5.0, "window": 7}, (0, 30, 64), HOPPER, "fa4"),
    ({**BF16, "width": 256}, {}, None, HOPPER, "fa4"),
    ({**BF16, "width": 192}, {}, None, (10, 0), "flash"),
    (BF16, {}, None, AMPERE, "flash"),
    (BF16, {}, None, (12, 0), "cudnn"),
]


def on_a_gpu(dtype: torch.dtype, width: int = 64, length: int = 64) -> tuple[Any, Any]:
    """Queries and keys as far as the choice may look: no values."""
    here = {"dtype": dtype, "device": torch.device("cuda"), "is_cuda": True}
    return (
        SimpleNamespace(shape=(1, 8, length, width), **here),
        SimpleNamespace(shape=(1, 2, length, width), **here),
    )


@pytest.mark.parametrize(
    ("installed", "sizes", "options", "documents", "capability", "wanted"),
    [(False, *choice) for choice in CHOICES] + [(True, *choice) for choice in NEWER_CHOICES],
)
def test_the_kernel_follows_from_the_problem(
    monkeypatch: pytest.MonkeyPatch,
    installed: bool,
    sizes: dict,
    options: dict,
    documents: tuple[int, ...] | None,
    capability: tuple[int, int],
    wanted: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(flash_attention_4, "INSTALLED", installed)
    monkeypatch.setattr(flash_attention_3, "INSTALLED", False)
    monkeypatch.setattr(flash_attention_2, "VERSION", None)
    offsets = None if documents is None else torch.tensor(documents)
    name, reason = choose_kernel(*on_a_gpu(**sizes), AttentionOptions(1.0, **options), offsets)
    assert name == wanted
    assert reason


def test_the_cpu_takes_its_own_kernel_where_it_can() -> None:
    query, key, _ = inputs()
    assert choose_kernel(query, key, AttentionOptions(1.0))[0] == "cpu"
    name, reason = choose_kernel(query, key, AttentionOptions(1.0, window=5))
    assert name == "blockwise"
    assert "not cpu: it has no window" in reason
    assert choose_kernel(query, key, AttentionOptions(1.0, kernel="blockwise")) == (
        "blockwise",
        "it was asked for",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "cudnn"}, "kernel='cudnn' cannot do this attention: it needs a CUDA GPU, not cpu"),
        ({"kernel": "flash"}, "kernel='flash' cannot .* CUDA GPU"),
        ({"kernel": "fa4"}, "kernel='fa4' cannot .* CUDA GPU"),
        ({"kernel": "cpu", "softcap": 2.0}, "kernel='cpu' cannot .* no window and no softcap; use kernel="),
    ],
)
def test_a_kernel_that_cannot_says_why(options: dict, message: str) -> None:
    tensors = inputs()
    with pytest.raises(ValueError, match=message):
        attention_forward(*tensors, AttentionOptions(1.0, **options))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 0}, "window=0 must be at least 1"),
        ({"softcap": 0.0}, r"softcap=0\.0 must be positive"),
        ({"kernel": "fa5"}, "kernel='fa5' does not exist; use one of auto, fa4, fa3, cudnn"),
    ],
)
def test_options_that_make_no_sense_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionOptions(1.0, **fields)


@pytest.mark.parametrize(("offsets", "message"), [((0, 20, 13, 37), "fall from 20 to 13"), ((0,), "must be")])
def test_offsets_that_are_no_documents_are_refused(offsets: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Documents.of(torch.tensor(offsets))


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="2 key/value heads do not divide 3 query heads"):
        attention_forward(*inputs(heads=(3, 2)), AttentionOptions(1.0))


def test_documents_are_sent_to_a_device_once() -> None:
    documents = Documents.of(torch.tensor([0, 5, 5, 9]))
    sent = documents.offsets_on(torch.device("cpu"))
    assert sent.tolist() == [0, 5, 9]
    assert sent.dtype == torch.int32
    assert documents.longest == 5
    assert documents.offsets_on(torch.device("cpu")) is sent


@pytest.mark.parametrize(("kernel", "documents"), [("CUDNN", None), ("FLASH", None), ("FLASH", (0, 30, 64))])
@pytest.mark.parametrize("window", [None, 9])
def test_the_installed_pytorch_takes_the_arguments(
    kernel: str, documents: tuple[int, ...] | None, window: int | None
) -> None:
    """The kernels need a GPU; that PyTorch's operators know these arguments shows without one."""
    if kernel == "CUDNN" and window:
        return
    tensors = inputs(length=64, width=64, device="meta", dtype=torch.bfloat16)
    options = AttentionOptions(SCALE, window)
    where = Documents.of(torch.tensor(documents or (0, 64)))
    out, lse = getattr(attention_kernels, kernel).forward(*tensors, options, where)
    grads = getattr(attention_kernels, kernel).backward(out, *tensors, out, lse, options, where)
    assert out.shape == tensors[0].shape
    assert lse.dtype == torch.float32
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in tensors]


GPU_PROBLEMS = [
    ("cudnn", {"length": 1000, "rows": 2}, {}),
    ("cudnn", {"length": 2999}, {}),
    ("flash", {"length": 1000, "rows": 2}, {}),
    ("flash", {"length": 2999}, {"window": 700}),
    ("flash", {"length": 2999}, {"documents": (0, 1000, 1001, 1001, 2999)}),
    ("flash", {"length": 2999}, {"window": 300, "documents": (0, 1000, 1001, 2999)}),
    ("blockwise", {"length": 1777}, {"softcap": 5.0, "window": 600}),
    ("fa4", {"length": 1000, "rows": 2}, {}),
    ("fa4", {"length": 2999}, {"window": 700}),
    ("fa4", {"length": 2999}, {"documents": (0, 1000, 1001, 1001, 2999)}),
    ("fa4", {"length": 2999}, {"softcap": 5.0}),
]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize(("kernel", "sizes", "rules"), GPU_PROBLEMS)
def test_gpu_kernels_are_as_near_to_the_truth_as_plain_pytorch(
    kernel: str, sizes: dict, rules: dict, heads: tuple[int, int]
) -> None:
    if kernel == "fa4" and not flash_attention_4.INSTALLED:
        pytest.skip("flash-attn-4 is not installed")
    where = {"heads": heads, "width": 128, "device": "cuda", **sizes}
    scale = 0.09  # of scores of standard deviation 4: peaked, not one-hot
    tensors = inputs(dtype=torch.bfloat16, **where)
    options = AttentionOptions(scale, rules.get("window"), rules.get("softcap"), kernel)
    got = ours(tensors, options, rules.get("documents"))
    wide = tuple(tensor.double() for tensor in tensors)
    blockwise = AttentionOptions(scale, options.window, options.softcap, "blockwise")
    truth = ours(wide, blockwise, rules.get("documents"))
    theirs = plain(tensors, scale=scale, **rules)
    for part, value in got.items():
        assert_as_accurate_as(value, theirs[part], truth[part], name=part)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_gpu_kernels_take_columns_of_a_buffer_without_a_copy(kernel: str) -> None:
    tensors = inputs(heads=(8, 2), length=4096, width=128, device="cuda", dtype=torch.bfloat16)
    options = AttentionOptions(0.02, kernel=kernel)
    attention_forward(*tensors, options)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out, lse = attention_forward(*tensors, options)
    most = torch.cuda.max_memory_allocated() - before
    assert most < out.nbytes + lse.nbytes + tensors[1].numel() * 2 // 2, "less than a copy of the keys"


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_a_gpu_is_not_waited_for(packed: bool) -> None:
    tensors = inputs(heads=(8, 2), length=1000, width=128, device="cuda", dtype=torch.bfloat16)
    documents = Documents.of(torch.tensor([0, 300, 1000])) if packed else None
    options = AttentionOptions(0.02)
    upstream = upstream_of(tensors[0])
    name, _ = attention.choose_kernel(*tensors[:2], options, documents)
    newer = {"fa4": flash_attention_4.INSTALLED, "fa3": flash_attention_3.INSTALLED}
    fallback = "flash" if packed else "cudnn"
    assert name == next((kernel for kernel, installed in newer.items() if installed), fallback)
    for mode in ("default", "error"):  # the first round compiles, plans, and sends the documents
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out, lse = attention_forward(*tensors, options, documents)
            attention_backward(upstream, *tensors, out, lse, options, documents)
        finally:
            torch.cuda.set_sync_debug_mode("default")
