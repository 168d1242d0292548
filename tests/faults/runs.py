"""Tiny training runs in forked processes: settings, one attempt at a run, and whether two ended alike."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tiny_run import Workshop, records

from longseq.distributed.state_files import SavedState
from longseq.launch.checkpoint import newest_checkpoint, read_state
from longseq.launch.manifest import checksum_problems, step_of, survey
from longseq.launch.processes import free_port

HANG_S = 90.0
"""An attempt that takes longer hangs."""
LET_OTHERS_END_S = 0.3
"""What a launcher waits, once a process has died, before it ends the others."""
STEPS = 8
EVERY_RUN = (f"train.steps={STEPS}", "train.eval_every=4", "checkpoint.at_first_step=true")
MODEL = ("model.name={shop}/pretrained/model", "model.config={{}}")


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Attributes:
        name: Of it, in the report.
        overrides: Put over the tiny config; `{shop}` is where its documents are.
        processes: How many there are, over gloo.
    """

    name: str
    overrides: tuple[str, ...]
    processes: int = 1


SETTINGS = (
    Setting("adamw", ("checkpoint.every=1", "checkpoint.background=true")),
    Setting("adamw, saved while training waits", ("checkpoint.every=2", "checkpoint.background=false")),
    Setting(
        "adamw, three kept", ("checkpoint.every=2", "checkpoint.keep=3", "train.global_batch_sequences=4")
    ),
    Setting(
        "apollo-mini in backward, bf16 weights",
        (
            "optimizer.name=apollo-mini",
            "optimizer.in_backward=true",
            "optimizer.weights=bf16",
            "train.precision=bf16",
            "train.global_batch_sequences=1",
            "checkpoint.every=2",
        ),
    ),
    Setting(
        "adapters with dropout", (*MODEL, "model.lora.dropout=0.3", "model.lora.rank=4", "checkpoint.every=2")
    ),
    Setting("two processes", ("parallel.num_gpus=2", "checkpoint.every=2"), 2),
    Setting("two processes, a sequence over both", ("parallel.ulysses_degree=2", "checkpoint.every=2"), 2),
    Setting(
        "two processes, ZeRO 1", ("parallel.num_gpus=2", "parallel.zero_stage=1", "checkpoint.every=3"), 2
    ),
    Setting(
        "two processes, ZeRO 3, saved while training waits",
        ("parallel.num_gpus=2", "parallel.zero_stage=3", "checkpoint.every=3", "checkpoint.background=false"),
        2,
    ),
)


IMPORTS = {
    "transformers.models.llama.modeling_llama": "",
    "longseq.launch.worker": "",
    "longseq.distributed.zero": "zero_stage",
    "deepspeed.runtime.zero.muon.muon_optimizer": "zero_stage",
    "peft": "lora",
}
"""What a run imports, and the word in its settings that asks for it."""


@dataclass(frozen=True)
class Attempt:
    """How one start of a run ended.

    Attributes:
        statuses: Of each process: its exit status, or minus the signal that ended it.
        seconds: It took.
        printed: By all processes.
        changes: Of the file system, that rank 0 made or was about to make.
    """

    statuses: tuple[int, ...]
    seconds: float
    printed: str
    changes: int

    @property
    def is_done(self) -> bool:
        """Whether every process ended well."""
        return set(self.statuses) == {0}


def warm_up(settings: tuple[Setting, ...]) -> None:
    """Import what runs of these settings need, so that a fork of this process is one in no time."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1")
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", TORCH_CPP_LOG_LEVEL="ERROR")
    torch.set_num_threads(1)
    words = " ".join(override for setting in settings for override in setting.overrides)
    for module, word in IMPORTS.items():
        if word in words:
            import_module(module)
    from matplotlib.figure import Figure

    # Half the time of a run would go into pictures that nobody looks at; their files are written.
    Figure.savefig = lambda figure, path, **options: Path(path).write_bytes(b"a picture")


def yaml_of(setting: Setting, shop: Workshop, run_dir: Path) -> Path:
    """The config file of a run of that setting in that folder."""
    overrides = [override.format(shop=shop.folder) for override in setting.overrides]
    path = shop.yaml("setting", *EVERY_RUN, *overrides, f"log.run_dir={run_dir}")
    mine = run_dir.with_suffix(".yaml")
    mine.write_text(path.read_text())
    return mine


def attempt(
    yaml: Path,
    processes: int,
    *,
    in_child: Callable[[int], None] | None = None,
    meanwhile: Callable[[list[int], int], None] | None = None,
) -> Attempt:
    """Start the run of a config and wait for its end.

    Args:
        yaml: The config.
        processes: How many are forked; they find each other over gloo.
        in_child: Called in each before it starts, with its rank.
        meanwhile: Called here every millisecond, with the pids and the changes that rank 0 has made.
    """
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 2**20)  # nobody reads before the end
    counting, counted = os.pipe()
    os.set_blocking(counting, False)
    port, started, changes = str(free_port()), time.monotonic(), 0
    pids = [_fork(yaml, rank, processes, port, (writing, counted), in_child) for rank in range(processes)]
    os.close(writing)
    os.close(counted)
    statuses: dict[int, int] = {}
    first_end = None
    while len(statuses) < processes:
        seconds = time.monotonic() - started
        alive = [pid for pid in pids if pid not in statuses]
        for pid in alive:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                statuses[pid] = os.waitstatus_to_exitcode(status)
                if statuses[pid] != 0 and first_end is None:
                    first_end = seconds
        changes += _read_all(counting)
        alive = [pid for pid in pids if pid not in statuses]
        if meanwhile is not None and alive:
            meanwhile(alive, changes)
        if seconds > HANG_S or (first_end is not None and seconds > first_end + LET_OTHERS_END_S):
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)
    changes += _read_all(counting)
    os.close(counting)
    with os.fdopen(reading, errors="replace") as pipe:
        printed = pipe.read()
    seconds = time.monotonic() - started
    if seconds > HANG_S:
        printed += f"\nhung for {HANG_S:.0f} s"
    return Attempt(tuple(statuses[pid] for pid in pids), seconds, printed, changes)


def _read_all(pipe: int) -> int:
    try:
        return len(os.read(pipe, 1 << 20))
    except BlockingIOError:
        return 0


CHANGING = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")
"""Audited operations that change a file system; an `open` only where it is for writing."""


def changes_files(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an audited operation changes a file system that stays."""
    if event not in CHANGING or str(arguments[0]).startswith(("/dev/", "/proc/")):
        return False
    if event != "open":
        return True
    _, mode, flags = arguments
    return bool(flags & (os.O_WRONLY | os.O_RDWR)) if isinstance(flags, int) else "r" not in str(mode)


def _fork(
    yaml: Path,
    rank: int,
    processes: int,
    port: str,
    pipes: tuple[int, int],
    in_child: Callable[[int], None] | None,
) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    writing, counted = pipes
    try:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        # pytest puts files of its own in their place.
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        if processes > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
            os.environ.update(LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        if rank == 0:
            sys.addaudithook(lambda *audited: changes_files(*audited) and os.write(counted, b"."))
        if in_child is not None:
            in_child(rank)
        from longseq.launch.cli import main

        status = main(["train", str(yaml)])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def differences(ours: Path, truth: Path) -> list[str]:
    """In what the ends of two runs differ: metrics, weights, optimizer's states, place in the data."""
    found = [line for kind in RECORDS if (line := _different_records(kind, ours, truth)) is not None]
    mine, theirs = newest_checkpoint(ours), newest_checkpoint(truth)
    if read_state(mine) != read_state(theirs):
        found.append(f"state: {read_state(mine)} is not {read_state(theirs)}")
    found += _different_tensors(SavedState(mine / "engine"), SavedState(theirs / "engine"))
    random_states = [sorted((folder / "rng").glob("rank-*")) for folder in (mine, theirs)]
    for one, other in zip(*random_states, strict=True):
        if not _equal(torch.load(one, weights_only=True), torch.load(other, weights_only=True)):
            found.append(f"random state {one.name}")
    return found


RECORDS = {
    "step": ("step", "loss", "lr", "grad_norm", "tokens", "tokens_seen", "epoch"),
    "eval": ("step", "eval_loss", "eval_tokens"),
    "reference": ("name", "value"),
}
"""Of each kind of record, what does not depend on the clock."""


def _different_records(kind: str, ours: Path, truth: Path) -> str | None:
    mine, theirs = (
        [tuple(record[key] for key in RECORDS[kind]) for record in records(run, kind)]
        for run in (ours, truth)
    )
    if kind == "eval":
        # Asked to stop, a run leaves out the evaluation that is due at that step.
        stops = {note["step"] for note in records(ours, "note") if "stopped by" in note["text"]}
        theirs = [one for one in theirs if one[0] not in stops or one in mine]
    if mine == theirs:
        return None
    pairs = [pair for pair in zip(mine, theirs, strict=False) if pair[0] != pair[1]]
    first, other = pairs[0] if pairs else (len(mine), len(theirs))
    return f"{kind} records: {first} is not {other}"


def _different_tensors(mine: SavedState, theirs: SavedState) -> list[str]:
    if mine.shapes != theirs.shapes:
        return ["the names or shapes of the weights"]
    found = []
    for name in mine.shapes:
        if mine.scalars(name) != theirs.scalars(name):
            found.append(f"the optimizer's numbers of {name}")
        if mine.states(name) != theirs.states(name):
            found.append(f"the optimizer's states of {name}")
            continue
        for state in ("weight", *mine.states(name)):
            if not torch.equal(mine.whole(name, state), theirs.whole(name, state)):
                found.append(f"{state} of {name}")
    return found


def _equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def good_step(run_dir: Path) -> int:
    """Of the newest checkpoint that is whole to the last byte; 0 without one."""
    good = survey(run_dir / "checkpoints").good
    return max((step_of(path) for path in good if not checksum_problems(path)), default=0)
