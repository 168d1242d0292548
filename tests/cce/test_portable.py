"""The chunked loss and statistics against plain PyTorch in float64, on the CPU's way and on the GPU's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from numerics import assert_as_accurate_as
from torch import Tensor
from torch.nn import functional as F

from longseq.cce import portable
from longseq.cce.head import ELSEWHERE, IGNORED, Gradients, Head, Needs, Statistics, Tokens
from longseq.cce.portable import chunk_tokens, exact_loss, statistics, statistics_backward

N, V, D, R = 67, 131, 29, 5  # multiples of nothing
ALL = Needs(True, True, True, True, True)
NAMES = ("hidden", "weight", "bias", "inner", "outer")
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.0},
    "scale": {"logit_scale": 0.37},
    "low rank": {"rank": True},
    "all": {"bias": True, "rank": True, "softcap": 3.0, "logit_scale": 1.7},
}
NO_OPTIONS = {"label_smoothing": 0.0, "z_loss": 0.0, "memory_mib": None}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CASES = [(way, dtype, head) for way in ("dropped", "masked") for dtype in DTYPES for head in HEADS.values()]
# Each dtype and head on its own is in the kernel's own test.
CASES += [("kernel", torch.float32, HEADS["plain"]), ("kernel", torch.float16, HEADS["all"])]
LOSSES = [{}, {"label_smoothing": 0.2}, {"label_smoothing": 0.1, "z_loss": 0.05}]


@pytest.fixture(params=["dropped", "masked", "kernel"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """IGNORED tokens dropped, as on the CPU; masked, as elsewhere; masked, and rows done by the kernel."""
    if request.param != "dropped":
        monkeypatch.setattr(portable, "_drops_ignored", lambda device: False)
    if request.param == "kernel":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("the interpreter is off where there is a GPU")
        from longseq.cce.kernels import softmax_gradient

        wanted = (torch.float32, torch.float16)  # the interpreter cuts bf16 off where a GPU rounds
        monkeypatch.setattr(
            portable, "_row_kernels", lambda hidden: softmax_gradient if hidden.dtype in wanted else None
        )
    return request.param


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "chunk_tokens", lambda *args, **kwargs: 16)


def make(dtype: torch.dtype = torch.float64, **options) -> tuple[Tokens, Head]:
    """Rounded to bf16 first, so that every dtype is given the same problem; labels of every kind."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to(dtype)

    labels = torch.randint(0, V, (N,), generator=generator)
    labels[torch.rand(N, generator=generator) < 0.3] = IGNORED
    labels[0] = labels[20] = labels[-1] = IGNORED
    labels[3] = labels[40] = ELSEWHERE
    hidden, weight, bias, inner, outer = (
        random(N, D), random(V, D) * 0.25, random(V), random(N, R), random(V, R) * 0.25
    )  # fmt: skip
    rank, has_bias = options.pop("rank", False), options.pop("bias", False)
    tokens = Tokens(hidden, labels, inner if rank else None)
    return tokens, Head(weight, bias if has_bias else None, outer if rank else None, **options)


def needs_of(tokens: Tokens, head: Head) -> Needs:
    return Needs(True, True, head.bias is not None, tokens.inner is not None, head.outer is not None)


def plain_statistics(tokens: Tokens, head: Head) -> Statistics:
    """The textbook's way, written apart from the library's; of tokens that count, 0 for the others."""
    z = tokens.hidden @ head.weight.T
    if tokens.inner is not None:
        z = z + tokens.inner @ head.outer.T
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if head.bias is not None:
        z = z + head.bias
    z = z * head.logit_scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    counts = tokens.labels != IGNORED
    target = z.gather(-1, tokens.labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return Statistics(
        z.logsumexp(-1) * counts, torch.where(tokens.labels >= 0, target, 0.0), z.mean(-1) * counts
    )


def plain_loss(tokens: Tokens, head: Head, weights: Tensor, options: dict) -> Tensor:
    lse, target, mean = plain_statistics(tokens, head)
    smoothing = options.get("label_smoothing", 0.0)
    losses = (1 - smoothing) * (lse - target) + smoothing * (lse - mean)
    return ((losses + options.get("z_loss", 0.0) * lse**2) * weights).sum()


def leaves(tokens: Tokens, head: Head) -> tuple[Tokens, Head, list[Tensor | None]]:
    found = [
        None if part is None else part.clone().requires_grad_()
        for part in (tokens.hidden, head.weight, head.bias, tokens.inner, head.outer)
    ]
    hidden, weight, bias, inner, outer = found
    return Tokens(hidden, tokens.labels, inner), head._replace(weight=weight, bias=bias, outer=outer), found


def differentiated(tokens: Tokens, head: Head, function: Callable) -> tuple[Tensor, Gradients]:
    tokens, head, parts = leaves(tokens, head)
    loss = function(tokens, head)
    loss.backward()
    return loss.detach(), Gradients(*(None if part is None else part.grad for part in parts))


def check(ours: Gradients, plain: Gradients, truth: Gradients) -> None:
    for name in NAMES:
        mine, theirs, true = (getattr(found, name) for found in (ours, plain, truth))
        assert (mine is None) == (true is None)
        if mine is not None:
            assert_as_accurate_as(mine.to(theirs.dtype), theirs, true, name=name)


def token_weights(labels: Tensor) -> Tensor:
    weights = torch.rand(N, generator=torch.Generator().manual_seed(2))
    return weights.masked_fill(labels == IGNORED, 0.0)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("way", "dtype", "head_options"), CASES, indirect=["way"])
@pytest.mark.parametrize("options", LOSSES, ids=["nll", "smoothing", "smoothing and z"])
def test_exact_loss(head_options: dict, options: dict, dtype: torch.dtype, way: str) -> None:
    tokens, head = make(dtype, **head_options)
    weights = token_weights(tokens.labels)
    truth, d_truth = differentiated(
        *make(**head_options), lambda t, h: plain_loss(t, h, weights.double(), options)
    )
    plain, d_plain = differentiated(tokens, head, lambda t, h: plain_loss(t, h, weights, options))
    wide = torch.promote_types(dtype, torch.float32)
    loss, found, report = exact_loss(
        tokens, head, weights.to(wide), **{**NO_OPTIONS, **options}, needs=needs_of(tokens, head)
    )
    assert_as_accurate_as(loss, plain.to(wide), truth, name="loss")
    check(found, d_plain, d_truth)
    for name in ("weight", "bias", "outer"):
        assert getattr(found, name) is None or getattr(found, name).dtype == wide
    assert found.hidden.dtype == (wide if dtype == torch.float16 else dtype)
    assert not found.hidden[tokens.labels == IGNORED].any()
    assert not report.any()
    assert report.dtype == torch.float64


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("need_mean", [False, True])
@pytest.mark.parametrize("head_options", [HEADS["plain"], HEADS["all"]], ids=["plain", "all"])
def test_statistics(head_options: dict, need_mean: bool, dtype: torch.dtype, way: str) -> None:
    tokens, head = make(dtype, **head_options)
    wide_tokens, wide_head = make(**head_options)
    wide = torch.promote_types(dtype, torch.float32)
    upstream = Statistics(*torch.randn(3, N, dtype=wide))
    upstream = upstream if need_mean else upstream._replace(mean=None)

    def weighed(tokens: Tokens, head: Head) -> Tensor:
        found = plain_statistics(tokens, head)
        return sum((s * g).sum() for s, g in zip(found, upstream, strict=True) if g is not None)

    ours = statistics(tokens, head, need_mean=need_mean, memory_mib=None)
    plain, truth = plain_statistics(tokens, head), plain_statistics(wide_tokens, wide_head)
    for name, mine, theirs, true in zip(Statistics._fields, ours, plain, truth, strict=True):
        if name == "mean" and not need_mean:
            assert mine is None
        else:
            assert_as_accurate_as(mine, theirs, true, name=name)
            assert not mine[tokens.labels == IGNORED].any()
    _, d_truth = differentiated(wide_tokens, wide_head, weighed)
    _, d_plain = differentiated(tokens, head, weighed)
    found = statistics_backward(tokens, head, ours.lse, upstream, needs_of(tokens, head), None)
    check(found, d_plain, d_truth)
    assert {part.dtype for part in found if part is not None} == {dtype}


@pytest.mark.usefixtures("small_chunks")
def test_what_ignored_tokens_hold_reaches_nothing(way: str) -> None:
    tokens, head = make(torch.float32, **HEADS["all"])
    ignored = (tokens.labels == IGNORED).unsqueeze(-1)
    broken = tokens._replace(
        hidden=tokens.hidden.masked_fill(ignored, float("nan")),
        inner=tokens.inner.masked_fill(ignored, float("inf")),
    )
    weights = token_weights(tokens.labels)
    upstream = Statistics(*torch.ones(3, N))
    broken_upstream = Statistics(*(part.masked_fill(ignored.squeeze(-1), float("nan")) for part in upstream))
    found = []
    for t, u in ((tokens, upstream), (broken, broken_upstream)):
        loss, gradients, _ = exact_loss(t, head, weights, **NO_OPTIONS, needs=ALL)
        known = statistics(t, head, need_mean=True, memory_mib=None)
        found.append([loss, *gradients, *known, *statistics_backward(t, head, known.lse, u, ALL, None)])
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("needs", [Needs(), Needs(hidden=True), Needs(weight=True), Needs(bias=True)])
def test_only_what_is_needed(needs: Needs, way: str) -> None:
    tokens, head = make(torch.float32, **HEADS["all"])
    weights = token_weights(tokens.labels)
    whole_loss, whole, _ = exact_loss(tokens, head, weights, **NO_OPTIONS, needs=ALL)
    loss, part, _ = exact_loss(tokens, head, weights, **NO_OPTIONS, needs=needs)
    assert torch.equal(loss, whole_loss)
    for name in NAMES:
        assert (getattr(part, name) is not None) == getattr(needs, name)
        assert not getattr(needs, name) or torch.equal(getattr(part, name), getattr(whole, name))


@pytest.mark.parametrize("num_tokens", [0, 9])
@pytest.mark.parametrize("filter_eps", [0.0, 1e-3])
def test_no_token_that_counts(num_tokens: int, filter_eps: float, way: str) -> None:
    tokens, head = make(torch.float32, **HEADS["all"])
    tokens = Tokens(*(part[:num_tokens] for part in tokens))
    tokens.labels.fill_(IGNORED)
    loss, found, report = exact_loss(
        tokens, head, torch.zeros(num_tokens), **NO_OPTIONS, needs=ALL, filter_eps=filter_eps
    )
    known = statistics(tokens, head, need_mean=True, memory_mib=None)
    again = statistics_backward(tokens, head, known.lse, known, ALL, None)
    for tensor in (loss, report, *found, *known, *again):
        assert not tensor.any()
    assert found.hidden.shape == again.hidden.shape == (num_tokens, D)


def test_a_vocabulary_of_one_word(way: str) -> None:
    head = Head(torch.randn(1, D), torch.randn(1))
    tokens = Tokens(torch.randn(4, D), torch.tensor([0, IGNORED, 0, 0]))
    loss, found, _ = exact_loss(
        tokens, head, torch.ones(4), **NO_OPTIONS, needs=Needs(True, True, True), filter_eps=0.0
    )
    for tensor in (loss, *found[:3]):
        assert not tensor.any()


def test_a_weight_of_nan_is_told(way: str) -> None:
    """How a label that is no word comes here: it counts, it has no row, its weight is NaN."""
    tokens, head = make(torch.float32)
    weights = token_weights(tokens.labels)
    weights[3] = float("nan")
    loss, found, _ = exact_loss(tokens, head, weights, **NO_OPTIONS, needs=Needs(True, True))
    assert loss.isnan()
    assert found.hidden[3].isnan().all()
    assert found.hidden[:3].isfinite().all()
    assert found.weight.isnan().all()


def filtered_by_hand(
    tokens: Tokens, head: Head, weights: Tensor, eps: float
) -> tuple[Gradients, list[float]]:
    """The definition, tile by tile: gradients of the plain head without bias, in float64, and the report."""
    kept = (tokens.labels != IGNORED).nonzero().squeeze(-1)
    hidden, labels, weights = tokens.hidden[kept], tokens.labels[kept], weights[kept]
    p = (hidden @ head.weight.T).softmax(-1)
    gradient = p.clone()
    has = labels >= 0
    gradient[has.nonzero().squeeze(-1), labels[has]] -= 1.0
    gradient *= weights.unsqueeze(-1)
    is_label = torch.zeros_like(p, dtype=torch.bool)
    is_label[has.nonzero().squeeze(-1), labels[has]] = True
    others = p.masked_fill(is_label, 0.0)
    living, tiles, dropped = 0, 0, 0.0
    for row in range(0, len(kept), 128):
        for word in range(0, p.shape[1], 128):
            tile = (slice(row, row + 128), slice(word, word + 128))
            alive = (others[tile] >= eps).any()
            living, tiles = living + int(alive), tiles + 1
            if not alive:
                dropped += others[tile].sum().item()
                gradient[tile] = gradient[tile].where(is_label[tile], 0.0)
    d_hidden = torch.zeros_like(tokens.hidden)
    d_hidden[kept] = gradient @ head.weight
    return Gradients(d_hidden, gradient.T @ hidden, gradient.sum(0)), [living, tiles, dropped, len(kept)]


@pytest.mark.parametrize("chunk", [128, 256, 4096])
@pytest.mark.parametrize("vocab_size", [1024, 1000, 100])
def test_the_filter_is_what_it_is_defined_to_be(
    vocab_size: int, chunk: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portable, "chunk_tokens", lambda *args, **kwargs: chunk)
    num_tokens, eps = 500, 0.02
    hidden = torch.randn(num_tokens, 16, dtype=torch.float64)
    # Early words are less likely: of their tiles, most are dead, among them that of word 0, which the code
    # looks up for tokens without a label. Labels are in living tiles and in dead ones, some of them likely.
    weight = torch.randn(vocab_size, 16, dtype=torch.float64)
    weight *= (torch.arange(vocab_size) / vocab_size).unsqueeze(-1)
    labels = torch.randint(0, vocab_size, (num_tokens,))
    labels[torch.rand(num_tokens) < 0.2] = IGNORED
    labels[::9] = ELSEWHERE
    labels[-1] = vocab_size - 1
    weight[20] = 0.2 * hidden[30]
    labels[30] = 20
    tokens, head = Tokens(hidden, labels), Head(weight, torch.zeros(vocab_size, dtype=torch.float64))
    weights = torch.rand(num_tokens, dtype=torch.float64).masked_fill(labels == IGNORED, 0.0)
    expected, expected_report = filtered_by_hand(tokens, head, weights, eps)
    needs = Needs(True, True, True)
    loss, found, report = exact_loss(tokens, head, weights, **NO_OPTIONS, needs=needs, filter_eps=eps)
    torch.testing.assert_close(report, torch.tensor(expected_report, dtype=torch.float64), rtol=1e-9, atol=0)
    if vocab_size > 128:
        assert report[0] < report[1]
        assert report[2] > 0
    torch.testing.assert_close(tuple(found[:3]), tuple(expected[:3]), rtol=1e-9, atol=1e-12)
    unfiltered, _, _ = exact_loss(tokens, head, weights, **NO_OPTIONS, needs=needs)
    torch.testing.assert_close(loss, unfiltered, rtol=1e-12, atol=0)
    _, _, alone = exact_loss(tokens, head, weights, **NO_OPTIONS, needs=Needs(), filter_eps=eps)
    assert torch.equal(alone, report)


def test_a_nan_is_not_filtered_away(way: str) -> None:
    tokens, head = make(torch.float32, bias=True)
    broken = tokens.hidden.clone()
    broken[3] = float("nan")
    tokens = tokens._replace(hidden=broken)
    options = {**NO_OPTIONS, "needs": Needs(bias=True), "filter_eps": 0.9}
    loss, found, _ = exact_loss(tokens, head, token_weights(tokens.labels), **options)
    assert loss.isnan()
    assert found.bias.isnan().all()


def test_chunks_fit_their_memory() -> None:
    # 128,256 words in bf16: 2 bytes a logit in place; else 4 more in float32, and 4 for the cap's slope.
    for in_place, softcap, size in ((True, False, 2), (True, True, 2), (False, False, 6), (False, True, 10)):
        tokens = chunk_tokens(128256, torch.bfloat16, memory_mib=2048, in_place=in_place, softcap=softcap)
        assert tokens % 128 == 0
        assert tokens * 128256 * size <= 2**31 < (tokens + 128) * 128256 * size
    assert chunk_tokens(128256, torch.bfloat16, memory_mib=None, in_place=True) > 4000
    assert chunk_tokens(10**9, torch.float32, memory_mib=1, in_place=True) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filter_eps", [0.0, 1e-6])
def test_real_sizes_on_a_gpu(filter_eps: float, dtype: torch.dtype) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    num_tokens, vocab_size, width, rank = 1025, 32003, 520, 8
    shapes = ((num_tokens, width), (vocab_size, width), (vocab_size,), (num_tokens, rank), (vocab_size, rank))
    parts = [(torch.randn(shape, device="cuda") * 0.3).bfloat16() for shape in shapes]
    labels = torch.randint(0, vocab_size, (num_tokens,), device="cuda")
    labels[::7], labels[1::7] = IGNORED, ELSEWHERE
    weights = torch.rand(num_tokens, device="cuda").masked_fill(labels == IGNORED, 0.0)
    options = {"label_smoothing": 0.0 if filter_eps else 0.1, "z_loss": 0.01}

    def problem(dtype: torch.dtype) -> tuple[Tokens, Head]:
        hidden, weight, bias, inner, outer = (part.to(dtype) for part in parts)
        return Tokens(hidden, labels, inner), Head(weight, bias, outer, softcap=8.0, logit_scale=0.7)

    truth, d_truth = differentiated(
        *problem(torch.float64), lambda t, h: plain_loss(t, h, weights.double(), options)
    )
    tokens, head = problem(dtype)
    plain, d_plain = differentiated(tokens, head, lambda t, h: plain_loss(t, h, weights, options))
    wide = torch.promote_types(dtype, torch.float32)
    # Chunks of 128 tokens, or of as many in place; hidden states of IGNORED tokens that must not matter.
    hidden = tokens.hidden.masked_fill((labels == IGNORED).unsqueeze(-1), float("nan"))
    broken = tokens._replace(hidden=hidden)
    loss, found, report = exact_loss(
        broken, head, weights.to(wide), **options, needs=ALL, memory_mib=16, filter_eps=filter_eps
    )
    assert_as_accurate_as(loss, plain.to(wide), truth, name="loss")
    # Of tiles under 1e-6 nothing is seen beside the rounding of bf16.
    if filter_eps == 0.0 or dtype == torch.bfloat16:
        check(found, d_plain, d_truth)
    assert (report[3].item() == (labels != IGNORED).sum().item()) == (filter_eps > 0.0)
    known = statistics(broken, head, need_mean=True, memory_mib=16)
    for name, mine, theirs, true in zip(
        Statistics._fields, known, plain_statistics(tokens, head), plain_statistics(*problem(torch.float64)),
        strict=True,
    ):  # fmt: skip
        assert_as_accurate_as(mine, theirs, true, name=name)
    # With the loss's upstream gradients, its gradients.
    smoothing = options["label_smoothing"]
    wide_weights = weights.to(wide)
    upstream = Statistics(
        wide_weights * (1 + 2 * options["z_loss"] * known.lse),
        -wide_weights * (1 - smoothing),
        -wide_weights * smoothing,
    )
    check(statistics_backward(broken, head, known.lse, upstream, ALL, 16), d_plain, d_truth)


@pytest.mark.gpu
def test_no_host_sync_on_a_gpu() -> None:
    hidden, weight = torch.randn(600, 64, device="cuda"), torch.randn(1000, 64, device="cuda")
    labels = torch.randint(0, 1000, (600,), device="cuda")
    tokens, head, weights = Tokens(hidden, labels), Head(weight), torch.ones(600, device="cuda")
    needs = Needs(True, True)

    def everything() -> None:
        for eps in (0.0, 1e-3):
            exact_loss(tokens, head, weights, **NO_OPTIONS, needs=needs, filter_eps=eps)
        known = statistics(tokens, head, need_mean=True, memory_mib=None)
        statistics_backward(tokens, head, known.lse, known, needs, None)

    everything()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_that_is_written_first_may_hold_nan(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    tokens, head = make(torch.float32, **HEADS["all"])
    weights = token_weights(tokens.labels)
    expected = exact_loss(tokens, head, weights, **NO_OPTIONS, needs=ALL)[1]

    def spoilt(function: Callable) -> Callable:
        def make_spoilt(*args, **kwargs) -> Tensor:
            made = function(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return make_spoilt

    monkeypatch.setattr(torch, "empty_like", spoilt(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", spoilt(Tensor.new_empty))
    found = exact_loss(tokens, head, weights, **NO_OPTIONS, needs=ALL)[1]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_agrees_with_torch_cross_entropy() -> None:
    tokens, head = make()
    weights = (tokens.labels != IGNORED).double()
    labels = tokens.labels.masked_fill(tokens.labels == ELSEWHERE, IGNORED)
    tokens = tokens._replace(labels=labels)
    expected = F.cross_entropy(
        tokens.hidden @ head.weight.T, labels, ignore_index=IGNORED, label_smoothing=0.1, reduction="sum"
    )
    options = {**NO_OPTIONS, "label_smoothing": 0.1}
    loss, _, _ = exact_loss(tokens, head, weights, **options, needs=Needs())
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
