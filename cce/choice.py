"""Which method `auto` takes, said once."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .chunks import filter_memory_mib

logger = logging.getLogger(__name__)

METHODS = ("auto", "exact", "recompute", "filtered", "reference")
FULL_ENOUGH = 0.9
"""Share of living tiles from which a filter saves less than its lists cost."""
LOOK_AGAIN_EVERY = 100
"""Of the calls after a filter was given up, this one is made with it: a model in training gets surer."""


class Choice(NamedTuple):
    method: str
    why: str
    share: float | None = None  # of living tiles, where that decided


def choose_method(
    method: str,
    weight: Tensor,
    *,
    reduction: str,
    return_lse: bool,
    split: bool,
    filter_eps: float | str,
    label_smoothing: float,
    needs_gradient: bool,
    memory_mib: int | None,
    reports: bool,
) -> str:
    """The method that is run; "auto" is resolved, anything else checked against the other options.

    Raises:
        ValueError: The method cannot do what is asked.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {', '.join(METHODS)}.")
    late = [
        name
        for name, asked in (
            ("reduction='none'", reduction == "none"),
            ("return_lse=True", return_lse),
            ("group=", split),
        )
        if asked
    ]
    problems = []
    if method in ("exact", "filtered") and late:
        problems.append(
            f"method={method!r} takes gradients in forward, so it has one scalar loss of one process: "
            f"{', '.join(late)} needs method='recompute' or 'auto'"
        )
    if method == "filtered" and label_smoothing:
        problems.append(
            f"method='filtered' with label_smoothing={label_smoothing}: smoothing gives every word a "
            "gradient, so there is none to leave out; take method='exact'"
        )
    if method == "reference" and split:
        problems.append("group= needs method='recompute' or 'auto'; the reference knows one process")
    if filter_eps != "auto" and method not in ("auto", "filtered"):
        problems.append(f"filter_eps={filter_eps!r} has no effect with method={method!r}; take 'filtered'")
    if reports and method not in ("auto", "filtered"):
        problems.append(f"filter_report has nothing to tell of method={method!r}; take 'filtered'")
    least_mib = filter_memory_mib(*weight.shape) if weight.is_cuda and weight.requires_grad else 0
    if method == "filtered" and memory_mib is not None and memory_mib < least_mib:
        problems.append(
            f"memory_mib={memory_mib} is too little for method='filtered', which takes {least_mib} MiB "
            "beside the gradients of this head; take method='exact'"
        )
    if problems:
        raise ValueError("linear_cross_entropy: " + "; ".join(problems) + ".")
    if method != "auto":
        return method
    room = memory_mib is None or memory_mib >= least_mib
    choice = _choose(weight, late, filter_eps, label_smoothing, needs_gradient, room)
    if not torch.compiler.is_compiling():
        _say_once(choice)
    return choice.method


def _choose(
    weight: Tensor,
    late: list[str],
    filter_eps: float | str,
    label_smoothing: float,
    needs_gradient: bool,
    room: bool,
) -> Choice:
    if late:
        return Choice("recompute", f"{', '.join(late)}: gradients must wait for backward")
    if not needs_gradient:
        return Choice("recompute", "no gradient is wanted, and its forward stores nothing")
    if filter_eps != "auto" and not room:
        return Choice("exact", "memory_mib leaves no room for a filter")
    if filter_eps != "auto" and not label_smoothing:
        share = None if torch.compiler.is_compiling() else _share_that_counts(weight)
        if share is not None and share > FULL_ENOUGH:
            return Choice("exact", "a filter last kept too many of the tiles to pay", share)
        return Choice("filtered", f"filter_eps={filter_eps:.3g} allows to leave tiles out")
    return Choice("exact", "one pass, gradients in forward, nothing left out (filter_eps allows a filter)")


_said: set[tuple[str, str]] = set()


def _say_once(choice: Choice) -> None:
    if (choice.method, choice.why) not in _said:
        _said.add((choice.method, choice.why))
        share = "" if choice.share is None else f" ({choice.share:.0%})"
        logger.info("cut cross-entropy: method %r: %s%s.", choice.method, choice.why, share)


class _Watch:
    """What is known of a head's filter: sums that have arrived, and sums on their way to the host."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.coming: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None
        self.passed_over = 0  # calls without the filter

    def look(self) -> None:
        if self.coming is None or _is_capturing():
            return
        if self.arrived.query():
            self.sums, self.coming = self.coming, None


def _is_capturing() -> bool:
    """Whether a CUDA graph is being captured, in which asking an event would break it."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


_watched: WeakIdKeyDictionary = WeakIdKeyDictionary()


def watch(weight: Tensor, sums: Tensor) -> None:
    """Start to bring a filter's sums to the host, unless some are on their way; nobody waits for them."""
    seen = _watched.setdefault(weight, _Watch())
    if not sums.is_cuda:
        seen.sums = sums
        return
    seen.look()
    if seen.coming is None and not _is_capturing():
        with torch.cuda.device_of(sums):
            seen.coming = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
            seen.coming.copy_(sums, non_blocking=True)
            seen.arrived = torch.cuda.Event()
            seen.arrived.record()


def last_living_share(weight: Tensor) -> float | None:
    """Share of living tiles in the newest call of this head whose sums have arrived; None before that."""
    seen = _watched.get(weight)
    if seen is None:
        return None
    seen.look()
    if seen.sums is None:
        return None
    living, tiles = seen.sums[:2].tolist()
    return living / tiles if tiles else None


def _share_that_counts(weight: Tensor) -> float | None:
    """The last living share; None every `LOOK_AGAIN_EVERY`th call, to let a filter that was given up try."""
    share = last_living_share(weight)
    if share is None or share <= FULL_ENOUGH:
        return share
    seen = _watched[weight]
    seen.passed_over += 1
    return None if seen.passed_over % LOOK_AGAIN_EVERY == 0 else share
