"""The two sides of the connections by which ranks watch each other (`watch.py`), and the lines on them.

hello SECRET RANK NAME   a rank's first line; the secret is in the run's store
.                        a heartbeat, both ways
end JSON                 what ended the run, both ways
said                     rank 0 has told of it
bye                      whoever leaves now is done
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from .exit_status import CRASHED, INTERRUPTED

if TYPE_CHECKING:
    import torch.distributed as dist

    from .watch import Watch

logger = logging.getLogger(__name__)

BEAT_S = 2.0
UNREACHABLE_S = 45
"""A machine that acknowledges nothing for so long is lost; a network that is only disturbed is back."""
GRACE_S = 2.0
"""What is wrong on one rank mostly is on all: so long rank 0 has to come to it by itself, and say it once."""
LINGER_S = 45.0
"""How long the others stay, at most, while the one that failed writes down why; launchers end it then."""
KEY = "longseq/watch"
SILENCE_VARIABLE = "LONGSEQ_RANK_TIMEOUT_S"


@dataclass(frozen=True)
class End:
    """What ended the run: the first rank that failed or was lost, its exit status, and why."""

    rank: int
    status: int
    text: str
    is_loss: bool = False


def end_process(status: int) -> NoReturn:
    """Leave without going back to what the process is in."""
    gone = contextlib.suppress(OSError, ValueError)  # whoever reads may be, which must not keep this process
    with gone:
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[?25h")  # a progress bar hides the cursor
    for stream in (sys.stdout, sys.stderr):
        with gone:
            stream.flush()
    os._exit(status)


def speaks_for_machine() -> bool:
    """Whether this process says on its machine what is wrong: each may have a launcher of its own."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _say(end: End) -> None:
    if end.status == INTERRUPTED:  # as the command line says it
        with contextlib.suppress(OSError):
            print("longseq train: interrupted", file=sys.stderr)
    else:
        logger.error("%s", end.text)


class _Lines:
    """A connection that carries lines; sending never waits long, and what cannot be sent is lost."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(BEAT_S)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for name, value in {
            "TCP_KEEPIDLE": 10,
            "TCP_KEEPINTVL": 5,
            "TCP_USER_TIMEOUT": UNREACHABLE_S * 1000,
        }.items():
            if hasattr(socket, name):  # not everywhere
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.connection = connection
        self._lock = threading.Lock()
        self._rest = b""

    def send(self, *words: str) -> None:
        with self._lock, contextlib.suppress(OSError):  # whoever reads from it sees why
            self.connection.sendall(" ".join(words).encode() + b"\n")

    def read(self) -> list[str] | None:
        """The lines that have come; None where the other end has closed. Raises OSError where it is lost."""
        received = self.connection.recv(1 << 16)
        if not received:
            return None
        *lines, self._rest = (self._rest + received).split(b"\n")
        return [line.decode(errors="replace") for line in lines]


@dataclass
class _Peer:
    """A rank as rank 0 sees it."""

    lines: _Lines
    rank: int | None = None
    name: str = ""
    silent_beats: int = 0


class Hub:
    """Rank 0's side."""

    def __init__(self, watch: Watch, store: dist.Store) -> None:
        self._watch = watch
        self._secret = secrets.token_hex(16)
        self._peers: dict[socket.socket, _Peer] = {}
        self._selector = selectors.DefaultSelector()
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, dualstack_ipv6=dual)
        self._listener.setblocking(False)  # who has called may be gone before he is received
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._closing = False
        self._speak_at: float | None = None
        self._leave_at = 0.0
        store.set(KEY, f"{self._listener.getsockname()[1]} {self._secret}")
        self._thread = threading.Thread(target=self._run, name="longseq-watch", daemon=True)
        self._thread.start()

    def pass_on(self, end: End) -> None:
        self._speak_at = time.monotonic() + GRACE_S
        self._leave_at = time.monotonic() + LINGER_S
        self._broadcast("end", json.dumps(asdict(end)))

    def close(self) -> None:
        self._closing = True
        self._broadcast("bye")
        self._thread.join(2 * BEAT_S)

    def _broadcast(self, *words: str) -> None:
        for peer in list(self._peers.values()):
            if peer.rank is not None:
                peer.lines.send(*words)

    def _run(self) -> None:
        next_beat = time.monotonic() + BEAT_S
        while not self._closing:
            wait = 0.1 if self._watch.news else max(0.0, next_beat - time.monotonic())
            for key, _ in self._selector.select(wait):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.fileobj)
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + BEAT_S
                self._beat()
            if self._watch.news is not None and not self._watch.is_handled:
                self._end(self._watch.news)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
            lines = _Lines(connection)
        except OSError:  # it has gone already, as those do that look for open ports
            return
        self._peers[connection] = _Peer(lines)
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> None:
        peer = self._peers[connection]
        try:
            lines, why = peer.lines.read(), None
        except OSError as error:
            lines, why = None, error
        if lines is None:
            self._drop(connection)
            if peer.rank is not None:
                self._lost(peer, why)
            return
        peer.silent_beats = 0
        for line in lines:
            self._take(connection, peer, line)

    def _take(self, connection: socket.socket, peer: _Peer, line: str) -> None:
        word, _, rest = line.partition(" ")
        if peer.rank is None:
            secret, rank, name = (*rest.split(" ", 2), "", "", "")[:3]
            if word != "hello" or not secrets.compare_digest(secret.encode(), self._secret.encode()):
                self._drop(connection)  # somebody who looks for open ports
                return
            peer.rank, peer.name = int(rank), name
        elif word == "bye":
            self._drop(connection)
        elif word == "end":
            self._watch.tell(End(**json.loads(rest)))

    def _drop(self, connection: socket.socket) -> None:
        if self._peers.pop(connection, None) is not None:
            self._selector.unregister(connection)
            connection.close()

    def _lost(self, peer: _Peer, why: OSError | None) -> None:
        if isinstance(why, TimeoutError) or (why is not None and "unreachable" in str(why)):
            text = f"the machine of {peer.name} does not answer any more ({why})"
        else:
            text = (
                f"{peer.name} is gone without a word: it was killed (as a machine does that runs out of "
                "memory), or crashed; its last lines, if it left any, say more"
            )
        assert peer.rank is not None
        self._watch.tell(End(peer.rank, CRASHED, text, is_loss=True))

    def _beat(self) -> None:
        self._broadcast(".")
        for peer in self._peers.values():
            # Counted in looks of our own: while this machine sleeps, nobody is silent.
            peer.silent_beats += 1
            if peer.rank is not None and _too_silent(peer.silent_beats, self._watch):
                self._watch.tell(End(peer.rank, CRASHED, _silent_text(peer.name, self._watch), is_loss=True))

    def _end(self, end: End) -> None:
        now = time.monotonic()
        if self._speak_at is not None and (end.is_loss or now >= self._speak_at):
            self._speak_at = None
            self._watch.say_once(partial(_say, end))
            self._broadcast("said")
        is_there = any(peer.rank == end.rank for peer in self._peers.values())
        if self._speak_at is None and (end.is_loss or not is_there or now >= self._leave_at):
            end_process(end.status)


class Spoke:
    """Another rank's side."""

    def __init__(self, watch: Watch, connection: socket.socket, secret: str) -> None:
        self._watch = watch
        self._lines = _Lines(connection)
        self.said = threading.Event()
        """Rank 0 has said what is wrong, or has gone."""
        self._closing = False
        self._leave_at: float | None = None
        self._silent_beats = 0
        name = f"rank {watch.rank} ({socket.gethostname()}, process {os.getpid()})"
        self._lines.send("hello", secret, str(watch.rank), name)
        self._thread = threading.Thread(target=self._run, name="longseq-watch", daemon=True)
        self._thread.start()

    def pass_on(self, end: End) -> None:
        self._leave_at = time.monotonic() + LINGER_S
        if end.rank == self._watch.rank:
            self._lines.send("end", json.dumps(asdict(end)))

    def close(self) -> None:
        self._closing = True
        self._lines.send("bye")
        self._thread.join(2 * BEAT_S)
        self._lines.connection.close()  # behind the last word: who closes without it is taken for lost

    def _run(self) -> None:
        next_beat = time.monotonic() + BEAT_S
        while not self._closing and self._read():
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + BEAT_S
                self._lines.send(".")
                self._silent_beats += 1
                if _too_silent(self._silent_beats, self._watch):
                    self._lost(_silent_text("rank 0", self._watch))
            if self._leave_at is not None and time.monotonic() >= self._leave_at:
                self._leave()

    def _read(self) -> bool:
        """Take what comes within a beat; whether rank 0 is still to be listened to."""
        try:
            lines = self._lines.read()
        except TimeoutError as error:
            if error.errno is None:  # nothing came, as opposed to a connection that was given up
                return True
            lines = None
        except OSError:
            lines = None
        if lines is None:
            self.said.set()
            if not self._closing:
                self._lost("rank 0 is gone without a word, and with it what the ranks meet at")
                self._leave()
            return False
        self._silent_beats = 0
        for line in lines:
            word, _, rest = line.partition(" ")
            if word == "end":
                self._watch.tell(End(**json.loads(rest)))
            elif word == "said":
                self.said.set()
            elif word == "bye":
                self.said.set()
                return False
        return True

    def _lost(self, text: str) -> None:
        is_news = self._watch.news is None
        self._watch.tell(End(0, CRASHED, text, is_loss=True))
        # Rank 0 cannot say it any more, on its own machine either.
        if is_news and (speaks_for_machine() or self._watch.rank == 1):
            here = f"rank {self._watch.rank} ({socket.gethostname()})"
            self._watch.say_once(partial(logger.error, "%s: %s", here, text))
        self._leave_at = time.monotonic()

    def _leave(self) -> None:
        if self._watch.is_handled:
            self._leave_at = None
            return
        assert self._watch.news is not None
        if speaks_for_machine():
            self._watch.say_once(partial(_say, self._watch.news))
        end_process(self._watch.news.status)


def connect(watch: Watch, store: dist.Store) -> Spoke | None:
    """A rank's side; None, which is said, where rank 0 cannot be reached."""
    port, secret = store.get(KEY).decode().split()
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    try:
        connection = socket.create_connection((address, int(port)), timeout=UNREACHABLE_S)
    except OSError as error:
        logger.warning(
            "rank %d cannot reach rank 0 at %s port %s (%s): if a process dies, the others will wait for it "
            "until the collective that they are in gives up.",
            watch.rank,
            address,
            port,
            error,
        )
        return None
    return Spoke(watch, connection, secret)


def _too_silent(beats: int, watch: Watch) -> bool:
    return watch.silent_beats is not None and beats > watch.silent_beats


def _silent_text(name: str, watch: Watch) -> str:
    return (
        f"{name} is there, but has not been heard of for {(watch.silent_beats or 0) * BEAT_S:g} s: it is "
        f"stopped, or stuck in a call (`py-spy dump --pid PROCESS` there says in which); {SILENCE_VARIABLE} "
        "sets another limit, 0 none"
    )
