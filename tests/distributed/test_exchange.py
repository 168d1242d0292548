"""What is handed to the collective of an exchange; what comes of it is in test_ulysses.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longseq.distributed import exchange as exchange_module
from longseq.distributed.exchange import Exchange
from longseq.distributed.head_plan import plan_heads

RANKS, ROWS, LENGTH, HEADS, WIDTH = 2, 2, 6, 4, 8


class Done:
    """A collective that is over."""

    def wait(self) -> None:
        pass


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the collective is given, call by call."""
    found = []

    def all_to_all_single(received: Tensor, sent: Tensor, **kwargs) -> Done:
        found.append(sent)
        received.copy_(sent)
        return Done()

    monkeypatch.setattr(dist, "all_to_all_single", all_to_all_single)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_attention_s_output_goes_home_without_a_copy(handed_over: list[Tensor], dtype: torch.dtype) -> None:
    exchange = Exchange(plan_heads(HEADS * RANKS, HEADS, RANKS), 0, None)
    by_token = torch.randn(LENGTH, ROWS, HEADS, WIDTH).to(dtype).permute(1, 2, 0, 3)
    by_head = by_token.contiguous()
    found = [exchange.start_to_tokens("q", out).wait()[0] for out in (by_token, by_head)]
    assert handed_over[0].data_ptr() == by_token.data_ptr()
    assert handed_over[1].data_ptr() != by_head.data_ptr()
    assert torch.equal(*handed_over)
    assert torch.equal(*found)
    # Both ranks' heads are this rank's here.
    halves = [by_head[:, :, part] for part in (slice(0, 3), slice(3, 6))]
    assert torch.equal(found[0], torch.cat(halves, dim=1))


def test_what_is_sent_of_several_tensors_is_a_copy(handed_over: list[Tensor]) -> None:
    exchange = Exchange(plan_heads(HEADS * RANKS, HEADS * RANKS, RANKS), 0, None)
    grads = [torch.randn(LENGTH, ROWS, HEADS, WIDTH).permute(1, 2, 0, 3) for _ in range(3)]
    found = exchange.start_to_tokens("qkk", *grads).wait()
    [sent] = handed_over
    assert all(sent.data_ptr() != grad.data_ptr() for grad in grads)
    for grad, one in zip(grads, found, strict=True):
        assert torch.equal(one, torch.cat([grad[:, :, :3], grad[:, :, 3:]], dim=1))


def elements_behind(tensor: Tensor) -> int:
    """Of the memory that it is a view of."""
    return tensor.untyped_storage().nbytes() // tensor.itemsize


def test_tensors_that_would_reach_far_together_arrive_apart(
    handed_over: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = Exchange(plan_heads(HEADS * RANKS, HEADS, RANKS), 0, None)
    counts = {"q": HEADS * RANKS, "k": HEADS}
    tensors = [torch.randn(ROWS, counts[kind], LENGTH, WIDTH) for kind in "qkkq"]
    together = exchange.start_to_heads("qkkq", *tensors).wait()
    assert len(handed_over) == 1
    held = elements_behind(together[0])
    monkeypatch.setattr(exchange_module, "MOST_OFFSET", held)
    exchange.start_to_heads("qkkq", *tensors).wait()
    assert len(handed_over) == 2
    monkeypatch.setattr(exchange_module, "MOST_OFFSET", held - 1)
    apart = exchange.start_to_heads("qkkq", *tensors).wait()
    assert len(handed_over) == 2 + len(tensors)
    for one, other in zip(apart, together, strict=True):
        assert torch.equal(one, other)
        assert elements_behind(one) == one.numel()
