"""One process of a run: joins the others, trains, and says in a line what went wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from ..distributed.groups import ProcessGroups
from .config import RunConfig
from .exit_status import BAD_INPUT, CRASHED, DISK_FULL, INTERRUPTED, OUT_OF_MEMORY, status_of
from .nodes import check_nodes
from .out_of_memory import explain, watch_memory
from .processes import join, leave, set_up_logging
from .train import train
from .watch import Watch
from .watch_links import End, end_process, speaks_for_machine

logger = logging.getLogger(__name__)

_ECHOES = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")
"""Words of errors that come of another rank's end, in the messages of what moves tensors between ranks."""


def run_worker(
    config: RunConfig, work: Callable[[RunConfig, ProcessGroups, torch.device], object] | None = None
) -> int:
    """Train on this process, alone or as one of those that a launcher started.

    Args:
        config: The run.
        work: What is done in training's place, by the same processes and with the same care for errors.

    Returns:
        Exit status (`exit_status.py`). Where one of several processes fails, all end by its status.

    Raises:
        ValueError: Config, data, model or machine are not as they should be; also other errors with status
            `BAD_INPUT`, and Ctrl-C, which the command line says in a line.
    """
    config, groups, device = join(config)
    set_up_logging(groups.is_main)
    _say_where(config, groups, device)
    watch_memory(Path(config.log.run_dir), config.log.memory_history)
    watch = Watch(groups.rank, groups.world_size)
    try:
        check_nodes(config, groups)
        (work or train)(config, groups, device)
    except BaseException as error:
        status = status_of(error)
        end = watch.failed(status, _one_line(error), is_echo=_is_echo(error))
        return _end(error, end, watch, partial(_say, error, status, config, device))
    watch.close()
    leave()
    return 0


def _end(error: BaseException, end: End, watch: Watch, say: Callable[[], None]) -> int:
    """Say what went wrong where nobody else does, and end this process as all do."""
    mine = status_of(error)
    if watch.is_alone:
        try:
            return _in_its_own_way(error, mine, say)
        finally:
            leave()
    told_by_another = end.rank != watch.rank
    is_alike = told_by_another and end.text.endswith(_one_line(error))
    is_mine = not told_by_another or not _is_echo(error)
    is_said = is_mine and not is_alike and mine in (CRASHED, OUT_OF_MEMORY) and watch.rank != 0
    if is_said:
        say()
    if mine != INTERRUPTED:
        watch.wait_for_main()
    if not speaks_for_machine():
        end_process(end.status)
    if is_alike:  # in this rank's own way, unless the watch has said it meanwhile
        is_said = not watch.say_once(lambda: None) or is_said
    elif told_by_another:
        watch.say_once(partial(logger.error, "%s", end.text))
    watch.leave_within(end.status)
    return _in_its_own_way(error, mine, say) if is_mine and not is_said else end.status


def _in_its_own_way(error: BaseException, status: int, say: Callable[[], None]) -> int:
    if status in (BAD_INPUT, INTERRUPTED):
        raise error
    say()
    return status


def _say(error: BaseException, status: int, config: RunConfig, device: torch.device) -> None:
    if isinstance(error, torch.OutOfMemoryError):
        plan = getattr(error, "plan", None)
        logger.error("%s", explain(error, plan, device, Path(config.log.run_dir)))
    elif status == DISK_FULL:
        logger.error(
            "%s\nFree some space where it was to be written (log.run_dir=%s, or the cache of tokens), and "
            "start the same command again: it goes on from the newest checkpoint.",
            *(error, config.log.run_dir),
        )
    elif _is_ours(error) or status == OUT_OF_MEMORY:
        logger.error("%s", error)
    else:
        logger.error("the run crashed; the same command goes on from its newest checkpoint", exc_info=error)


def _is_ours(error: BaseException) -> bool:
    """Whether its message tells a person what to do; of another error, where it comes from helps more."""
    return isinstance(error, ValueError) or hasattr(error, "exit_status")


def _one_line(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    first, *_ = str(error).strip().splitlines() or [""]
    return first if _is_ours(error) else f"{type(error).__name__}: {first}"


def _is_echo(error: BaseException) -> bool:
    """Whether an error may say no more than that another rank has gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _ECHOES)


def _say_where(config: RunConfig, groups: ProcessGroups, device: torch.device) -> None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    engine = f"ZeRO {config.parallel.zero_stage}" if config.parallel.zero_stage else "no ZeRO"
    logger.info(
        "%d process%s on %s: %d for each sequence, %d at once; %s, %s",
        groups.world_size,
        "" if groups.world_size == 1 else "es",
        name,
        groups.sp_size,
        groups.dp_size,
        engine,
        config.train.precision,
    )
    if device.type == "cpu" and config.model.name is not None and groups.is_main:
        logger.warning("torch sees no GPU (python -c 'import torch; print(torch.cuda.is_available())').")
