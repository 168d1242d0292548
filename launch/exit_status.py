"""What the exit statuses of `longseq train` mean, and which of them are worth another try."""

from __future__ import annotations

import errno
import signal

DONE = 0
"""All steps are done, or the run was asked to save and stop and has."""
STOPPED_ITSELF = 1
"""The run saw that going on is of no use: a loss or gradient that is not finite."""
BAD_INPUT = 2
"""Config, data, model or machine are not what they should be; the message says what to change."""
OUT_OF_MEMORY = 3
"""A GPU, or the host, had no more memory."""
DISK_FULL = 4
"""There was no room for what had to be written."""
CRASHED = 5
"""Anything else: an error of CUDA, of the network or of the code, or a process that was lost."""
INTERRUPTED = 130
"""Ctrl-C, as in every shell."""

_ABOUT_THE_CONFIG = (ValueError, NotImplementedError, FileNotFoundError, FileExistsError, PermissionError)
_ABOUT_PATHS = (NotADirectoryError, IsADirectoryError)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of the disk, of a quota, of a file

_REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Whom one of these ends was asked to end, by a person or a cluster."""

_SAID = {
    DONE: "it ended as it should",
    STOPPED_ITSELF: "it stopped itself",
    BAD_INPUT: "config, data, model or machine are not as they should be",
    OUT_OF_MEMORY: "it was out of memory",
    DISK_FULL: "there was no room on the disk",
    CRASHED: "it crashed, or lost a process",
    INTERRUPTED: "it was interrupted",
}
_HINTS = {
    signal.SIGKILL: "the machine may have run out of memory, or somebody ended it",
    signal.SIGBUS: "a file that was mapped into memory became shorter, or its disk failed",
}


def status_of(error: BaseException) -> int:
    """The status of a process that ends by an exception; `error.exit_status` says it where it is there."""
    told = getattr(error, "exit_status", None)
    if told is not None:
        return told
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return OUT_OF_MEMORY
    if is_disk_full(error):
        return DISK_FULL
    return BAD_INPUT if isinstance(error, _ABOUT_THE_CONFIG + _ABOUT_PATHS) else CRASHED


def is_disk_full(error: BaseException) -> bool:
    """Whether there was no room, or no quota left, for what had to be written: here, or in its cause."""
    causes = [error, error.__cause__, getattr(error.__cause__, "__cause__", None)]
    return any(isinstance(one, OSError) and one.errno in _NO_ROOM for one in causes)


def ending_signal(status: int) -> signal.Signals | None:
    """The signal that ended a process, if its status says so.

    Args:
        status: As `subprocess` has it (-N), as a shell has it (128 + N), or as DeepSpeed's launcher hands on
            what `subprocess` told it (256 - N; 255 is what ssh says of itself).
    """
    for number in (-status, 256 - status if status != 255 else 0, status - 128):
        if number in set(signal.Signals):
            return signal.Signals(number)
    return None


def is_crash(status: int) -> bool:
    """Whether the same command may well succeed where this one has not."""
    number = ending_signal(status)
    return status == CRASHED or (number is not None and number not in _REQUESTS)


def describe(status: int) -> str:
    """A status in words."""
    number = ending_signal(status)
    if number is not None and status not in _SAID:
        hint = f" ({_HINTS[number]})" if number in _HINTS else ""
        return f"a process of it was ended by {number.name}{hint}"
    return _SAID.get(status, f"it ended with status {status}")
