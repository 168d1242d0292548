"""A plan: how a run will be run, what that takes, and why each thing was chosen so."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..config import RunConfig
from .choose import Choice, Search
from .inside import refuse_groups
from .knobs import Knobs
from .machine import Machine
from .memory import MemoryEstimate
from .reasons import Reason, reasons
from .seconds import TimeEstimate
from .workload import Workload


@dataclass(frozen=True)
class Plan:
    """How a config is run on a machine, by estimate.

    Attributes:
        config: The config, with numbers where it had `auto` or `max` for its processes and its length.
        machine: What it is for.
        work: The model and its optimizer.
        knobs: All that was chosen or given.
        memory: Of one process.
        seconds: Of a training step, all GPUs together.
        fits: Whether card and host have room for it. Where nothing fits, the knobs are those that leave the
            most room.
        card_room: Bytes of a GPU that are planned with.
        host_room: Bytes of host memory that each process may take.
        reasons: Why each knob is what it is.
        longest_tokens: Of the longest sequence that fits with what the config fixes; None if none does.
        notes: What else a person should know.
    """

    config: RunConfig
    machine: Machine
    work: Workload
    knobs: Knobs
    memory: MemoryEstimate
    seconds: TimeEstimate
    fits: bool
    card_room: int
    host_room: int
    reasons: tuple[Reason, ...]
    longest_tokens: int | None
    notes: tuple[str, ...]


def make_plan(
    config: RunConfig, machine: Machine, *, work: Workload | None = None, positions: int | None = None
) -> Plan:
    """Choose all that a config leaves open, and say what the run will take.

    What the config fixes is kept. Of the ways that fit, the fastest by estimate is taken; a way that is no
    simpler than another must save something for it (see costs.py).

    Args:
        config: A run's config, checked.
        machine: What it is to run on.
        work: Its workload, if that is known; else it is made of the model's Hugging Face config.
        positions: Of the model, if `work` is given and they are known: `max` goes no further.

    Raises:
        ConfigError: What the config fixes cannot go together on so many GPUs.
        ValueError: The model's config cannot be had, or is none that can be counted.
    """
    search, positions = new_search(config, machine, work, positions)
    longest = search.longest()
    choice, notes = choose(search, longest, positions)
    costs, knobs = search.costs, choice.knobs
    return Plan(
        config=choice.config,
        machine=machine,
        work=search.work,
        knobs=knobs,
        memory=costs.memory(knobs),
        seconds=costs.seconds(knobs),
        fits=costs.fits(knobs),
        card_room=costs.card_room,
        host_room=costs.host_room,
        reasons=reasons(config, choice.config, knobs, costs, longest),
        longest_tokens=longest,
        notes=tuple(notes),
    )


def new_search(
    config: RunConfig, machine: Machine, work: Workload | None = None, positions: int | None = None
) -> tuple[Search, int | None]:
    """A search for a config's knobs, and the model's positions if they are known."""
    if work is None:
        from ..model import hf_config

        architecture = hf_config(config.model)
        work = Workload.from_config(config, architecture)
        positions = getattr(architecture, "max_position_embeddings", None)
    refuse_groups(config, work)
    # A plan hands every layer a number of groups, which its backward keeps to.
    return Search(config, replace(work, adapts_groups=False), machine), positions


def choose(search: Search, longest: int | None, positions: int | None) -> tuple[Choice, list[str]]:
    """The way to run, and what should be said of its length."""
    length, notes = search.config.sequence.length, []
    if length == "max":
        length, notes = _longest_of_model(search, longest, positions)
    elif positions is not None and length > positions:
        notes.append(
            f"sequence.length={length:,} is above the model's {positions:,} positions "
            "(max_position_embeddings), for which it was not trained: `longseq train` refuses it until "
            "model.config.max_position_embeddings is raised."
        )
    return search.fastest(length) or search.least(length), notes


def _longest_of_model(search: Search, longest: int | None, positions: int | None) -> tuple[int, list[str]]:
    step = search.step_tokens()
    if longest is None:
        return step, []
    if positions is None or longest <= positions:
        return longest, []
    said = f"there is room for {longest:,} tokens, and the model has {positions:,} positions"
    length = positions // step * step or positions
    return length, [f"sequence.length=max is {length:,}: {said} (max_position_embeddings)."]
