"""Every example runs as it stands, and is short enough to read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
MAX_LINES = 40
TORCH_ABORT = "terminate called without an active exception"
"""Of torch 2.13 over gloo, on a busy machine: a thread that lets go of a collective's tensors as Python ends
asks for Python's lock, is ended there, and the process aborts, all its work done."""


def example(path: Path) -> Any:
    """Slow where two processes import transformers and DeepSpeed."""
    marks = [pytest.mark.slow] if "import deepspeed" in path.read_text() else []
    return pytest.param(path, id=path.name, marks=marks)


@pytest.mark.parametrize("path", map(example, EXAMPLES))
def test_it_runs_and_is_short(path: Path) -> None:
    launcher = (
        ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if "torchrun" in path.read_text() else []
    )
    command = [sys.executable, *launcher, str(path)]
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if TORCH_ABORT not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
    assert len(path.read_text().splitlines()) <= MAX_LINES
