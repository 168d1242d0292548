"""One optimizer step: its batches, forward and backward, the sums over all ranks, the update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed.engine import NonFiniteGradientError
from ..distributed.groups import ProcessGroups
from ..distributed.loss import count_tokens, global_token_loss
from ..distributed.sequence import shard_batch
from .config import RunConfig
from .data.dataset import Batch, micro_batches
from .evaluation import summed_nll
from .flops import ModelShape, model_flops
from .requests import Wishes
from .run_state import RunState
from .schedule import learning_rate
from .setup import RunParts


@dataclass(frozen=True)
class StepResult:
    """What a step came to, over all ranks.

    Attributes:
        loss: Mean NLL over the step's valid tokens, in nats a token.
        norm: Global gradient norm before clipping; None where no update was made.
        tokens: Tokens of the step.
        flops: Of the model, for them.
        lr: Learning rate.
        wishes: What any rank was asked by then.
        is_writing: Whether any rank still writes a checkpoint.
        problem: What was not finite; None where the update was made.
        nll_sums: Of each micro batch of this rank, on the device.
    """

    loss: float
    norm: float | None
    tokens: int
    flops: float
    lr: float
    wishes: Wishes
    is_writing: bool
    problem: str | None
    nll_sums: list[Tensor]


@dataclass(frozen=True)
class _Totals:
    nll: float
    tokens: int
    flops: float
    wishes: Wishes
    is_writing: bool


@dataclass(frozen=True)
class Stepper:
    """Makes the steps of a run.

    Attributes:
        config: The run.
        groups: This rank's process groups.
        device: Where this rank computes.
        parts: Data and engine.
        shape: By which FLOPs are counted, if they can be.
    """

    config: RunConfig
    groups: ProcessGroups
    device: torch.device
    parts: RunParts
    shape: ModelShape | None

    def step(self, state: RunState, wishes: Wishes, *, is_writing: bool) -> StepResult:
        """One optimizer step. The host waits for the device for the loss, and again for the norm.

        Where loss or gradient is not finite, nothing is updated (`optimizer.in_backward`: after the update
        is made), and the result says so. Such a loss ends a step before its update, unless the run is to skip
        the step: then its gradient is made NaN, and the engine drops it as it drops every such gradient.

        Args:
            state: Where the run is.
            wishes: What this rank is asked.
            is_writing: Whether this rank still writes a checkpoint.
        """
        engine, skips = self.parts.engine, self.config.train.on_nonfinite == "skip"
        wholes = list(self._micro_batches(state))
        batches = [shard_batch(whole, self.groups) for whole in wholes]
        num_tokens = count_tokens((batch["shift_labels"] for batch in batches), self.groups, self.device)
        lr = learning_rate(state.step, self.parts.total_steps, self.config.optimizer.lr, self.config.schedule)
        sums: list[Tensor] = []
        norm, problem = None, None
        engine.begin_step(lr)
        for index, batch in enumerate(batches):
            nll = summed_nll(engine, batch, self.device)
            sums.append(nll.detach())
            loss = global_token_loss(nll, num_tokens, reducer_divisor=engine.reducer_divisor)
            # Times 1, or times NaN: told on the device, where the host would have to wait for it.
            engine.backward(loss * (1 + 0 * sums[-1]) if skips else loss)
            if index == len(batches) - 1:
                totals = self._totals(sums, wholes, wishes, is_writing)
                mean = totals.nll / max(1.0, float(num_tokens))
                if not math.isfinite(mean):
                    problem = f"loss is {mean}"
                    if not skips:
                        break
            try:
                norm = engine.step(lr)
            except NonFiniteGradientError as error:
                problem = problem or str(error)
        assert problem is None or norm is None, "the update was made with a gradient that is not finite"
        return StepResult(
            mean, norm, totals.tokens, totals.flops, lr, totals.wishes, totals.is_writing, problem, sums
        )

    def _micro_batches(self, state: RunState) -> Iterator[Batch]:
        train = self.config.train
        return micro_batches(
            self.parts.train_set,
            seed=train.seed,
            first_sequence=state.sequences_seen,
            global_batch=train.global_batch_sequences,
            micro_batch=train.micro_batch_sequences,
            dp_rank=self.groups.dp_rank,
            dp_size=self.groups.dp_size,
        )

    def _totals(self, sums: list[Tensor], wholes: list[Batch], wishes: Wishes, is_writing: bool) -> _Totals:
        """Sums over all ranks, and what any of them was asked, or still does: one collective."""
        # Of the whole sequence: a shard's has padding, by which runs of unequal degree would differ.
        lengths = [length for whole in wholes for length in whole["document_offsets"].diff().tolist()]
        shared = 1.0 / self.groups.sp_size  # ranks of a sequence count it together
        mine = [0.0, sum(lengths) * shared, self._flops(lengths) * shared]
        mine += [float(wishes.stop), float(wishes.save), float(is_writing)]
        totals = torch.tensor(mine, dtype=torch.float64).to(self.device)
        for nll in sums:
            totals[0] += nll
        nll, tokens, flops, *votes = self.groups.all_sum(totals).tolist()
        stop, save, writing = (vote > 0 for vote in votes)
        return _Totals(nll, round(tokens), flops, Wishes(stop, save), writing)

    def _flops(self, document_lengths: list[int]) -> float:
        if self.shape is None:
            return 0.0
        return model_flops(self.shape, document_lengths, frozen_weights=self.config.model.lora is not None)
