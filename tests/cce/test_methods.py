"""Every method against plain PyTorch in float64: loss and every gradient, for every option and dtype."""

from __future__ import annotations

import pytest
import torch
from head_problems import METHODS, D, N, V, can, check, make, objective, ours, plain, results
from numerics import assert_as_accurate_as
from torch.nn import functional as F

from longseq.cce import linear_cross_entropy

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "nothing": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "bias": {"bias": True},
    "ignore_index": {"ignore_index": 7},
    "shift": {"shift": True},
    "softcap": {"softcap": 2.0},
    "logit_scale": {"logit_scale": 0.37},
    "smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.05},
    "token_weights": {"token_weights": True},
    "return_lse": {"return_lse": True},
}
EVERYTHING = {
    "bias": True,
    "ignore_index": -1,
    "shift": True,
    "softcap": 3.0,
    "logit_scale": 1.7,
    "z_loss": 0.01,
    "token_weights": True,
}
OPTIONS |= {
    "everything": EVERYTHING,
    "everything and smoothing": EVERYTHING | {"label_smoothing": 0.1, "reduction": "sum"},
    "everything per token": EVERYTHING | {"label_smoothing": 0.1, "reduction": "none", "return_lse": True},
}
CASES = [(method, name) for method in METHODS for name, options in OPTIONS.items() if can(method, options)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("method", "name"), CASES)
def test_options(method: str, name: str, dtype: torch.dtype) -> None:
    # Each has roundings of its own: of two float32 results, either may by luck be the nearer one.
    found = check(make(**OPTIONS[name]), dtype, slack=2.0, method=method)
    assert found["loss"].dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("upstream", [1 / 400, 8.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_upstream_gradient(method: str, dtype: torch.dtype, upstream: float) -> None:
    check(make(upstream=upstream, bias=True), dtype, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_float16_gradients_survive_a_loss_scale(method: str) -> None:
    # A mean over many tokens makes gradients that float16 cannot hold until the loss scale reaches them.
    problem = make(ignored="none", upstream=2.0**14)
    problem.parts["hidden"].mul_(2.0**-10)
    check(problem, torch.float16, method=method)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_row_of_a_rare_word_is_as_accurate_as_the_others(method: str, dtype: torch.dtype) -> None:
    """Its gradient is a sum that one token dominates, small beside the matrix: a norm would not see it."""
    problem = make(600, 260, 48, ignored="none", reduction="sum")
    # A Zipf-like text: the last words are labels once, or never.
    labels = (260 * torch.rand(600) ** 3).long().clamp(max=239)
    labels[-3:] = torch.tensor([240, 250, 259])
    problem.labels.copy_(labels)
    true, low, mine = (problem.to(d) for d in (torch.float64, dtype, dtype))
    truth, theirs = results(true, plain(true))["weight"], results(low, plain(low))["weight"]
    found = results(mine, ours(mine, method=method))["weight"]
    for word in (240, 250, 259, 245, 0):
        assert_as_accurate_as(found[word], theirs[word], truth[word], slack=2.0, name=f"word {word}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_bias_with_wide_hidden_states(method: str, dtype: torch.dtype) -> None:
    # A kernel that adds the bias once a block of the width is right up to one block.
    check(make(33, 70, 700, bias=True), dtype, method=method)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_softcap_of_gemma_2(method: str, dtype: torch.dtype) -> None:
    problem = make(softcap=30.0)
    problem.parts["weight"].mul_(16.0)  # logits of some 25: the cap bends the larger ones
    check(problem, dtype, method=method)
    with_cap, without = ours(problem), ours(problem, softcap=None)
    assert not torch.isclose(with_cap[0], without[0], rtol=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_logits_of_thousands_do_not_overflow(method: str) -> None:
    problem = make(bias=True)
    problem.parts["weight"].mul_(4096.0)
    check(problem, torch.float32, method=method)


@pytest.mark.parametrize(
    ("num_tokens", "vocab_size", "width"), [(1, V, D), (N, 1, D), (N, V, 1), (1, 1, 1), (130, 257, 3)]
)
@pytest.mark.parametrize("method", METHODS)
def test_sizes(method: str, num_tokens: int, vocab_size: int, width: int) -> None:
    problem = make(num_tokens, vocab_size, width, ignored="none", bias=True)
    check(problem, torch.float64, method=method)
    check(problem, torch.bfloat16, method=method)


@pytest.mark.parametrize("shape", [(3, 11), (2, 3, 5), (5, 1)])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_hidden_states_of_any_shape(method: str, shift: bool, shape: tuple[int, ...]) -> None:
    check(make(shape=shape, shift=shift, token_weights=True, ignored="none"), method=method)
    if can(method, {"reduction": "none"}):
        options = {"reduction": "none", "return_lse": True}
        found = check(make(shape=shape, shift=shift, ignored="none", **options), method=method)
        assert found["loss"].shape == found["lse"].shape == shape


@pytest.mark.parametrize("method", METHODS)
def test_one_token_without_a_dimension(method: str) -> None:
    hidden, weight = torch.randn(D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    reduction = "none" if can(method, {"reduction": "none"}) else "mean"
    found = linear_cross_entropy(hidden, weight, torch.tensor(5), method=method, reduction=reduction)
    assert found.shape == ()
    torch.testing.assert_close(found, F.cross_entropy(weight @ hidden, torch.tensor(5)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_tensors_that_are_not_contiguous(method: str, dtype: torch.dtype) -> None:
    problem = make(bias=True, rank=3, token_weights=True)
    strided = {name: part.mT.contiguous().mT for name, part in problem.parts.items() if part.dim() == 2}
    strided["bias"] = problem.parts["bias"].repeat_interleave(2)[::2]
    spread = problem.options["token_weights"].repeat_interleave(3)[::3]
    labels = problem.labels.repeat_interleave(2)[::2]
    transposed = type(problem)(strided, labels, 1.0, {"token_weights": spread}).to(dtype)
    assert not any(part.is_contiguous() for part in transposed.parts.values() if part.dim() == 2)
    found = results(transposed, ours(transposed, method=method))
    straight = problem.to(dtype)
    expected = results(straight, plain(straight))
    true = problem.to(torch.float64)
    for name, truth in results(true, plain(true)).items():
        assert_as_accurate_as(found[name], expected[name], truth, name=name)


@pytest.mark.parametrize("method", METHODS)
def test_a_slice_of_a_wider_weight(method: str) -> None:
    # Padding words that are cut off, and a batch whose rows were cut.
    weight = torch.randn(V + 9, D, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(4, 20, D, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, V, (4, 20))
    options = {"filter_eps": 1e-30} if method == "filtered" else {}
    found = linear_cross_entropy(hidden[:, 3:-2], weight[:V], labels[:, 3:-2], method=method, **options)
    expected = F.cross_entropy((hidden[:, 3:-2] @ weight[:V].T).flatten(0, 1), labels[:, 3:-2].flatten())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    pairs = zip(
        torch.autograd.grad(found, (hidden, weight)),
        torch.autograd.grad(expected, (hidden, weight)),
        strict=True,
    )
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("options", [{"bias": True, "rank": 3}, EVERYTHING | {"rank": 8}])
@pytest.mark.parametrize("method", METHODS)
def test_little_memory_gives_the_same(method: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make(300, 517, D, **options)
    whole = check(problem, method=method)
    small = check(problem, method=method, memory_mib=1)  # of some 100 tokens a chunk
    monkeypatch.setattr("longseq.cce.portable.chunk_tokens", lambda *args, **kwargs: 13)
    tiny = check(problem, method=method)
    for name, value in whole.items():
        torch.testing.assert_close(small[name], value, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(tiny[name], value, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["exact", "recompute"])
def test_many_chunks_are_summed_in_float32(
    method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum that is kept in the head's dtype rounds once a chunk: that is what ruins rare words elsewhere."""
    monkeypatch.setattr("longseq.cce.portable.chunk_tokens", lambda *args, **kwargs: 8)
    check(make(800, bias=True, rank=3), dtype, but=["loss"], method=method)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_two_calls_add_up(method: str, dtype: torch.dtype) -> None:
    problem = make(bias=True).to(dtype)
    for upstream in (1.0, -3.0):
        (ours(problem, method=method)[0] * upstream).backward()
    once = make(bias=True).to(dtype)
    (ours(once, method=method)[0] * -2.0).backward()
    for name, part in problem.parts.items():
        tolerance = 16 * torch.finfo(dtype).eps
        scale = once.parts[name].grad.abs().max().item()
        torch.testing.assert_close(part.grad, once.parts[name].grad, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("options", [{"memory_mib": None}, {"memory_mib": 1}])
@pytest.mark.parametrize("method", METHODS)
def test_a_second_backward_gives_the_same_gradients(method: str, options: dict) -> None:
    problem = make(bias=True, rank=3).to(torch.float32)
    loss = ours(problem, method=method, **options)[0]
    leaves = list(problem.parts.values())
    (loss * 4.0).backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves]
    again = torch.autograd.grad(loss, leaves, grad_outputs=torch.tensor(4.0))
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("method", METHODS)
def test_tied_weights_get_both_gradients(method: str) -> None:
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, V, (N,))
    options = {"filter_eps": 1e-30} if method == "filtered" else {}
    loss = linear_cross_entropy(F.embedding(ids, weight), weight, ids.roll(1), method=method, **options)
    (found,) = torch.autograd.grad(loss, weight)
    (expected,) = torch.autograd.grad(
        F.cross_entropy(F.embedding(ids, weight) @ weight.T, ids.roll(1)), weight
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_are_those_of_finite_differences(reduction: str) -> None:
    """Of the loss and the log-sum-exp, for any upstream gradient of each."""
    options = {
        "softcap": 3.0,
        "label_smoothing": 0.1,
        "z_loss": 0.1,
        "logit_scale": 1.3,
        "reduction": reduction,
    }
    problem = make(5, 6, 3, bias=True, rank=2, return_lse=True, token_weights=True, **options).to(
        torch.float64
    )

    def function(*leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parts = dict(zip(problem.parts, leaves, strict=True))
        return ours(type(problem)(parts, problem.labels, 1.0, problem.options), method="recompute")

    assert torch.autograd.gradcheck(function, tuple(problem.parts.values()))


def test_the_log_sum_exp_alone_can_be_trained_on() -> None:
    problem = make(return_lse=True).to(torch.float64)
    true = make(return_lse=True).to(torch.float64)
    ours(problem, method="recompute")[1].square().mean().backward()
    plain(true)[1].square().mean().backward()
    for name in ("hidden", "weight"):
        torch.testing.assert_close(problem.parts[name].grad, true.parts[name].grad, rtol=1e-10, atol=1e-14)
    assert not problem.parts["hidden"].grad[problem.labels == -100].any()


def test_exact_and_recompute_are_one_loss() -> None:
    """In the same dtype, beyond what the truth can tell: a user may change the method in mid-training."""
    problem = make(400, 300, 64, z_loss=0.01, bias=True)
    found = [
        results(p, ours(p, method=m))
        for p, m in ((problem.to(torch.float32), m) for m in ("exact", "recompute", "filtered"))
    ]
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-8)


def test_objective_weighs_tokens_differently() -> None:
    """The helper's upstream gradients must not be all alike, or a mixed-up order would pass."""
    problem = make(reduction="none").to(torch.float64)
    losses = ours(problem)[0]
    (upstream,) = torch.autograd.grad(objective(problem, (losses, None)), losses)
    assert upstream.unique().numel() == N
