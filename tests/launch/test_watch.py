"""Three processes over gloo, of which one dies, fails or is stopped: all end, soon, and say which."""

from __future__ import annotations

import json
import signal
import socket
import struct
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import watched_ranks
from tiny_run import environment
from watched_ranks import RANKS, RUNS

from longseq.launch import watch_links
from longseq.launch.exit_status import BAD_INPUT, CRASHED, OUT_OF_MEMORY, STOPPED_ITSELF
from longseq.launch.watch import Watch
from longseq.launch.watch_links import KEY, Hub, Spoke


class Ended(NamedTuple):
    """Of each rank of a run."""

    statuses: list[int | None]
    printed: list[str]
    pids: list[int]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    folder = tmp_path_factory.mktemp("watched")
    command = [sys.executable, watched_ranks.__file__, str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads((folder / "ended.json").read_text())
    return {
        name: Ended(
            told["statuses"][name],
            [(folder / name / f"{rank}.out").read_text() for rank in range(RANKS)],
            told["pids"][name],
        )
        for name in RUNS
    }


def test_a_rank_that_is_killed_is_named(ended: dict[str, Ended]) -> None:
    statuses, printed, _ = ended["kill"]
    assert statuses == [CRASHED, CRASHED, -signal.SIGKILL]
    assert f"rank 2 ({socket.gethostname()}, process " in printed[0]
    assert "is gone without a word" in printed[0]
    assert "Traceback" not in "".join(printed)
    assert printed[1] == ""


def test_rank_0_that_is_killed_is_named(ended: dict[str, Ended]) -> None:
    statuses, printed, _ = ended["kill main"]
    assert statuses == [-signal.SIGKILL, CRASHED, CRASHED]
    assert printed[1].count("rank 0 is gone without a word") == 1
    assert "Traceback" not in "".join(printed)


def test_a_rank_that_fails_says_why_and_ends_all(ended: dict[str, Ended]) -> None:
    statuses, printed, _ = ended["raise"]
    assert statuses == [CRASHED] * RANKS
    assert printed[0].count("rank 1 (") == 1
    assert "CUDA error: an illegal memory access" in printed[0]
    assert "Traceback" in printed[1]
    assert "Traceback" not in printed[0] + printed[2]


@pytest.mark.parametrize(
    ("run", "said", "status"),
    [
        ("raise, heard late", "CUDA error: an illegal memory access", CRASHED),
        ("alike, late", "step 3: loss is nan", STOPPED_ITSELF),
    ],
)
def test_what_the_watch_has_said_is_not_said_again(
    ended: dict[str, Ended], run: str, said: str, status: int
) -> None:
    """By rank 0's own thread, which comes to it just before the watch ends the process."""
    statuses, printed, _ = ended[run]
    assert statuses == [status] * RANKS
    assert printed[0].count(said) == 1


def test_what_one_rank_refuses_has_its_status(ended: dict[str, Ended]) -> None:
    statuses, printed, _ = ended["refuse"]
    assert statuses == [BAD_INPUT] * RANKS
    assert "rank 2 (" in printed[0]
    assert "data.source: it has gone" in printed[0]
    assert "Traceback" not in "".join(printed)


def test_what_all_ranks_find_is_said_once(ended: dict[str, Ended]) -> None:
    statuses, printed, _ = ended["alike"]
    assert statuses == [STOPPED_ITSELF] * RANKS
    assert "".join(printed).count("step 3: loss is nan") == 1
    assert "rank" not in printed[0]


def test_a_rank_without_memory_explains_it(ended: dict[str, Ended]) -> None:
    statuses, printed, _ = ended["no memory"]
    assert statuses == [OUT_OF_MEMORY] * RANKS
    assert "rank 1 (" in printed[0]
    assert "explained: CUDA out of memory" in printed[1]


def test_a_rank_that_is_stopped_is_named(ended: dict[str, Ended]) -> None:
    statuses, printed, pids = ended["stop"]
    assert statuses == [CRASHED, None, CRASHED]
    assert f"process {pids[1]})" in printed[0]
    assert "has not been heard of for 4 s" in printed[0]


def test_ranks_that_end_end_no_other(ended: dict[str, Ended]) -> None:
    statuses, printed, _ = ended["end"]
    assert statuses == [0] * RANKS
    assert "gone" not in "".join(printed)


def test_strangers_at_the_port_do_not_end_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come and go, as those do that look for open ports; the ranks' lines still count."""
    monkeypatch.setattr(watch_links, "BEAT_S", 0.1)
    store: dict[str, str] = {}
    watch = Watch(0, 1)
    hub = Hub(watch, SimpleNamespace(set=store.__setitem__))
    port, secret = store[KEY].split()

    def call(line: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", int(port)), timeout=10)
        connection.sendall(line)
        return connection

    reset = call(b"")
    reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    reset.close()
    for line in (b"GET / HTTP/1.0\r\n", b"hello \xff 1 x\n", b"hello guess 1 x\n"):
        with call(line) as stranger:
            assert stranger.recv(100) == b""
    with call(f"hello {secret} 1 rank 1\n".encode()) as rank:
        assert rank.recv(100) == b".\n"
        hub.close()
        assert watch.news is None


def test_a_rank_that_leaves_says_so_before_its_connection_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where its thread sees first that it is to leave."""
    here, there = socket.socketpair()
    here_lines = watch_links._Lines
    monkeypatch.setattr(here_lines, "__init__", lines_without_tcp)
    spoke = Spoke(Watch(0, 1), here, "secret")
    send = spoke._lines.send

    def late(*words: str) -> None:
        there.sendall(b".\n")  # the thread wakes up, and ends
        spoke._thread.join(10)
        send(*words)

    monkeypatch.setattr(spoke._lines, "send", late)
    spoke.close()
    assert b"".join(iter(lambda: there.recv(100), b"")).splitlines()[-1] == b"bye"


def lines_without_tcp(self: watch_links._Lines, connection: socket.socket) -> None:
    connection.settimeout(10)
    self.connection, self._lock, self._rest = connection, threading.Lock(), b""


def test_a_process_ends_although_nobody_reads_what_it_says() -> None:
    code = (
        "import sys; from longseq.launch.watch_links import end_process\n"
        "sys.stdin.read(); sys.stdout.write('last words'); end_process(5)"  # unwritten as yet
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**environment(), "PYTHONUNBUFFERED": ""}, **pipes
    )
    process.stdout.close()
    process.stdin.close()
    assert process.wait(60) == 5


def test_a_limit_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSEQ_RANK_TIMEOUT_S", "soon")
    with pytest.raises(ValueError, match="LONGSEQ_RANK_TIMEOUT_S=soon: give seconds"):
        Watch(0, 1)
