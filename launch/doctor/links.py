"""How fast the GPUs of a machine reach each other: measured, pair by pair."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from statistics import median

from .findings import Finding, ok, warning
from .gpu import nvidia_smi

COPIED_BYTES = 256 << 20
NVLINK_AT_LEAST_GB_S = 20.0
"""One link of the oldest generation in use carries as much one way; PCIe 3 x16 carries less."""


@dataclass(frozen=True)
class Links:
    """How GPUs of one machine reach each other.

    Attributes:
        reach: For each pair, whether one reads the other's memory without the host.
        gb_s: For each pair, what a copy attained.
        kinds: nvidia-smi's word for each pair, such as NV18 (NVLink) or SYS (through the
            CPUs), if it is there.
    """

    reach: dict[tuple[int, int], bool]
    gb_s: dict[tuple[int, int], float]
    kinds: dict[tuple[int, int], str] = field(default_factory=dict)


def read_links(count: int) -> Links:
    """Asks, and copies 256 MiB, between every pair."""
    import torch

    pairs = [(one, other) for one in range(count) for other in range(one + 1, count)]
    reach = {
        (one, other): torch.cuda.can_device_access_peer(one, other)
        and torch.cuda.can_device_access_peer(other, one)
        for one, other in pairs
    }
    rates = {pair: _copy_gb_s(*pair) for pair in pairs}
    torch.cuda.empty_cache()
    # nvidia-smi counts all GPUs, torch those that are visible.
    all_visible = "CUDA_VISIBLE_DEVICES" not in os.environ
    return Links(reach, rates, _topology(nvidia_smi("topo", "-m")) if all_visible else {})


def _copy_gb_s(one: int, other: int) -> float:
    import torch

    try:
        source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=f"cuda:{one}")
        target = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=f"cuda:{other}")
    except torch.OutOfMemoryError:
        return 0.0
    target.copy_(source)  # the first opens the way
    torch.cuda.synchronize(one)
    torch.cuda.synchronize(other)
    with torch.cuda.device(one):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(3):
            target.copy_(source)
        end.record()
        end.synchronize()
    return 3 * COPIED_BYTES / 1e9 / (begin.elapsed_time(end) / 1e3)


def _topology(text: str | None) -> dict[tuple[int, int], str]:
    """The pairs in the matrix that `nvidia-smi topo -m` prints."""
    # Headings are underlined by escape codes on some versions.
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line).split() for line in (text or "").splitlines()]
    heads = next((line for line in lines if line and line[0] == "GPU0" and "GPU0" not in line[1:]), [])
    columns = [name for name in heads if re.fullmatch(r"GPU\d+", name)]
    found = {}
    for line in lines:
        if line and line is not heads and re.fullmatch(r"GPU\d+", line[0]):
            row = int(line[0][3:])
            for name, kind in zip(columns, line[1:], strict=False):
                if int(name[3:]) > row:
                    found[row, int(name[3:])] = kind
    return found


def check_links(facts: Links) -> list[Finding]:
    """What is wrong with pairs of GPUs; one line where all of them are fine."""
    if not facts.reach:
        return []
    apart = [pair for pair, reached in facts.reach.items() if not reached]
    findings = []
    if apart:
        findings.append(
            warning(
                f"{len(apart)} of {len(facts.reach)} pairs of GPUs do not reach each other's memory "
                f"({_pairs(apart)}): what they exchange goes through the host",
                "Between GPUs without NVLink, IOMMU or PCIe ACS in the BIOS most often forbid it; sharing a "
                "sequence (parallel.ulysses_degree) will be slow.",
            )
        )
    rates = {pair: rate for pair, rate in facts.gb_s.items() if rate > 0}
    usual = median(rates.values()) if rates else 0.0
    slow = [pair for pair, rate in rates.items() if rate < usual / 2]
    if slow:
        findings.append(
            warning(
                f"GPUs {_pairs(slow)} exchange {min(rates[pair] for pair in slow):.0f} GB/s, where others "
                f"attain {usual:.0f} GB/s",
                "A link is down or shared (nvidia-smi nvlink --status); leave these GPUs out by "
                "CUDA_VISIBLE_DEVICES, or report the machine.",
            )
        )
    linked = [pair for pair, kind in facts.kinds.items() if kind.startswith("NV") and pair in rates]
    idle = [pair for pair in linked if rates[pair] < NVLINK_AT_LEAST_GB_S]
    if idle and not slow:
        findings.append(
            warning(
                f"GPUs {_pairs(idle)} have NVLink but exchange {min(rates[pair] for pair in idle):.0f} GB/s",
                "It is not used: look at nvidia-smi nvlink --status and at whether the Fabric Manager runs "
                "(systemctl status nvidia-fabricmanager).",
            )
        )
    if not findings:
        kinds = sorted(set(facts.kinds.values()))
        kind = f" ({', '.join(kinds)})" if kinds else ""
        span = f"{min(rates.values()):.0f} to {max(rates.values()):.0f} GB/s" if rates else "no rate measured"
        many = f"all {len(facts.reach)} pairs of GPUs reach" if len(facts.reach) > 1 else "both GPUs reach"
        findings.append(ok(f"{many} each other's memory{kind}: {span} one way"))
    return findings


def _pairs(pairs: list[tuple[int, int]]) -> str:
    shown = ", ".join(f"{one}-{other}" for one, other in pairs[:4])
    return f"{shown} and more" if len(pairs) > 4 else shown
