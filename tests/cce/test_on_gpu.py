"""`linear_cross_entropy` on a GPU at the sizes of real heads: as right as eager, as frugal as it says."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from gpu_problems import Shape, gradients, leaves, make, our_loss, plain_losses
from numerics import relative_error
from torch import Tensor
from torch.nn import functional as F

from longseq.cce import FilterReport

GIB, MIB = 2**30, 2**20
NAN = float("nan")
UPSTREAM = 1 / 400
EPS = 2**-12
"""What `filter_eps="auto"` is in bfloat16."""


def _gpu() -> tuple[int, float]:
    """Compute capability and memory in GiB of the GPU, if there is one."""
    if not torch.cuda.is_available():
        return 0, 0.0
    return torch.cuda.get_device_capability()[0], torch.cuda.get_device_properties(0).total_memory / GIB


HAS_KERNELS = _gpu()[0] in (9, 10)
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="needs a GPU of compute capability 9 or 10")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_gpu()[1] < 70, reason="float64 at real sizes needs a GPU of 80 GB"),
]

METHODS = {
    "exact": {"method": "exact"},
    "exact, in chunks": {"method": "exact", "memory_mib": 300},
    "exact, the weight in backward": {"method": "exact", "memory_mib": 16},
    "exact, all in backward": {"method": "exact", "memory_mib": 100},
    "recompute": {"method": "recompute"},
    "filtered": {"method": "filtered"},
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


SHAPES = {
    "Llama 3": Shape(1025, 128256, 4096),
    "Gemma 2": Shape(1025, 256000, 2304, options={"softcap": 30.0}),
    "GPT-2 with a bias": Shape(4500, 50257, 1000, bias=True),
    "LoRA": Shape(1025, 128256, 2048, rank=16),
}
SMALL = Shape(4500, 50257, 1000, bias=True, rank=8, options={"softcap": 30.0})


@dataclass
class Truth:
    """What is right for the mean loss, and how far eager is from it."""

    shape: Shape
    parts: dict[str, Tensor]
    labels: Tensor
    values: dict[str, Tensor]  # loss and gradients, float64
    eager: dict[str, float]  # relative errors
    small: dict[str, float]  # share of the gradient that a filter may drop, at most
    small_probability: float  # of a token, in words below the threshold


def find_truth(shape: Shape) -> Truth:
    parts, labels = make(shape)
    counts = (labels != -100).sum()
    found = {}
    for dtype in (torch.float64, torch.bfloat16):
        own = leaves(parts, dtype)
        losses, logits, raw = plain_losses(own, labels, shape)
        total = losses.sum() / counts
        if dtype == torch.float64:
            small, small_probability = small_part(total, logits, raw, labels, own)
        (total * UPSTREAM).backward()
        found[dtype] = {"loss": total.detach(), **gradients(own)}
        del losses, logits, raw, total, own
    truth = found[torch.float64]
    eager = {name: relative_error(value, truth[name]) for name, value in found[torch.bfloat16].items()}
    return Truth(shape, parts, labels, truth, eager, small, small_probability)


def small_part(
    total: Tensor, logits: Tensor, raw: Tensor, labels: Tensor, parts: dict[str, Tensor]
) -> tuple[dict[str, float], float]:
    """Norm of what words below the threshold give each gradient, over that of all; and their probability."""
    counts = labels != -100
    probabilities = logits.detach().softmax(1)
    is_small = (probabilities < EPS) & counts.unsqueeze(1)
    probability = float(probabilities[is_small].sum() / counts.sum())
    is_small.scatter_(1, labels.clamp(min=0).unsqueeze(1), False)
    (of_logits,) = torch.autograd.grad(total, raw, retain_graph=True)
    tensors = list(parts.values())
    whole = torch.autograd.grad(raw, tensors, of_logits, retain_graph=True)
    part = torch.autograd.grad(raw, tensors, of_logits * is_small, retain_graph=True)
    shares = zip(parts, part, whole, strict=True)
    return {name: float(some.norm() / every.norm()) for name, some, every in shares}, probability


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES.keys())
def truth(request: pytest.FixtureRequest) -> Iterator[Truth]:
    yield find_truth(request.param)
    gc.collect()
    torch.cuda.empty_cache()


@each_method
def test_as_right_as_eager(method: dict, truth: Truth) -> None:
    """A low-rank pair is trained beside a weight that is not."""
    parts, report = leaves(truth.parts), FilterReport()
    if truth.shape.rank:
        parts["weight"].requires_grad_(False)
    filtered = method["method"] == "filtered"
    options = {**method, "filter_report": report} if filtered else method
    loss = our_loss(parts, truth.labels, truth.shape, **options)
    (loss * UPSTREAM).backward()
    found = {"loss": loss.detach(), **gradients(parts)}
    assert set(found) == set(truth.values) - ({"weight"} if truth.shape.rank else set())
    for name, value in found.items():
        error, eager = relative_error(value, truth.values[name]), truth.eager[name]
        # Where eager's own error in a scalar is small by luck; the kernels do not round logits to bfloat16.
        allowed = 1.2 * eager + (1e-4 if name != "loss" else 5e-5 if HAS_KERNELS else 1e-3)
        if filtered and name != "loss":
            allowed += 1.1 * truth.small[name]
        print(f"{name}: relative error {error:.2e}, eager {eager:.2e}, allowed {allowed:.2e}")
        assert error <= allowed, f"{name}: relative error {error:.2e}, eager {eager:.2e}"
    if filtered:
        assert 0 < report.living_share <= 1
        assert report.dropped_probability <= truth.small_probability + 1e-3


def test_filter_of_many_tokens() -> None:
    """Enough of them for the words to be put in order first; their places in the vocabulary are random."""
    shape = Shape(4500, 32000, 1024, bias=True)
    parts, labels = make(shape)
    shuffled = torch.randperm(32000, device="cuda")
    parts["weight"], parts["bias"] = parts["weight"][shuffled], parts["bias"][shuffled]
    place = torch.empty_like(shuffled)
    place[shuffled] = torch.arange(32000, device="cuda")
    labels = torch.where(labels >= 0, place[labels.clamp(min=0)], labels)
    wide, narrow, ours = leaves(parts, torch.float64), leaves(parts), leaves(parts)
    losses, logits, raw = plain_losses(wide, labels, shape)
    small, _ = small_part(losses.sum(), logits, raw, labels, wide)
    losses.sum().backward()
    plain_losses(narrow, labels, shape)[0].sum().backward()
    our_loss(ours, labels, shape, method="filtered", reduction="sum").backward()
    for name, part in ours.items():
        error, eager = (relative_error(p.grad, wide[name].grad) for p in (part, narrow[name]))
        assert error <= 1.2 * eager + 1.1 * small[name] + 1e-4, f"{name}: {error:.2e}, eager {eager:.2e}"


def test_a_loss_for_each_token() -> None:
    """`reduction="none"`, with an upstream gradient that differs from token to token."""
    shape = Shape(513, 256000, 2304, options={"softcap": 30.0})
    parts, labels = make(shape)
    upstream = torch.randn(shape.num_tokens, device="cuda")
    found = []
    for dtype in (torch.float64, torch.bfloat16, None):  # None: ours
        own = leaves(parts, dtype)
        if dtype is None:
            losses = our_loss(own, labels, shape, reduction="none", method="recompute")
        else:
            losses = plain_losses(own, labels, shape)[0]
        (losses * upstream).sum().backward()
        found.append({"loss": losses.detach(), **gradients(own)})
    true, eager, ours = found
    assert not ours["loss"][labels == -100].any()
    for name, value in ours.items():
        error, plain = relative_error(value, true[name]), relative_error(eager[name], true[name])
        assert error <= 1.2 * plain + 1e-4, f"{name}: relative error {error:.2e}, eager {plain:.2e}"


def test_tokens_that_the_model_is_sure_of() -> None:
    """Losses of about a thousandth: what is left of their gradients is as right as eager's."""
    num_tokens, vocab_size, width = 256, 32000, 4096
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(vocab_size, width, generator=generator, device="cuda") / width**0.5
    labels = torch.randint(0, vocab_size, (num_tokens,), generator=generator, device="cuda")
    hidden = torch.randn(num_tokens, width, generator=generator, device="cuda") + 18.0 * weight[labels]
    parts = {"hidden": hidden.bfloat16(), "weight": weight.bfloat16()}
    shape = Shape(num_tokens, vocab_size, width)

    def of_hidden(dtype: torch.dtype, method: str | None = None) -> Tensor:
        own = leaves(parts, dtype)
        if method is None:
            plain_losses(own, labels, shape)[0].sum().backward()
        else:
            our_loss(own, labels, shape, method=method, reduction="sum").backward()
        return own["hidden"].grad.double()

    true = of_hidden(torch.float64)

    def error(gradient: Tensor) -> float:
        return float(((gradient - true).norm(dim=1) / true.norm(dim=1)).square().mean().sqrt())

    eager = error(of_hidden(torch.bfloat16))
    for method in ("exact", "recompute"):
        ours = error(of_hidden(torch.bfloat16, method))
        print(f"{method}: relative error of a token's gradient {ours:.2e}, eager {eager:.2e}")
        assert ours <= 1.2 * eager, f"{method}: relative error {ours:.2e}, eager {eager:.2e}"


LARGE = {
    "exact": {"method": "exact"},
    "recompute": {"method": "recompute"},
    "filtered": {"method": "filtered", "filter_eps": 1e-30},
}


@pytest.mark.parametrize("method", LARGE.values(), ids=LARGE.keys())
def test_more_than_2_to_the_31_logits(method: dict) -> None:
    """The last tokens of a chunk too large for 32-bit offsets get what they get alone."""
    shape, last = Shape(20480, 256000, 256), 128
    assert shape.num_tokens * shape.vocab_size > 2 * 2**31
    parts, labels = make(shape)
    labels[-last:].clamp_(min=0)
    weights = torch.zeros(shape.num_tokens, device="cuda")
    weights[-last:] = 1.0
    large, alone = leaves(parts), leaves({**parts, "hidden": parts["hidden"][-last:]})
    options = {**method, "memory_mib": 24000, "reduction": "sum"}
    loss = our_loss(large, labels, shape, token_weights=weights, **options)
    loss.backward()
    expected = our_loss(alone, labels[-last:].clone(), shape, **options)
    expected.backward()
    assert relative_error(loss, expected) < 1e-5
    assert not large["hidden"].grad[:-last].any()
    assert relative_error(large["hidden"].grad[-last:], alone["hidden"].grad) < 5e-3
    assert relative_error(large["weight"].grad, alone["weight"].grad) < 5e-3


@each_method
def test_cuda_graph(method: dict) -> None:
    """A captured step, replayed with other hidden states and other ignored tokens, gives eager's bits."""
    parts, labels = make(SMALL)
    parts = leaves(parts)

    def step() -> list[Tensor]:
        loss = our_loss(parts, labels, SMALL, **method)
        return [loss, *torch.autograd.grad(loss, list(parts.values()))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        parts["hidden"].copy_(parts["hidden"].flip(0))
        labels.copy_(labels.flip(0))
        labels[::3] = -100
    graph.replay()
    for ours, expected in zip(captured, step(), strict=True):
        assert ours.isfinite().all()
        assert torch.equal(ours, expected)


WAYS = {
    **METHODS,
    "auto with a filter": {"filter_eps": 2**-12},
    "each token": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1, "z_loss": 1e-4},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_step_waits_for_nothing(way: dict) -> None:
    parts, labels = make(SMALL)
    parts = leaves(parts)

    def step() -> None:
        our_loss(parts, labels, SMALL, **way).sum().backward()

    step()
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_method
def test_same_bits_twice(method: dict) -> None:
    parts, labels = make(SMALL)
    found = []
    for _ in range(2):
        own = leaves(parts)
        loss = our_loss(own, labels, SMALL, **method)
        loss.backward()
        found.append([loss.detach(), *gradients(own).values()])
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("method", [{"method": m} for m in ("exact", "recompute", "filtered")], ids=str)
def test_backward_twice(method: dict) -> None:
    parts, labels = make(SMALL)
    parts = leaves(parts)
    loss = our_loss(parts, labels, SMALL, **method)
    first = torch.autograd.grad(loss, list(parts.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(parts.values()), 0.5 * torch.ones_like(loss))
    for once, half in zip(first, second, strict=True):
        assert relative_error(half, once.double() * 0.5) < 5e-3


@each_method
def test_a_label_that_is_no_word(method: dict) -> None:
    """Looking would stall the step: it is told by NaN, in the loss and in what the token reaches."""
    parts, labels = make(SMALL)
    labels[5] = SMALL.vocab_size
    own = leaves(parts)
    loss = our_loss(own, labels, SMALL, **method)
    loss.backward()
    assert loss.isnan()
    assert own["hidden"].grad[5].isnan().all()
    assert own["weight"].grad.isnan().any()
    with (
        torch.autograd.detect_anomaly(check_nan=False),
        pytest.raises(ValueError, match=r"labels\[5\]=50257"),
    ):
        our_loss(own, labels, SMALL, **method)


def test_ignored_tokens_may_hold_anything() -> None:
    shape = SHAPES["GPT-2 with a bias"]
    parts, labels = make(shape)
    parts["hidden"][labels == -100] = NAN
    own = leaves(parts)
    loss = our_loss(own, labels, shape, method="exact")
    loss.backward()
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(own).values())
    assert not own["hidden"].grad[labels == -100].any()


LAYOUTS = {
    "hidden states by columns": lambda p: {**p, "hidden": p["hidden"].T.contiguous().T},
    "weight by columns": lambda p: {**p, "weight": p["weight"].T.contiguous().T},
    "rows of an odd length": lambda p: {n: F.pad(t, (0, 3))[..., : t.shape[-1]] for n, t in p.items()},
    "rows that begin anywhere": lambda p: {n: F.pad(t, (1, 2))[..., 1:-2] for n, t in p.items()},
    "a bias of every second": lambda p: {**p, "bias": p["bias"].repeat_interleave(2)[::2]},
    "a low-rank pair by columns": lambda p: {**p, "lora_b": p["lora_b"].T.contiguous().T},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("method", ["exact", "recompute"])
def test_layouts(method: str, layout: object) -> None:
    """Where a tensor's numbers lie in memory changes nothing."""
    parts, labels = make(SMALL)
    expected, ours = leaves(parts), {n: p.detach().requires_grad_() for n, p in layout(parts).items()}
    for own in (expected, ours):
        our_loss(own, labels, SMALL, method=method).backward()
    for name, part in expected.items():
        assert torch.equal(ours[name], part)
        assert relative_error(ours[name].grad, part.grad) < 2e-2, name


@pytest.mark.parametrize("method", ["exact", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(dtype: torch.dtype, method: str) -> None:
    """With a loss scale, as float16 is trained."""
    shape = Shape(1025, 50257, 1024, bias=True)
    parts, labels = make(shape, dtype)
    found = []
    for own_dtype in (torch.float64, dtype, None):
        own = leaves(parts, own_dtype)
        if own_dtype is None:
            loss = our_loss(own, labels, shape, method=method)
        else:
            loss = plain_losses(own, labels, shape)[0].sum() / (labels != -100).sum()
        (loss * 1024.0).backward()
        found.append({"loss": loss.detach(), **gradients(own)})
    true, eager, ours = found
    for name, value in ours.items():
        error, plain = relative_error(value, true[name]), relative_error(eager[name], true[name])
        allowed = 1.5 * plain + (5e-5 if name == "loss" and dtype == torch.float16 else 1e-6)
        assert error <= allowed, f"{name}: relative error {error:.2e}, eager {plain:.2e}"


@pytest.mark.parametrize("method", ["exact", "recompute", "filtered"])
def test_compiled(method: str) -> None:
    parts, labels = make(SMALL)
    torch._dynamo.reset()

    def total(parts: dict[str, Tensor]) -> Tensor:
        return our_loss(parts, labels, SMALL, method=method)

    eager, compiled = leaves(parts), leaves(parts)
    expected = total(eager)
    expected.backward()
    loss = torch.compile(total, fullgraph=True)(compiled)
    loss.backward()
    assert relative_error(loss, expected) < 1e-6
    for name, part in compiled.items():
        assert relative_error(part.grad, eager[name].grad) < 5e-3, name


def peak_mib(function: object) -> float:
    """The most memory that a call holds beside what is there before it; what one-time set-up takes is not."""
    function()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


FRUGAL = Shape(8192, 128256, 4096)


@needs_kernels
def test_memory_of_forward() -> None:
    """A loss without a gradient needs no logits, nor a chunk of them."""
    parts, labels = make(FRUGAL)
    with torch.no_grad():
        assert peak_mib(lambda: our_loss(parts, labels, FRUGAL)) <= 8
        assert peak_mib(lambda: our_loss(parts, labels, FRUGAL, reduction="none")) <= 8


@needs_kernels
@pytest.mark.parametrize("memory_mib", [290, 1500, 2600])
@pytest.mark.parametrize("method", ["exact", "recompute"])
def test_memory_of_a_step(method: str, memory_mib: int) -> None:
    """`memory_mib` is what is used beside the gradients that are returned."""
    parts, labels = make(FRUGAL)
    parts = leaves(parts)
    of_gradients = sum(part.numel() * 2 for part in parts.values()) / MIB

    def step() -> None:
        for part in parts.values():
            part.grad = None
        our_loss(parts, labels, FRUGAL, method=method, memory_mib=memory_mib).backward()
        for part in parts.values():
            part.grad = None

    peak = peak_mib(step)
    print(f"peak {peak:.0f} MiB, {of_gradients:.0f} of them gradients")
    assert peak <= memory_mib + of_gradients + 8, f"{peak:.0f} MiB, {of_gradients:.0f} of them gradients"
