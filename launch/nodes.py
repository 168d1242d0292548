"""Several nodes: told by Slurm, met at one address, and sure to be of one run before it begins."""

from __future__ import annotations

import os
import re
import socket
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch.distributed as dist

    from ..distributed.groups import ProcessGroups
    from .config import RunConfig

LATEST_START = timedelta(minutes=30)
"""How long the first process waits for the others: nodes may be started by hand, one after the other."""
NODES_OWN = ("data.cache_dir", "log.")
"""Keys of a config that may name other places on another node; it is looked at what is there."""
BAD_NEWS_S = 2.0
"""The store goes with rank 0: this long it stays, for the others to hear what is wrong."""
VERDICT = "longseq/world"
STOP = "longseq/stop"
HEEDS = "longseq/heeds"
"""There while somebody looks at STOP: nobody does before the first step, nor after the last."""


def adopt_slurm() -> None:
    """Under srun, say in torch's words what Slurm says in its own.

    SLURM_STEP_NUM_TASKS is set inside a step alone: a batch script's own process is not one of its tasks.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks < 2 or "RANK" in os.environ:
        return
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    os.environ["WORLD_SIZE"] = str(tasks)
    per_node = tasks_per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])
    os.environ["LOCAL_WORLD_SIZE"] = str(per_node[int(os.environ["SLURM_NODEID"])])
    # Below the ports that the system gives away; another step of the job may run beside this one.
    port = 10000 + (16 * int(os.environ["SLURM_JOB_ID"]) + int(os.environ["SLURM_STEP_ID"])) % 20000
    os.environ.setdefault("MASTER_PORT", str(port))
    os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))


def first_host(nodelist: str) -> str:
    """The first name of a list in Slurm's words, such as `gpu[003-006,9],login1`.

    It is read here because containers seldom have `scontrol`, which would say it.
    """
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodelist).split(",")[0]


def tasks_per_node(words: str) -> list[int]:
    """Slurm's `2(x3),1` as [2, 2, 2, 1]."""
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", words)
    return [int(count) for count, times in runs for _ in range(int(times or 1))]


def meet() -> dist.Store:
    """Connect to the run's store, which rank 0 keeps at MASTER_ADDR, and see that all are of one world.

    Nodes whose launchers were told different things would otherwise wait for each other for half an hour.

    Raises:
        ValueError: Another process has this rank, or counts other processes; the port is taken, or the
            address cannot be reached.
        TimeoutError: Some have not come.
        ConnectionError: Rank 0 has gone.
    """
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), os.environ["WORLD_SIZE"]
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(
            address, port, is_master=rank == 0, wait_for_workers=False, timeout=LATEST_START
        )
    except dist.DistNetworkError as error:
        raise ValueError(
            f"rank {rank} ({socket.gethostname()}) cannot {'listen' if rank == 0 else 'reach rank 0'} at "
            f"MASTER_ADDR={address}, MASTER_PORT={port}: {str(error).splitlines()[0]}. Every node must reach "
            "that address; another port: -- --master_port N, or under srun MASTER_PORT=N."
        ) from error
    mine = f"{world} on {socket.gethostname()}"
    if store.add(f"longseq/taken/{rank}", 1) > 1:
        store.set(VERDICT, f"two processes are rank {rank}")
    store.set(f"longseq/came/{rank}", mine)
    if rank == 0:
        _receive_all(store, int(world), mine)
    try:
        verdict = store.get(VERDICT).decode()
    except dist.DistError as error:
        raise ConnectionError(f"rank 0, at {address} port {port}, does not answer; look there") from error
    if verdict.split()[0] == world:
        return store
    if rank == 0:
        time.sleep(BAD_NEWS_S)
    if verdict.split()[0].isdigit():
        verdict = f"WORLD_SIZE={mine}, and rank 0 counts {verdict}"
    raise ValueError(
        f"{verdict}. Give the launcher of every node the same hostfile (or --nnodes and --nproc-per-node), "
        "and a node rank of its own."
    )


def _receive_all(store: dist.Store, world: int, mine: str) -> None:
    """Wait for every rank, and tell all of them what world it is; or of the first that says otherwise."""
    deadline = time.monotonic() + LATEST_START.total_seconds()
    missing = set(range(1, world))
    while missing and not store.check([VERDICT]):
        for rank in [rank for rank in missing if store.check([f"longseq/came/{rank}"])]:
            theirs = store.get(f"longseq/came/{rank}").decode()
            if theirs.split()[0] != str(world):
                store.set(VERDICT, f"WORLD_SIZE={mine}, and rank {rank} counts {theirs}")
                return
            missing.remove(rank)
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"ranks {sorted(missing)[:8]} of {world} processes have not come within {LATEST_START}; see "
                "that every node was started, and can reach MASTER_ADDR at MASTER_PORT."
            )
        time.sleep(0.02)
    if not store.check([VERDICT]):
        store.set(VERDICT, mine)


def check_nodes(config: RunConfig, groups: ProcessGroups) -> None:
    """See that all ranks have the same config and libraries, and share the run's folder; all call it.

    Raises:
        ValueError: On every rank.
    """
    import torch

    from .. import __version__
    from .deepspeed_json import read_json

    tree = config.model_dump()
    if config.parallel.deepspeed_config is not None:
        # Not the path of a file, which may hold other things on another node.
        tree["parallel"]["deepspeed_config"] = read_json(config.parallel.deepspeed_config)
    words = {"the version of longseq": __version__, "the version of torch": torch.__version__}
    for key, value in _flat(tree).items():
        if not key.startswith(NODES_OWN):
            words[key] = repr(value)
    require_same(words, groups, "start every node with the same config and the same packages")
    _check_shared(Path(config.log.run_dir), groups)


def require_same(words: Mapping[str, str], groups: ProcessGroups, advice: str) -> None:
    """See that every rank says the same; one small collective.

    Args:
        words: What is said, by what it is called.
        groups: The process groups.
        advice: What to do where somebody says otherwise.

    Raises:
        ValueError: On every rank, with the first that differs from rank 0.
    """
    first, *others = groups.gathered({**words, "host": socket.gethostname()})
    for rank, theirs in enumerate(others, start=1):
        for name in {**first, **theirs}:
            if name != "host" and theirs.get(name) != first.get(name):
                raise ValueError(
                    f"{name} is {theirs.get(name)} on rank {rank} ({theirs['host']}), and {first.get(name)} "
                    f"on rank 0 ({first['host']}): {advice}."
                )


def _check_shared(folder: Path, groups: ProcessGroups) -> None:
    """Every rank writes its part of a checkpoint, so all must see the same folder."""
    (name, *_) = groups.gathered(f".{uuid.uuid4().hex}")
    problem = None
    if groups.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        except OSError as error:  # the others wait
            problem = str(error)
    groups.barrier()
    everyone = groups.gathered((problem, os.access(folder / name, os.F_OK), socket.gethostname()))
    problem, _, main_host = everyone[0]
    if problem is not None:
        raise ValueError(
            f"log.run_dir={folder} cannot be written on rank 0 ({main_host}): {problem}; name another folder."
        )
    if groups.is_main:
        (folder / name).unlink()
    for rank, (_, sees_it, host) in enumerate(everyone):
        if not sees_it:
            raise ValueError(
                f"log.run_dir={folder} on rank {rank} ({host}) is not that of rank 0 ({main_host}): "
                "each process writes its part of a checkpoint; name a folder that all nodes share."
            )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat.update(_flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value})
    return flat


def ask_to_stop(address: str, port: int, word: str) -> bool:
    """Ask a run whose processes are on other machines to save and stop, at its store.

    Returns:
        Whether the run could be reached, and heeds it.
    """
    import torch.distributed as dist

    try:
        store = dist.TCPStore(
            address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10)
        )
        if not store.check([HEEDS]):
            return False
        store.set(STOP, word)
    except dist.DistError:
        return False
    return True


def heed_requests(heeds: bool) -> None:
    """Say whether `ask_to_stop` is heeded from now on; rank 0 says it for all."""
    store = _store_of_rank_0()
    if store is not None and heeds:
        store.set(HEEDS, "yes")
    elif store is not None:
        store.delete_key(HEEDS)


def asked_to_stop() -> str | None:
    """What `ask_to_stop` said to this run, on its rank 0; None on the others."""
    store = _store_of_rank_0()
    return store.get(STOP).decode() if store is not None and store.check([STOP]) else None


def _store_of_rank_0() -> dist.Store | None:
    """The run's store without its prefix, as `ask_to_stop` sees it; None on the other ranks."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_rank() != 0:
        return None
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store
