"""Programs that compile kernels for Hopper without a GPU, run in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

TIME_LIMIT_S = 900
"""Guards against a hang; a compilation takes about a second."""


def run_compiler(program: Sequence[str], cache: Path) -> list[dict[str, Any]]:
    """What a program says that compiles as `compile_kernels` does, a JSON object a line.

    The test is skipped where this version of Triton cannot compile without a launch.

    Args:
        program: Arguments of Python; `tests/` is on its path.
        cache: An empty folder: the user's cache must not answer for the compiler.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *program],
        env=environment | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
        check=False,
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    unsupported = [line["unsupported"] for line in found if "unsupported" in line]
    if unsupported:
        pytest.skip(f"cannot compile without a launch: {unsupported[0]}")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "done" in found[-1], found[-3:]
    return found
