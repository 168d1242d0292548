"""The processes of a run: joined when a launcher started them, and told apart from one that stands alone."""

from __future__ import annotations

import fcntl
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .nodes import adopt_slurm, meet

if TYPE_CHECKING:
    import torch

    from ..distributed.groups import ProcessGroups
    from .config import RunConfig

logger = logging.getLogger(__name__)


def is_launched() -> bool:
    """Whether deepspeed, torchrun, mpirun's environment or srun started this process as one of a group."""
    adopt_slurm()
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join(config: RunConfig, *, use_deepspeed: bool = True) -> tuple[RunConfig, ProcessGroups, torch.device]:
    """Make this process one of its run.

    Args:
        config: The run; what it leaves to the plan is decided here, alike on every rank.
        use_deepspeed: Whether DeepSpeed must know the process group too, where the config asks for ZeRO.

    Returns:
        The config with numbers for what the plan chooses, the process groups, and the device that this rank
        computes on.

    Raises:
        ValueError: The node has fewer GPUs than processes, or the nodes were told different worlds.
    """
    import torch
    import torch.distributed as dist

    from ..distributed.groups import ProcessGroups
    from .planner.resolve import resolve_for_run

    device = _device()
    launched = is_launched()
    if not launched:
        config = resolve_for_run(config, 1)
    elif device.type == "cpu" or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(share_of_cores())
    if launched or (use_deepspeed and config.parallel.zero_stage > 0):
        _join_group(device, launched)
    if launched:  # behind the group: by what all ranks' machines have
        config = resolve_for_run(config, dist.get_world_size())
    if use_deepspeed and config.parallel.zero_stage > 0:
        from ..distributed.zero import init_deepspeed_communication

        init_deepspeed_communication()
    return config, ProcessGroups.create(config.parallel.ulysses_degree), device


def share_of_cores() -> int:
    """Cores of this machine for each of its processes.

    PyTorch itself takes all of them in every process, wakes a thread on each for any tensor of 32,768 numbers
    or more, such as a batch's, and waits for the last one: several processes wait for each other's.
    """
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
    processes = next(int(os.environ[name]) for name in names if os.environ.get(name))
    return max(1, (os.cpu_count() or 1) // processes)


ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""What torch reads its allocator's settings from, by its newer and its older name."""


def _device() -> torch.device:
    import torch

    # Segments that grow: a long step asks for tensors of many lengths, and between segments of a fixed size
    # up to a fifth of what the allocator held on one GPU was of no use (benchmarks/results/plan.md, H100).
    # A person's own settings stay. It counts from the first allocation on, and none was made yet.
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        os.environ[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"
    if not torch.cuda.is_available():
        # accelerate imports DeepSpeed whether it is used or not, and that complains of a missing GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    device = torch.device("cuda", local_gpu(torch.cuda.device_count()))
    torch.cuda.set_device(device)
    return device


def _join_group(device: torch.device, launched: bool) -> None:
    import torch.distributed as dist

    if not launched:
        # ZeRO on one process still talks to a group, of one.
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(free_port())
    world = {}
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun's nodes have met already
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        world = {"store": meet(), "rank": rank, "world_size": size}
    has_gpu = device.type == "cuda"
    dist.init_process_group("nccl" if has_gpu else "gloo", device_id=device if has_gpu else None, **world)


def local_gpu(count: int) -> int:
    """Which of the GPUs that this process sees is its own."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank < count:
        return local_rank
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    is_told = visible != "" and "," not in visible
    if count == 1 and (is_told or os.environ.get("SLURM_LOCALID") == str(local_rank)):
        return 0  # the launcher shows each process a GPU of its own
    import socket

    raise ValueError(
        f"{socket.gethostname()} has {count} GPUs for this run and was to start process {local_rank + 1} on "
        "them; lower its slots in the hostfile, --nproc-per-node or --ntasks-per-node."
    )


def leave() -> None:
    """Take leave of the process group, so that no rank waits for this one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def sole_user(run_dir: Path) -> Iterator[None]:
    """Keep a second run out of a run's folder, where each would delete what the other writes.

    Raises:
        ValueError: Another run is there.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"log.run_dir={run_dir} is in use by another run; wait for it, or set another log.run_dir."
            ) from error
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): see that no second run uses it.", run_dir, error.strerror
            )
        yield


class ConsoleHandler(logging.StreamHandler):
    """Writes to what `sys.stdout` is at the moment, so that a progress bar can stay below the lines."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    @property
    def stream(self):
        """The stream of the moment."""
        return sys.stdout

    @stream.setter
    def stream(self, value) -> None:
        pass


def set_up_logging(is_main: bool) -> None:
    """One rank speaks of decisions; the others only of what goes wrong."""
    import warnings

    handler = ConsoleHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("longseq").setLevel(logging.INFO if is_main else logging.WARNING)
    # DeepSpeed calls torch, and peft transformers, by names that these would like to leave: nothing that a
    # user can change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch\.distributed|transformers)\.")
    if not (is_main and sys.stderr.isatty()):
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    if not is_main:
        warnings.simplefilter("ignore")
