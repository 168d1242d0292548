"""Every kernel compiles for Hopper, fits into its shared memory, and uses the hardware it is written for."""

from __future__ import annotations

from pathlib import Path

import pytest
from compile_runs import run_compiler

pytest.importorskip("triton")

SHARED_MEMORY = 227 * 1024
"""Bytes that one program may use on Hopper."""

PRODUCTS = {"_logits_kernel", "_rows_product_kernel", "_columns_product_kernel"}


@pytest.mark.slow  # some 40 compilations of half a second: the user's cache must not answer for the compiler
def test_compile(tmp_path: Path) -> None:
    found = run_compiler([str(Path(__file__).parents[1] / "compile_kernels.py")], tmp_path)
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
