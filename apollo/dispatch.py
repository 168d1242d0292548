"""Whether Triton's kernels can be had, and for what."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of weights and gradients."""


@cache
def has_triton() -> bool:
    """Whether Triton is installed; there are platforms that it is not made for."""
    return find_spec("triton") is not None
