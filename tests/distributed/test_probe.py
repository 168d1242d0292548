"""What a reducer divides by: measured through each engine, used by it, and refused where nobody knows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo import run_cases
from torch import nn
from training_samples import VOCAB, engine_training, prepared_llama

from longseq.distributed import ProcessGroups
from longseq.distributed.engine import Engine, LocalEngine
from longseq.distributed.probe import ReducerScaleError, calibrate, measure_reducer_divisor
from longseq.distributed.zero_config import ZeroOptions

# Processes are started that make engines of DeepSpeed.
pytestmark = pytest.mark.slow

STAGES = (0, 1, 2, 3)
OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, weight_decay=0.1),
    "SGD with momentum": lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.9),
}

PAIRS = [*((stage, "AdamW") for stage in STAGES), (0, "SGD with momentum"), (2, "SGD with momentum")]


def make_engine(stage: int, optimizer: str, dtype: torch.dtype, accumulation: int) -> tuple[Engine, Any]:
    groups = ProcessGroups.create(2)
    model = prepared_llama(groups, dtype=dtype)
    made = OPTIMIZERS[optimizer](model.parameters())
    if stage == 0:
        return LocalEngine(model, made, groups, accumulation_steps=accumulation), groups
    from longseq.distributed.zero import DeepSpeedEngine, init_deepspeed_communication

    init_deepspeed_communication()
    options = ZeroOptions(stage, accumulation, bf16=dtype == torch.bfloat16)
    return DeepSpeedEngine(model, made, groups, options), groups


def engine_case(stage: int, optimizer: str, dtype: str = "float32", expected: float | None = None) -> dict:
    """The measured divisor; and a training's losses and norms with a probe before it and without."""
    runs = []
    for probed in (False, True):
        engine, groups = make_engine(stage, optimizer, getattr(torch, dtype), accumulation=4)
        found = engine.reducer_divisor
        if probed:
            if expected is not None:
                engine.reducer_divisor = expected
            calibrate(engine, groups, VOCAB, torch.device("cpu"))
        runs.append(engine_training(engine, groups))
    return {"known": found, "measured": engine.reducer_divisor, "runs": runs}


def ddp_case() -> list[float]:
    """DDP's mean over all ranks, and what somebody has made a third of."""
    groups, measured = ProcessGroups.create(), []
    for factor in (1.0, 3.0):
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))

        def backward(model: nn.Module = model) -> None:
            model(torch.full((1, 3), 1.0 + dist.get_rank())).sum().backward()

        def reduced(param: nn.Parameter, factor: float = factor) -> torch.Tensor:
            return param.grad / factor

        try:
            measured.append(measure_reducer_divisor(model.parameters(), backward, reduced, groups))
        except ReducerScaleError as error:
            measured.append(str(error))
    return measured


def adapters_case() -> float:
    """Adapters as they begin: the second factor is 0, so that the first ones, all smaller, get nothing."""
    groups = ProcessGroups.create()
    first = [nn.Parameter(torch.ones(2, 3)) for _ in range(20)]
    second = [nn.Parameter(torch.zeros(5, 2)) for _ in range(20)]

    def backward() -> None:
        ones = torch.full((3,), 1.0 + groups.rank)
        sum((b @ a @ ones).sum() for a, b in zip(first, second, strict=True)).backward()
        for param in (*first, *second):
            groups.all_sum(param.grad)

    return measure_reducer_divisor([*first, *second], backward, lambda param: param.grad, groups)


def no_gradient_case() -> str:
    groups = ProcessGroups.create()
    layer = nn.Linear(3, 2)
    with pytest.raises(ReducerScaleError) as refused:
        measure_reducer_divisor(layer.parameters(), lambda: None, lambda param: param.grad, groups)
    return str(refused.value)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list]:
    cases: dict[str, Any] = {
        f"ZeRO {stage}, {optimizer}": (engine_case, {"stage": stage, "optimizer": optimizer})
        for stage, optimizer in PAIRS
    }
    for stage in (1, 2, 3):
        cases[f"ZeRO {stage}, bf16"] = (
            engine_case,
            {"stage": stage, "optimizer": "AdamW", "dtype": "bfloat16"},
        )
    cases["expected another"] = (engine_case, {"stage": 2, "optimizer": "AdamW", "expected": 1.0})
    cases |= {fn.__name__: (fn, {}) for fn in (ddp_case, adapters_case, no_gradient_case)}
    return run_cases(2, cases)


@pytest.mark.parametrize(("stage", "optimizer"), PAIRS)
def test_what_is_measured_is_what_is_known_and_nothing_else_changes(
    outcomes: dict[str, list], stage: int, optimizer: str
) -> None:
    for rank in outcomes[f"ZeRO {stage}, {optimizer}"]:
        assert rank["measured"] == rank["known"] == (1.0 if stage == 0 else 2.0)
        plain, probed = rank["runs"]
        assert probed == plain, "bit for bit"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_gradients_measure_as_well(outcomes: dict[str, list], stage: int) -> None:
    for rank in outcomes[f"ZeRO {stage}, bf16"]:
        assert rank["measured"] == 2.0
        plain, probed = rank["runs"]
        assert probed == plain


def test_what_is_measured_is_used(outcomes: dict[str, list]) -> None:
    for rank in outcomes["expected another"]:
        assert rank["measured"] == 2.0
        plain, probed = rank["runs"]
        assert probed == plain


def test_any_reducer_can_be_measured_and_an_unknown_one_is_refused(outcomes: dict[str, list]) -> None:
    for mean, strange in outcomes["ddp_case"]:
        assert mean == 2.0
        assert "divides the ranks' summed gradients by 6, and known are 1, 2" in strange


def test_adapters_whose_first_factors_have_no_gradient_yet_are_measured(outcomes: dict[str, list]) -> None:
    assert outcomes["adapters_case"] == [1.0, 1.0]


def test_no_gradient_measures_nothing(outcomes: dict[str, list]) -> None:
    for message in outcomes["no_gradient_case"]:
        assert "by nan" in message
