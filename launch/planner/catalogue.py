"""GPUs by name: what their datasheets promise, and which share of it a training step attains. Pure Python.

The shares were measured with this library on H200s and H100s (SXM): sequence_parallel.json, optimizer.json
and plan.json in benchmarks/results. Rates of every other GPU are its datasheet's times these shares: scaled,
not measured. On a machine that is there, `longseq plan --calibrate` measures it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..flops import peak_tflops

MEASURED = ("h200", "h100-80g")
"""Cards whose rates these shares are of."""
CONTEXT_BYTES = 840 * 2**20
"""What a process takes of a GPU outside of torch's allocator: CUDA, cuBLAS, cuDNN, Triton's kernels. It was
840 MiB on an H200 and 770 on an H100; NCCL's buffers are beside it."""


@dataclass(frozen=True)
class Shares:
    """Which part of a datasheet's rate large calls attain."""

    matmul: float
    attention_forward: float
    attention_backward: float
    flash: float = 1.0
    """Of attention's rates, those of flash-attention 2: on what is older it is the kernel there is."""


# Measured, of 989 TFLOP/s: products of layers at 690 to 780, cuDNN's attention at 550 to 600 forward and 490
# to 520 backward. Flash-attention 2 was not: arXiv 2407.08608 has it at over half of that on an H100.
_HOPPER = Shares(matmul=0.715, attention_forward=0.575, attention_backward=0.52, flash=0.55)
# cuDNN and flash-attn-4 are tuned for Blackwell as for Hopper.
_BLACKWELL = _HOPPER
# Before Hopper attention is flash-attention 2, whose paper (arXiv 2307.08691) has up to 225 TFLOP/s forward
# and backward together of an A100's 312, and less of it backward; not measured here.
_AMPERE = Shares(matmul=0.75, attention_forward=0.62, attention_backward=0.5)

_MEMORY_SHARE = 0.83
"""Of a memory's rate, what a step's kernels attain: 4,000 of an H200's 4,800 GB/s."""
MIXED_SHARE = 0.91
"""The same of what one large sum attains, which `--calibrate` times: 3,060 of an H100's 3,350 GB/s."""
_PCIE_SHARE = 0.87
"""Of PCIe, what copies of pinned memory attain: 55 of 63 GB/s in one direction."""
_LINK_SHARE = 0.45
"""Of NVLink's one direction, what NCCL's collectives attain beside kernels: 140 to 300 of 450 GB/s."""
LINK_OF_A_COPY = 0.52
"""Of one large copy between two GPUs, what collectives attain beside a step's kernels."""
_NETWORK_SHARE = 0.8
"""Of the network's rate; not measured."""


@dataclass(frozen=True)
class Card:
    """A kind of GPU.

    Attributes:
        key: What people type.
        pattern: Of the name by which torch knows it.
        name: Such a name, by which `launch/flops.py` knows its peak.
        memory_gib: Total as the driver says it, which is less than the datasheet's.
        memory_gb_s: By the datasheet.
        host_gb_s: One direction: PCIe x16 has 31.5 GB/s (4.0) and 63 (5.0).
        link_gb_s: One direction, to the other GPUs of a node: NVLink, else PCIe.
        network_gb_s: One direction, a GPU's part of the usual network of such nodes.
        shares: Of peaks, what is attained.
    """

    key: str
    pattern: str
    name: str
    memory_gib: float
    memory_gb_s: float
    host_gb_s: float
    link_gb_s: float
    network_gb_s: float
    shares: Shares

    @property
    def peak_tflops(self) -> float:
        """Dense, bf16."""
        peak = peak_tflops(self.name, "bf16")
        assert peak is not None, self.name
        return peak


# Rates from the datasheets of these names on nvidia.com (GeForce: the Ampere, Ada and Blackwell whitepapers).
# Memory as torch has reported it in its "out of memory" messages, rounded down: ECC and the driver take some.
# The first pattern that is found in a name counts, so the special ones stand first.
CARDS: tuple[Card, ...] = (
    Card("b200", r"B200", "NVIDIA B200", 178.3, 8000, 63, 900, 50, _BLACKWELL),
    # 480 GB of LPDDR5X beside 96 GB of HBM3, NVLink-C2C at 450 GB/s in each direction.
    Card("gh200", r"GH200", "NVIDIA GH200 480GB", 94.5, 4000, 450, 450, 50, _HOPPER),
    Card("h200", r"H200", "NVIDIA H200", 139.8, 4800, 63, 450, 50, _HOPPER),
    Card("h100-pcie", r"H100 PCIe", "NVIDIA H100 PCIe", 79.1, 2000, 63, 63, 25, _HOPPER),
    Card("h100-nvl", r"H100 NVL", "NVIDIA H100 NVL", 93.0, 3900, 63, 63, 25, _HOPPER),
    Card("h100-80g", r"H[18]00", "NVIDIA H100 80GB HBM3", 79.1, 3350, 63, 450, 50, _HOPPER),
    Card("a100-80g-pcie", r"A100 80GB PCIe", "NVIDIA A100 80GB PCIe", 79.1, 1935, 31.5, 31.5, 12.5, _AMPERE),
    Card("a100-80g", r"A[18]00.*80GB", "NVIDIA A100-SXM4-80GB", 79.1, 2039, 31.5, 300, 25, _AMPERE),
    Card("a100-40g", r"A100", "NVIDIA A100-SXM4-40GB", 39.3, 1555, 31.5, 300, 25, _AMPERE),
    Card("l40s", r"L40S", "NVIDIA L40S", 44.3, 864, 31.5, 31.5, 12.5, _AMPERE),
    Card("l4", r"L4", "NVIDIA L4", 22.0, 300, 31.5, 31.5, 12.5, _AMPERE),
    Card("a10", r"A10", "NVIDIA A10", 22.0, 600, 31.5, 31.5, 12.5, _AMPERE),
    Card("rtx-a6000", r"RTX A6000", "NVIDIA RTX A6000", 47.4, 768, 31.5, 31.5, 12.5, _AMPERE),
    Card("rtx-5090", r"RTX 5090$", "NVIDIA GeForce RTX 5090", 31.3, 1792, 63, 63, 12.5, _AMPERE),
    Card("rtx-4090", r"RTX 4090$", "NVIDIA GeForce RTX 4090", 23.5, 1008, 31.5, 31.5, 12.5, _AMPERE),
    Card("rtx-3090", r"RTX 3090$", "NVIDIA GeForce RTX 3090", 23.6, 936, 31.5, 31.5, 12.5, _AMPERE),
)


def card_of(device_name: str) -> Card | None:
    """The card of a name as torch says it, if it is known; a slice of one (MIG) is not."""
    if re.search(r"\bMIG\b", device_name):
        return None
    for card in CARDS:
        if re.search(rf"\b(?:{card.pattern})(?![0-9A-Za-z])", device_name):
            return card
    return None


def attained(card: Card) -> dict[str, float]:
    """The rates of a plan's `Gpu`, by its attributes' names."""
    peak, shares = card.peak_tflops, card.shares
    return {
        "matmul_tflops": peak * shares.matmul,
        "attention_forward_tflops": peak * shares.attention_forward,
        "attention_backward_tflops": peak * shares.attention_backward,
        "memory_gb_s": card.memory_gb_s * _MEMORY_SHARE,
        "host_gb_s": card.host_gb_s * _PCIE_SHARE,
        "link_gb_s": card.link_gb_s * (_LINK_SHARE if card.link_gb_s > card.host_gb_s else _PCIE_SHARE),
        "flash_share": shares.flash,
        "network_gb_s": card.network_gb_s * _NETWORK_SHARE,
    }
