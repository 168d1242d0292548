"""Starting a run's processes with DeepSpeed's launcher."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from .config import RunConfig
from .processes import free_port

MODULE = "longseq.launch.cli"


def num_processes(config: RunConfig) -> int:
    """Processes that a run on this machine takes: as told, else as many of its GPUs as the batch can use.

    On a machine without a GPU it is one for each shard of a sequence.
    """
    if config.parallel.num_gpus != "auto":
        return config.parallel.num_gpus
    degree = config.parallel.ulysses_degree
    available = _gpu_count()
    for count in range(available - available % degree, 0, -degree):
        if config.train.global_batch_sequences % (config.train.micro_batch_sequences * count // degree) == 0:
            if count < available:
                print(
                    f"{available - count} of {available} GPUs stay idle: train.global_batch_sequences="
                    f"{config.train.global_batch_sequences} cannot be shared by more; enlarge it, or "
                    "parallel.ulysses_degree.",
                    file=sys.stderr,
                )
            return count
    return degree


def launch(
    config_source: str,
    overrides: Sequence[str],
    *,
    num_gpus: int,
    hostfile: str | None = None,
    launcher_args: Sequence[str] = (),
) -> int:
    """Run `longseq train` on several processes and wait for them.

    SIGTERM and SIGUSR1 are handed to the workers, which save and stop; DeepSpeed's launcher would kill them.
    So are Ctrl-C, which ends them at once, and SIGHUP of a terminal that closes, which becomes SIGTERM.

    Args:
        config_source: Preset or YAML file.
        overrides: `key=value` each.
        num_gpus: Processes in all; with a hostfile, its slots decide which node runs how many.
        hostfile: DeepSpeed's hostfile, for several nodes.
        launcher_args: Handed to DeepSpeed's launcher as they are.

    Returns:
        The exit status.
    """
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank"]
    if hostfile is not None:
        if not Path(hostfile).is_file():
            raise ValueError(
                f"--hostfile {hostfile}: no such file; DeepSpeed would train on this machine alone."
            )
        command += ["--hostfile", hostfile]
    else:
        # A path that does not exist: DeepSpeed would otherwise read a hostfile of the machine's own.
        command += ["--hostfile", os.devnull + "/none", *_which_gpus(num_gpus)]
    if "--master_port" not in " ".join(launcher_args):
        command += ["--master_port", str(free_port())]
    if "--log_level" not in " ".join(launcher_args):
        command += ["--log_level", "critical"]  # which worker it was and by which command: they say it better
    command += [*launcher_args, "--module", MODULE, "train", config_source, *overrides]
    environment = dict(os.environ)
    if not _gpu_count():
        environment["DS_ACCELERATOR"] = "cpu"
        # DeepSpeed counts a CPU machine's "devices" by its NUMA nodes unless it is told.
        environment["LOCAL_SIZE"] = str(num_gpus)
    # In a session of its own: what a terminal or `timeout` sends to all would end DeepSpeed's launcher, and
    # that the workers, before they have saved.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    numbers = [signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup has it ignored
        numbers.append(signal.SIGHUP)
    earlier = {
        number: signal.signal(number, lambda received, frame: _pass_on(process, received))
        for number in numbers
    }
    try:
        status = _wait(process)
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
    _tell_of_a_killed_worker(status)
    return status


def _wait(process: subprocess.Popen) -> int:
    try:
        try:
            return process.wait()
        except KeyboardInterrupt:
            _pass_on(process, signal.SIGINT)
            process.wait()
            return 130  # whatever a worker died of that was in a collective with one already gone
    except KeyboardInterrupt:  # the second: nobody wants to wait
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return 130


def _tell_of_a_killed_worker(status: int) -> None:
    """DeepSpeed's launcher ends with 256 - N where a signal N ended a worker, which then said nothing."""
    number = -status if status < 0 else 256 - status
    if status and number in set(signal.Signals):
        name = signal.Signals(number).name
        why = "; the machine may have run out of memory" if number == signal.SIGKILL else ""
        print(f"longseq train: a process of the run was ended by {name}{why}.", file=sys.stderr)


def _which_gpus(num_gpus: int) -> list[str]:
    """DeepSpeed's words for the GPUs to use: of those that CUDA_VISIBLE_DEVICES leaves, the first."""
    visible = [word for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    if not visible:
        available = _gpu_count()
        if 0 < available < num_gpus:
            raise ValueError(
                f"parallel.num_gpus={num_gpus} but this machine has {available}; ask for as many, or name "
                "more machines with --hostfile."
            )
        return ["--num_gpus", str(num_gpus)]
    if num_gpus > len(visible):
        raise ValueError(
            f"parallel.num_gpus={num_gpus} but CUDA_VISIBLE_DEVICES={','.join(visible)} leaves "
            f"{len(visible)}; ask for as many, or leave more of them visible."
        )
    return ["--include", f"localhost:{','.join(visible[:num_gpus])}"]


def _pass_on(process: subprocess.Popen, number: int) -> None:
    import psutil

    if number == signal.SIGHUP:
        number = signal.SIGTERM
    workers = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if ("-m", MODULE) in pairwise(child.cmdline()):
                workers.append(child)
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.send_signal(number)
    if not workers:  # none yet, or all on other nodes, which DeepSpeed's launcher ends
        os.killpg(process.pid, signal.SIGTERM)


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count()
