"""Sizes of memory and files as people read them."""

from __future__ import annotations


def gib(num_bytes: float) -> str:
    """Bytes in GiB, without the unit: `12.3`."""
    return f"{num_bytes / 2**30:,.1f}"


def size_text(num_bytes: float) -> str:
    """Bytes as `12.3 GiB`, small ones as `340 MiB`."""
    return f"{gib(num_bytes)} GiB" if abs(num_bytes) >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
