from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from longseq.launch.data.cache import build_once, cache_root


def whole(folder: Path) -> bool:
    return (folder / "done").exists()


def build(folder: Path) -> None:
    (folder / "part").write_text("x")
    (folder / "done").touch()


def test_it_is_built_once(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "key"
    assert build_once(target, whole, build)
    assert not build_once(target, whole, lambda _: pytest.fail("built again"))
    assert sorted(path.name for path in target.parent.iterdir()) == ["key", "key.lock"]


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        build(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "key", whole, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]
    assert build_once(tmp_path / "key", whole, build)


def test_a_damaged_folder_is_built_anew(tmp_path: Path) -> None:
    target = tmp_path / "key"
    target.mkdir()
    (target / "part").write_text("old")
    assert build_once(target, whole, build)
    assert (target / "part").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.lock"]


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    killed = f"""
import os, pathlib, signal
from longseq.launch.data.cache import build_once
def die(folder):
    (folder / "part").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
build_once(pathlib.Path({str(tmp_path / "key")!r}), lambda folder: False, die)
"""
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode < 0
    assert not (tmp_path / "key").exists()
    assert len(list(tmp_path.glob("key.building-*"))) == 1
    assert build_once(tmp_path / "key", whole, build)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.lock"]


def test_the_second_waits_for_the_first(tmp_path: Path) -> None:
    built = []

    def slow(folder: Path) -> None:
        time.sleep(0.3)
        built.append(folder)
        build(folder)

    threads = [threading.Thread(target=build_once, args=(tmp_path / "key", whole, slow)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert whole(tmp_path / "key")


def test_without_locks_the_first_to_finish_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)

    def overtaken(folder: Path) -> None:
        build(folder)
        os.mkdir(tmp_path / "key")
        build(tmp_path / "key")
        (tmp_path / "key" / "part").write_text("theirs")

    build_once(tmp_path / "key", whole, overtaken)
    assert (tmp_path / "key" / "part").read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.lock"]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSEQ_CACHE", "/elsewhere")
    assert cache_root("/named") == Path("/named")
    assert cache_root(None) == Path("/elsewhere")
    monkeypatch.delenv("LONGSEQ_CACHE")
    assert cache_root(None) == Path.home() / ".cache" / "longseq"
