"""Whether processes of this machine can talk to each other: a few of them, for as long as a ping may take.

As a script it is one of them: `python ping.py STORE RANK WORLD nccl|gloo`. It imports torch alone, for every
process pays for what it imports, and says after each stage that it has come so far.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 30.0
NUMBERS = 1 << 20
STARTING_S = 120.0
"""Importing torch from a slow disk is no hang of the network."""
GRACE_S = 3.0
"""When one has died the others wait for it in vain; they may have something to say first."""
STAGES = ("started", "joined", "all-reduce", "all-to-all")


@dataclass(frozen=True)
class Ping:
    """Facts.

    Attributes:
        backend: `nccl` or `gloo`.
        num_processes: How many were started.
        reached: The last stage that every one of them reached; empty for none.
        hung: Whether the time ran out.
        limit_s: That there was for it.
        failure: What a process that died said last; empty where none did.
    """

    backend: str
    num_processes: int
    reached: str
    hung: bool
    limit_s: float
    failure: str = ""


@dataclass
class PingRun:
    """Processes that are on their way; what is left of them is ended by `result`."""

    backend: str
    processes: list[subprocess.Popen]
    folder: tempfile.TemporaryDirectory
    limit_s: float

    def result(self) -> Ping:
        """Wait for them, no longer than the limit."""
        hung = self._wait()
        died = [process.poll() not in (None, 0) for process in self.processes]
        for process in self.processes:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
        said = [self._read(rank) for rank in range(len(self.processes))]
        least = self._stages_done()
        self.folder.cleanup()
        failures = [_last_line(text) for text, is_dead in zip(said, died, strict=True) if is_dead]
        return Ping(
            self.backend,
            len(self.processes),
            STAGES[least - 1] if least else "",
            hung and not failures,
            self.limit_s,
            failures[0] if failures else "",
        )

    def _wait(self) -> bool:
        """Whether the time ran out before all were done, or one had died."""
        deadline = time.monotonic() + STARTING_S
        is_met = False
        while any(process.poll() is None for process in self.processes):
            if not is_met and self._stages_done():
                is_met, deadline = True, time.monotonic() + self.limit_s
            if any(process.poll() not in (None, 0) for process in self.processes):
                deadline = min(deadline, time.monotonic() + GRACE_S)
            if time.monotonic() > deadline:
                return True
            time.sleep(0.05)
        return False

    def _stages_done(self) -> int:
        """That all of them have behind them."""
        texts = [self._read(rank).splitlines() for rank in range(len(self.processes))]
        return min(sum(stage in lines for stage in STAGES) for lines in texts)

    def _read(self, rank: int) -> str:
        return Path(self.folder.name, f"{rank}.txt").read_text(errors="replace")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() and line.strip() not in STAGES]
    return lines[-1] if lines else "it said nothing"


def start_ping(
    backend: str,
    num_processes: int,
    limit_s: float = LIMIT_S,
    command: Callable[[Path, int, int, str], list[str]] | None = None,
) -> PingRun:
    """Start processes that greet each other.

    Args:
        backend: `nccl`, with a GPU for each, or `gloo`.
        num_processes: Two or more.
        limit_s: Longer than this, from the moment that all have started, is a hang.
        command: Makes the words of a process; None takes this module's own.
    """
    folder = tempfile.TemporaryDirectory(prefix="longseq-ping-", ignore_cleanup_errors=True)
    command = command or _command
    processes = []
    for rank in range(num_processes):
        # A file and not a pipe: NCCL_DEBUG=INFO would fill a pipe that nobody reads.
        with Path(folder.name, f"{rank}.txt").open("wb") as said:
            words = command(Path(folder.name, "store"), rank, num_processes, backend)
            processes.append(subprocess.Popen(words, stdout=said, stderr=subprocess.STDOUT))
    return PingRun(backend, processes, folder, limit_s)


def _command(store: Path, rank: int, world_size: int, backend: str) -> list[str]:
    return [sys.executable, __file__, str(store), str(rank), str(world_size), backend]


def _greet(store: str, rank: int, world_size: int, backend: str) -> None:
    import torch
    import torch.distributed as dist

    print(STAGES[0], flush=True)
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        device_id=device if backend == "nccl" else None,
    )
    print(STAGES[1], flush=True)
    numbers = torch.full((NUMBERS,), float(rank + 1), device=device)
    dist.all_reduce(numbers)
    _require(bool((numbers == world_size * (world_size + 1) // 2).all()), "all-reduce")
    print(STAGES[2], flush=True)
    sent = torch.full((world_size, NUMBERS), float(rank), device=device)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    wanted = torch.arange(world_size, device=device, dtype=sent.dtype)[:, None]
    _require(bool((received == wanted).all()), "all-to-all")
    print(STAGES[3], flush=True)
    dist.destroy_process_group()


def _require(is_right: bool, what: str) -> None:
    if not is_right:
        raise SystemExit(f"WRONG NUMBERS: what arrived of an {what} is not what was sent")


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose files are no packages
    _greet(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
