"""Training steps of a model that has techniques on it, as the training loop takes them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...distributed import loss as token_loss
from ...distributed import sequence
from ...distributed.engine import Engine
from ...distributed.groups import ProcessGroups
from .. import evaluation
from .batches import Batch, num_labels
from .compare import InputGradients, Step, grads_of
from .truth import wide

UPSTREAM = 0.125
"""Factor of losses, taken off the gradients again: a power of two, so that it rounds nothing."""
CPU = torch.device("cpu")


def logits_step(model: nn.Module, batch: Batch) -> Step:
    """Of a model whose techniques leave the logits: one document a row, all rows at once."""
    ids, labels = batch["input_ids"], batch["labels"][:, 1:]
    with InputGradients(model) as gradients:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        nll = F.cross_entropy(
            wide(logits).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        loss = nll / max(1, num_labels([batch]))
        return _backward(model, loss, gradients)


def loss_step(model: nn.Module, batch: Batch, *, num_items: int | None = None) -> Step:
    """Of a model whose head gives the loss: one document a row, from labels that it shifts."""
    with InputGradients(model) as gradients:
        options = {} if num_items is None else {"num_items_in_batch": num_items}
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False, **options).loss
        return _backward(model, loss, gradients)


def packed_step(model: nn.Module, batch: Batch, groups: ProcessGroups) -> Step:
    """Of a model with this library's attention, from the logits: this rank's part of a packed row."""
    shard = sequence.shard_batch(batch, groups)
    labels = shard.pop("shift_labels")
    with InputGradients(model) as gradients:
        logits = model(**shard, use_cache=False).logits
        nll = F.cross_entropy(
            wide(logits).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        return _backward(model, nll / max(1, num_labels([batch])), gradients)


def _backward(model: nn.Module, loss: Tensor, gradients: InputGradients) -> Step:
    model.zero_grad()
    (loss * UPSTREAM).backward()
    grads = {name: grad / UPSTREAM for name, grad in grads_of(model).items()}
    inputs = [None if grad is None else grad / UPSTREAM for grad in gradients.found]
    return Step(float(loss.detach()), grads, inputs)


def engine_step(
    engine: Engine, groups: ProcessGroups, batches: list[Batch], *, lr: float, device: torch.device = CPU
) -> tuple[Step, float | None]:
    """One optimizer step through an engine, as `launch/train.py` takes it.

    Args:
        engine: Of this rank.
        groups: Of this rank.
        batches: All micro-batches of the step; this rank takes its own.
        lr: Learning rate.
        device: Where this rank computes.

    Returns:
        The step, and its gradient norm. Its loss is that of all ranks; gradients are those that the optimizer
        is given, before clipping, and not there where weights are updated in backward; inputs' gradients are
        those of this rank's tokens.
    """
    shards = [sequence.shard_batch(batch, groups) for batch in batches[groups.dp_rank :: groups.dp_size]]
    num_tokens = token_loss.count_tokens((shard["shift_labels"] for shard in shards), groups, device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    inputs: list[Tensor | None] = []
    grads: dict[str, Tensor] = {}
    norm = None
    engine.begin_step(lr)
    for index, shard in enumerate(shards):
        with InputGradients(engine.module) as gradients:
            nll = evaluation.summed_nll(engine, shard, device)
            total += nll.detach()
            divisor = engine.reducer_divisor
            engine.backward(token_loss.global_token_loss(nll, num_tokens, reducer_divisor=divisor))
        inputs += [None if grad is None else grad / divisor for grad in gradients.found]
        if index == len(shards) - 1:
            grads = reduced_grads(engine)
        norm = engine.step(lr)
    loss = float(groups.all_sum(total) / num_tokens.clamp(min=1))
    return Step(loss, grads, inputs), norm


@torch.no_grad()
def evaluated_loss(
    engine: Engine, groups: ProcessGroups, batches: list[Batch], device: torch.device = CPU
) -> float:
    """Mean loss of all ranks' batches as `launch/evaluation.py` takes it."""
    shards = [sequence.shard_batch(batch, groups) for batch in batches[groups.dp_rank :: groups.dp_size]]
    num_tokens = token_loss.count_tokens((shard["shift_labels"] for shard in shards), groups, device)
    engine.module.eval()
    total = sum(evaluation.summed_nll(engine, shard, device).double() for shard in shards)
    engine.module.train()
    return float(groups.all_sum(torch.as_tensor(total)) / num_tokens.clamp(min=1))


def reduced_grads(engine: Engine) -> dict[str, Tensor]:
    """The whole gradient of each weight that the engine's optimizer is about to be given."""
    found = {}
    for name, param in engine.module.named_parameters():
        grad = engine.reduced_grad(param) if param.requires_grad else param.grad
        if grad is not None:
            found[name] = grad.detach().clone()
    return found
