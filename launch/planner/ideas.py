"""Single changes of a config that may free memory; what each of them brings is worked out in advice.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ...apollo import Apollo
from ...mst.layer_places import ALL_ON_GPU
from ...mst.placement import Placement, spread_inputs
from ...mst.segments import fewest_waiting
from .inside import NOTHING, TILES, possible_groups, with_parallel
from .knobs import Knobs
from .workload import Weight, Workload

if TYPE_CHECKING:
    from ..config import ApolloConfig
    from .plan import Plan

NEEDED_STAGE = {"offload_optimizer": 1, "offload_parameters": 3}
"""The ZeRO stage that each way to the host needs."""
LOSS_MIB = (1024, 256)


@dataclass(frozen=True)
class Idea:
    """What may be tried.

    Attributes:
        family: Of several of one family one is told.
        values: By dotted key.
        knobs: With these values.
        work: Another than the plan's, where the values change it.
        note: What they change beside memory and time.
    """

    family: str
    values: dict[str, object]
    knobs: Knobs
    work: Workload | None = None
    note: str = ""


def ideas(plan: Plan) -> Iterator[Idea]:
    """All that might help, one key changed and what hangs on it; the config's rules are asked later."""
    yield from _of_the_batch(plan)
    yield from _of_processes(plan)
    if plan.knobs.stream:
        yield from _of_streamed_layers(plan)
    else:
        for name, inputs in (("gpu", ALL_ON_GPU), ("host", Placement(1))):
            streamed = replace(plan.knobs, stream=True, inputs=inputs)
            yield Idea("checkpoints", {"sequence.checkpoints": name}, streamed)
    yield from _of_tiles(plan)
    yield from _of_the_optimizer(plan)
    yield from _of_the_loss(plan)


def _of_the_batch(plan: Plan) -> Iterator[Idea]:
    knobs = plan.knobs
    if knobs.micro_batch > 1:
        one = replace(knobs, micro_batch=1, accumulation=knobs.accumulation * knobs.micro_batch)
        yield Idea("micro batch", {"train.micro_batch_sequences": 1}, one)
    # Of a plan that does not fit the longest length that does is known.
    half = knobs.length // 2 // knobs.ulysses_degree * knobs.ulysses_degree
    if plan.fits and half:
        note = "for a run of its own, with shorter sequences"
        yield Idea("length", {"sequence.length": half}, replace(knobs, length=half), note=note)


def _of_processes(plan: Plan) -> Iterator[Idea]:
    """Other ways to share the work: one key of `parallel`, with the stage that it needs."""
    knobs = plan.knobs
    options: list[tuple[str, int | str]] = [
        ("ulysses_degree", degree)
        for degree in range(knobs.ulysses_degree + 1, knobs.num_gpus + 1)
        if knobs.num_gpus % degree == 0
    ]
    options += [("zero_stage", stage) for stage in range(knobs.zero_stage + 1, 4)]
    options += [(name, "none" if getattr(knobs, name) else "cpu") for name in NEEDED_STAGE]
    for name, value in options:
        changed = {name: value}
        if value == "cpu" and knobs.zero_stage < NEEDED_STAGE[name]:
            changed["zero_stage"] = NEEDED_STAGE[name]
        values = {f"parallel.{key}": one for key, one in changed.items()}
        yield Idea(name, values, with_parallel(knobs, **changed))


def _of_streamed_layers(plan: Plan) -> Iterator[Idea]:
    knobs = plan.knobs
    if plan.knobs.inputs.kept is None:  # else it is auto's, which tries them all
        yield from _of_inputs(plan)
    if knobs.attention != NOTHING:
        none = replace(knobs, attention=NOTHING)
        yield Idea("attention", {"sequence.save_attention": "none"}, none)
    for groups in possible_groups(plan.work, knobs.ulysses_degree):
        if groups > knobs.head_groups:
            yield Idea("head groups", {"sequence.head_groups": groups}, replace(knobs, head_groups=groups))


def _of_inputs(plan: Plan) -> Iterator[Idea]:
    knobs, inputs, layers = plan.knobs, plan.knobs.inputs, plan.work.num_layers
    if not inputs.host or inputs.gpu_layers > 1:
        values: dict[str, object] = {"sequence.checkpoints": "host"}
        if inputs.every > 1:
            values["sequence.checkpoint_every"] = inputs.every
        yield Idea("checkpoints", values, replace(knobs, inputs=Placement(1, inputs.every)))
    every = 2 * inputs.every
    if every <= layers:
        rarer = Placement(1, every) if inputs.host else replace(inputs, every=every)
        values = {
            "sequence.checkpoints": "host" if inputs.host else "gpu",
            "sequence.checkpoint_every": every,
        }
        yield Idea("checkpoints", values, replace(knobs, inputs=rarer))
    if plan.config.sequence.checkpoints != "auto":
        fewest = spread_inputs(layers, 0, fewest_waiting(layers))
        values = {"sequence.checkpoints": "auto"}
        if inputs.every > 1:
            values["sequence.checkpoint_every"] = 1
        yield Idea("checkpoints", values, replace(knobs, inputs=fewest))


def _of_tiles(plan: Plan) -> Iterator[Idea]:
    knobs, least = plan.knobs, TILES[-1]
    if plan.config.sequence.mini_sequence and (knobs.tile_tokens or knobs.tokens_a_gpu) > least:
        yield Idea("tiles", {"sequence.tile_tokens": least}, replace(knobs, tile_tokens=least))


def _of_the_optimizer(plan: Plan) -> Iterator[Idea]:
    work, apollo = plan.work, plan.config.optimizer.apollo
    if not work.in_backward:
        note = "clip_norm then goes by the norm of the step before"
        in_backward = replace(work, in_backward=True)
        yield Idea("in backward", {"optimizer.in_backward": True}, plan.knobs, in_backward, note)
    if work.optimizer == "adamw" and not work.has_adapters:
        states = apollo_mini_bytes(work.weights, apollo)
        mini = replace(work, optimizer="apollo-mini", state_bytes=states)
        note = "another optimizer, for a run of its own: docs/apollo.md"
        yield Idea("optimizer", {"optimizer.name": "apollo-mini"}, plan.knobs, mini, note)


def apollo_mini_bytes(weights: tuple[Weight, ...], apollo: ApolloConfig) -> int:
    """Of APOLLO-Mini's states by its own report; from shapes, for the model is not at hand."""
    by_rule: dict[str, dict] = {}
    for weight in weights:
        rule = "adamw"
        if len(weight.shape) in (2, 3):
            rule = apollo.embeddings if weight.kind in ("embedding", "head") else "low_rank"
        group = by_rule.setdefault(rule, {"params": [], "names": [], "rule": rule})
        group["params"].append(torch.nn.Parameter(torch.empty(weight.shape, device="meta")))
        group["names"].append(weight.name)
    return Apollo(list(by_rule.values()), rank=apollo.rank, scale_type="tensor").memory_report().state_bytes


def _of_the_loss(plan: Plan) -> Iterator[Idea]:
    work, given = plan.work, plan.work.loss_memory_mib
    if work.loss == "logits":
        yield Idea("loss", {"sequence.loss": "cce"}, plan.knobs, replace(work, loss="cce"))
        return
    for mib in LOSS_MIB:
        if given is None or mib < given:
            less = replace(work, loss_memory_mib=mib)
            yield Idea("loss", {"sequence.loss_memory_mib": mib}, plan.knobs, less)
