"""A training run from its config to the exported model."""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from pathlib import Path

import torch

from ..distributed.groups import ProcessGroups
from .checkpoint import Checkpoints, RunState, read_state
from .config import RunConfig
from .config_file import check_world, dump_config
from .export import export_checkpoint
from .loop import Loop, TrainingError
from .metrics import MetricsWriter
from .plot import plot_runs
from .processes import sole_user
from .restarts import TOLD
from .resume import check_same_data, check_same_walk, choose_checkpoint
from .setup import set_up

__all__ = ["TrainingError", "train"]

logger = logging.getLogger(__name__)


def train(config: RunConfig, groups: ProcessGroups, device: torch.device) -> RunState:
    """Train as a config says, going on from its checkpoint where there is one.

    Every rank calls it.

    Args:
        config: The run.
        groups: This rank's process groups.
        device: Where this rank computes.

    Returns:
        Where the run stopped.

    Raises:
        ValueError: Config, data, model or checkpoint do not fit together.
        TrainingError: Loss or gradient became non-finite; no update was made with it.
        SaveError: The first checkpoint, or the last, could not be saved.
        torch.OutOfMemoryError: With the run's plan, if there is one, as its `plan`.
    """
    run_dir = Path(config.log.run_dir)
    with sole_user(run_dir) if groups.is_main else nullcontext():
        return _train(config, groups, device, run_dir)


def _train(config: RunConfig, groups: ProcessGroups, device: torch.device, run_dir: Path) -> RunState:
    layout = check_world(config, groups.world_size)
    checkpoints = Checkpoints(
        run_dir, groups, config.checkpoint.keep, background=config.checkpoint.background
    )
    resume_from = choose_checkpoint(config, checkpoints, groups)
    if resume_from is not None:
        check_same_walk(config, resume_from)
    parts = set_up(config, layout, groups, device)
    state = RunState()
    if resume_from is not None:
        check_same_data(read_state(resume_from), parts.data_digest, resume_from)
        state = checkpoints.load(resume_from, parts.engine)
        logger.info("resumed from %s, after step %d", resume_from, state.step)
    if state.step >= parts.total_steps:
        logger.info(
            "%s has trained all its %d steps; set log.run_dir for a new run, or more train.steps.",
            run_dir,
            parts.total_steps,
        )
        if checkpoints.newest() is not None:  # it may have died between its last checkpoint and here
            _finish(config, groups, checkpoints, is_done=True)
        return state
    loop = Loop(config, groups, device, parts, checkpoints, state)
    with MetricsWriter(
        run_dir,
        config.log,
        groups.is_main,
        resume_step=state.step,
        total_steps=parts.total_steps,
        config=config.model_dump(),
    ) as metrics:
        # A run that is refused, for what is wrong with its metrics too, changes nothing.
        if groups.is_main:
            _write_whole(run_dir / "config.yaml", dump_config(config))
        if TOLD in os.environ:
            metrics.note(os.environ[TOLD])
        try:
            loop.run(metrics)
        except torch.OutOfMemoryError as error:
            error.plan = parts.plan
            raise
    _finish(config, groups, checkpoints, is_done=loop.state.step >= parts.total_steps)
    return loop.state


def _finish(config: RunConfig, groups: ProcessGroups, checkpoints: Checkpoints, *, is_done: bool) -> None:
    """What a run leaves behind once it is over: the plot, and the exported model if asked for."""
    if not groups.is_main:
        return
    run_dir = Path(config.log.run_dir)
    try:
        logger.info("loss curve: %s", plot_runs([run_dir]))
    except (ValueError, OSError) as error:
        logger.warning("no loss curve was drawn: %s", error)
    if is_done and config.checkpoint.export_at_end:
        newest = checkpoints.newest()
        assert newest is not None
        logger.info("exported model: %s", export_checkpoint(newest, run_dir / "model", overwrite=True))


def _write_whole(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(text)
    draft.replace(path)
