"""The ways to train that `batch_throughput.py` measures, and the memory that they are given."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from decoder_anchors import checkpoint_layers
from decoder_model import build, fixed_attention
from torch import Tensor, nn
from torch.optim import Optimizer

from longseq.apollo import Apollo, parameter_groups
from longseq.apollo.in_backward import InBackwardHandle, step_in_backward
from longseq.mst import apply_mini_sequence

LR = 1e-5
"""Small: a first step along random weights' gradients takes all matrices one way."""
GIB = 2**30
YARDSTICK = "adamw"
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One way to train."""

    key: str
    label: str
    mini: bool = False
    """APOLLO-Mini in backward; else fused AdamW behind it."""
    checkpoints: bool = False
    """transformers' own, one a layer."""
    streamed: bool = False


CASES = (
    Case(YARDSTICK, "transformers, AdamW"),
    Case("mini", "transformers, APOLLO-Mini in backward", mini=True),
    Case("longseq-mini", "longseq streamed layers, APOLLO-Mini in backward", mini=True, streamed=True),
    Case("adamw-checkpoints", "transformers layer checkpoints, AdamW", checkpoints=True),
    Case("mini-checkpoints", "transformers layer checkpoints, APOLLO-Mini in backward", True, True),
)


class Training:
    """A model and its optimizer, ready for steps of any batch."""

    def __init__(self, case: Case, shape: str, num_layers: int, device: str) -> None:
        self.device = torch.device(device)
        self.model = build(shape, num_layers, device)
        self.undo: Callable[[], None] = lambda: None
        if case.streamed:
            kernel = "cudnn" if device == "cuda" else "auto"
            self.undo = apply_mini_sequence(self.model, checkpoints="gpu", attention_kernel=kernel).undo
        elif case.checkpoints:
            checkpoint_layers(self.model)
        self.optimizer = make_optimizer(case, self.model)
        self.in_backward: InBackwardHandle | None = None
        if case.mini:
            self.in_backward = step_in_backward(self.optimizer, self.model)

    def step(self, ids: Tensor) -> Row:
        """Loss, seconds of the whole step, and of the optimizer where it comes behind backward."""
        started = self.now()
        with fixed_attention(self.device):
            loss = self.model(input_ids=ids, labels=ids).loss
            loss.backward()
        if self.in_backward is not None:
            self.in_backward.finish_step()
            ended = self.now()
            return {"loss": loss.item(), "s": ended - started, "optimizer s": None}
        between = self.now()
        self.optimizer.step()
        self.optimizer.zero_grad()
        ended = self.now()
        return {"loss": loss.item(), "s": ended - started, "optimizer s": ended - between}

    def forget(self) -> None:
        """Let go of what a step that failed has left in `.grad`."""
        for param in self.model.parameters():
            param.grad = None

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def make_optimizer(case: Case, model: nn.Module) -> Optimizer:
    if case.mini:
        return Apollo(parameter_groups(model), LR, scale_type="tensor", rounding="stochastic")
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(model.parameters(), LR, weight_decay=0.0, fused=fused)


def draw(model: nn.Module, batch: int, length: int) -> Tensor:
    """Token ids `(batch, length)`; the first rows are those of a smaller batch."""
    weight = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, weight.shape[0], (batch, length), generator=generator).to(weight.device)
