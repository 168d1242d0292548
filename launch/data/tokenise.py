"""Reads and tokenises sources in parallel, the longest documents first."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .encode import EncodedBatch, Encoder
from .rows import Document, Problem, Reader, Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_WORKERS = 16
# A worker takes seconds to start; less text than this is tokenised here before it would be up.
POOL_BYTES = 32 << 20
TASK_BYTES = 1 << 20
_LINE_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class Task:
    """Rows `start` to `stop` of a source: one unit of work."""

    source: int
    start: int
    stop: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What became of a task's rows."""

    task: Task
    batch: EncodedBatch
    problems: list[Problem]


def plan_tasks(sources: Sequence[Rows], task_bytes: int = TASK_BYTES) -> list[Task]:
    """Cuts sources into stretches of neighbouring rows of about `task_bytes`, largest first.

    A document of more than that is a task of its own, so that the longest documents come first and
    none of them is still at work, alone, when all the others are done.
    """
    tasks = []
    for source, rows in enumerate(sources):
        total = np.concatenate([[0], np.cumsum(rows.sizes)])
        start = 0
        while start < len(rows.sizes):
            stop = int(np.searchsorted(total, total[start] + task_bytes, side="right")) - 1
            stop = min(max(stop, start + 1), len(rows.sizes))
            tasks.append(Task(source, start, stop, int(total[stop] - total[start])))
            start = stop
    return sorted(tasks, key=lambda task: (-task.num_bytes, task.source, task.start))


def tokenise(
    sources: Sequence[Rows],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_workers: int | None = None,
    progress: bool = False,
) -> Iterator[TaskResult]:
    """Yields each task's documents as soon as they are tokens, in no particular order.

    Args:
        sources: The rows.
        tokenizer: It is sent to the workers, so that all use the very same one.
        num_workers: Processes; None takes one a core that this process may use, `MAX_WORKERS` at most,
            and none for so little text that starting them would take longer.
        progress: Show a bar on a terminal, else a line now and then.

    Raises:
        RuntimeError: A worker was killed.
        ValueError: The tokenizer cannot serve the documents' kind at all.
    """
    tasks = plan_tasks(sources)
    num_bytes = sum(task.num_bytes for task in tasks)
    if num_workers is None:
        num_workers = min(available_cores(), MAX_WORKERS) if num_bytes >= POOL_BYTES else 1
    num_workers = min(num_workers, len(tasks))
    done = (
        _here(sources, tokenizer, tasks)
        if num_workers <= 1
        else _pooled(sources, tokenizer, tasks, num_workers)
    )
    with _progress(progress, num_bytes) as advance:
        for result in done:
            advance(result.task.num_bytes)
            yield result


def available_cores() -> int:
    """Cores that this process may use, which in a container may be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _here(
    sources: Sequence[Rows], tokenizer: PreTrainedTokenizerBase, tasks: list[Task]
) -> Iterator[TaskResult]:
    encoder = Encoder(tokenizer)
    for task in tasks:
        rows = sources[task.source]
        yield _run(rows.reader, encoder, task, rows.part(task.start, task.stop))


def _pooled(
    sources: Sequence[Rows], tokenizer: PreTrainedTokenizerBase, tasks: list[Task], num_workers: int
) -> Iterator[TaskResult]:
    with tempfile.TemporaryDirectory(prefix="longseq-tokenise-") as folder:
        # Given to a worker as it starts, a tokenizer would not fit into the pipe: each start would wait until
        # the worker before has imported all that a tokenizer needs.
        shared = Path(folder, "readers-and-tokenizer.pickle")
        shared.write_bytes(pickle.dumps(([rows.reader for rows in sources], tokenizer)))
        yield from _by_workers(sources, tasks, num_workers, shared)


def _by_workers(
    sources: Sequence[Rows], tasks: list[Task], num_workers: int, shared: Path
) -> Iterator[TaskResult]:
    # Spawned, because a fork of a process that holds CUDA, NCCL or a tokenizer's threads can hang.
    pool = ProcessPoolExecutor(
        num_workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(shared,)
    )
    waiting = iter(tasks)
    running: set[Future[TaskResult]] = set()
    try:
        while True:
            # A few tasks a worker: results wait in memory until they are written.
            while len(running) < 3 * num_workers and (task := next(waiting, None)) is not None:
                part = sources[task.source].part(task.start, task.stop)
                running.add(pool.submit(_run_in_worker, task, part))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"One of the {num_workers} processes that tokenise was killed, most often because memory ran "
            f"out; set data.num_workers to {max(num_workers // 2, 1)}. A script that calls this must do so "
            "below `if __name__ == '__main__':`."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[list[Reader], Encoder]
"""What a worker process works with; set once by `_start_worker`."""


def _start_worker(shared: Path) -> None:
    global _worker
    # One process a core is enough: threads of the tokenizer's own would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    readers, tokenizer = pickle.loads(shared.read_bytes())
    _worker = readers, Encoder(tokenizer)


def _run_in_worker(task: Task, part: Any) -> TaskResult:
    readers, encoder = _worker
    return _run(readers[task.source], encoder, task, part)


def _run(reader: Reader, encoder: Encoder, task: Task, part: Any) -> TaskResult:
    numbers, encoded, problems = [], [], []
    for number, row in reader.read(part):
        outcome = encoder.encode(row) if isinstance(row, Document) else row
        if isinstance(outcome, Problem):
            problems.append(outcome)
        else:
            numbers.append(number)
            encoded.append(outcome)
    return TaskResult(task, EncodedBatch.join(numbers, encoded, encoder.dtype), problems)


@contextlib.contextmanager
def _progress(show: bool, num_bytes: int) -> Iterator[Any]:
    """Gives a function that takes the bytes that are newly done."""
    if not show:
        yield lambda _: None
    elif sys.stderr.isatty():
        with _progress_bar(num_bytes) as advance:
            yield advance
    else:
        yield _progress_lines(num_bytes)


@contextlib.contextmanager
def _progress_bar(num_bytes: int) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("tokenising"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tokenising", total=num_bytes)
        yield lambda done: bar.advance(task, done)


def _progress_lines(num_bytes: int) -> Any:
    done_bytes, last = 0, time.monotonic()

    def advance(done: int) -> None:
        nonlocal done_bytes, last
        done_bytes += done
        if time.monotonic() - last >= _LINE_EVERY_S:
            last = time.monotonic()
            print(
                f"tokenising: {done_bytes / 1e6:,.0f} of {num_bytes / 1e6:,.0f} MB "
                f"({done_bytes / max(num_bytes, 1):.0%})",
                file=sys.stderr,
                flush=True,
            )

    return advance
