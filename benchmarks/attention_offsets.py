"""Attention whose tensors reach beyond 2^31 elements: cuDNN's kernel as it is, and as longseq calls it.

python benchmarks/attention_offsets.py --out benchmarks/results      # seconds on a GPU of 80 GB

A tensor whose heads are columns of a wide row reaches far with few tokens. The same numbers, packed, are the
truth; `distributed/short_offsets.py` says what is done about it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import report
import torch
from torch import Tensor

from longseq.distributed.attention_kernels import CUDNN, AttentionOptions, Documents, Kernel
from longseq.distributed.short_offsets import last_offset, with_short_offsets

HEADS, LENGTH, WIDTH = (4, 2), 1100, 64
NAMES = {"g": "gradient of the output", "q": "queries", "k": "keys", "v": "values", "gqkv": "all four"}
ROW_ELEMENTS = (2**20, 2**21, 2**22)
NOTE = """Heads of the tensors named are columns of wide rows, so that their last element lies far behind the
first; errors are relative to the same numbers packed densely, as norms. Of the backward, the largest error of
the gradients of queries, keys and values. The output that backward is given was packed in all cases."""
Row = dict[str, Any]


def problem(row_elements: int, far: str, device: str) -> list[Tensor]:
    """Gradient of the output, queries, keys and values `(1, heads, tokens, width)`, some in wide rows."""
    tensors = []
    for index, (name, count) in enumerate(zip("gqkv", (HEADS[0], *HEADS, HEADS[1]), strict=True)):
        row = row_elements if name in far else count * WIDTH
        rows = torch.empty(1, LENGTH, row, dtype=torch.bfloat16, device=device)[..., : count * WIDTH]
        rows.normal_(generator=torch.Generator(device).manual_seed(count + index))
        tensors.append(rows.unflatten(2, (count, WIDTH)).transpose(1, 2))
    return tensors


def off(found: Tensor, truth: Tensor) -> float:
    return float((found.float() - truth.float()).norm() / truth.float().norm())


def measure(kernel: Kernel, row_elements: int, far: str, device: str = "cuda") -> list[Row]:
    """Errors of a kernel on far tensors, as it is and as longseq calls it."""
    options, whole = AttentionOptions(WIDTH**-0.5), Documents.whole(LENGTH)
    tensors = problem(row_elements, far, device)
    dense = [tensor.contiguous() for tensor in tensors]
    out, lse = kernel.forward(*dense[1:], options, whole)
    truth = kernel.backward(*dense, out, lse, options, whole)
    rows = []
    for name, one in (("cuDNN", kernel), ("longseq's call of it", with_short_offsets(kernel))):
        found, _ = one.forward(*tensors[1:], options, whole)
        grads = one.backward(*tensors, out, lse, options, whole)
        errors = {"out": off(found, out), "grads": [off(*pair) for pair in zip(grads, truth, strict=True)]}
        rows.append({"far": far, "last_offset": max(map(last_offset, tensors)), "kernel": name} | errors)
    return rows


def table(rows: list[Row]) -> list[Row]:
    """A row a case."""
    return [
        {
            "in wide rows": NAMES[row["far"]],
            "last element": row["last_offset"],
            "beyond 2^31": "yes" if row["last_offset"] >= 2**31 else "no",
            "kernel": row["kernel"],
            "forward": row["out"],
            "backward": max(row["grads"]),
        }
        for row in rows
    ]


def main(arguments: list[str] | None = None) -> None:
    args = report.arguments(__doc__.splitlines()[0]).parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("cuDNN's kernel needs a CUDA GPU.")
    rows: list[Row] = []
    for far in NAMES:
        for row_elements in ROW_ELEMENTS:
            rows += measure(CUDNN, row_elements, far)
            print(json.dumps(rows[-2:]), flush=True)
    keep(rows, args.out)


def keep(rows: list[Row], out: Path | None, **facts: Any) -> None:
    """Table and rows."""
    title = "Attention beyond 2^31 elements"
    report.write("attention_offsets", title, rows, out, tables=[("Errors", table(rows))], note=NOTE, **facts)


if __name__ == "__main__":
    main()
