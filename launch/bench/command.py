"""`longseq bench`: whole training steps of a config on this machine, and what they take."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import RunConfig
from ..human_numbers import parse_tokens
from ..planner.machine import parse_bytes, taken_to_have
from .limits import card_bytes
from .settings import read_config

if TYPE_CHECKING:
    import torch

    from ...distributed.groups import ProcessGroups


@dataclass(frozen=True)
class Options:
    """What `longseq bench` was asked for.

    Attributes:
        config: Preset or file.
        overrides: `key=value` each.
        steps: That are timed.
        warms_up: Whether a whole step goes before them, that is not timed.
        memory_only: Attention's kernel and products of matrices are left out.
        gpu_bytes: Of the card that this one is taken for; None is its own.
        host_bytes: Of each node.
        document_tokens: Of each document; None is one a sequence.
        profile: One more step is taken apart.
        json: Where the results are kept.
    """

    config: str
    overrides: tuple[str, ...]
    steps: int
    warms_up: bool
    memory_only: bool
    gpu_bytes: int | None
    host_bytes: int | None
    document_tokens: int | None
    profile: bool
    json: Path | None

    @classmethod
    def of(cls, args: argparse.Namespace, overrides: Sequence[str]) -> Options:
        """As they were typed.

        Raises:
            ValueError: A size or number that is none.
        """
        # Seconds without attention say nothing, and the first step's memory is not a later one's.
        steps = args.steps if args.steps is not None else 1 if args.memory_only else 2
        if steps < 1:
            raise ValueError(f"--steps {steps} must be 1 or above.")
        if args.json is not None and args.json.is_dir():
            raise ValueError(f"--json {args.json} is a folder; name a file in it.")
        if args.json is not None:
            _refuse_unwritable(args.json.absolute())
        return cls(
            args.config,
            tuple(overrides),
            steps,
            warms_up=not args.no_warm_up,
            memory_only=args.memory_only,
            gpu_bytes=None if args.gpu_memory is None else card_bytes(args.gpu_memory),
            host_bytes=None if args.host_memory is None else _host_bytes(args.host_memory),
            document_tokens=None if args.document_tokens is None else _tokens(args.document_tokens),
            profile=args.profile,
            json=args.json,
        )


def bench(args: argparse.Namespace) -> int:
    """Start as many processes as the config asks for, or be one of them.

    Args:
        args: `config`, `overrides`, the launcher's options and those of `longseq bench`.

    Returns:
        Exit status (`exit_status.py`): 0 where it was measured, 3 where memory ran out.

    Raises:
        ValueError: Config, options, model or machine are not as they should be.
    """
    from ..config_file import check_count
    from ..launcher import launch, num_processes
    from ..processes import is_launched
    from ..worker import run_worker

    overrides = list(args.overrides)
    if args.num_gpus is not None:
        overrides.append(f"parallel.num_gpus={args.num_gpus}")
    options = Options.of(args, overrides)
    config, notes = read_config(args.config, overrides, packs=options.document_tokens is not None)
    if args.hostfile is not None or not is_launched():
        count = num_processes(config, args.hostfile, args.launcher_args)
        check_count(config, count)
        if count != 1 or args.hostfile is not None:
            print(f"starting {count} processes", flush=True)  # their first line is many seconds away
            return launch(
                args.config,
                [*overrides, *words_of(args)],
                num_gpus=count,
                command="bench",
                hostfile=args.hostfile,
                launcher_args=args.launcher_args,
            )
    if args.launcher_args:
        raise ValueError(
            f"{' '.join(args.launcher_args)} behind -- is for DeepSpeed's launcher, which one process does "
            "not start; leave it out, or ask for more with --num-gpus."
        )
    with taken_to_have(options.gpu_bytes, options.host_bytes):
        return run_worker(config, partial(measure, options=options, notes=notes))


def words_of(args: argparse.Namespace) -> list[str]:
    """The options of `longseq bench` as they were typed, for its other processes."""
    words = []
    for name in ("no_warm_up", "memory_only", "profile"):
        words += [f"--{name.replace('_', '-')}"] if getattr(args, name) else []
    for name in ("steps", "gpu_memory", "host_memory", "document_tokens", "json"):
        value = getattr(args, name)
        value = value.absolute() if isinstance(value, Path) else value
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    return words


def measure(
    config: RunConfig,
    groups: ProcessGroups,
    device: torch.device,
    *,
    options: Options,
    notes: Sequence[str] = (),
) -> None:
    """What each process does once it has joined: set up, step, and say what that took; every rank calls it.

    Args:
        config: Of the bench, whose length is a number by now.
        groups: This rank's process groups.
        device: Where it computes.
        options: The same on all ranks.
        notes: What to say of the config.

    Raises:
        torch.OutOfMemoryError: With the run's plan as its `plan`, if there is one.
        HostMemoryError: The host's is over.
        ValueError: Data, model or machine do not go together.
    """
    import torch

    from .limits import GpuLimit, HostWatch
    from .measure import Measurement
    from .report import Report
    from .settings import settle

    started = time.perf_counter()
    config = settle(config, groups, device, options.document_tokens)
    report = Report(config, options, groups, device)
    limit = None
    if options.gpu_bytes is not None:
        limit = GpuLimit(options.gpu_bytes, device, groups.world_size)
    measurement = Measurement(config, groups, device, options.document_tokens, limit)
    report.begin(notes)
    with HostWatch().watching() as host:
        try:
            _steps(measurement, host, report, options, started)
        except (torch.OutOfMemoryError, MemoryError) as error:
            error.plan = measurement.plan
            report.failed(measurement.row, measurement.plan, error)
            raise
    report.end(measurement)


def _steps(measurement, host, report, options: Options, started: float) -> None:
    from .stub_attention import stub_attention
    from .stub_products import StubProducts

    def check_host() -> None:
        host.check(options.host_bytes, measurement.groups)
        measurement.row["host_peak_bytes"] = measurement.most(host.peak_bytes)

    def keep(row: dict) -> None:
        check_host()
        report.keep(row, measurement.plan)

    measurement.set_up()
    report.tell(f"set up: {time.perf_counter() - started:.1f} s")
    keep(measurement.row)
    stubs = stub_attention(measurement.parts.engine.module) if options.memory_only else []
    if options.memory_only or not options.warms_up:
        measurement.warm_up(report.tell)
        check_host()
    first = options.warms_up and not options.memory_only
    with StubProducts() if options.memory_only else nullcontext() as products:
        measurement.measure(options.steps, keep, first=first, profile=options.profile, tell=report.tell)
    if options.memory_only and not (stubs and all(stub.num_calls for stub in [*stubs, products])):
        raise RuntimeError("attention or products were not left out: nothing called what stands for them.")


def _refuse_unwritable(path: Path) -> None:
    """Before a model is made: its results would have nowhere to go."""
    folder = next(one for one in path.parents if one.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"--json {path}: nothing can be written in {folder}; name a file elsewhere.")


def _host_bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ValueError(f"--host-memory {text}: {error}") from error


def _tokens(text: str) -> int:
    try:
        found = parse_tokens(text)
    except ValueError as error:
        raise ValueError(f"--document-tokens {text}: {error}") from error
    if not isinstance(found, int):
        raise ValueError(f"--document-tokens {text} is no number of tokens; write one such as 8192 or 8k.")
    return found
