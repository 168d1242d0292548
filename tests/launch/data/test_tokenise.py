from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import slow_tokenizer

from longseq.launch.data import tokenise as module
from longseq.launch.data.rows import TextFiles
from longseq.launch.data.tokenise import plan_tasks, tokenise
from longseq.launch.data.tokenizer import byte_tokenizer


@pytest.fixture
def files(tmp_path: Path) -> TextFiles:
    paths = []
    for i, size in enumerate([10, 5000, 20, 30, 900, 1, 1, 1]):
        paths.append(tmp_path / f"{i}.txt")
        paths[-1].write_text(chr(97 + i) * size)
    return TextFiles(paths, [path.name for path in paths])


def test_tasks_cover_all_rows_once_and_the_longest_come_first(files: TextFiles) -> None:
    tasks = plan_tasks([files, files], task_bytes=64)
    rows = sorted((task.source, row) for task in tasks for row in range(task.start, task.stop))
    assert rows == [(source, row) for source in range(2) for row in range(8)]
    assert [(task.source, task.start, task.stop) for task in tasks[:4]] == [
        (0, 1, 2),
        (1, 1, 2),
        (0, 4, 5),
        (1, 4, 5),
    ]
    sizes = [task.num_bytes for task in tasks]
    assert sizes == sorted(sizes, reverse=True)
    assert all(task.num_bytes <= 64 or task.stop == task.start + 1 for task in tasks)


def test_rows_without_a_size_make_progress_too() -> None:
    files = TextFiles([], [])
    files.sizes = np.zeros(5, np.int64)
    assert sum(task.stop - task.start for task in plan_tasks([files])) == 5
    assert plan_tasks([TextFiles([], [])]) == []


def test_processes_give_what_one_gives(files: TextFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "plan_tasks", lambda sources: plan_tasks(sources, task_bytes=64))

    def tokens(num_workers: int) -> dict[int, list[int]]:
        found = {}
        for result in tokenise([files], byte_tokenizer(), num_workers=num_workers):
            batch, at = result.batch, 0
            for row, length in zip(batch.rows.tolist(), batch.lengths.tolist(), strict=True):
                found[row] = batch.tokens[at : at + length].tolist()
                at += length
        return found

    alone = tokens(1)
    assert sorted(alone) == list(range(8))
    assert len(alone[1]) == 5002
    assert tokens(2) == alone


def test_workers_start_beside_each_other(
    files: TextFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a tokenizer imports takes seconds, and no worker's start waits for another's."""
    monkeypatch.setattr(module, "plan_tasks", lambda sources: plan_tasks(sources, task_bytes=64))
    monkeypatch.setenv(slow_tokenizer.FOLDER, str(tmp_path))
    tokenizer = slow_tokenizer.wrap(byte_tokenizer(), num_bytes=1 << 20)
    assert list(tokenise([files], tokenizer, num_workers=2))
    assert sorted(path.read_text() for path in tmp_path.glob("*.begun")) == ["met", "met"]


def test_progress_is_lines_where_there_is_no_terminal(
    files: TextFiles, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_LINE_EVERY_S", 0.0)
    list(tokenise([files], byte_tokenizer(), num_workers=1, progress=True))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines()[-1].startswith("tokenising: ")
    assert "(100%)" in shown.err
