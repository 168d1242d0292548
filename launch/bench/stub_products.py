"""Products of matrices without their work: zeros, in the memory that they would have.

At millions of tokens the products of a step take minutes, and no memory beside their results: cuBLAS'
workspace is there from the warm-up on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ATEN = torch.ops.aten
PRODUCTS = (ATEN.mm, ATEN.addmm, ATEN.addmm_)


class StubProducts(TorchDispatchMode):
    """While it lasts, products of matrices are zeros of the shape, type and place that they would have.

    Attributes:
        num_calls: Products that were left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """One operation."""
        kwargs = kwargs or {}
        if func.overloadpacket not in PRODUCTS:
            return func(*args, **kwargs)
        self.num_calls += 1
        if func.overloadpacket is ATEN.addmm_:
            return args[0]
        out = kwargs.get("out")
        if func.overloadpacket is ATEN.mm:
            left, right, *rest = args
            if out is not None:
                return out.zero_()
            dtype = rest[0] if rest else kwargs.get("out_dtype", left.dtype)
            return left.new_zeros(left.shape[0], right.shape[1], dtype=dtype)
        total, left, right, *rest = args
        if out is not None:
            return out if out is total else out.copy_(total)
        dtype = rest[0] if rest else kwargs.get("out_dtype", left.dtype)
        return left.new_zeros(left.shape[0], right.shape[1], dtype=dtype).add_(total)
