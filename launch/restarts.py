"""`longseq train --max-restarts N`: a run that crashes goes on from its newest checkpoint by itself."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from .exit_status import describe, is_crash
from .launcher import MODULE
from .processes import is_launched

FIRST_PAUSE_S = 5.0
"""What ended a run may take as long to pass: a port that is given back, memory of a GPU that is freed."""
LONGEST_PAUSE_S = 300.0
LOOK_S = 0.2
"""How often it is looked, in a pause, whether somebody asked to stop."""
TOLD = "LONGSEQ_RESTARTED"
"""In the environment of a run that was started again: which restart it is, and why; the run notes it."""

_HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def supervise(
    words: Sequence[str],
    run_dir: Path,
    max_restarts: int,
    *,
    newest: Callable[[Path], str | None] | None = None,
    first_pause_s: float = FIRST_PAUSE_S,
) -> int:
    """Run a training command as a child, and start it again where it crashes.

    It is not started again where that is of no use (`exit_status.is_crash`), where it was asked to stop, or
    where the last try has come to no new checkpoint.

    Args:
        words: The command line behind `longseq`, without `--max-restarts`: `train CONFIG key=value ...`. What
            is behind a `--` comes last.
        run_dir: The run's folder (`log.run_dir`).
        max_restarts: How many times it is started again, at most.
        newest: Names the newest checkpoint in a run's folder; for tests.
        first_pause_s: Seconds before the first restart; each later pause is twice as long.

    Returns:
        The exit status of the last try.

    Raises:
        ValueError: This process was itself started by a launcher, beside others that would have to be
            started again with it.
    """
    if is_launched():
        raise ValueError(
            f"--max-restarts={max_restarts}: this process was started by a launcher (RANK is set), which "
            "alone can start all of them again: use torchrun's --max-restarts, or `#SBATCH --requeue`; "
            "the run goes on from its newest checkpoint by itself."
        )
    newest = newest or _newest_checkpoint
    with _Child(words) as child:
        reached, is_first = newest(run_dir), True
        for restart in range(max_restarts + 1):
            status = child.run(newest(run_dir) if restart else None)
            if child.was_asked or not is_crash(status):
                return status
            before, reached = reached, newest(run_dir)
            if reached == before and not is_first:
                _say(
                    f"{describe(status)}; it has come to no new checkpoint since the last try ({reached}): "
                    "gave up. What is wrong stands above."
                )
                return status
            is_first = False
            if restart == max_restarts:
                break
            pause_s = min(first_pause_s * 2**restart, LONGEST_PAUSE_S)
            why = f"restart {restart + 1} of {max_restarts}: {describe(status)}"
            _say(f"{why}; goes on from {reached or 'the start'} in {pause_s:g} s")
            if child.pause(pause_s):
                return status
            child.environment[TOLD] = why
    _say(
        f"{describe(status)}; all {max_restarts} restarts are used. The same command goes on from {reached}."
    )
    return status


def _newest_checkpoint(run_dir: Path) -> str | None:
    from .checkpoint import newest_checkpoint

    found = newest_checkpoint(run_dir)
    return None if found == run_dir else found.name


def _say(text: str) -> None:
    print(f"longseq train: {text}", file=sys.stderr, flush=True)


@dataclass
class _Child:
    """The command's process; signals that come meanwhile are handed on to it."""

    words: Sequence[str]
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    was_asked: bool = False

    def __enter__(self) -> _Child:
        self._process: subprocess.Popen | None = None
        # nohup has a terminal's end ignored, and so have we then.
        numbers = [one for one in _HANDED_ON if signal.getsignal(one) is not signal.SIG_IGN]
        self._earlier = {number: signal.signal(number, self._hand_on) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def run(self, newest: str | None) -> int:
        """Start the command and wait for it; its status.

        Args:
            newest: A checkpoint of the run itself, from which it then goes on whatever `checkpoint.resume`
                said for the first start.
        """
        words = list(self.words)
        if newest is not None:
            end = words.index("--") if "--" in words else len(words)
            words.insert(end, "checkpoint.resume=auto")
        # In a session of its own: Ctrl-C reaches a whole terminal, and the child would hear it twice.
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULE, *words], env=self.environment, start_new_session=True
        )
        if self.was_asked:  # between two tries, or while this one was being started
            self._process.terminate()
        try:
            status = self._process.wait()
            return status if status >= 0 else 128 - status
        finally:
            self._process = None

    def pause(self, seconds: float) -> bool:
        """Wait, unless it is asked to stop; whether it was."""
        # Not at an event: its lock may be held here when the signal comes that would set it.
        end = time.monotonic() + seconds
        while not self.was_asked and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, LOOK_S))
        return self.was_asked

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self.was_asked = True
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
