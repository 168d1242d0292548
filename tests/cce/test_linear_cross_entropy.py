"""What may be given to `linear_cross_entropy`: labels, frozen parts, autocast, a compiler; and errors."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from head_problems import METHODS, NO_FILTER, D, N, Problem, V, can, check, make, ours, results
from torch import Tensor
from torch.nn import functional as F

from longseq.cce import linear_cross_entropy, portable
from longseq.cce.chunks import filter_memory_mib
from longseq.cce.head import Needs

LABEL_OPTIONS = [
    {"bias": True},
    {"reduction": "sum", "token_weights": True},
    {"reduction": "none", "return_lse": True},
    {"z_loss": 0.1, "label_smoothing": 0.1, "softcap": 5.0},
]
BY_METHOD = [(method, options) for method in METHODS for options in LABEL_OPTIONS if can(method, options)]


def small() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(4, D), torch.randn(V, D, requires_grad=True), torch.randint(0, V, (4,))


@pytest.mark.parametrize(("method", "options"), BY_METHOD)
@pytest.mark.parametrize("num_tokens", [0, 5])
def test_no_token_that_counts_is_zero_with_zero_gradients(
    num_tokens: int, method: str, options: dict
) -> None:
    problem = make(num_tokens or 1, ignored="all", rank=3, **options)
    if not num_tokens:
        problem.parts["hidden"], labels = problem.parts["hidden"][:0], problem.labels[:0]
        weights = {"token_weights": torch.ones(0)} if "token_weights" in options else {}
        problem = Problem(problem.parts, labels, 1.0, {**problem.options, **weights})
    problem = problem.to(torch.float32)
    found = results(problem, ours(problem, method=method))
    assert {"hidden", "weight", "lora_a", "lora_b"} < found.keys()
    for name, value in found.items():
        assert torch.equal(value, torch.zeros_like(value)), name
    for name, part in problem.parts.items():
        assert found[name].shape == part.shape


@pytest.mark.parametrize("method", ["exact", "recompute", "filtered"])
def test_ignored_hidden_states_do_not_matter(method: str) -> None:
    clean, broken = make(bias=True).to(torch.float32), make(bias=True)
    broken.parts["hidden"][broken.labels == -100] = float("nan")
    broken = broken.to(torch.float32)
    expected = results(clean, ours(clean, method=method))
    for name, value in results(broken, ours(broken, method=method)).items():
        assert torch.equal(value, expected[name]), name


def test_an_ignored_word_is_still_a_word_of_the_softmax() -> None:
    """`ignore_index` may be a real word, such as padding: its row then has a gradient all the same."""
    problem = make(ignore_index=3)
    for method in METHODS:
        found = check(problem, method=method)
        assert found["weight"][3].any()
        assert not found["hidden"][problem.labels == 3].any()


def test_shift_scores_each_token_against_the_next_label() -> None:
    hidden, weight = torch.randn(3, 11, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    labels, weights = torch.randint(0, V, (3, 11)), torch.rand(3, 11, dtype=torch.float64)
    labels[1, 4] = -100
    by_hand = F.cross_entropy(
        (hidden[:, :-1] @ weight.T).flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    ).view(3, 10)
    shifted = linear_cross_entropy(hidden, weight, labels, shift=True, reduction="none")
    torch.testing.assert_close(shifted, F.pad(by_hand, (0, 1)), rtol=1e-12, atol=0)
    mean = linear_cross_entropy(hidden, weight, labels, shift=True)
    torch.testing.assert_close(mean, by_hand.sum() / 29, rtol=1e-12, atol=0)
    # Weights go with the labels: they are of the token that is predicted.
    weighed = linear_cross_entropy(hidden, weight, labels, shift=True, token_weights=weights, reduction="sum")
    torch.testing.assert_close(weighed, (by_hand * weights[:, 1:]).sum(), rtol=1e-12, atol=0)


INTEGERS = (torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


@pytest.mark.parametrize("vocab_size", [131, 300, 40000])
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_labels_of_any_integer_dtype(method: str, dtype: torch.dtype, vocab_size: int) -> None:
    """Also where the dtype cannot hold the number of words, or -100."""
    labels = torch.randint(0, 120, (N,))
    if dtype == torch.uint8 and vocab_size > 156:
        labels[3] = 156  # the byte that -100 is
    if dtype.is_signed:
        labels[5] = -100
    hidden, weight = torch.randn(N, 4), torch.randn(vocab_size, 4)
    for shift in (False, True):
        expected = linear_cross_entropy(hidden, weight, labels, method=method, shift=shift)
        found = linear_cross_entropy(hidden, weight, labels.to(dtype), method=method, shift=shift)
        assert torch.equal(found, expected)


def test_rows_without_a_token_can_be_shifted() -> None:
    labels = torch.zeros(2, 0, dtype=torch.long)
    found = linear_cross_entropy(
        torch.zeros(2, 0, D), torch.randn(V, D), labels, shift=True, reduction="none"
    )
    assert found.shape == (2, 0)


FROZEN = [parts for size in (1, 2) for parts in combinations(("hidden", "weight", "bias"), size)]


@pytest.mark.parametrize("options", [{}, {"reduction": "none", "return_lse": True}], ids=["mean", "none"])
@pytest.mark.parametrize("frozen", FROZEN, ids="+".join)
@pytest.mark.parametrize("method", METHODS)
def test_frozen_parts(method: str, frozen: tuple[str, ...], options: dict) -> None:
    if can(method, options):
        check(make(bias=True, softcap=4.0, **options), frozen=frozen, method=method)


@pytest.mark.parametrize("frozen", [(), *FROZEN, ("hidden", "weight", "lora_a"), ("lora_b",)])
@pytest.mark.parametrize("method", ["exact", "recompute", "filtered"])
def test_frozen_parts_cost_nothing(
    method: str, frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd would drop a gradient that nobody wants; it must not be made."""
    wanted, summed = [], portable._Sums.__init__

    def spy(self: object, tokens: object, head: object, needs: Needs, *rest: object) -> None:
        wanted.append(needs)
        summed(self, tokens, head, needs, *rest)

    monkeypatch.setattr(portable._Sums, "__init__", spy)
    problem = make(bias=True, rank=3).to(torch.float32, frozen)
    results(problem, ours(problem, method=method))
    trained = {name: part.requires_grad for name, part in problem.parts.items()}
    adapted = trained["lora_a"] or trained["hidden"]
    expected = Needs(trained["hidden"], trained["weight"], trained["bias"], adapted, trained["lora_b"])
    assert wanted[-1] == expected
    with torch.no_grad():
        ours(problem, method=method)
    assert wanted[-1] == Needs()


@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_train(method: str) -> None:
    everything_frozen = make(bias=True, rank=3).to(
        torch.float32, ("hidden", "weight", "bias", "lora_a", "lora_b")
    )
    trained = make(bias=True, rank=3).to(torch.float32)
    loss = ours(everything_frozen, method=method)[0]
    with torch.no_grad():
        quiet = ours(trained, method=method)[0]
    assert not loss.requires_grad
    assert not quiet.requires_grad
    torch.testing.assert_close(loss, ours(trained, method=method)[0].detach(), rtol=1e-6, atol=0)
    assert torch.equal(loss, quiet)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("method", METHODS)
def test_autocast_takes_float32_weights(method: str, rank: int, dtype: torch.dtype) -> None:
    """What is given in float32 is cast, also where a layer before made the hidden states low already."""
    low = make(bias=True, rank=rank, softcap=6.0).to(dtype)
    expected = results(low, ours(low, method=method))
    for hidden_dtype in (torch.float32, dtype):
        master = make(bias=True, rank=rank, softcap=6.0).to(torch.float32)
        hidden = master.parts["hidden"].detach().to(hidden_dtype).requires_grad_()
        master = Problem(master.parts | {"hidden": hidden}, master.labels, 1.0, master.options)
        with torch.autocast("cpu", dtype):
            answer = ours(master, method=method)
        found = results(master, answer)
        assert found["loss"].dtype == found["weight"].dtype == torch.float32
        for name, value in expected.items():
            assert torch.equal(found[name].to(value.dtype), value), name


@pytest.mark.parametrize("forward_too", [True, False])
@pytest.mark.parametrize(("method", "options"), [case for case in BY_METHOD if case[0] != "reference"])
def test_a_backward_inside_autocast_is_the_same(method: str, options: dict, forward_too: bool) -> None:
    found = []
    for inside in (False, True):
        problem = make(**options).to(torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=forward_too):
            answer = ours(problem, method=method)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            found.append(results(problem, answer))
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int64, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("method", METHODS)
def test_token_weights_of_any_dtype(method: str, dtype: torch.dtype) -> None:
    hidden, weight, labels = torch.randn(70001, 4), torch.randn(9, 4), torch.randint(0, 9, (70001,))
    weights = torch.ones(70001, dtype=dtype)  # more than float16 can count to
    weights[:100] = 0
    found = linear_cross_entropy(hidden, weight, labels, token_weights=weights, method=method)
    expected = F.cross_entropy(hidden[100:] @ weight.T, labels[100:])
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("option", ["token_weights", "bias"])
def test_the_reference_is_float32_whatever_is_beside_it(option: str) -> None:
    hidden, weight, labels = small()
    beside = torch.ones(4 if option == "token_weights" else V, dtype=torch.float64)
    found = linear_cross_entropy(hidden, weight, labels, method="reference", **{option: beside})
    assert found.dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_ignored_tokens_do_not_matter(method: str) -> None:
    problem, broken = make(token_weights=True), make(token_weights=True)
    broken.options["token_weights"][broken.labels == -100] = float("nan")
    assert torch.equal(ours(broken, method=method)[0], ours(problem, method=method)[0])


COMPILED = [(method, {"bias": True, "softcap": 5.0, "z_loss": 0.01}) for method in METHODS]
COMPILED += [("auto", {"shift": True}), ("auto", {"reduction": "none", "return_lse": True, "rank": 3})]
COMPILED += [
    ("exact", {"label_smoothing": 0.1, "rank": 3, "token_weights": True}),
    ("auto", {"filter_eps": 1e-20}),
]


@pytest.mark.parametrize(("method", "options"), COMPILED)
def test_compiles_without_a_graph_break(method: str, options: dict) -> None:
    """Forward and backward equal eager's, also at a second number of tokens."""
    torch._dynamo.reset()

    def run(problem: Problem) -> tuple[Tensor, Tensor | None]:
        return ours(problem, method=method)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for shape in ((4, 17), (3, 23)):
        eager, graph = (make(shape=shape, **options).to(torch.float32) for _ in range(2))
        expected = results(eager, run(eager))
        for name, value in results(graph, compiled(graph)).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("method", ["exact", "recompute", "filtered"])
def test_real_sizes_on_a_gpu(method: str, dtype: torch.dtype) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    problem = make(1025, 32003, 520, bias=True)
    parts = {name: part.cuda() for name, part in problem.parts.items()}
    options, memory_mib = {}, 64
    if method == "filtered":
        options, memory_mib = {"filter_eps": NO_FILTER}, filter_memory_mib(*parts["weight"].shape)
    check(Problem(parts, problem.labels.cuda(), 1.0, options), dtype, method=method, memory_mib=memory_mib)


@pytest.mark.parametrize("method", ["exact", "recompute"])
def test_a_compiler_is_told_of_the_layouts_that_come_back(method: str) -> None:
    """Hidden states and weight by columns: what a custom op promises of its outputs is what it returns."""
    hidden, weight = torch.randn(D, 40).T, torch.randn(D, V).T
    labels = torch.randint(0, V, (40,))
    empty = (None, None, None)  # bias, inner, outer
    needs = [True, True, False, False, False]
    if method == "exact":
        op, settings = "exact_loss", (torch.ones(40), None, 1.0, 0.0, 0.0, needs, None, 0.0, False)
        arguments = (hidden, weight, *empty, labels, *settings)
    else:
        op, ones = "head_statistics_backward", torch.ones(40)
        arguments = (hidden, weight, *empty, labels, ones, ones, ones, None, None, 1.0, needs, None)
    torch.library.opcheck(
        getattr(torch.ops.longseq, op).default, arguments, test_utils=("test_schema", "test_faketensor")
    )
