"""What a gradient reducer divides by: measured through the engine that will train, before it does.

DeepSpeed's reducers differ by ZeRO stage, option and version in what they divide the ranks' summed gradients
by. Adam hides a wrong factor; clipping, logged norms, weight decay and SGD do not. So one tiny step is taken
at start: what autograd hands each parameter is summed over the ranks by us, and compared with what the
reducer made of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..apollo.selection import whole_shape
from .engine import Engine
from .groups import ProcessGroups
from .sequence import shard_batch

logger = logging.getLogger(__name__)

WATCHED_OF_A_SIZE = 4
WATCHED_ELEMENTS = 2**22
"""Of the parameters whose gradients are compared: the smallest, since they are summed over ranks again."""
TOLERANCE = 0.05
"""Of a measured divisor: bf16 rounds by less, and the known ones are factors of 2 apart or more."""
TOKENS_A_RANK = 8


class ReducerScaleError(RuntimeError):
    """Gradients are reduced by a factor that nobody knows: training would be wrong without a word."""


def measure_reducer_divisor(
    params: Iterable[nn.Parameter],
    backward: Callable[[], None],
    reduced_grad: Callable[[nn.Parameter], Tensor | None],
    groups: ProcessGroups,
) -> float:
    """Measure C of `global_token_loss` for any reducer: DDP, DeepSpeed, one's own.

    Args:
        params: The model's trainable parameters; the smallest are watched.
        backward: Runs forward and backward of a whole step (all its micro batches) up to where gradients are
            reduced, with losses that differ from rank to rank or not; every rank calls it.
        reduced_grad: The whole gradient that the optimizer would then see, on every rank.
        groups: The process groups, all of whose ranks reduce together.

    Returns:
        1, the number of data-parallel ranks or the number of all ranks: the sum of the ranks' gradients over
        what the reducer made of it.

    Raises:
        ReducerScaleError: It is none of these, or there was no gradient to measure it by.
    """
    watched = _watched(params)
    sums: list[Tensor | None] = [None] * len(watched)

    def keep(index: int) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:
            earlier = sums[index]
            grad = grad.detach().double()
            sums[index] = grad if earlier is None else earlier + grad

        return hook

    hooks = [param.register_hook(keep(index)) for index, param in enumerate(watched)]
    try:
        backward()
    finally:
        for hook in hooks:
            hook.remove()
    reduced = [reduced_grad(param) for param in watched]
    device = next((grad.device for grad in (*reduced, *sums) if grad is not None), torch.device("cpu"))
    squares = torch.zeros(2, dtype=torch.float64, device=device)
    for param, mine, found in zip(watched, sums, reduced, strict=True):
        # Every rank joins in each sum, whether its own tokens reached the weight or not.
        zeros = torch.zeros(whole_shape(param).numel(), dtype=torch.float64, device=device)
        total = groups.all_sum(zeros if mine is None else mine.flatten().clone())
        found = zeros if found is None else found.flatten().to(device, torch.float64)
        squares += torch.stack([total @ total, total @ found])
    of_sum, of_both = squares.tolist()
    return _known(of_sum / of_both if of_both else float("nan"), groups)


def calibrate(engine: Engine, groups: ProcessGroups, vocab_size: int, device: torch.device) -> None:
    """Set an engine's `reducer_divisor` by a step on a few random tokens that changes nothing else.

    Raises:
        ReducerScaleError: As `measure_reducer_divisor`.
    """
    params = [param for param in engine.module.parameters() if param.requires_grad]

    def backward() -> None:
        for micro_batch in range(engine.accumulation_steps):
            draw = torch.Generator().manual_seed(micro_batch)
            ids = torch.randint(0, vocab_size, (1, TOKENS_A_RANK * groups.sp_size), generator=draw)
            shard = shard_batch({"input_ids": ids, "labels": ids}, groups)
            # Documents stay with the host, where attention reads them.
            shard = {
                name: tensor if name == "document_offsets" else tensor.to(device)
                for name, tensor in shard.items()
            }
            labels = shard["shift_labels"]  # a plain forward makes no loss without labels
            nll = engine(**shard, labels=labels, num_items_in_batch=ids.numel(), use_cache=False).loss
            engine.backward(nll)
            if micro_batch < engine.accumulation_steps - 1:
                engine.step(0.0)

    expected = engine.reducer_divisor
    engine.reducer_divisor = measure_reducer_divisor(params, backward, engine.reduced_grad, groups)
    engine.step(0.0)  # ends the step that was begun: with this rate no weight moves
    engine.reset_optimizer()
    if engine.reducer_divisor != expected:
        logger.warning(
            "gradients are divided by %g and not by %g, as this engine's reducer was known to do; losses are "
            "scaled by what was measured.",
            engine.reducer_divisor,
            expected,
        )


def _watched(params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """A few of each size, from the smallest up: one half of an adapter alone has no gradient at first."""
    by_size: dict[int, list[nn.Parameter]] = {}
    for param in params:
        by_size.setdefault(whole_shape(param).numel(), []).append(param)
    watched: list[nn.Parameter] = []
    num_elements = 0
    for size, alike in sorted(by_size.items(), key=lambda item: item[0]):
        if watched and num_elements + size > WATCHED_ELEMENTS:
            break
        watched += alike[:WATCHED_OF_A_SIZE]
        num_elements += size * len(alike[:WATCHED_OF_A_SIZE])
    return watched


def _known(measured: float, groups: ProcessGroups) -> float:
    known = sorted({1, groups.dp_size, groups.world_size})
    for value in known:
        if abs(measured / value - 1) < TOLERANCE:
            return float(value)
    raise ReducerScaleError(
        f"the reducer divides the ranks' summed gradients by {measured:.4g}, and known are "
        f"{', '.join(map(str, known))} (nothing, the sequences at once, all ranks). Learning rate, clipping "
        "and weight decay would be off by a factor. Look for what scales gradients or losses beside us: a "
        "DeepSpeed JSON (gradient_predivide_factor, sequence_parallel_size, prescale_gradients), a hook on "
        "weights, or a DeepSpeed of another version; `measured` nan means that no watched weight had a "
        "gradient."
    )
