"""What one process takes of its host's memory during training."""

from __future__ import annotations

from ...mst.pinned_slab import BLOCK_BYTES
from .knobs import Knobs
from .memory_held import Held
from .memory_sizes import Sizes
from .workload import Workload

PROCESS_BYTES = int(2.2 * 2**30)
"""Of a process by itself, resident: Python, PyTorch's libraries, CUDA, the data that it has open. Measured:
1.7 GiB of one alone, 2.2 of each of four."""


def host_parts(work: Workload, knobs: Knobs, sizes: Sizes, found: Held) -> list[tuple[str, int, str]]:
    """Name, bytes and note of each part."""
    parts = [("the process itself", PROCESS_BYTES, "libraries and data")]
    if knobs.stream:
        slab = slab_bytes(work, knobs, sizes)
        parts.append(("layer inputs and attention on the host", slab, "pinned, in blocks"))
    parts.append(("optimizer and weights on the host", found.host, "by DeepSpeed"))
    return parts


def slab_bytes(work: Workload, knobs: Knobs, sizes: Sizes) -> int:
    """Of the pinned slab that layers keep in."""
    num, attention = work.num_layers, knobs.attention
    inputs = knobs.inputs.count("host", num) if knobs.inputs.host else 0
    saved = max(0, num - attention.gpu_layers) if attention.host else 0
    wanted = inputs * sizes.hidden + saved * (sizes.queries + sizes.log_sums)
    return -(-wanted // BLOCK_BYTES) * BLOCK_BYTES
