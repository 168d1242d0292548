"""No rank waits for one that has gone: each keeps a connection to rank 0, which tells all what ended one.

A collective that a rank never joins is given up after minutes, and then nothing is said of the rank. A
connection says at once that its other end has gone, whoever killed it, because it is the kernel that closes
it; and it stays while a process is busy in a long call, when a heartbeat would stop. Heartbeats go over it
too, for a process that is there but stopped; their limit is long, since a false alarm ends a good run.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable

from .watch_links import BEAT_S, LINGER_S, SILENCE_VARIABLE, End, Hub, Spoke, connect, end_process

SILENCE_S = 180.0
"""A process that is there and says nothing for so long is stopped or stuck. Calls that hold Python's lock (a
step of DeepSpeed's Adam on the host, a library loaded from a slow disk) take seconds, at the worst tens."""
ECHO_S = 5.0
"""How long a rank whose collective broke off waits to hear who has left it."""
TEARDOWN_S = 20.0
"""How long a process may take to end once all is said: NCCL may wait for those that have gone."""


class Watch:
    """This rank's part in seeing that all end together."""

    def __init__(self, rank: int, world_size: int, *, silence_s: float | None = None) -> None:
        """Connects to the others; every rank makes one.

        Args:
            rank: This rank.
            world_size: Ranks in all; alone it does nothing.
            silence_s: Seconds without a word after which a rank is given up, 0 for no limit; None takes
                $LONGSEQ_RANK_TIMEOUT_S or `SILENCE_S`.

        Raises:
            ValueError: The environment variable is no number.
        """
        self.rank = rank
        self.news: End | None = None
        silence_s = _silence_s() if silence_s is None else silence_s
        self.silent_beats = max(1, round(silence_s / BEAT_S)) if silence_s else None
        self.heard = threading.Event()
        """Set once there is news."""
        self.is_handled = False
        """Whether this rank's own thread has failed too, and says and ends what there is to."""
        self._lock = threading.Lock()
        self._speaking = threading.Lock()
        self._is_said = False
        self._side: Hub | Spoke | None = None
        if world_size > 1:
            import torch.distributed as dist

            store = dist.distributed_c10d._get_default_store()
            self._side = Hub(self, store) if rank == 0 else connect(self, store)

    def close(self) -> None:
        """Take leave: this rank is done, and the others need not care what becomes of it."""
        if self._side is not None:
            self._side.close()

    @property
    def is_alone(self) -> bool:
        """Whether there is no other rank to tell, or to hear of."""
        return self._side is None

    def failed(self, status: int, message: str, *, is_echo: bool = False) -> End:
        """Tell all ranks that this one ends by an error; at once, whatever else it does about it.

        Args:
            status: Its exit status.
            message: What is wrong, in a line.
            is_echo: The error may only say that another rank has gone, which is waited for then.

        Returns:
            What ended the run: this, or what another rank told before.
        """
        if is_echo and self._side is not None:
            self.heard.wait(ECHO_S)
        self.is_handled = True
        return self.tell(End(self.rank, status, f"rank {self.rank} ({socket.gethostname()}): {message}"))

    def tell(self, end: End) -> End:
        """Make something the news, unless there is some; returns what it is."""
        with self._lock:
            is_first = self.news is None
            if self.news is None:
                self.news = end
        if is_first:
            self.heard.set()
            if self._side is not None:
                self._side.pass_on(end)
        return self.news

    def say_once(self, say: Callable[[], None]) -> bool:
        """Say what ended the run, unless this process has said it; returns whether it is said now.

        This rank's own thread and the watch's come to it independently: the rank that failed leaves once it
        is told of, which breaks the collective that this one's thread is in.
        """
        with self._speaking:
            if self._is_said:
                return False
            self._is_said = True
            say()
            return True

    def wait_for_main(self) -> None:
        """Let rank 0 say what is wrong before this process ends: with it, its launcher ends the others."""
        if isinstance(self._side, Spoke):
            self._side.said.wait(LINGER_S)

    def leave_within(self, status: int, seconds: float = TEARDOWN_S) -> None:
        """Let this process end in its own way, unless it hangs in that."""
        if self._side is not None:
            timer = threading.Timer(seconds, end_process, [status])
            timer.daemon = True
            timer.start()


def _silence_s() -> float:
    text = os.environ.get(SILENCE_VARIABLE) or str(SILENCE_S)
    try:
        return max(0.0, float(text))
    except ValueError as error:
        raise ValueError(f"{SILENCE_VARIABLE}={text}: give seconds, or 0 for no limit.") from error
