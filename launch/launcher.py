"""Starting a run's processes with DeepSpeed's launcher, on this machine or on several."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from types import FrameType

from .config import RunConfig
from .hostfile import chosen_slots, meeting_words, option, quote_for_pdsh
from .nodes import ask_to_stop
from .processes import free_port

MODULE = "longseq.launch.cli"
NO_SSH_PORT = 29500
"""Where launchers that know nothing of each other meet, unless they are told: DeepSpeed's and torch's own."""


def num_processes(config: RunConfig, hostfile: str | None = None, launcher_args: Sequence[str] = ()) -> int:
    """Processes that a run takes: as told, else as many of this machine's GPUs as the batch can use.

    On a machine without a GPU it is one for each shard of a sequence. With a hostfile it is its slots,
    of which words for DeepSpeed's launcher may choose some.

    Raises:
        ValueError: The hostfile is not there, is none, or has other slots than `parallel.num_gpus` asks for.
    """
    if hostfile is not None:
        slots = sum(chosen_slots(hostfile, launcher_args).values())
        if config.parallel.num_gpus not in ("auto", slots):
            raise ValueError(
                f"parallel.num_gpus={config.parallel.num_gpus} but {slots} slots of {hostfile} take part; "
                "leave it out, or name as many slots."
            )
        return slots
    if config.parallel.num_gpus != "auto":
        return config.parallel.num_gpus
    available = _gpu_count()
    if config.parallel.ulysses_degree == "auto":
        from .planner.resolve import most_processes

        return most_processes(config, available)
    degree = config.parallel.ulysses_degree
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
    command: str = "train",
    hostfile: str | None = None,
    launcher_args: Sequence[str] = (),
) -> int:
    """Run `longseq train` (or another command of a config) on several processes and wait for them.

    SIGTERM and SIGUSR1 are handed to the workers, which save and stop; DeepSpeed's launcher would kill them.
    Where none is on this machine, the run is asked at its store; it ends where it is not training yet, and
    when it is asked twice. Ctrl-C is handed on too, and ends them at once, and so is SIGHUP of a terminal
    that closes, which becomes SIGTERM.

    Args:
        config_source: Preset or YAML file.
        overrides: `key=value` each.
        num_gpus: Processes in all; a hostfile says it by its slots.
        command: What each process is told to do.
        hostfile: DeepSpeed's hostfile, for several nodes.
        launcher_args: Handed to DeepSpeed's launcher as they are.

    Returns:
        The exit status.
    """
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank"]
    arguments = [config_source, *overrides]
    store: tuple[str, int] | None = None
    if hostfile is not None:
        if "RANK" in os.environ:
            raise ValueError(
                f"--hostfile {hostfile}: this process was itself started by a launcher (RANK is set), which "
                "names the nodes; leave it out."
            )
        words += ["--hostfile", hostfile, *meeting_words(hostfile, launcher_args)]
        if "--force_multi" in words:
            arguments = [quote_for_pdsh(word) for word in arguments]
    else:
        # A path that does not exist: DeepSpeed would otherwise read a hostfile of the machine's own.
        words += ["--hostfile", os.devnull + "/none", *_which_gpus(num_gpus)]
    given_port = option(launcher_args, "--master_port")
    port = int(given_port or (NO_SSH_PORT if "--no_ssh" in launcher_args else free_port()))
    if given_port is None:
        words += ["--master_port", str(port)]
    if option(launcher_args, "--log_level") is None:
        words += ["--log_level", "critical"]  # which worker it was and by which command: they say it better
    words += [*launcher_args, "--module", MODULE, command, *arguments]
    environment = dict(os.environ)
    if not _gpu_count():
        environment["DS_ACCELERATOR"] = "cpu"
        # DeepSpeed counts a CPU machine's "devices" by its NUMA nodes unless it is told.
        environment["LOCAL_SIZE"] = str(num_gpus)
    # In a session of its own: what a terminal or `timeout` sends to all would end DeepSpeed's launcher, and
    # that the workers, before they have saved.
    process = subprocess.Popen(words, env=environment, start_new_session=True)
    numbers = [signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup has it ignored
        numbers.append(signal.SIGHUP)
    if hostfile is not None:
        first, *_ = chosen_slots(hostfile, launcher_args)
        store = option(launcher_args, "--master_addr") or first, port

    def hand_on(received: int, frame: FrameType | None) -> None:
        nonlocal store
        asked, store = store, None  # who asks again does not want to wait
        _pass_on(process, received, asked)

    earlier = {number: signal.signal(number, hand_on) for number in numbers}
    try:
        status = _wait(process)
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
    _tell_of_a_killed_worker(status, command)
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


def _tell_of_a_killed_worker(status: int, command: str) -> None:
    """DeepSpeed's launcher ends with 256 - N where a signal N ended a worker, which then said nothing."""
    number = -status if status < 0 else 256 - status
    if status and number in set(signal.Signals):
        name = signal.Signals(number).name
        why = "; the machine may have run out of memory" if number == signal.SIGKILL else ""
        print(f"longseq {command}: a process of the run was ended by {name}{why}.", file=sys.stderr)


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


def _pass_on(process: subprocess.Popen, number: int, store: tuple[str, int] | None = None) -> None:
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
    if workers:
        return
    # None yet, or all on other nodes, which a run that trains can be told of at its store alone.
    if store is not None and number != signal.SIGINT and ask_to_stop(*store, signal.Signals(number).name):
        return
    os.killpg(process.pid, signal.SIGTERM)


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count()
