"""The machine around the GPUs: memory and its limits, compiler, clock."""

from __future__ import annotations

import os
import resource
import shutil
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

from ..sizes import size_text
from .findings import Finding, error, ok, warning

SHM_BYTES = 1 << 30
"""NCCL takes some 10 MiB of /dev/shm for each pair of processes, and data workers what they hand over;
a container's default of 64 MiB is too small for both."""
OPEN_FILES = 4096
PINNED_TRIAL_BYTES = 64 << 20
CLOCK_SLACK_S = 2 * 24 * 3600


@dataclass(frozen=True)
class System:
    """Facts.

    Attributes:
        shm_bytes: Free in /dev/shm; None without one.
        host_bytes: Memory of the machine.
        free_host_bytes: Of it, free within the limits of machine and container.
        limit_bytes: Of the container; None without a limit below the machine's memory.
        cores: That this process may use.
        open_files: Limit of open files of a process.
        locked_bytes: `ulimit -l`; None without a limit.
        pinning: How a trial to pin host memory went: None where there is no GPU to pin for, else what CUDA
            said; empty where it went well.
        compiler: The C compiler that Triton would take; None without one.
        has_python_header: Whether Python.h is there.
        clock_behind_s: How far the clock lies behind the newest of what was installed.
    """

    shm_bytes: int | None
    host_bytes: int
    free_host_bytes: int
    limit_bytes: int | None
    cores: int
    open_files: int
    locked_bytes: int | None
    pinning: str | None
    compiler: str | None
    has_python_header: bool
    clock_behind_s: float


def read_system(has_gpu: bool) -> System:
    """The facts of this machine; `has_gpu` tries to pin host memory, which takes CUDA."""
    import psutil

    from ...mst.placement import free_host_bytes
    from ..data.tokenise import available_cores

    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    host_bytes = psutil.virtual_memory().total
    limits = [limit for limit in _container_limits() if limit < host_bytes]
    return System(
        shm_bytes=_free_shm(),
        host_bytes=host_bytes,
        free_host_bytes=free_host_bytes(),
        limit_bytes=min(limits, default=None),
        cores=available_cores(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked_bytes=None if locked == resource.RLIM_INFINITY else locked,
        pinning=_try_to_pin() if has_gpu else None,
        compiler=os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc"),
        has_python_header=Path(sysconfig.get_paths()["include"], "Python.h").is_file(),
        clock_behind_s=Path(__file__).stat().st_mtime - time.time(),
    )


def _free_shm() -> int | None:
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return None


def _container_limits() -> list[int]:
    """Memory limits of the control groups that this process can see, versions 2 and 1."""
    found = []
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = Path("/sys/fs/cgroup", name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            found.append(int(text))
    return found


def _try_to_pin() -> str:
    import torch

    try:
        torch.empty(PINNED_TRIAL_BYTES, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as failure:
        return str(failure).strip().splitlines()[0]
    return ""


def check_system(facts: System) -> list[Finding]:
    """Memory first, for that is what long sequences run out of."""
    checks = (_memory, _shared_memory, _pinning, _compiler, _open_files, _clock)
    return [finding for check in checks for finding in check(facts)]


def _memory(facts: System) -> list[Finding]:
    limit = "" if facts.limit_bytes is None else f", the container's limit is {size_text(facts.limit_bytes)}"
    line = f"{size_text(facts.host_bytes)} of host memory{limit}, {size_text(facts.free_host_bytes)} free; "
    line += f"{facts.cores} core{'s' if facts.cores != 1 else ''}"
    allowed = min(facts.host_bytes, facts.limit_bytes or facts.host_bytes)
    if facts.free_host_bytes < allowed // 4:
        return [
            warning(
                line,
                "More than three quarters are taken: checkpoints=host and offload_optimizer=cpu may find no "
                "room. End what takes it, or give the container more.",
            )
        ]
    return [ok(line)]


def _shared_memory(facts: System) -> list[Finding]:
    if facts.shm_bytes is None:
        return [warning("there is no /dev/shm", "NCCL needs it; mount a tmpfs there.")]
    if facts.shm_bytes < SHM_BYTES:
        return [
            warning(
                f"/dev/shm has {size_text(facts.shm_bytes)} free; NCCL and processes that tokenise want "
                f"{size_text(SHM_BYTES)}",
                "Start the container with --shm-size=8g or --ipc=host; without one, remount it: "
                "mount -o remount,size=8G /dev/shm.",
            )
        ]
    return [ok(f"/dev/shm has {size_text(facts.shm_bytes)} free")]


def _pinning(facts: System) -> list[Finding]:
    if facts.pinning is None:
        return []
    limit = "no limit" if facts.locked_bytes is None else f"ulimit -l is {size_text(facts.locked_bytes)}"
    if facts.pinning:
        return [
            error(
                f"{size_text(PINNED_TRIAL_BYTES)} of host memory cannot be pinned: {facts.pinning} ({limit})",
                "Raise the limit (ulimit -l unlimited, --ulimit memlock=-1 for a container), free host "
                "memory, or set sequence.checkpoints=gpu.",
            )
        ]
    # CUDA's driver pins without regard to the limit; what locks memory itself (RDMA) heeds it.
    return [ok(f"host memory can be pinned ({limit})")]


def _compiler(facts: System) -> list[Finding]:
    # Without a GPU no kernel is compiled: nothing is lost.
    severity = warning if facts.pinning is None else error
    if facts.compiler is None:
        return [
            severity(
                "there is no C compiler, which Triton needs to start its kernels",
                "Install one (apt-get install gcc, or conda install gcc), or name one in CC.",
            )
        ]
    if not facts.has_python_header:
        return [
            severity(
                "Python.h is missing, which Triton needs to start its kernels",
                "Install the headers of this Python: apt-get install python3-dev (python3.12-dev for 3.12).",
            )
        ]
    return [ok(f"C compiler {facts.compiler} and Python.h are there for Triton")]


def _open_files(facts: System) -> list[Finding]:
    if facts.open_files < OPEN_FILES and facts.open_files != resource.RLIM_INFINITY:
        return [
            warning(
                f"a process may have {facts.open_files:,} files open",
                f"Many shards and processes need more: ulimit -n {16 * OPEN_FILES}.",
            )
        ]
    return []


def _clock(facts: System) -> list[Finding]:
    if facts.clock_behind_s > CLOCK_SLACK_S:
        days = facts.clock_behind_s / (24 * 3600)
        return [
            warning(
                f"the clock is {days:.0f} days behind files that are there already",
                "Downloads will be refused (certificates) and logs disordered; set it: timedatectl set-ntp "
                "true.",
            )
        ]
    return []
