"""Some rounds of what `rounds.py` does a hundred of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import environment

SCRIPT = Path(__file__).with_name("rounds.py")


@pytest.mark.slow
def test_injured_and_damaged_runs_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Slow: a process of its own imports everything, to be forked for every attempt; pytest cannot be."""
    words = ["--rounds", "6", "--seed", "32", "--settings", "4", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words, "--keep", str(tmp_path / "work")],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "faults.json").read_text())
    assert (found["equal"], found["failed"]) == (6, [])
    # Without a hit the rounds would have shown nothing.
    assert sum(len(one["injuries"]) for one in found["rows"]) >= 6
    assert sum(len(one["damages"]) for one in found["rows"]) >= 3
