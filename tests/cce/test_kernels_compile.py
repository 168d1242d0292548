"""Every kernel compiles for Hopper, fits into its shared memory, and uses the hardware it is written for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED_MEMORY = 227 * 1024
"""Bytes that one program may use on Hopper."""

PRODUCTS = {"_logits_kernel", "_rows_product_kernel", "_columns_product_kernel"}


@pytest.mark.slow  # some 40 compilations of half a second: the user's cache must not answer for the compiler
def test_compile(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "compile_kernels.py")],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    unsupported = [line["unsupported"] for line in found if "unsupported" in line]
    if unsupported:
        pytest.skip(f"cannot compile without a launch: {unsupported[0]}")
    assert done.returncode == 0, done.stderr[-4000:]
    assert found[-1] == {"done": True}, found[-3:]
    compiled = [line for line in found if "kernel" in line]
    assert {line["kernel"] for line in compiled} >= PRODUCTS
    assert not [line["never_launched"] for line in found if "never_launched" in line]
    too_large = [line for line in compiled if line["shared"] > SHARED_MEMORY]
    assert not too_large
    slow = [
        line
        for line in compiled
        if line["kernel"] in PRODUCTS and not (line["wgmma"] and line["bulk_copies"])
    ]
    assert not slow
