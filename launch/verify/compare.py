"""How near one step is to another: every tensor of it, by a number that one rule judges."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

EXACT = 1e-10
"""Of float64 results: its roundings add up to less, and any mistake is larger by orders."""
NEAR = 1e-5
"""Where transformers' own code takes part, which rounds norms or the loss to float32."""
SLACK = 1.5
"""Error that is allowed in fewer bits, of the error that plain PyTorch makes in the same dtype."""
LOSS, EVALUATED = "loss", "loss in evaluation"
SMALLEST = 1e-6
"""Of a step's largest gradient: a tensor below it is judged as if it were of that size."""


@dataclass
class Step:
    """What a training step comes to.

    Attributes:
        loss: Mean over the labels of the step.
        grads: Of each trainable weight by name; weights without a gradient are not there.
        inputs: Gradient of the embedding's output of each micro-batch, `(B, L, D)`; None where there is none.
        evaluated: The same mean without gradients and in evaluation mode, where that was looked at.
        others: What an optimizer added to each weight, where that was looked at.
    """

    loss: float
    grads: dict[str, Tensor]
    inputs: list[Tensor | None] = field(default_factory=list)
    evaluated: float | None = None
    others: dict[str, Tensor] = field(default_factory=dict)

    def scaled(self, factor: float) -> Step:
        """The step of a loss that is so many times this one's."""
        return Step(
            self.loss * factor,
            {name: grad * factor for name, grad in self.grads.items()},
            [None if grad is None else grad * factor for grad in self.inputs],
        )

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        named = {LOSS: torch.tensor(self.loss, dtype=torch.float64), **self.grads}
        if self.evaluated is not None:
            named[EVALUATED] = torch.tensor(self.evaluated, dtype=torch.float64)
        for index, grad in enumerate(self.inputs):
            if grad is not None:
                named[f"input of micro-batch {index + 1}" if len(self.inputs) > 1 else "input"] = grad
        return named


@dataclass(frozen=True)
class Row:
    """One case of one technique, at its worst tensor.

    Attributes:
        technique: What was tried.
        case: On what, with which options.
        error: Relative error of the tensor.
        tensor: Its name.
        tolerance: What its error may be.
        note: What else is to be said of it.
    """

    technique: str
    case: str
    error: float
    tensor: str
    tolerance: float
    note: str = ""

    @property
    def is_right(self) -> bool:
        """Whether the error is within the tolerance; a NaN is not."""
        return self.error <= self.tolerance

    @property
    def severity(self) -> float:
        """What rows are ordered by: the error over what is allowed."""
        return self.error / self.tolerance if math.isfinite(self.error) else math.inf

    def as_json(self) -> dict[str, Any]:
        """Numbers and words; what is no number is None."""
        values = asdict(self) | {"ok": self.is_right}
        return values | {"error": self.error if math.isfinite(self.error) else None}


def compare(
    technique: str,
    case: str,
    found: Step,
    truth: Step,
    *,
    tolerance: float | Mapping[str, float] = EXACT,
    note: str = "",
) -> Row:
    """Judge a step by its worst tensor.

    Args:
        technique: For the row.
        case: For the row.
        found: What is judged.
        truth: What it should be.
        tolerance: Relative error that is allowed: one for all tensors, or by name.
        note: For the row.
    """
    ours, wanted = found.tensors(), truth.tensors()
    floor = SMALLEST * max((float(grad.norm()) for grad in truth.grads.values()), default=0.0)
    rows = []
    for name in sorted(ours.keys() | wanted.keys()):
        allowed = tolerance if isinstance(tolerance, float) else _of_name(tolerance, name)
        error, said = _judge(ours.get(name), wanted.get(name), 0.0 if name in (LOSS, EVALUATED) else floor)
        rows.append(Row(technique, case, error, name, allowed, "; ".join(filter(None, (said, note)))))
    return max(rows, key=lambda row: row.severity)


def _of_name(tolerance: Mapping[str, float], name: str) -> float:
    return tolerance.get(LOSS if name == EVALUATED else name, EXACT)


def relative_error(value: Tensor, truth: Tensor, floor: float = 0.0) -> float:
    """Norm of the difference over the norm of the truth, which counts as `floor` at least."""
    value, truth = value.detach().double().cpu(), truth.detach().double().cpu()
    if value.shape != truth.shape:
        return math.inf
    scale = max(float(truth.norm()), floor)
    return float((value - truth).norm()) / (scale if scale > 0 else 1.0)


def allowed_in(plain: Step, truth: Step, dtype: torch.dtype) -> dict[str, float]:
    """What each tensor's error may be in few bits: that of plain PyTorch in them, and a rounding or two."""
    tiny = torch.finfo(dtype).eps
    floor = SMALLEST * max((float(grad.norm()) for grad in truth.grads.values()), default=0.0)
    wanted = truth.tensors()
    return {
        name: SLACK * relative_error(value, wanted[name], floor) + tiny * (2.0 if value.dim() == 0 else 0.25)
        for name, value in plain.tensors().items()
    }


def tried(technique: str, case: str, run: Callable[[], Row]) -> Row:
    """A row of what `run` finds, or of how it failed: a crash is a finding, not the end of the report."""
    try:
        return run()
    except Exception as error:  # whatever it is, it is what the user's run would have met
        return Row(
            technique, case, math.inf, "-", EXACT, f"raised {type(error).__name__}: {_first_line(error)}"
        )


def grads_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients that weights have."""
    return {
        name: param.grad.detach().clone()
        for name, param in model.named_parameters()
        if param.grad is not None
    }


class InputGradients:
    """Notes the gradient of what the embedding gives, call by call."""

    def __init__(self, model: nn.Module) -> None:
        self.found: list[Tensor | None] = []
        self._embedding = model.get_input_embeddings()

    def __enter__(self) -> InputGradients:
        self._hook = self._embedding.register_forward_hook(self._watch)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _watch(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        self.found.append(None)
        index = len(self.found) - 1

        def note(grad: Tensor) -> None:
            earlier = self.found[index]
            # A copy: layers write their input's gradient over the one that they are given.
            self.found[index] = grad.detach().clone() if earlier is None else earlier + grad

        if output.requires_grad:
            output.register_hook(note)


def _judge(value: Tensor | None, truth: Tensor | None, floor: float) -> tuple[float, str]:
    if truth is None:
        return math.inf, "is there, and should not be"
    if value is None:
        value, said = torch.zeros_like(truth), "is not there"
    else:
        said = ""
    if value.shape != truth.shape:
        return math.inf, f"has shape {tuple(value.shape)}, not {tuple(truth.shape)}"
    error = relative_error(value, truth, floor)
    return error, said or _factor(value, truth, error)


def _factor(value: Tensor, truth: Tensor, error: float) -> str:
    """`2 x the true one`, where that is what is wrong with it."""
    if not math.isfinite(error):
        return "is not finite"
    flat, wanted = value.detach().double().flatten().cpu(), truth.detach().double().flatten().cpu()
    square = float(wanted @ wanted)
    if not error > 1e-3 or not square:
        return ""
    factor = float(flat @ wanted) / square
    rest = float((flat - factor * wanted).norm()) / square**0.5
    return f"{factor:.4g} x the true one" if rest < 0.01 * error else ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""
