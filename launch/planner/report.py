"""A plan as people and programs read it: tables, JSON, a few lines of a log, and beside what was measured."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..console import format_duration, format_rate
from ..sizes import gib
from .advice import advice
from .reasons import attention_text, inputs_text

if TYPE_CHECKING:
    from rich.console import JustifyMethod, RenderableType
    from rich.table import Table

    from .plan import Plan

logger = logging.getLogger(__name__)

PLAIN_WIDTH = 120
"""Columns of the tables where they are not printed on a terminal."""
SHOWN_CHANGES = 5
"""Of those that would free memory; JSON has all."""


def verdict(plan: Plan) -> str:
    """Whether it fits, how full it gets, and how fast it is: one line."""
    memory, seconds = plan.memory, plan.seconds
    return (
        f"{'fits' if plan.fits else 'DOES NOT FIT'}: {gib(memory.reserved_bytes)} of "
        f"{gib(plan.machine.gpu.memory_bytes)} GiB of each GPU, {gib(memory.host_bytes)} of "
        f"{gib(plan.host_room)} GiB of host memory a process; "
        f"{_step_text(seconds.seconds)} a step, {format_rate(seconds.tokens_per_second)} tokens/s"
    )


def _step_text(seconds: float) -> str:
    return format_duration(seconds) if seconds >= 1 else f"{1000 * seconds:.3g}ms"


def longest_line(plan: Plan) -> str:
    """The longest sequence that fits."""
    if plan.longest_tokens is None:
        return "no sequence fits with what the config fixes"
    return f"the longest sequence that fits with what the config fixes: {plan.longest_tokens:,} tokens"


def print_plan(plan: Plan, notes: Sequence[str] = ()) -> None:
    """Print the tables.

    Args:
        plan: What is printed.
        notes: What to say above them.
    """
    print_tables([*(f"note: {note}" for note in notes), *tables(plan)])


def print_tables(parts: Sequence[RenderableType]) -> None:
    """Print texts and tables, on a terminal or into a file."""
    from rich.console import Console

    if sys.stdout.isatty():
        Console(highlight=False, markup=False, emoji=False).print(*parts, sep="\n")
        return
    console = Console(file=io.StringIO(), width=PLAIN_WIDTH, highlight=False, markup=False, emoji=False)
    console.print(*parts, sep="\n")
    # Cells are filled up with blanks, which a file has no use for.
    for line in console.file.getvalue().splitlines():
        print(line.rstrip())


def tables(plan: Plan) -> list[RenderableType]:
    """What `longseq plan` prints: verdict, memory, knobs, seconds, and what would make it fit."""
    from rich.text import Text

    found: list[RenderableType] = [
        Text(_title(plan), style="bold"),
        Text(verdict(plan), style="green" if plan.fits else "bold red"),
        Text(longest_line(plan)),
        *(Text(f"note: {note}") for note in plan.notes),
        _heading(f"Memory of each process where it is most ({plan.memory.moment})"),
        _memory_table(plan),
        _heading("What was chosen, and why"),
        _knob_table(plan),
        _heading(f"Seconds of a step: {_sequences(plan)} x {plan.knobs.length:,} tokens, one document each"),
        _seconds_table(plan),
        Text(f"rates of the GPU: {plan.machine.gpu.rates}"),
    ]
    if not plan.fits:
        found.append(_heading("What would help"))
        found += [Text(line) for line in advice(plan, SHOWN_CHANGES)]
    return found


def model_name(plan: Plan) -> str:
    """What the model is called."""
    model = plan.config.model
    return model.name or f"{model.config.get('model_type')} from random weights"


def _title(plan: Plan) -> str:
    machine = plan.machine
    nodes = -(-machine.num_gpus // machine.gpus_per_node)
    where = f" on {nodes} nodes" if nodes > 1 else ""
    gpus = f"{machine.num_gpus} x {machine.gpu.name}{where}"
    return f"{model_name(plan)} on {gpus}, {plan.knobs.length:,} tokens a sequence"


def _heading(text: str) -> RenderableType:
    from rich.text import Text

    return Text(f"\n{text}", style="bold")


def _sequences(plan: Plan) -> int:
    knobs = plan.knobs
    return knobs.micro_batch * knobs.accumulation * knobs.data_degree


def table_of(*columns: tuple[str, JustifyMethod]) -> Table:
    """A table without rows; of each column its name and how it is justified."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name, justify in columns:
        # A key that is broken in two cannot be copied.
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name == "key")
    return table


def _memory_table(plan: Plan) -> Table:
    memory = plan.memory
    table = table_of(("component", "left"), ("GPU GiB", "right"), ("host GiB", "right"), ("", "left"))
    for part in sorted(memory.parts, key=lambda part: -(part.gpu_bytes + part.host_bytes)):
        if part.gpu_bytes or part.host_bytes:
            table.add_row(part.name, _cell(part.gpu_bytes), _cell(part.host_bytes), part.note)
    table.add_section()
    table.add_row("sum", gib(memory.peak_bytes), gib(memory.host_bytes), "as torch counts it")
    rest = memory.reserved_bytes - memory.peak_bytes
    table.add_row("besides", gib(rest), "", "fragments, buffers of NCCL, CUDA's context")
    table.add_row("room", gib(plan.card_room), gib(plan.host_room), _room_note(plan))
    return table


def _room_note(plan: Plan) -> str:
    card = plan.machine.gpu.memory_bytes
    return f"{100 * plan.card_room / card:.0f} % of the card's {gib(card)}; a process's part of the node"


def _cell(num_bytes: int) -> str:
    if num_bytes == 0:
        return ""
    return gib(num_bytes) if num_bytes >= 0.05 * 2**30 else "<0.1"


def _knob_table(plan: Plan) -> Table:
    table = table_of(("key", "left"), ("value", "left"), ("why", "left"))
    for reason in plan.reasons:
        table.add_row(reason.key, reason.value, reason.why)
    return table


def _seconds_table(plan: Plan) -> Table:
    table = table_of(("part", "left"), ("s", "right"), ("share", "right"))
    whole = plan.seconds.seconds
    digits = 2 if whole >= 1 else 4
    for name, part in sorted(plan.seconds.parts, key=lambda part: -part[1]):
        table.add_row(name, f"{part:.{digits}f}", f"{100 * part / whole:.0f} %")
    table.add_section()
    table.add_row("step", f"{whole:.{digits}f}", "")
    return table


def settings(plan: Plan) -> list[str]:
    """`key=value` for each key that the plan put a number in the place of `auto` or `max` for."""
    knobs, parallel = plan.knobs, plan.config.parallel
    return [
        f"sequence.length={knobs.length}",
        f"parallel.num_gpus={plan.machine.num_gpus}",
        f"parallel.ulysses_degree={parallel.ulysses_degree}",
        f"parallel.zero_stage={parallel.zero_stage}",
        f"parallel.offload_optimizer={parallel.offload_optimizer}",
        f"parallel.offload_parameters={parallel.offload_parameters}",
    ]


def as_json(plan: Plan, notes: Sequence[str] = ()) -> dict[str, Any]:
    """All of a plan in plain values; sizes in bytes, times in seconds."""
    memory, seconds = plan.memory, plan.seconds
    return {
        "fits": plan.fits,
        "longest_tokens": plan.longest_tokens,
        "settings": settings(plan),
        "model": plan.config.model.model_dump(),
        "machine": asdict(plan.machine),
        "knobs": asdict(plan.knobs),
        "memory": {
            "parts": [asdict(part) for part in memory.parts],
            "peak_bytes": memory.peak_bytes,
            "moment": memory.moment,
            "moments": dict(memory.moments),
            "reserved_bytes": memory.reserved_bytes,
            "card_room_bytes": plan.card_room,
            "host_bytes": memory.host_bytes,
            "host_room_bytes": plan.host_room,
        },
        "seconds": {
            "parts": dict(seconds.parts),
            "step": seconds.seconds,
            "tokens_per_second": seconds.tokens_per_second,
        },
        "reasons": [asdict(reason) for reason in plan.reasons],
        "advice": advice(plan),
        "notes": [*notes, *plan.notes],
    }


def log_plan(plan: Plan) -> None:
    """Say at a run's start by what it is run; as a warning where the estimate has no room for it."""
    for line in log_lines(plan):
        logger.info("%s", line)
    if not plan.fits:
        helps = "".join(f"\n  {line}" for line in advice(plan, SHOWN_CHANGES))
        logger.warning("by estimate this run has too little memory; it is tried all the same.%s", helps)


def log_lines(plan: Plan) -> Iterator[str]:
    """The plan in a few lines."""
    knobs, work = plan.knobs, plan.work
    yield f"plan: {verdict(plan)}"
    if knobs.stream:
        groups = "1 group" if knobs.head_groups == 1 else f"{knobs.head_groups} groups"
        yield (
            f"plan: inputs of layers {inputs_text(knobs, work.num_layers)}; of attention is kept: "
            f"{attention_text(knobs, work)}; {groups} of heads, {_tile_text(knobs.tile_tokens)}"
        )
    else:
        yield f"plan: layers are not streamed, {_tile_text(knobs.tile_tokens)}"
    for note in plan.notes:
        yield f"plan: {note}"


def _tile_text(tile_tokens: int | None) -> str:
    return "no tiles" if tile_tokens is None else f"tiles of {tile_tokens:,} tokens"


def compare(plan: Plan, measured_peak_gib: float, measured_seconds: float | None) -> str:
    """What was expected beside what was measured, for a run's end.

    Args:
        plan: By which the run was run.
        measured_peak_gib: Most memory that torch allocated on a GPU, in GiB.
        measured_seconds: Of a step; None where none can be told (the first compiles kernels).
    """
    expected = plan.memory.peak_bytes / 2**30
    off = _off(measured_peak_gib, expected)
    told = f"peak memory {measured_peak_gib:.1f} GiB, planned {expected:.1f} ({off})"
    if measured_seconds is None:
        return told
    step = plan.seconds.seconds
    # Documents that share a sequence attend to less than the plan counts.
    of_what = " with a document a sequence" if plan.config.data.pack else ""
    return (
        f"{told}; a step {_step_text(measured_seconds)}, planned {_step_text(step)}{of_what} "
        f"({_off(measured_seconds, step)})"
    )


def _off(measured: float, expected: float) -> str:
    return f"{100 * (measured / expected - 1):+.0f} %"
