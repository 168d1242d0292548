"""`longseq plan`: will it fit, how fast, with which settings; on any machine, for any machine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from ..config import RunConfig
from ..config_errors import ConfigError
from ..config_file import load_config
from ..images import refuse_other_formats
from .layouts import most_processes
from .machine import GPUS_A_NODE, HOST_SHARE, Machine, named_machine, parse_bytes, this_machine
from .plan import Plan, make_plan
from .workload import Workload

ASSUMED_GPU = "h100-80g"
"""What a plan is for where there is no GPU and none is named."""


def plan(args: argparse.Namespace) -> int:
    """Plan a config and print it.

    Args:
        args: `config`, `overrides`, and the options of `longseq plan`.

    Returns:
        Exit status: 0 where it fits, 1 where it does not.

    Raises:
        ValueError: A config, a machine or a model that cannot be planned.
        OSError: The picture cannot be written.
    """
    from .drawing import draw
    from .report import as_json, print_plan

    if args.plot is not None:
        refuse_other_formats(args.plot)
    overrides = list(args.overrides)
    if args.num_gpus is not None:
        overrides.append(f"parallel.num_gpus={args.num_gpus}")
    config = load_config(args.config, overrides)
    notes = []
    if args.calibrate:
        notes.append(_calibrate(args))
    machine, said = _machine(config, args.gpu, args.gpus_per_node, args.host_memory)
    made, of_model = _plan_on(config, machine)
    notes += said + of_model
    if args.json:
        print(json.dumps(as_json(made, notes), indent=2))
    else:
        print_plan(made, notes)
    if args.plot is not None:
        draw(made, args.plot)
        # Not among the JSON.
        print(f"memory drawn: {args.plot}", file=sys.stderr if args.json else sys.stdout)
    return 0 if made.fits else 1


def plan_here(config: RunConfig) -> tuple[Plan, list[str]]:
    """A config's plan for this machine, or for a usual GPU where there is none; and what to say of it.

    Raises:
        ValueError: The config or its model cannot be planned.
    """
    machine, notes = _machine(config, None, None, None)
    made, of_model = _plan_on(config, machine)
    return made, notes + of_model


def _plan_on(config: RunConfig, machine: Machine) -> tuple[Plan, list[str]]:
    from .known_shapes import architecture

    found, note = architecture(config.model)
    positions = getattr(found, "max_position_embeddings", None)
    made = make_plan(config, machine, work=Workload.from_config(config, found), positions=positions)
    return made, [note] if note else []


def _calibrate(args: argparse.Namespace) -> str:
    from .calibrate import calibrate

    if args.gpu is not None:
        raise ValueError(
            f"--calibrate times the GPU that is here, and --gpu {args.gpu} names another; drop one."
        )
    return f"this GPU's figures are kept in {calibrate(progress=not args.json)}"


def _machine(
    config: RunConfig, gpu: str | None, gpus_per_node: int | None, host_memory: str | None
) -> tuple[Machine, list[str]]:
    """The machine to plan for, and what was assumed of it."""
    if gpus_per_node is not None and gpus_per_node < 1:
        raise ValueError(f"--gpus-per-node {gpus_per_node} must be 1 or above.")
    with _named("--host-memory", host_memory):
        host_bytes = None if host_memory is None else parse_bytes(host_memory)
    if gpu is None:
        here = this_machine(_num_gpus(config, _gpus_here()))
        if here is not None:
            per_node = here.gpus_per_node if gpus_per_node is None else min(gpus_per_node, here.num_gpus)
            host = here.host_bytes if host_bytes is None else int(host_bytes * HOST_SHARE)
            return replace(here, gpus_per_node=per_node, host_bytes=host), _elsewhere(here)
    with _named("--gpu", gpu), _named("--gpus-per-node", gpus_per_node):
        machine = named_machine(gpu or ASSUMED_GPU, _num_gpus(config, 0), host_bytes, gpus_per_node)
    notes = []
    if gpu is None:
        notes.append(f"there is no GPU here: planned for {ASSUMED_GPU}; name another with --gpu.")
    if host_bytes is None:
        whole = round(machine.host_bytes / HOST_SHARE / 2**30)
        notes.append(f"each node is taken to have {whole:,} GiB of host memory; say it with --host-memory.")
    return machine, notes


@contextmanager
def _named(option: str, value: object) -> Iterator[None]:
    """Begin what is said against an option with its name, if it was given."""
    try:
        yield
    except ValueError as error:
        if value is None:
            raise
        raise ValueError(f"{option} {value}: {error}") from error


def _elsewhere(here: Machine) -> list[str]:
    available = _gpus_here()
    if here.num_gpus <= available:
        return []
    return [f"{here.num_gpus} GPUs are planned, of the kind of the {available} that are here."]


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count()


def _num_gpus(config: RunConfig, available: int) -> int:
    """GPUs to plan with: as told, else those that are here and that the batch can use.

    Where nobody said how many there are, as many as share a sequence; with an `auto` degree one node's.
    """
    parallel = config.parallel
    if parallel.num_gpus != "auto":
        return parallel.num_gpus
    if parallel.ulysses_degree == "auto":
        return most_processes(config, available or GPUS_A_NODE)
    degree = parallel.ulysses_degree
    for count in range(available - available % degree, 0, -degree):
        if _is_shared(config, count):
            return count
    return degree


def _is_shared(config: RunConfig, count: int) -> bool:
    from ..config_rules import check_count

    try:
        check_count(config, count)
    except ConfigError:
        return False
    return True
