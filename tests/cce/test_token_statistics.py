"""What a head says of each token, against plain PyTorch."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor

from longseq.cce import token_statistics

N, V, D = 300, 777, 40
OPTIONS = [{}, {"softcap": 3.0, "logit_scale": 1.7}, {"bias": True}]


def make(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, bias = torch.randn(N, D), torch.randn(V, D) * 0.3, torch.randn(V)
    labels = torch.randint(0, V, (N,))
    labels[::5] = -100
    labels[128:256] = -100  # a tile of tokens that do not count
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), labels


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: dict) -> tuple:
    logits = hidden.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    logits = logits * options.get("logit_scale", 1.0)
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    softmax = torch.distributions.Categorical(logits=logits)
    counts = labels != -100
    log_prob = softmax.log_prob(labels.clamp(min=0))
    return tuple(part * counts for part in (log_prob, softmax.entropy(), logits.argmax(-1)))


def check(options: dict, dtype: torch.dtype, tolerance: float, device: str = "cpu") -> None:
    options = dict(options)
    hidden, weight, bias, labels = (part.to(device) for part in make(dtype))
    bias = bias if options.pop("bias", False) else None
    found = token_statistics(hidden, weight, labels, bias=bias, memory_mib=1, **options)
    true = plain(hidden, weight, bias, labels, options)
    torch.testing.assert_close(found.log_prob.double(), true[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.entropy.double(), true[1], rtol=tolerance, atol=tolerance)
    assert torch.equal(found.argmax, true[2])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_as_plain_pytorch_says(options: dict, dtype: torch.dtype, tolerance: float) -> None:
    check(options, dtype, tolerance)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_kernel_says_the_same(options: dict, monkeypatch: pytest.MonkeyPatch, kernel_device: str) -> None:
    fused = import_module("longseq.cce.fused")
    # By name, the package has a function where this module is.
    module = import_module("longseq.cce.token_statistics")
    monkeypatch.setattr(module, "kernels_for", lambda tokens, head: fused)
    check(options, torch.float32, 1e-5, kernel_device)


def test_words_that_cannot_be_and_labels_that_are_none() -> None:
    hidden, weight, bias, labels = make(torch.float32)
    bias[7] = -float("inf")
    labels[1], labels[2] = V, -100
    found = token_statistics(hidden.view(3, 100, D), weight, labels.view(3, 100), bias=bias)
    assert found.log_prob.shape == (3, 100)
    assert found.entropy.isfinite().all()
    assert found.log_prob.flatten()[1].isnan()
    assert found.log_prob.flatten()[2] == 0


def test_shapes_and_dtypes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"must be \(..., D\), \(V, D\)"):
        token_statistics(torch.randn(4, 3), torch.randn(5, 2), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="cast one"):
        token_statistics(torch.randn(4, 3), torch.randn(5, 3).double(), torch.zeros(4, dtype=torch.long))
