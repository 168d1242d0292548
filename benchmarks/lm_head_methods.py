"""The ways to the loss of a head that `lm_head.py` measures: ours and every anchor that is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lm_head_timing import Loss, free
from lm_head_truth import EPS
from torch import Tensor
from torch.nn import functional as F

from longseq import cce

SMALL_MEMORY_MIB = 290


class MissingError(Exception):
    """A method that this environment does not have; the text says what is missing."""


@dataclass(frozen=True)
class Method:
    """One row of the tables."""

    key: str
    label: str
    build: Callable[[], Loss]
    ours: bool = False
    filtered: bool = False
    forward_only: bool = False
    everywhere: bool = False  # or at the main cases alone


class OurFilter:
    """Method "filtered", which can be asked once for a report of what the filter did."""

    def __init__(self) -> None:
        if not hasattr(cce, "FilterReport"):
            raise MissingError("this longseq has no FilterReport")
        self.report: Any = None

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return cce.linear_cross_entropy(
            hidden, weight, labels, method="filtered", filter_eps=EPS, filter_report=self.report
        )

    def facts(self, step: Callable[[], Any]) -> dict[str, float]:
        """Run one step under a report; the steps that are timed run without one."""
        self.report = cce.FilterReport()
        try:
            step()
            return {"f": float(self.report.living_share), "dropped": float(self.report.dropped_probability)}
        finally:
            self.report = None


def ours(method: str, **options: Any) -> Callable[[], Loss]:
    def build() -> Loss:
        return lambda hidden, weight, labels: cce.linear_cross_entropy(
            hidden, weight, labels, method=method, **options
        )

    return build


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels)


def compiled() -> Loss:
    # A table's shapes are its own: without this the third one would be compiled for shapes in general.
    torch.compiler.reset()
    return torch.compile(eager, dynamic=False)


def liger() -> Loss:
    _need("liger_kernel", "liger-kernel")
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, weight, labels: liger_fused_linear_cross_entropy(hidden, weight, labels)


def apple(impl: str) -> Callable[[], Loss]:
    def build() -> Loss:
        _need("cut_cross_entropy", "cut-cross-entropy")
        from cut_cross_entropy import linear_cross_entropy

        return lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels, impl=impl)

    return build


def torch_native() -> Loss:
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise MissingError(f"torch {torch.__version__} has none (2.13 does)")
    # Without options it is the two plain operations; its chunks are what is compared.
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, labels: F.linear_cross_entropy(hidden, weight, labels, options=options)


METHODS = (
    Method("exact", "longseq exact", ours("exact"), ours=True),
    Method(
        "exact-small",
        f"longseq exact, {SMALL_MEMORY_MIB} MiB",
        ours("exact", memory_mib=SMALL_MEMORY_MIB),
        ours=True,
    ),
    Method("recompute", "longseq recompute", ours("recompute"), ours=True),
    Method("filtered", "longseq filtered", OurFilter, ours=True, filtered=True),
    Method("forward", "longseq forward alone", ours("recompute"), ours=True, forward_only=True),
    Method("eager", "eager, float32 logits", lambda: eager, everywhere=True),
    Method("compile", "torch.compile", compiled),
    Method("liger", "Liger fused linear CE", liger, everywhere=True),
    Method("apple", "cut-cross-entropy", apple("cce"), filtered=True, everywhere=True),
    Method("apple-exact", "cut-cross-entropy, exact", apple("cce_exact")),
    Method("torch", "F.linear_cross_entropy", torch_native),
)


def attempt(method: Method, work: Callable[[Loss], dict[str, Any]], device: str) -> dict[str, Any]:
    """What `work` finds with the method, and why it found nothing as `note` (None otherwise)."""
    try:
        return work(method.build()) | {"note": None}
    except MissingError as error:
        note = str(error)
    except torch.OutOfMemoryError:
        note = "out of memory"
    except Exception as error:  # an anchor of any kind may fail in any way, and its row says how
        note = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[
            :120
        ]
    free(device)  # only here is the traceback gone, and what it held
    return {"note": note}


def _need(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise MissingError(f"{package} is not installed")
