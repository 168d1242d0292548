"""Method `filtered`: what it may leave out of the gradient, what it must not, and what it says about it."""

from __future__ import annotations

import math

import pytest
import torch
from head_problems import make, ours, plain, results
from torch import Tensor
from torch.nn import functional as F

from longseq.cce import FilterReport, linear_cross_entropy
from longseq.cce.filtered import resolve_eps

NUM_TOKENS, NUM_WORDS = 300, 517  # three tiles by five, the last ones of a few rows
EPS = [0.3, 1e-2, 1e-3, 1e-5]
GUARDED = {
    "nothing": {},
    "everything": {"softcap": 20.0, "logit_scale": 0.8, "z_loss": 0.02, "bias": True, "token_weights": True},
}


def logits_of_a_text() -> tuple[Tensor, Tensor]:
    """Logits whose words are the less likely the later they are; labels of common words, and a few rare."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(NUM_TOKENS, NUM_WORDS, generator=generator, dtype=torch.float64) * 2.0
    logits -= torch.arange(NUM_WORDS) / 30.0
    labels = (torch.rand(NUM_TOKENS, generator=generator) ** 4 * 128).long()
    labels[::50] = torch.tensor([200, 300, 516, 127, 128, 383])
    labels[5:40] = -100
    return logits, labels


def d_logits(way: str, **options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of each logit, as the gradient of the hidden states or of the weight: the other is 1.

    Returns:
        The loss, that gradient, the softmax, and the labels.
    """
    logits, labels = logits_of_a_text()
    has_bias = options.pop("bias", False)
    bias = torch.linspace(-1.0, 1.0, NUM_WORDS, dtype=torch.float64) if has_bias else None
    if options.pop("token_weights", False):
        options["token_weights"] = torch.linspace(0.1, 2.0, NUM_TOKENS, dtype=torch.float64)
    if way == "hidden":
        hidden, weight = logits.requires_grad_(), torch.eye(NUM_WORDS, dtype=torch.float64)
        trained = hidden
    else:
        hidden, weight = torch.eye(NUM_TOKENS, dtype=torch.float64), logits.T.contiguous().requires_grad_()
        trained = weight
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, **options)
    (gradient,) = torch.autograd.grad(loss, trained)
    z = (logits.detach() + (0 if bias is None else bias)) * options.get("logit_scale", 1.0)
    if options.get("softcap"):
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    return loss.detach(), gradient if way == "hidden" else gradient.T, z.softmax(-1), labels


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("options", GUARDED.values(), ids=GUARDED.keys())
@pytest.mark.parametrize("way", ["hidden", "weight"])
def test_what_is_left_out_is_below_the_threshold(way: str, options: dict, eps: float) -> None:
    loss, found, softmax, labels = d_logits(way, method="filtered", filter_eps=eps, **options)
    exact_loss, whole, _, _ = d_logits(way, method="exact", **options)
    assert torch.equal(loss, exact_loss)
    missing = (found == 0) & (whole != 0)
    assert missing.any()
    assert (softmax[missing] < eps).all()
    # What is kept is as it was; a label's term is always kept, and keeps nothing else.
    torch.testing.assert_close(found[~missing], whole[~missing], rtol=1e-12, atol=0)
    tokens = (labels != -100).nonzero().squeeze(-1)
    assert not missing[tokens, labels[tokens]].any()
    of_labels_tile = labels.unsqueeze(-1) // 128 == torch.arange(NUM_WORDS) // 128
    assert (missing & of_labels_tile).any()


def test_a_higher_threshold_leaves_out_more() -> None:
    reports = []
    for eps in EPS:
        reports.append(FilterReport())
        d_logits("hidden", method="filtered", filter_eps=eps, filter_report=reports[-1])
    shares = [report.living_share for report in reports]
    assert shares == sorted(shares)
    assert shares[0] < shares[1] < shares[-1] < 1.0
    dropped = [report.dropped_probability for report in reports]
    assert dropped[0] > dropped[1] > dropped[-1] > 0.0


@pytest.mark.parametrize("eps", [1e-2, 1e-4])
def test_the_report_says_how_much_of_the_gradient_is_gone(eps: float) -> None:
    """Without weights, a dropped element of a mean is its softmax over the number of tokens."""
    report = FilterReport()
    _, found, softmax, labels = d_logits("hidden", method="filtered", filter_eps=eps, filter_report=report)
    dropped = softmax[(found == 0) & (labels != -100).unsqueeze(-1)].sum() / (labels != -100).sum()
    assert report.dropped_probability == pytest.approx(dropped.item(), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_numbers_of_a_report(dtype: torch.dtype) -> None:
    """Two tiles of tokens by three of words, told by hand; ignored tokens are in none."""
    logits = torch.full((300, 384), -8.0)
    logits[:, :128] = 0.0
    labels = torch.zeros(300, dtype=torch.long)
    ignored = torch.arange(300) % 7 == 3
    labels[ignored] = -100
    counted = (~ignored).nonzero().squeeze(-1)
    labels[counted[256:]] = -100  # 256 are left
    # A likely word keeps its tile of the first 128 tokens; of the second, it is a label, and does not.
    logits[counted[10], 130] = logits[counted[200], 383] = 0.0
    labels[counted[200]] = 383
    report = FilterReport()
    assert (report.tiles, report.living_share, report.dropped_probability) == (0, 0.0, 0.0)

    def call() -> None:
        linear_cross_entropy(
            logits.to(dtype).requires_grad_(),
            torch.eye(384, dtype=dtype),
            labels,
            method="filtered",
            filter_eps=1e-4,
            filter_report=report,
        )

    rare = math.exp(-8.0) / (128 + 256 * math.exp(-8.0))
    beside_a_likely_one = math.exp(-8.0) / (129 + 255 * math.exp(-8.0))
    in_dead_tiles = (127 * 128 + 127 * 256) * rare + (128 + 255) * beside_a_likely_one
    for _ in range(2):
        call()
    assert report.tiles == 12
    assert report.living_share == 3 / 6
    assert report.dropped_probability == pytest.approx(in_dead_tiles / 256, rel=1e-5)
    # A call with other tiles counts by its tiles and tokens, not as one of three.
    labels.fill_(-100)
    labels[0] = 5
    call()
    assert report.tiles == 15
    assert report.living_share == 7 / 15
    dropped = 2 * in_dead_tiles + 256 * rare
    assert report.dropped_probability == pytest.approx(dropped / 513, rel=1e-5)
    report.reset()
    assert (report.tiles, report.living_share, report.dropped_probability) == (0, 0.0, 0.0)
    labels.fill_(-100)
    call()
    assert (report.tiles, report.living_share, report.dropped_probability) == (0, 0.0, 0.0)


def test_a_report_does_not_hold_the_graph() -> None:
    report = FilterReport()
    problem = make().to(torch.float32)
    ours(problem, method="filtered", filter_report=report)
    assert report.tiles == 2
    assert not report._sums.requires_grad


def test_the_threshold_auto_is_a_32nd_of_the_epsilon() -> None:
    for dtype, eps in ((torch.bfloat16, 2.0**-12), (torch.float16, 2.0**-15), (torch.float32, 2.0**-28)):
        assert resolve_eps("auto", dtype) == eps
    # The same under autocast, of the dtype that is computed in.
    for dtype, given in ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)):
        reports = FilterReport(), FilterReport()
        logits, labels = logits_of_a_text()
        options = {"method": "filtered", "filter_report": reports[0]}
        with torch.autocast("cpu", dtype, enabled=given != dtype):
            linear_cross_entropy(logits.to(given), torch.eye(NUM_WORDS, dtype=given), labels, **options)
        options = {"method": "filtered", "filter_report": reports[1], "filter_eps": 2.0**-12}
        linear_cross_entropy(logits.to(dtype), torch.eye(NUM_WORDS, dtype=dtype), labels, **options)
        assert reports[0].living_share == reports[1].living_share < 1.0


def test_auto_costs_no_accuracy_in_bfloat16() -> None:
    """The paper's claim, of the elements that bfloat16 would lose: the gradients are as near as exact's."""
    logits, labels = logits_of_a_text()
    weight = torch.randn(NUM_WORDS, 64).double() * 0.3
    hidden = torch.linalg.lstsq(weight, logits.T).solution.T.contiguous() * 2.0
    true = [hidden.bfloat16().double().requires_grad_(), weight.bfloat16().double().requires_grad_()]
    truth = torch.autograd.grad(F.cross_entropy(true[0] @ true[1].T, labels), true)
    errors = {}
    for method in ("exact", "filtered"):
        parts = [part.detach().bfloat16().requires_grad_() for part in true]
        found = torch.autograd.grad(linear_cross_entropy(*parts, labels, method=method), parts)
        errors[method] = [(f.double() - t).norm() / t.norm() for f, t in zip(found, truth, strict=True)]
    for exact, filtered in zip(errors["exact"], errors["filtered"], strict=True):
        assert filtered <= 1.5 * exact


@pytest.mark.parametrize("eps", [1e-2, 1e-3])
def test_every_gradient_leaves_out_the_same(eps: float) -> None:
    """Of the bias and of a low-rank adapter too: each is a product of the same gradient of the logits."""
    problem = make(400, 600, 12, bias=True, rank=4, ignored="none").to(torch.float64)
    problem.parts["weight"].data[256:] *= 0.01
    problem.parts["bias"].data[256:] -= 12.0
    problem.labels.remainder_(256)
    report = FilterReport()
    found = results(problem, ours(problem, method="filtered", filter_eps=eps, filter_report=report))
    assert report.living_share == 2 / 5
    exact = problem.to(torch.float64)
    expected = results(exact, plain(exact))
    for name in ("weight", "bias", "lora_b"):
        assert not found[name][256:].any()
        assert expected[name][256:].any()
        torch.testing.assert_close(found[name][:256], expected[name][:256], rtol=1e-10, atol=1e-14)
    assert found.keys() == expected.keys()
