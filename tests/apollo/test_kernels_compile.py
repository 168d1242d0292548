"""The kernels for whole matrices compile for Hopper, and use the hardware they are written for.

As a program, this file compiles what a step of matrices launches (`compile_kernels.py`); the test runs it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from compile_runs import run_compiler

SHARED_MEMORY = 227 * 1024
"""Bytes that one program may use on Hopper."""
PRODUCT = "_channel_statistics_kernel"
MODULES = ("projection", "statistics", "moments", "update")


@pytest.mark.slow  # some 30 compilations of a second and more, which the user's cache must not answer
def test_compile(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    found = run_compiler([__file__], tmp_path)
    assert not [line["never_launched"] for line in found if "never_launched" in line]
    compiled = [line for line in found if "kernel" in line]
    assert not [line for line in compiled if line["shared"] > SHARED_MEMORY]
    assert not [line for line in compiled if line["kernel"] == PRODUCT and not line["wgmma"]]
    products, updates = (
        [path.read_text() for path in tmp_path.rglob(f"{name}.ptx")] for name in (PRODUCT, "_update_kernel")
    )
    assert len(products) == sum(line["kernel"] == PRODUCT for line in compiled)
    # Tensor cores are done with a tile before another one is fetched over it (see the kernel).
    assert not [ptx for ptx in products if "wgmma.wait_group.sync.aligned 1" in ptx]
    # But for the odd sizes, all that is large goes 16 bytes at a time.
    assert sum("cp.async.cg" in ptx for ptx in products) == len(products) - 1
    assert sum("cache_hint.b16" not in ptx for ptx in updates) == len(updates) - 1


def main() -> None:
    import importlib

    import torch
    from compile_kernels import BF16, can_compile, on_gpu
    from triton.runtime.jit import JITFunction

    seen: dict[str, str] = {}
    if not can_compile(seen):
        return
    from longseq.apollo.kernels.matrices import Matrices, step_matrices

    def step(
        rows: int, columns: int, rank: int, dtype: torch.dtype = BF16, scale_type: str = "channel"
    ) -> None:
        def each(*shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
            return [on_gpu(*shape, dtype=dtype) for _ in range(2)]

        moments = [each(max(rows, columns), rank) for _ in range(2)]
        pairs = [each(rows, columns, dtype=dtype), each(rows, columns, dtype=dtype), *moments, each()]
        step_matrices(
            Matrices(*pairs, [2**64 - 1, 0], [2**32 - 1, 0], [2**33, 0]),
            rank=rank,
            scale_type=scale_type,
            lr=0.01,
            betas=(0.9, 0.999),
            eps=1e-6,
            weight_decay=0.1,
            alpha=1.0,
            norm_growth_limit=1.01,
            step=1,
            rounding="stochastic",
        )

    for rows, columns in ((1024, 512), (512, 1024)):
        for dtype in (BF16, torch.float32):
            step(rows, columns, 1, dtype, "tensor")
            step(rows, columns, 128, dtype)
            step(rows, columns, 256, dtype)
    step(1001, 333, 5)
    for name in MODULES:
        module = importlib.import_module(f"longseq.apollo.kernels.{name}")
        kernels = {key for key, value in vars(module).items() if isinstance(value, JITFunction)}
        for kernel in sorted(key for key in kernels - set(seen.values()) if key.endswith("_kernel")):
            print(json.dumps({"never_launched": kernel}))
    print(json.dumps({"done": True}))


if __name__ == "__main__":
    main()
