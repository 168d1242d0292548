"""Runs of three processes over gloo, of which one dies, fails or is stopped; as a script, all at once.

`python watched_ranks.py FOLDER` writes what each rank said to FOLDER/RUN/RANK.out, and how all ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers.utils.logging  # noqa: F401  (once, for all ranks)

from longseq.distributed.groups import ProcessGroups
from longseq.launch import watch_links, worker
from longseq.launch.config import RunConfig
from longseq.launch.loop import TrainingError

RANKS = 3
SOON_S = 150
"""On a machine that is busy with other tests; alone, the slowest of these takes seconds."""


def run_rank(rank: int, folder: Path, acts: dict[int, str], limit_s: float) -> None:
    """A rank of a run whose steps are collectives, one after the other; at the third it acts as told."""
    torch.set_num_threads(1)
    output = os.open(folder / f"{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", LONGSEQ_RANK_TIMEOUT_S=str(limit_s))

    def join(config: Any) -> Any:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=RANKS)
        return config, ProcessGroups.create(), torch.device("cpu")

    def train(config: Any, groups: ProcessGroups, device: torch.device) -> None:
        act = acts.get(rank, "work")
        for step in range(1, 10_000):
            if step == 3:
                do(act)
            if act == "end" and step == 3:
                time.sleep(0.5)  # gloo may still be sending to the others
                return
            dist.all_reduce(torch.ones(3))
            time.sleep(0.05)

    worker.join, worker.train = join, train
    worker.check_nodes = lambda *_: None
    worker.watch_memory = lambda *_: None
    worker.explain = lambda error, *_: f"explained: {error}"
    if acts.get(rank, "").startswith("outlive"):  # as where its own thread is quicker than the watch's
        watch_links.end_process = lambda status: time.sleep(1)
    os._exit(worker.run_worker(RunConfig()))


def do(act: str) -> None:
    if act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if act == "raise":
        raise RuntimeError("CUDA error: an illegal memory access")
    if act == "refuse":
        raise ValueError("data.source: it has gone")
    if act == "outlive, not finite":
        time.sleep(watch_links.GRACE_S + 2)  # it has been said meanwhile
    if act.endswith("not finite"):
        raise TrainingError("step 3: loss is nan")
    if act == "no memory":
        raise torch.OutOfMemoryError("CUDA out of memory")


def run_all(folder: Path) -> None:
    """Every run, all at once: most of what they do is to wait for each other. One import serves them all."""
    children: dict[int, tuple[str, int]] = {}
    for name, acts in RUNS.items():
        (folder / name).mkdir()
        for rank in range(RANKS):
            pid = os.fork()
            if pid == 0:
                run_rank(rank, folder / name, acts, limit_s=4.0 if name == "stop" else 60.0)
            children[pid] = name, rank
    ended: dict[str, list[int | None]] = {name: [None] * RANKS for name in RUNS}
    pids = {name: [pid for pid, (run, _) in children.items() if run == name] for name in RUNS}
    deadline = time.monotonic() + SOON_S
    while len(children) > 1 and time.monotonic() < deadline:  # the stopped one stays
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            name, rank = children.pop(pid)
            ended[name][rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    (folder / "ended.json").write_text(json.dumps({"statuses": ended, "pids": pids}))


RUNS: dict[str, dict[int, str]] = {
    "kill": {2: "kill"},
    "kill main": {0: "kill"},
    "raise": {1: "raise"},
    "raise, heard late": {0: "outlive", 1: "raise"},
    "refuse": {2: "refuse"},
    "alike": dict.fromkeys(range(RANKS), "not finite"),
    "alike, late": {0: "outlive, not finite", 1: "not finite", 2: "not finite"},
    "stop": {1: "stop"},
    "no memory": {1: "no memory"},
    "end": dict.fromkeys(range(RANKS), "end"),
}


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
