"""What a run says when GPU memory runs out: what was taken, what the plan had expected, what would help."""

from __future__ import annotations

import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .checkpoint_folder import CHECKPOINTS_DIR
from .manifest import survey
from .sizes import gib, size_text

if TYPE_CHECKING:
    from .planner.plan import Plan

logger = logging.getLogger(__name__)

HISTORY_ENTRIES = 100_000
"""Of `log.memory_history`: the last so many allocations, a few hundred MiB of host memory."""
VIEWER = "https://pytorch.org/memory_viz"
FRESH_S = 600.0
"""A snapshot that is older was written for an earlier failure of the same run."""
SHOWN_PARTS, SHOWN_CHANGES = 12, 3
WITHOUT_PLAN = """\
What frees most, roughly in this order: sequence.checkpoints=host, train.micro_batch_sequences=1,
sequence.head_groups=8, more GPUs with a higher parallel.ulysses_degree, parallel.zero_stage=3,
parallel.offload_optimizer=cpu, a smaller sequence.loss_memory_mib or sequence.length."""

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = r"([\d.]+) (bytes|[KMGT]iB)"


@dataclass(frozen=True)
class Moment:
    """The memory of a GPU when it was not enough, in bytes; None is not known.

    Attributes:
        asked: What was asked for in vain.
        allocated: By tensors of this process.
        unused: Reserved by torch's allocator beside them.
        free: On the device.
        total: Of the device.
        others: What other processes have there, by their id.
        peak: Most that was allocated at once.
        retries: How often the allocator had to give back what it had cached.
    """

    asked: int | None = None
    allocated: int | None = None
    unused: int | None = None
    free: int | None = None
    total: int | None = None
    others: tuple[tuple[int, int], ...] = ()
    peak: int | None = None
    retries: int | None = None


def explain(error: BaseException, plan: Plan | None, device: torch.device, run_dir: Path) -> str:
    """The text for the log; sees to it that a snapshot of the memory is written.

    Args:
        error: A `torch.OutOfMemoryError`, whose message says what there was at that moment.
        plan: What the run was to take; None where none was made.
        device: The one that had no more.
        run_dir: Where the snapshot goes.
    """
    statistics = torch.cuda.memory_stats(device) if device.type == "cuda" else {}
    return "\n".join(
        [
            f"out of memory: {_first_line(error)}",
            *describe(read_moment(str(error), statistics), plan),
            *_advice(plan),
            *_snapshot_lines(run_dir, device),
            _how_to_go_on(run_dir),
        ]
    )


def _how_to_go_on(run_dir: Path) -> str:
    newest = survey(run_dir / CHECKPOINTS_DIR).newest
    if newest is None:
        return "There is no checkpoint yet: nothing is lost."
    return f"The newest checkpoint, {newest.name}, is whole: the same command goes on from it."


def _first_line(error: BaseException) -> str:
    # The rest of torch's message is in the table.
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.split(r"\. GPU \d+ has", text)[0].rstrip(".")


def read_moment(message: str, statistics: dict[str, int]) -> Moment:
    """What torch's message says, which was true at that moment, and its statistics.

    Args:
        message: Of the error.
        statistics: `torch.cuda.memory_stats()`; tensors may have been freed since.
    """
    total, free = _size(rf"total capacity of {_SIZE}", message), _size(rf"of which {_SIZE} is free", message)
    others = re.findall(rf"Process (\d+) has {_SIZE} memory in use", message)
    return Moment(
        asked=_size(rf"[Tt]ried to allocate {_SIZE}", message),
        allocated=_size(rf"{_SIZE} is allocated by PyTorch", message),
        unused=_size(rf"{_SIZE} is reserved by PyTorch but unallocated", message),
        free=free,
        total=total,
        others=tuple((int(pid), _bytes(number, unit)) for pid, number, unit in others),
        peak=statistics.get("allocated_bytes.all.peak"),
        retries=statistics.get("num_alloc_retries"),
    )


def _size(pattern: str, message: str) -> int | None:
    found = re.search(pattern, message)
    return _bytes(found[1], found[2]) if found else None


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])


def describe(moment: Moment, plan: Plan | None) -> list[str]:
    """The plan's table beside what there was, and what follows from the two."""
    lines = [*_table(moment, plan), *_diagnosis(moment, plan)]
    if moment.retries:
        lines.append(
            f"Before, the allocator had to give back what it had cached {moment.retries} times, which makes "
            "steps slow: memory was short all along."
        )
    return lines


def _table(moment: Moment, plan: Plan | None) -> list[str]:
    rows: list[tuple[str, int | None, int | None]] = []
    if plan is not None:
        parts = sorted(plan.memory.parts, key=lambda part: -part.gpu_bytes)
        rows += [(part.name, part.gpu_bytes, None) for part in parts[:SHOWN_PARTS] if part.gpu_bytes >= 2**20]
    planned = None if plan is None else plan.memory.peak_bytes
    rows.append(("allocated in all", planned, moment.allocated))
    rows.append(("the most before", None, moment.peak))
    rows.append(("asked for", None, moment.asked))
    reserve = None if plan is None else plan.memory.reserved_bytes - plan.memory.peak_bytes
    rows.append(("reserved beside it", reserve, moment.unused))
    rows += [(f"process {pid}", None, size) for pid, size in moment.others]
    rows.append(("free on the GPU", None, moment.free))
    rows.append(("the whole GPU", None if plan is None else plan.machine.gpu.memory_bytes, moment.total))
    rows = [row for row in rows if row[1] is not None or row[2] is not None]
    if not rows:
        return []
    width = max(len(name) for name, *_ in rows)
    head = f"{'':{width}}  {'planned':>9}  {'there was':>9}"
    return [head, *(f"{name:{width}}  {_cell(one):>9}  {_cell(two):>9}".rstrip() for name, one, two in rows)]


def _cell(num_bytes: int | None) -> str:
    return "" if num_bytes is None else size_text(num_bytes)


def _diagnosis(moment: Moment, plan: Plan | None) -> list[str]:
    lines = []
    taken = sum(size for _, size in moment.others)
    if moment.asked is not None and taken >= moment.asked:
        lines.append(
            f"Other processes have {size_text(taken)} of this GPU: without them it would have been enough."
        )
    elif moment.asked is not None and (moment.unused or 0) >= moment.asked and not _expandable():
        lines.append(
            f"{size_text(moment.unused or 0)} are reserved, but in pieces that are too small: set "
            "PYTORCH_ALLOC_CONF=expandable_segments:True, which joins them at no price."
        )
    if plan is None:
        return lines
    if not plan.fits:
        lines.append("The plan had said so: these settings do not fit.")
    elif moment.allocated is not None and moment.asked is not None:
        over = moment.allocated + moment.asked - plan.memory.peak_bytes
        if over > 0:
            lines.append(
                f"The plan had expected {gib(plan.memory.peak_bytes)} GiB at most ({plan.memory.moment}), "
                f"{size_text(over)} too little: please report it with this table and run_dir/config.yaml."
            )
    return lines


def _expandable() -> bool:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    return any("expandable_segments:True" in os.environ.get(name, "") for name in names)


def _advice(plan: Plan | None) -> list[str]:
    if plan is None:
        return [WITHOUT_PLAN]
    from .planner.advice import advice

    lines = advice(plan, SHOWN_CHANGES)
    if not lines:
        return ["No single key frees memory here: take more GPUs, or a smaller model."]
    return ["What would free most, by estimate:", *(f"  {line}" for line in lines)]


def watch_memory(run_dir: Path, history: bool) -> None:
    """See to it that a failure leaves a snapshot of the memory, taken before anything is freed.

    Without a GPU there is nothing to watch.

    Args:
        run_dir: Gets `out_of_memory-rank-N.pickle` (for the viewer at pytorch.org/memory_viz).
        history: Record where memory was asked for (log.memory_history), which costs a little in each step.
    """
    if not torch.cuda.is_available():
        return
    if history:
        torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES, stacks="python")
    attach = getattr(torch._C, "_cuda_attach_out_of_memory_observer", None)
    if attach is None:
        logger.info(
            "torch %s does not tell when memory runs out: a snapshot would be taken after the failure, when "
            "some of it is free again.",
            torch.__version__,
        )
        return
    attach(lambda device, asked, allocated, free: _write_quietly(run_dir))


def snapshot_path(run_dir: Path) -> Path:
    """Where this process's snapshot is."""
    return run_dir / f"out_of_memory-rank-{os.environ.get('RANK', '0')}.pickle"


def _write_quietly(run_dir: Path) -> bool:
    """Write the snapshot; what goes wrong with it must not hide the failure that it is of."""
    path = snapshot_path(run_dir)
    draft = path.with_name(f".{path.name}.partial")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(draft))
        draft.replace(path)
    except Exception as failure:  # of torch, of the disk, of host memory
        logger.warning("no snapshot of the GPU's memory was written: %s", failure)
        return False
    return True


def _snapshot_lines(run_dir: Path, device: torch.device) -> list[str]:
    if device.type != "cuda":
        return []
    path, when = snapshot_path(run_dir), ""
    if not path.is_file() or time.time() - path.stat().st_mtime > FRESH_S:
        when = " (taken after the failure)"
        if not _write_quietly(run_dir):
            return []
    return [f"What lay where{when}: drop {path} on {VIEWER}; log.memory_history=true adds who asked for it."]
