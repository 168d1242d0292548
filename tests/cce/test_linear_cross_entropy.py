"""`linear_cross_entropy` against plain PyTorch in float64: loss and every gradient, for every option."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from numerics import assert_as_accurate_as
from torch import Tensor
from torch.nn import functional as F

from longseq.cce import linear_cross_entropy
from longseq.cce.exact import chunk_tokens
from longseq.cce.options import LossOptions

N, V, D = 67, 131, 29  # multiples of nothing


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    upstream: float = 1.0
    options: dict = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Problem:
        hidden, weight, bias = (
            tensor.detach().to(dtype).requires_grad_() for tensor in (self.hidden, self.weight, self.bias)
        )
        return Problem(hidden, weight, bias, self.labels, self.upstream, self.options)


def make(*, ignored: str = "some", upstream: float = 1.0, **options) -> Problem:
    # Rounded to bf16 first, so that every dtype is given the same problem.
    hidden, weight, bias = (torch.randn(shape).bfloat16().double() for shape in ((N, D), (V, D), (V,)))
    labels = torch.randint(0, V, (N,))
    if ignored == "some":
        labels[torch.rand(N) < 0.3] = -100
        labels[0] = labels[-1] = -100
    elif ignored == "all":
        labels[:] = -100
    return Problem(hidden, weight * 0.3, bias, labels, upstream, options)


def plain_loss(problem: Problem) -> Tensor:
    """The textbook's way, written apart from the library's reference."""
    options = dict(problem.options)
    logits = problem.hidden @ problem.weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if options.get("bias"):
        logits = logits + problem.bias
    logits = logits * options.get("logit_scale", 1.0)
    if options.get("softcap"):
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    keep = problem.labels != -100
    logits, labels = logits[keep], problem.labels[keep]
    losses = F.cross_entropy(
        logits, labels, reduction="none", label_smoothing=options.get("label_smoothing", 0.0)
    )
    losses = losses + options.get("z_loss", 0.0) * logits.logsumexp(-1) ** 2
    weights = options.get("token_weights")
    weights = torch.ones_like(losses) if weights is None else weights[keep].to(losses)
    total = (losses * weights).sum()
    if options.get("reduction", "mean") == "mean":
        total = total / weights.sum() if len(losses) else total * 0.0
    return total


def our_loss(problem: Problem, **extra) -> Tensor:
    options = dict(problem.options)
    bias = problem.bias if options.pop("bias", False) else None
    return linear_cross_entropy(problem.hidden, problem.weight, problem.labels, bias=bias, **options, **extra)


def gradients(problem: Problem, loss: Tensor) -> dict[str, Tensor]:
    (loss * problem.upstream).backward()
    names = ("hidden", "weight", "bias") if problem.options.get("bias") else ("hidden", "weight")
    found = {"loss": loss.detach()}
    for name in names:
        grad = getattr(problem, name).grad
        found[name] = torch.zeros_like(getattr(problem, name)) if grad is None else grad
    return found


def check(problem: Problem, dtype: torch.dtype, *, slack: float = 1.5, **extra) -> None:
    truth_problem, plain_problem, our_problem = (problem.to(d) for d in (torch.float64, dtype, dtype))
    truth = gradients(truth_problem, plain_loss(truth_problem))
    plain = gradients(plain_problem, plain_loss(plain_problem))
    ours = gradients(our_problem, our_loss(our_problem, **extra))
    for name in truth:
        assert_as_accurate_as(ours[name], plain[name], truth[name], slack=slack, name=name)


OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.0},
    "logit_scale": {"logit_scale": 0.37},
    "smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.05},
    "everything": {
        "bias": True,
        "softcap": 3.0,
        "logit_scale": 1.7,
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "reduction": "sum",
    },
}


@pytest.mark.parametrize("method", ["exact", "reference"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_options(dtype: torch.dtype, options: dict, method: str) -> None:
    check(make(**options), dtype, method=method)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_token_weights(reduction: str) -> None:
    problem = make(reduction=reduction, token_weights=torch.rand(N, dtype=torch.float64), z_loss=0.02)
    check(problem, torch.float64, method="exact")
    check(problem, torch.float64, method="reference")


@pytest.mark.parametrize("upstream", [8.0, 0.3, -1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_upstream_gradient(dtype: torch.dtype, upstream: float) -> None:
    check(make(upstream=upstream), dtype, method="exact")


def test_float16_gradients_survive_a_loss_scale() -> None:
    # A mean over many tokens makes gradients that float16 cannot hold until the loss scale reaches them.
    problem = make(ignored="none", upstream=2.0**14)
    problem.hidden = problem.hidden * 1e-3
    check(problem, torch.float16, method="exact")


@pytest.mark.parametrize("memory_mib", [None, 1])
@pytest.mark.parametrize("num_chunks", [1, 2, 66, 67])
def test_any_chunking_gives_the_same(
    num_chunks: int, memory_mib: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 67 tokens: one chunk, two, a last chunk of one token, one token a chunk.
    tokens = -(-N // num_chunks)
    monkeypatch.setattr("longseq.cce.exact.chunk_tokens", lambda *args, **options: tokens)
    check(make(ignored="none"), torch.float64, method="exact", memory_mib=memory_mib)


def test_a_chunk_without_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longseq.cce.exact.chunk_tokens", lambda *args, **options: 10)
    problem = make(ignored="none")
    problem.labels[20:30] = -100
    check(problem, torch.float64, method="exact")


@pytest.mark.parametrize("method", ["exact", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_ignored_is_zero_with_zero_gradients(reduction: str, method: str) -> None:
    problem = make(ignored="all", reduction=reduction).to(torch.float32)
    found = gradients(problem, our_loss(problem, method=method))
    assert {name: float(value.abs().sum()) for name, value in found.items()} == {
        "loss": 0,
        "hidden": 0,
        "weight": 0,
    }


def test_no_tokens_at_all() -> None:
    hidden = torch.zeros(0, D, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(V, D), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert hidden.grad.shape == (0, D)


def test_ignored_hidden_states_do_not_matter() -> None:
    problem = make().to(torch.float32)
    with torch.no_grad():
        problem.hidden[problem.labels == -100] = float("nan")
    found = gradients(problem, our_loss(problem, method="exact"))
    assert all(torch.isfinite(value).all() for value in found.values())


def test_shift_scores_each_token_against_the_next_label() -> None:
    hidden = torch.randn(3, 11, D, dtype=torch.float64)
    weight = torch.randn(V, D, dtype=torch.float64)
    labels = torch.randint(0, V, (3, 11))
    labels[1, 4] = -100
    shifted = linear_cross_entropy(hidden, weight, labels, shift=True)
    by_hand = F.cross_entropy((hidden[:, :-1] @ weight.T).flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(shifted, by_hand, rtol=1e-12, atol=0)


def test_shift_moves_token_weights_with_the_labels() -> None:
    hidden, weight = torch.randn(2, 9, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    labels, weights = torch.randint(0, V, (2, 9)), torch.rand(2, 9, dtype=torch.float64)
    ours = linear_cross_entropy(hidden, weight, labels, shift=True, token_weights=weights, reduction="sum")
    losses = F.cross_entropy(
        (hidden[:, :-1] @ weight.T).flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    )
    torch.testing.assert_close(ours, (losses * weights[:, 1:].flatten()).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("hidden_grad", "weight_grad"), [(True, False), (False, True), (False, False)])
def test_frozen_parts(hidden_grad: bool, weight_grad: bool) -> None:
    problem = make()
    whole, part = problem.to(torch.float64), problem.to(torch.float64)
    our_loss(whole, method="exact").backward()
    part.hidden.requires_grad_(hidden_grad)
    part.weight.requires_grad_(weight_grad)
    loss = our_loss(part, method="exact")
    assert loss.requires_grad == (hidden_grad or weight_grad)
    if loss.requires_grad:
        loss.backward()
    for name, wanted in (("hidden", hidden_grad), ("weight", weight_grad)):
        grad = getattr(part, name).grad
        assert (grad is not None) == wanted
        if wanted:
            assert torch.equal(grad, getattr(whole, name).grad)


def test_second_backward_gives_the_same_gradients() -> None:
    problem = make().to(torch.float32)
    loss = our_loss(problem, method="exact")
    loss.backward(retain_graph=True)
    first = problem.weight.grad.clone()
    loss.backward()
    assert torch.equal(problem.weight.grad, 2 * first)


def test_tied_weight_gets_both_gradients() -> None:
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, V, (N,))
    linear_cross_entropy(F.embedding(ids, weight), weight, ids.roll(1), method="exact").backward()
    ours, weight.grad = weight.grad, None
    F.cross_entropy(F.embedding(ids, weight) @ weight.T, ids.roll(1)).backward()
    torch.testing.assert_close(ours, weight.grad, rtol=1e-10, atol=1e-12)


def test_autocast_takes_float32_weights() -> None:
    problem = make().to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = our_loss(problem, method="exact")
    loss.backward()
    low = make_like(problem, torch.bfloat16)
    expected = our_loss(low, method="exact")
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert problem.weight.grad.dtype == torch.float32


def make_like(problem: Problem, dtype: torch.dtype) -> Problem:
    return Problem(problem.hidden, problem.weight, problem.bias, problem.labels).to(dtype)


def test_reference_returns_what_exact_does_not_yet() -> None:
    problem = make().to(torch.float64)
    losses, lse = our_loss(problem, method="reference", reduction="none", return_lse=True)
    logits = problem.hidden @ problem.weight.T
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-12, atol=0)
    expected = F.cross_entropy(logits, problem.labels, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"method": "recompute"}, "method='recompute'"),
        ({"method": "filtered"}, "method='filtered'"),
        ({"reduction": "none"}, "reduction='none'"),
        ({"return_lse": True}, "return_lse"),
        ({"filter_eps": 1e-4}, "filter_eps"),
        ({"group": object()}, "group="),
    ],
)
def test_what_is_not_there_yet_is_named(option: dict, named: str) -> None:
    problem = make().to(torch.float32)
    with pytest.raises(NotImplementedError, match=named.replace("(", r"\(")):
        our_loss(problem, **option)


def test_a_label_outside_the_vocabulary_raises() -> None:
    problem = make().to(torch.float32)
    problem.labels[5] = V
    with pytest.raises(ValueError, match=rf"labels\[5\]={V}.*vocabulary of {V}"):
        our_loss(problem)


@pytest.mark.gpu
def test_a_label_outside_the_vocabulary_is_nan_on_a_gpu() -> None:
    hidden, weight = torch.randn(8, 16, device="cuda"), torch.randn(32, 16, device="cuda")
    labels = torch.arange(8, device="cuda")
    labels[3] = 32
    assert linear_cross_entropy(hidden, weight, labels).isnan()


def test_all_problems_with_the_arguments_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"labels \(3,\).*must be integers.*cast one"):
        linear_cross_entropy(torch.randn(4, D), torch.randn(V, D).double(), torch.zeros(3))
    with pytest.raises(ValueError, match=r"softcap.*label_smoothing.*z_loss.*reduction"):
        linear_cross_entropy(
            torch.randn(4, D),
            torch.randn(V, D),
            torch.zeros(4, dtype=torch.long),
            softcap=-1.0,
            label_smoothing=1.0,
            z_loss=-1.0,
            reduction="avg",
        )


def test_chunks_fit_their_memory() -> None:
    options = LossOptions()
    # 128,256 words in bf16: 4 bytes in float32 and 2 in bf16 for each logit.
    assert chunk_tokens(128256, torch.bfloat16, options, 2048) * 128256 * 6 <= 2**31
    assert chunk_tokens(128256, torch.bfloat16, options, 2048) > 2048
    assert chunk_tokens(10**9, torch.float32, options, 1) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_real_sizes_on_a_gpu(dtype: torch.dtype) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    num_tokens, vocab_size, width = 1025, 32003, 520
    hidden = torch.randn(num_tokens, width, device="cuda").bfloat16().double()
    weight = (torch.randn(vocab_size, width, device="cuda") * 0.1).bfloat16().double()
    labels = torch.randint(0, vocab_size, (num_tokens,), device="cuda")
    labels[::7] = -100
    problem = Problem(hidden, weight, torch.zeros(vocab_size, device="cuda"), labels)
    check(problem, dtype, method="exact", memory_mib=64)
