"""Functions run in several processes, over gloo or NCCL: one start of the processes, many cases in it."""

from __future__ import annotations

import importlib.util
import inspect
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

HANG_S = 120
"""A collective that some rank never joins fails the test after this."""

PRELOADED = ["transformers.models.llama.modeling_llama", "deepspeed.runtime.zero.muon.muon_optimizer"]
"""Processes are forked from one that has imported these: each is six CPU seconds less. The last is what
DeepSpeed imports when it makes its first engine."""

Case = tuple[Callable[..., Any], dict[str, Any]]


def run_cases(world_size: int, cases: dict[str, Case], backend: str = "gloo") -> dict[str, list[Any]]:
    """Run every case on every rank, one after the other, in processes that are started once.

    Args:
        world_size: Number of processes; each computes on one thread.
        cases: Name to (function at the top of its module, its keyword arguments). What it returns must be
            made of tensors, numbers, strings, lists and dicts.
        backend: "gloo", or "nccl", with a GPU for each process.

    Returns:
        Name to what each rank returned.

    Raises:
        ProcessRaisedException: With the traceback and the case's name, where one of them raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        located = {name: (inspect.getfile(fn), fn.__name__, kwargs) for name, (fn, kwargs) in cases.items()}
        arguments = (world_size, Path(folder), located, backend, dict(os.environ))
        mp.start_processes(_run_rank, arguments, nprocs=world_size, start_method=_start_method())
        ranks = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
    return {name: [returned[name] for returned in ranks] for name in cases}


def _start_method() -> str:
    """How processes start: forked, but spawned on a machine with a GPU, which a fork cannot use."""
    if torch.cuda.is_available():
        return "spawn"
    multiprocessing.set_forkserver_preload(PRELOADED)
    with patch.dict(os.environ, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1"):  # threads cannot be forked either
        forkserver.ensure_running()
    return "forkserver"


def _run_rank(
    rank: int,
    world_size: int,
    folder: Path,
    located: dict[str, tuple[str, str, dict[str, Any]]],
    backend: str,
    environment: dict[str, str],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)  # what was set since the process was started that this one is forked from
    # DeepSpeed looks for these even where the process group is there.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    if backend == "gloo":
        os.environ["DS_ACCELERATOR"] = "cpu"
    else:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        device_id=torch.device("cuda", rank) if backend == "nccl" else None,
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=HANG_S),
    )
    modules: dict[str, ModuleType] = {}
    returned = {}
    for name, (file, function, kwargs) in located.items():
        if file not in modules:
            modules[file] = _load_module(file)
        torch.manual_seed(0)
        try:
            returned[name] = getattr(modules[file], function)(**kwargs)
        except Exception as error:
            raise RuntimeError(f"case {name!r} on rank {rank}") from error
    torch.save(returned, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _load_module(file: str) -> ModuleType:
    """A test module by its path: the name that pytest gave it does not exist in a new process."""
    spec = importlib.util.spec_from_file_location(f"{Path(file).stem}_in_gloo", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
