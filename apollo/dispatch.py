"""What is there: Triton's kernels, and DTensors; neither is imported for those who have none."""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of weights and gradients."""


@cache
def has_triton() -> bool:
    """Whether Triton is installed; there are platforms that it is not made for."""
    return find_spec("triton") is not None


def is_dtensor(value: Any) -> bool:
    """Whether it is a DTensor; whoever has one has imported its module, which is a large one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)
