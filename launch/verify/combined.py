"""All techniques of a config together, and those that need several processes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ...distributed.engine import LocalEngine
from ...distributed.groups import ProcessGroups
from ...mst.apply import apply_mini_sequence
from .batches import TILE
from .bench import Bench, trained_model
from .compare import EXACT, NEAR, Row, Step, compare, relative_error, tried
from .optimizers import updates
from .processes import run_job
from .ranks import dtype_of
from .steps import engine_step, evaluated_loss, logits_step
from .truth import exact, plain_step

ONE = ProcessGroups()
ADAPTERS = "LoRA adapters"
TOGETHER = "all together, 1 process"
IN_FLOAT32 = 2.0
"""Error that is allowed in float32, of the error that plain PyTorch makes in it, beside `NEAR`."""
UPDATE = 1e-3
"""Of a weight's update in float32: it is read from a difference of weights, whose last digits it is."""


def adapters(bench: Bench) -> Iterator[Row]:
    """Adapters get their gradients and the frozen weights none."""
    if bench.config.model.lora is None:
        return
    sequence = bench.config.sequence
    for sample in bench.samples[1:3]:

        def run(sample=sample) -> Row:
            model = copy.deepcopy(bench.true_plain)
            options = {"checkpoints": "gpu"} if bench.streams else {"checkpoints": "none"}
            tile = TILE if sequence.mini_sequence else None
            apply_mini_sequence(model, tile_tokens=tile, loss="logits", **options)
            return compare(
                ADAPTERS, sample.name, logits_step(model, sample.batch), bench.truth([sample], adapters=True)
            )

        yield tried(ADAPTERS, sample.name, run)


def on_one_process(bench: Bench) -> Iterator[Row]:
    """Everything that the config uses on one process, built as training builds it."""
    groups = [bench.samples[:1]]
    if not bench.config.optimizer.in_backward:
        groups.append(bench.samples)
    for samples in groups:
        case = f"{len(samples)} micro-batch{'es' if len(samples) > 1 else ''}"

        def run(samples=samples, case: str = case) -> Row:
            model = trained_model(bench.clone_config, ONE, torch.float64)
            trainable = [param for param in model.parameters() if param.requires_grad]
            engine = LocalEngine(
                model, torch.optim.SGD(trainable, lr=1.0), ONE, accumulation_steps=len(samples)
            )
            evaluated = evaluated_loss(engine, ONE, bench.batches(samples))
            step, _ = engine_step(engine, ONE, bench.batches(samples), lr=1.0)
            step.evaluated = evaluated
            truth = bench.truth(samples, adapters=True)
            truth = replace(truth, evaluated=truth.loss)
            return compare(TOGETHER, case, step, truth, tolerance=bench.tolerance)

        yield tried(TOGETHER, case, run)


def jobs_of(bench: Bench) -> dict[str, str]:
    """Jobs for several processes, and what a row of each is called."""
    layout, finest = bench.layout, bench.finest_groups
    processes = f"{layout.processes} processes"
    if layout.processes == 1:
        return {}
    named = {}
    if layout.degree > 1:
        named["ulysses"] = f"Ulysses, {layout.degree} processes"
        if finest > 1 and bench.heads.keys // finest < layout.degree:
            named["ulysses_by_groups"] = f"Ulysses by {finest} head groups, {layout.degree} processes"
    if layout.zero_stage:
        named["zero"] = f"ZeRO {layout.zero_stage}, {processes}"
    named["together"] = f"all together, {processes}"
    return named


def on_several_processes(bench: Bench) -> Iterator[Row]:
    """Techniques that are about several processes, each alone, and then all together."""
    for job, title in jobs_of(bench).items():
        ranks: list[Step] = []
        yield tried(title, _case(bench, job), partial(_gradients, bench, job, title, ranks))
        if ranks and ranks[0].others:
            title = f"step of {bench.config.optimizer.name}: {title}"
            yield tried(title, _case(bench, job), partial(_steps, bench, job, title, ranks))


def _case(bench: Bench, job: str) -> str:
    return f"{len(bench.samples)} micro-batches, ranks a sequence: {_degree(bench, job)}"


def _degree(bench: Bench, job: str) -> int:
    return 1 if job == "zero" else bench.layout.degree


def _gradients(bench: Bench, job: str, title: str, ranks: list[Step]) -> Row:
    """Run a job, and judge each rank's loss and gradients."""
    ranks += run_job(job, bench.clone_config, bench.layout)
    truth, tolerance = _truth_of(bench, job)
    inputs = whole_inputs(bench, ranks, _degree(bench, job))
    truth = replace(truth, evaluated=truth.loss)
    found = [Step(rank.loss, rank.grads, inputs, rank.evaluated) for rank in ranks]
    return _worst([compare(title, _case(bench, job), one, truth, tolerance=tolerance) for one in found])


def _steps(bench: Bench, job: str, title: str, ranks: list[Step]) -> Row:
    """Judge what each rank's optimizer made of them."""
    truth = _update_of(bench, job)
    found = [Step(0.0, rank.others) for rank in ranks]
    return _worst([compare(title, "beside one process", one, truth, tolerance=UPDATE) for one in found])


def _worst(rows: list[Row]) -> Row:
    return max(rows, key=lambda row: row.severity)


def _truth_of(bench: Bench, job: str) -> tuple[Step, float | dict[str, float]]:
    """What the ranks should find, and what their errors may be."""
    truth = bench.truth(bench.samples, adapters=job == "together")
    if dtype_of(job, bench.layout) == torch.float64:
        if job == "together":
            return truth, bench.tolerance
        return truth, NEAR if bench.config.sequence.loss == "logits" else EXACT
    in_float32 = plain_step(copy.deepcopy(_model_of(bench, job)).float(), bench.batches(bench.samples))
    wanted = truth.tensors()
    return truth, {
        name: NEAR + IN_FLOAT32 * relative_error(value, wanted[name])
        for name, value in in_float32.tensors().items()
    }


def _update_of(bench: Bench, job: str) -> Step:
    """What one step of the config's optimizer adds to each weight, on one process and in float64."""
    grads = bench.truth(bench.samples, adapters=job == "together").grads
    model = exact(_model_of(bench, job))
    return Step(0.0, updates(model, grads, bench.config.optimizer, bench.config.train.seed))


def _model_of(bench: Bench, job: str) -> nn.Module:
    return bench.plain if job == "together" else bench.base


def whole_inputs(bench: Bench, ranks: list[Step], degree: int) -> list[Tensor | None]:
    """The ranks' parts of each micro-batch's input gradient, put together and without the padding."""
    num_rows = len(ranks) // degree
    whole: list[Tensor | None] = []
    for index, sample in enumerate(bench.samples):
        first = index % num_rows * degree
        parts = [rank.inputs[index // num_rows] for rank in ranks[first : first + degree]]
        length = sample.batch["input_ids"].shape[1]
        whole.append(None if any(part is None for part in parts) else torch.cat(parts, dim=1)[:, :length])
    return whole
