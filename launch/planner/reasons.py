"""Why a plan has each of its knobs as it has: told by what one knob changed would do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...mst.layer_memory import SavedAttention
from ...mst.layer_places import ALL_ON_GPU
from ..config import RunConfig
from ..config_changes import with_values
from ..config_errors import ConfigError
from ..sizes import gib
from .costs import Costs
from .inside import NOTHING, head_groups, tiles, with_parallel
from .knobs import Knobs
from .layouts import layouts
from .workload import Workload

SAME = 0.001
"""Shares of a step below this are not told: the estimate does not know them."""


@dataclass(frozen=True)
class Reason:
    """Attributes: `key` of the config, the `value` that the plan has, and `why`."""

    key: str
    value: str
    why: str


@dataclass(frozen=True)
class Variant:
    """The chosen knobs with one changed, and what that is called."""

    name: str
    knobs: Knobs


def reasons(
    asked: RunConfig, chosen: RunConfig, knobs: Knobs, costs: Costs, longest: int | None
) -> tuple[Reason, ...]:
    """One line for each knob.

    Args:
        asked: The config as it was given.
        chosen: With the plan's numbers.
        knobs: What was chosen.
        costs: Of the workload on the machine.
        longest: Tokens of the longest sequence that fits.
    """
    layers = costs.work.num_layers
    found = [_of_length(asked, knobs, longest)]
    for key, value in (
        ("parallel.ulysses_degree", str(knobs.ulysses_degree)),
        ("parallel.zero_stage", str(knobs.zero_stage)),
        ("parallel.offload_optimizer", chosen.parallel.offload_optimizer),
        ("parallel.offload_parameters", chosen.parallel.offload_parameters),
        ("sequence.checkpoints", inputs_text(knobs, layers)),
        ("sequence.save_attention", attention_text(knobs, costs.work)),
        ("sequence.head_groups", str(knobs.head_groups)),
        ("sequence.tile_tokens", "one tile" if knobs.tile_tokens is None else f"{knobs.tile_tokens:,}"),
    ):
        if not knobs.stream and key in ("sequence.save_attention", "sequence.head_groups"):
            continue
        others = _variants(key, asked, chosen, knobs, costs)
        found.append(Reason(key, value, _given(asked, key) or _why(costs, knobs, others)))
    return tuple(found)


def inputs_text(knobs: Knobs, num_layers: int) -> str:
    """Where the layers' inputs wait."""
    if not knobs.stream:
        return "not streamed"
    counts = [(knobs.inputs.count(where, num_layers), where) for where in ("gpu", "host", "rebuild")]
    names = {"gpu": "on the GPU", "host": "on the host", "rebuild": "rebuilt"}
    return ", ".join(f"{count} {names[where]}" for count, where in counts if count)


def attention_text(knobs: Knobs, work: Workload) -> str:
    """What is kept of attention."""
    saved, num_layers = knobs.attention, work.num_layers
    on_gpu = min(saved.gpu_layers, num_layers)
    what = "output"
    if saved.everything:
        what += ", queries, keys, values" if work.layer.at_once(knobs.head_groups) else ", sum with the input"
    parts = [f"{what} of {on_gpu} on the GPU"] if on_gpu else []
    parts += [f"output of {num_layers - on_gpu} on the host"] if saved.host and on_gpu < num_layers else []
    return "; ".join(parts) or "none"


def _given(asked: RunConfig, key: str) -> str | None:
    """Where the config says it: that it does."""
    section, name = key.split(".")
    value = getattr(getattr(asked, section), name)
    if name == "tile_tokens" and not asked.sequence.mini_sequence:
        return "set by you: sequence.mini_sequence=false"
    if value == "auto":
        return None
    if name in getattr(asked, section).model_fields_set:
        return "set by you"
    return "the default; auto would let the plan choose"


def _of_length(asked: RunConfig, knobs: Knobs, longest: int | None) -> Reason:
    room = "nothing fits" if longest is None else f"the longest that fits is {longest:,}"
    if asked.sequence.length != "max":
        return Reason("sequence.length", f"{knobs.length:,}", f"set by you; {room}")
    return Reason("sequence.length", f"{knobs.length:,}", f"max: {room}")


def _why(costs: Costs, knobs: Knobs, others: list[Variant]) -> str:
    if not costs.fits(knobs):
        return "leaves the most room, which is too little"
    if not others:
        return "what else is fixed leaves no other"
    return "; ".join(_compared(costs, knobs, other) for other in others[:2])


def _compared(costs: Costs, knobs: Knobs, other: Variant) -> str:
    memory = costs.memory(other.knobs)
    if memory.reserved_bytes > costs.card_room:
        room = gib(costs.card_room)
        return f"{other.name} would take {gib(memory.reserved_bytes)} of the {room} GiB that a GPU has for it"
    if memory.host_bytes > costs.host_room:
        return (
            f"{other.name} would take {gib(memory.host_bytes)} of the {gib(costs.host_room)} GiB of host "
            "memory that a process has"
        )
    change = costs.seconds(other.knobs).seconds / costs.seconds(knobs).seconds - 1
    if change >= SAME:
        return f"{other.name} would take {100 * change:.1f} % longer"
    if change <= -SAME:
        return f"{other.name} would save {-100 * change:.1f} %, too little for what it adds"
    return f"{other.name} would be no faster"


def _variants(key: str, asked: RunConfig, chosen: RunConfig, knobs: Knobs, costs: Costs) -> list[Variant]:
    """The chosen knobs with this key's nearest other values: the simpler one first, or else the next."""
    tokens = knobs.tokens_a_gpu
    if key.startswith("parallel."):
        return _of_layout(key, chosen, knobs, costs)
    if key == "sequence.checkpoints":
        return list(_of_inputs(asked, knobs))
    if key == "sequence.save_attention":
        return list(_of_attention(knobs, costs.work))
    if key == "sequence.head_groups":
        counts = head_groups(asked, costs.work, knobs.ulysses_degree)
        near = _neighbour(counts, knobs.head_groups)
        return [Variant(f"{n} group{'' if n == 1 else 's'}", replace(knobs, head_groups=n)) for n in near]
    near = _neighbour(tiles(asked, tokens), knobs.tile_tokens)
    return [Variant(f"{n:,}", replace(knobs, tile_tokens=n)) for n in near]


def _neighbour(values: list, value) -> list:
    """The one before, which is the simpler; of the first, the one after."""
    if value not in values or len(values) == 1:
        return []
    index = values.index(value)
    return [values[index - 1] if index else values[1]]


def _of_layout(key: str, chosen: RunConfig, knobs: Knobs, costs: Costs) -> list[Variant]:
    name = key.partition(".")[2]
    try:
        ways = layouts(
            with_values(chosen, {key: "auto"}), knobs.num_gpus, knobs.length, costs.work.shape.num_heads
        )
    except ConfigError:  # the chosen one is among them, unless it breaks a rule itself
        return []
    values = list(dict.fromkeys(getattr(way.parallel, name) for way in ways))
    near = _neighbour(values, getattr(chosen.parallel, name))
    return [Variant(str(value), with_parallel(knobs, **{name: value})) for value in near]


def _of_inputs(asked: RunConfig, knobs: Knobs) -> Iterator[Variant]:
    if not knobs.stream:
        yield Variant("streamed", replace(knobs, stream=True))
        return
    if knobs.inputs.rebuilds:
        every_one = replace(knobs.inputs, every=1, kept=None)
        yield Variant("keeping every input", replace(knobs, inputs=every_one))
    elif knobs.inputs.host:
        yield Variant("all on the GPU", replace(knobs, inputs=ALL_ON_GPU))
    elif asked.model.lora is None or asked.model.lora.dropout == 0:
        plain = replace(knobs, stream=False, head_groups=1, inputs=ALL_ON_GPU, attention=NOTHING)
        yield Variant("not streamed", plain)


def _of_attention(knobs: Knobs, work: Workload) -> Iterator[Variant]:
    saved = knobs.attention
    if saved == NOTHING:
        yield Variant("every output on the host", replace(knobs, attention=SavedAttention(host=True)))
        return
    yield Variant("none", replace(knobs, attention=NOTHING))
    more = SavedAttention(work.num_layers, everything=saved.everything)
    if saved != more:
        yield Variant("all on the GPU", replace(knobs, attention=more))
    elif not saved.everything:
        at_once = work.layer.at_once(knobs.head_groups)
        name = "queries, keys and values too" if at_once else "its sum with the input too"
        yield Variant(name, replace(knobs, attention=replace(more, everything=True)))
