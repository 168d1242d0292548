"""Attention whose tensors reach beyond 2^31 elements: cuDNN's kernel as it is, and as longseq calls it.

python benchmarks/attention_offsets.py --out benchmarks/results      # seconds on a GPU, 40 GiB of it

A tensor whose heads are columns of a wide row reaches far with few tokens. The same numbers, packed, are the
truth; `distributed/short_offsets.py` says what is done about it.
"""

from __future__ import annotations

import json
from typing import Any

import report
import torch
from torch import Tensor

from longseq.distributed.attention_kernels import CUDNN, AttentionOptions, Documents, Kernel
from longseq.distributed.short_offsets import last_offset, with_short_offsets

HEADS, LENGTH, WIDTH = (4, 2), 1100, 64
NAMES = {"g": "gradient of the output", "q": "queries", "k": "keys", "v": "values", "gqkv": "all four"}
ROW_ELEMENTS = (2**20, 2**21, 2**22)
KERNELS = {"cuDNN": CUDNN, "longseq's call of it": with_short_offsets(CUDNN)}
NOTE = """Heads are columns of rows so wide that the last element named lies beyond 2^31; errors are relative
to the same numbers packed densely, as norms. Of the backward, the largest error of the gradients of queries,
keys and values."""
Row = dict[str, Any]


def problem(row_elements: int, far: str) -> list[Tensor]:
    """Gradient of the output, queries, keys and values `(1, heads, tokens, width)`, some in wide rows."""
    tensors = []
    for index, (name, count) in enumerate(zip("gqkv", (HEADS[0], *HEADS, HEADS[1]), strict=True)):
        row = row_elements if name in far else count * WIDTH
        rows = torch.empty(1, LENGTH, row, dtype=torch.bfloat16, device="cuda")[..., : count * WIDTH]
        rows.normal_(generator=torch.Generator("cuda").manual_seed(count + index))
        tensors.append(rows.unflatten(2, (count, WIDTH)).transpose(1, 2))
    return tensors


def off(found: Tensor, truth: Tensor) -> float:
    return float((found.float() - truth.float()).norm() / truth.float().norm())


def measure(kernel: Kernel, tensors: list[Tensor]) -> Row:
    """Errors of a kernel on far tensors."""
    options, whole = AttentionOptions(WIDTH**-0.5), Documents.whole(LENGTH)
    dense = [tensor.contiguous() for tensor in tensors]
    out, lse = CUDNN.forward(*dense[1:], options, whole)
    truth = CUDNN.backward(*dense, out, lse, options, whole)
    found, _ = kernel.forward(*tensors[1:], options, whole)
    grads = kernel.backward(*tensors, out, lse, options, whole)
    return {"out": off(found, out), "grads": [off(*pair) for pair in zip(grads, truth, strict=True)]}


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
            tensors = problem(row_elements, far)
            facts = {"far": far, "last_offset": max(map(last_offset, tensors))}
            for name, kernel in KERNELS.items():
                rows.append(facts | {"kernel": name} | measure(kernel, tensors))
                print(json.dumps(rows[-1]), flush=True)
    keep(rows, args.out)


def keep(rows: list[Row], out: Any, **facts: Any) -> None:
    title = "Attention beyond 2^31 elements"
    report.write("attention_offsets", title, rows, out, tables=[("Errors", table(rows))], note=NOTE, **facts)


if __name__ == "__main__":
    main()
