"""One loss over every token, wherever the tokens are."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from longseq.distributed import ProcessGroups, global_token_loss
from longseq.distributed.loss import count_tokens

CPU = torch.device("cpu")


def test_only_labels_that_count_are_counted() -> None:
    micro_batches = [torch.tensor([[1, -100, 0]]), torch.full((1, 4), -100), torch.tensor([[5, 6]])]
    count = count_tokens(iter(micro_batches), ProcessGroups(), CPU)
    assert count.item() == 4
    assert count.dtype == torch.float64
    assert count_tokens([], ProcessGroups(), CPU).item() == 0


@pytest.mark.parametrize("reducer_divisor", [1.0, 3.0])
def test_summed_gradients_are_those_of_the_mean_over_all_tokens(reducer_divisor: float) -> None:
    """Three ranks of two micro batches; one rank and one micro batch have no label."""
    weight = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(3, 2, 11, 7, dtype=torch.float64)
    labels = torch.randint(0, 5, (3, 2, 11))
    labels[1], labels[2, 0], labels[0, 1, 3:] = -100, -100, -100
    truth = F.cross_entropy((hidden @ weight.T).flatten(0, 2), labels.flatten())
    (wanted,) = torch.autograd.grad(truth, weight)

    count = count_tokens(labels.flatten(0, 1), ProcessGroups(), CPU)
    total = torch.zeros_like(wanted)
    for rank in range(3):
        for micro in range(2):
            nll = F.cross_entropy(hidden[rank, micro] @ weight.T, labels[rank, micro], reduction="sum")
            loss = global_token_loss(nll, count, reducer_divisor=reducer_divisor)
            total += torch.autograd.grad(loss, weight)[0]
    torch.testing.assert_close(total / reducer_divisor, wanted, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("count", [0, torch.zeros(()), torch.zeros((), dtype=torch.float64)])
def test_a_step_without_labels_is_zero_and_finite(count: torch.Tensor | int) -> None:
    weight = torch.randn(5, 7, requires_grad=True)
    labels = torch.full((3,), -100)
    nll = F.cross_entropy(torch.randn(3, 7) @ weight.T, labels, reduction="sum")
    loss = global_token_loss(nll, count, reducer_divisor=2.0)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_more_tokens_than_float32_can_count() -> None:
    count = torch.tensor(2.0**24 + 1, dtype=torch.float64)
    loss = global_token_loss(torch.tensor(2.0**24 + 1, dtype=torch.float64), count)
    assert loss.item() == 1.0
