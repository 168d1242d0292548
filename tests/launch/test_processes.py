"""What a process takes of its machine."""

from __future__ import annotations

import os

import pytest

from longseq.launch.processes import share_of_cores


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "32"}, 16),
        ({"LOCAL_SIZE": "8", "WORLD_SIZE": "32"}, 8),
        ({"WORLD_SIZE": "2"}, 32),
        ({"LOCAL_WORLD_SIZE": "", "WORLD_SIZE": "128"}, 1),
    ],
)
def test_each_process_takes_its_share_of_the_cores(
    environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert share_of_cores() == expected
