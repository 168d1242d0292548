"""Several processes of this machine's CPU that talk over gloo, started, waited for, and ended."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    from ..config import RunConfig
    from .bench import Layout
    from .compare import Step

START_METHOD = "forkserver" if sys.platform.startswith("linux") else "spawn"
"""Processes are forked from one that has imported torch and transformers and computed nothing."""
WAIT_S = 120
"""After so long a rank that does not answer is one that waits for another for ever."""
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class RankError(RuntimeError):
    """A rank failed; the message is what it said."""


def prepare(model_type: str) -> None:
    """Begin to import what the processes need, beside what this one does."""
    if START_METHOD != "forkserver":
        return
    multiprocessing.set_forkserver_preload(
        [
            f"transformers.models.{model_type}.modeling_{model_type}",
            # What DeepSpeed imports when it makes its first engine; accelerate, which loads weights, imports
            # it where it is not used, too.
            "deepspeed.runtime.zero.muon.muon_optimizer",
            "longseq.launch.verify.ranks",
        ]
    )
    with patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()


def run_job(job: str, config: RunConfig, layout: Layout) -> list[Step]:
    """Run one of `ranks.JOBS` on every rank.

    Returns:
        What each rank found.

    Raises:
        RankError: A rank failed, or did not answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context(START_METHOD)
        with patch.dict(os.environ, ENVIRONMENT):
            processes = [
                context.Process(target=_run_rank, args=(rank, folder, job, config, layout), daemon=True)
                for rank in range(layout.processes)
            ]
            for process in processes:
                process.start()
        try:
            _wait(processes, Path(folder))
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [_read(Path(folder) / f"{rank}.pt") for rank in range(layout.processes)]


@contextmanager
def joined(rank: int, world_size: int, folder: Path, *, use_deepspeed: bool) -> Iterator[None]:
    """This process as one of a group, for as long as this lasts."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # DeepSpeed looks for these even where the process group is there.
    os.environ.update(ENVIRONMENT, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=WAIT_S),
    )
    if use_deepspeed:
        from ...distributed.zero import init_deepspeed_communication

        init_deepspeed_communication()
    yield
    dist.barrier()
    dist.destroy_process_group()


def _run_rank(rank: int, folder: str, job: str, config: RunConfig, layout: Layout) -> None:
    """A process's whole life. Failing, it ends at once: the others then fail too, and do not wait."""
    try:
        with _quiet():
            from .ranks import run_rank

            run_rank(rank, folder, job, config, layout)
    except BaseException as error:
        (Path(folder) / f"{rank}.error").write_text(
            f"{type(error).__name__}: {error}\n\n{traceback.format_exc()}"
        )
        os._exit(1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither libraries' prints nor their warnings: a rank's words are in its files."""
    import warnings

    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
        yield


def _wait(processes: Sequence[Any], folder: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    failed = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime)
    if failed:
        # The first to fail is the reason; the others lost their partner.
        raise RankError(f"rank {failed[0].stem}: {failed[0].read_text()}")
    for rank, process in enumerate(processes):
        if process.is_alive():
            raise RankError(f"rank {rank} did not answer within {WAIT_S} seconds: ranks wait for each other")
        if process.exitcode:
            raise RankError(f"rank {rank} ended with exit code {process.exitcode}")


def _read(path: Path) -> Step:
    import torch

    from .compare import Step

    return Step(**torch.load(path, weights_only=True))
