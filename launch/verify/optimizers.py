"""The optimizer's own step, beside its formula or beside itself in another layout."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ...distributed.engine import LocalEngine
from ...distributed.groups import ProcessGroups
from ..config import OptimizerConfig
from ..optimizer import build_optimizer
from .bench import Bench, trained_model
from .compare import EXACT, Row, Step, compare, tried
from .steps import engine_step

ONE = ProcessGroups()
OPTIMIZER = "optimizer's step"
IN_BACKWARD = "updates in backward"
LEARNING_RATE = 2.0**-7
"""Large beside float32's roundings of the weights that a change is read from."""
EPS = 1e-3
"""Of the size of the clone's gradients: with a config's 1e-8 a first step is their sign, and the sign of what
should be 0 is a rounding's."""
STEPS = 3


def small_optimizer(config: OptimizerConfig) -> OptimizerConfig:
    """The config's optimizer, for the clone: a rank below its matrices' sides, and nothing clipped."""
    rank = config.apollo.rank if config.name != "apollo" else 8
    return config.model_copy(
        update={
            "lr": LEARNING_RATE,
            "eps": EPS,
            "clip_norm": None,
            "apollo": config.apollo.model_copy(update={"rank": rank}),
            "weights": "float32",
        }
    )


def updates(
    model: nn.Module, grads: Mapping[str, Tensor], config: OptimizerConfig, seed: int
) -> dict[str, Tensor]:
    """What a step of the config's optimizer adds to each trainable weight; the model is not changed."""
    model = copy.deepcopy(model)
    optimizer = build_optimizer(model, small_optimizer(config), seed=seed)
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    before = {name: param.detach().clone() for name, param in trainable.items()}
    for name, param in trainable.items():
        param.grad = grads[name].to(param.dtype)
    optimizer.step()
    return {name: param.detach() - before[name] for name, param in trainable.items()}


def optimizer_steps(bench: Bench) -> Iterator[Row]:
    """AdamW beside its formula; updates in backward beside those behind it."""
    config = bench.config.optimizer
    if config.name == "adamw":
        yield tried(OPTIMIZER, _case(config.name), lambda: _adamw(bench))
    if config.in_backward:
        yield tried(IN_BACKWARD, "one SGD step", lambda: _one_step_a_weight(bench))
        case = f"{STEPS} steps of {config.name}, beside updates behind backward"
        yield tried(IN_BACKWARD, case, lambda: _as_behind_backward(bench, case))


def _case(name: str) -> str:
    return f"{STEPS} steps of {name}, beside its formula in float64"


def _adamw(bench: Bench) -> Row:
    """Decoupled weight decay on matrices, bias-corrected moments (arXiv:1711.05101)."""
    config = small_optimizer(bench.config.optimizer)
    model = copy.deepcopy(bench.base)
    optimizer = build_optimizer(model, config)
    grads = bench.truth(bench.samples[:1]).grads
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    beta_1, beta_2 = config.betas
    for step in range(1, STEPS + 1):
        for name, param in model.named_parameters():
            grad = grads[name] * (-0.5) ** step
            param.grad = grad.clone()
            decay = config.weight_decay if param.dim() >= 2 else 0.0
            first[name] = beta_1 * first[name] + (1 - beta_1) * grad
            second[name] = beta_2 * second[name] + (1 - beta_2) * grad**2
            mean, square = first[name] / (1 - beta_1**step), second[name] / (1 - beta_2**step)
            weights[name] -= config.lr * (decay * weights[name] + mean / (square.sqrt() + EPS))
        optimizer.step()
    found = Step(0.0, {name: param.detach() for name, param in model.named_parameters()})
    return compare(OPTIMIZER, _case("adamw"), found, Step(0.0, weights), tolerance=EXACT)


class CountingSGD(torch.optim.SGD):
    """Counts the steps of each weight."""

    def __init__(self, params: list[nn.Parameter], lr: float) -> None:
        super().__init__(params, lr=lr)
        self.steps: dict[int, int] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """`w -= lr * grad` of every weight that has a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.add_(param.grad, alpha=-group["lr"])
                    self.steps[id(param)] = self.steps.get(id(param), 0) + 1


def _one_step_a_weight(bench: Bench) -> Row:
    """With a rate of a power of two, a weight's change is its gradient: all of it, and once."""
    model = trained_model(bench.clone_config, ONE, torch.float64)
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    before = {name: param.detach().clone() for name, param in trainable.items()}
    optimizer = CountingSGD(list(trainable.values()), LEARNING_RATE)
    engine = LocalEngine(model, optimizer, ONE, in_backward=True)
    samples = bench.samples[:1]
    step, _ = engine_step(engine, ONE, bench.batches(samples), lr=LEARNING_RATE)
    step.grads = {name: (before[name] - param.detach()) / LEARNING_RATE for name, param in trainable.items()}
    several = [name for name, param in trainable.items() if optimizer.steps.get(id(param), 0) != 1]
    if several:
        counts = sorted({optimizer.steps.get(id(trainable[name]), 0) for name in several})
        raise RuntimeError(
            f"{several[0]} and {len(several) - 1} more weights were updated {counts} times a step"
        )
    truth = bench.truth(samples, adapters=True)
    return compare(IN_BACKWARD, "one SGD step", step, truth, tolerance=bench.tolerance)


def _as_behind_backward(bench: Bench, case: str) -> Row:
    """The config's own optimizer, in backward and behind it, over several steps."""
    ends = []
    for in_backward in (False, True):
        model = trained_model(bench.clone_config, ONE, torch.float64)
        config = small_optimizer(bench.config.optimizer)
        engine = LocalEngine(model, build_optimizer(model, config), ONE, in_backward=in_backward)
        losses = [
            engine_step(engine, ONE, [sample.batch], lr=LEARNING_RATE)[0].loss
            for sample in bench.samples[:STEPS]
        ]
        weights = {name: param.detach() for name, param in model.named_parameters()}
        ends.append(Step(losses[-1], weights))
    return compare(IN_BACKWARD, case, ends[1], ends[0], tolerance=EXACT)
