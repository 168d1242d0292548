"""Whether Triton's kernels can be had."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec


@cache
def has_triton() -> bool:
    """Whether Triton is installed; there are platforms that it is not made for."""
    return find_spec("triton") is not None
