"""Folders that are built once, whole or not at all, however many processes want them."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)


def cache_root(configured: str | None) -> Path:
    """`data.cache_dir`, else $LONGSEQ_CACHE, else ~/.cache/longseq."""
    return Path(configured or os.environ.get("LONGSEQ_CACHE") or "~/.cache/longseq").expanduser()


def build_once(
    folder: Path,
    is_whole: Callable[[Path], bool],
    build: Callable[[Path], None],
) -> bool:
    """Makes sure that `folder` is there and whole.

    It is built under another name and renamed, so that an interrupted build leaves nothing that looks
    finished. Other processes that want the same folder wait for the one that builds it; where the file
    system has no locks they build it too, and the first to finish wins.

    Args:
        folder: The folder that is wanted.
        is_whole: Whether a folder of that name is what `build` makes.
        build: Fills the empty folder that it is given.

    Returns:
        Whether this process built it.

    Raises:
        OSError: The cache cannot be written.
    """
    if is_whole(folder):
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_name(f"{folder.name}.lock")):
        if is_whole(folder):
            return False
        _remove_dead_builds(folder)
        scratch = folder.with_name(f"{folder.name}.building-{socket.gethostname()}-{os.getpid()}")
        scratch.mkdir()
        try:
            build(scratch)
            _install(scratch, folder, is_whole)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return True


def _install(scratch: Path, folder: Path, is_whole: Callable[[Path], bool]) -> None:
    try:
        scratch.rename(folder)
        return
    except OSError:
        # A folder that is not empty cannot be renamed onto.
        if not folder.exists():
            raise
    if is_whole(folder):
        return
    damaged = folder.with_name(f"{scratch.name}-damaged")
    folder.rename(damaged)
    scratch.rename(folder)
    shutil.rmtree(damaged)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    import fcntl

    # The file stays: one that is removed could be locked by two, one with the old and one with the new.
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("Waiting for another process that builds %s.", path.with_suffix(""))
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning(
                "The file system of %s has no locks (%s): processes that start at once build the same "
                "thing each for itself.",
                path.parent,
                error,
            )
        yield


def _remove_dead_builds(folder: Path) -> None:
    """Removes what killed processes of this machine left."""
    prefix = f"{folder.name}.building-{socket.gethostname()}-"
    for left in folder.parent.glob(f"{prefix}*"):
        pid = left.name.removeprefix(prefix).removesuffix("-damaged")
        if pid.isdigit() and not _is_running(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _is_running(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
