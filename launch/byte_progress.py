"""A bar for what reads or writes gigabytes, where somebody looks on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

WORTH_A_BAR = 2 * 10**9
"""Bytes: some seconds of a disk."""


@contextmanager
def byte_progress(title: str, num_bytes: int, *, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Yields what is to be called with each number of bytes that are done.

    Args:
        title: What is done.
        num_bytes: All of them.
        show: Whether this process speaks; it does so on a terminal, and of no less than `WORTH_A_BAR`.
    """
    if not show or num_bytes < WORTH_A_BAR or not sys.stdout.isatty():
        yield lambda done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(), transient=True) as progress:
        task = progress.add_task(title, total=num_bytes)
        yield lambda done: progress.update(task, advance=done)
