"""The driver, torch's build for it, and each GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from ..sizes import size_text
from .findings import Finding, error, ok, warning

OWN_BYTES = 2 << 30
"""That much of a GPU may be taken by contexts and a desktop before it is worth a word."""
SMI_S = 10.0
"""Longer than this the driver itself hangs."""
DRIVER_OF_CUDA = {13: 580, 12: 525, 11: 450}
"""First driver that runs any build of a CUDA generation (NVIDIA's CUDA compatibility guide)."""


@dataclass(frozen=True)
class GpuFacts:
    """One GPU, as torch sees it.

    Attributes:
        name: Of the card.
        capability: Major and minor.
        total_bytes: Its memory.
        free_bytes: Of it, now.
        others: What other processes have there, `pid name 12.3 GiB`, as far as nvidia-smi tells.
        slowed: Whether heat or power makes it run slower at this moment.
    """

    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int
    others: tuple[str, ...] = ()
    slowed: bool = False


@dataclass(frozen=True)
class Cuda:
    """Facts.

    Attributes:
        driver: Version of NVIDIA's driver; None without one.
        torch: Version of torch.
        built_for: The CUDA that torch was built for; None for a build without.
        hip: Set for a build for AMD's GPUs.
        visible: CUDA_VISIBLE_DEVICES, where it is set.
        failure: What torch said when CUDA was started; None where it did start.
        architectures: That torch has code for, such as `sm_90`.
        gpus: Those that torch sees.
    """

    driver: str | None
    torch: str
    built_for: str | None
    hip: str | None = None
    visible: str | None = None
    failure: str | None = None
    architectures: tuple[str, ...] = ()
    gpus: tuple[GpuFacts, ...] = ()


def nvidia_smi(*words: str) -> str | None:
    """What nvidia-smi prints; None where it is not there, fails or hangs."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        done = subprocess.run(
            ["nvidia-smi", *words], capture_output=True, text=True, timeout=SMI_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def read_cuda() -> Cuda:
    """The facts of this machine."""
    import torch

    facts = Cuda(
        driver=_driver(),
        torch=torch.__version__,
        built_for=torch.version.cuda,
        hip=torch.version.hip,
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )
    if facts.built_for is None or facts.driver is None:
        return facts
    try:
        torch.cuda.init()
        gpus = _gpus(torch.cuda.device_count())
    except (RuntimeError, AssertionError) as failure:
        first_line = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
        return replace(facts, failure=first_line)
    return replace(facts, architectures=tuple(torch.cuda.get_arch_list()), gpus=gpus)


def _driver() -> str | None:
    queried = nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    if queried and queried.strip():
        return queried.strip().splitlines()[0].strip()
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"Module(?: for \S+)?\s+(\d+\.[\d.]+)", text)
    return found[1] if found else "unknown"


def _gpus(count: int) -> tuple[GpuFacts, ...]:
    import torch

    others, slowed = _processes(), _slowed()
    found = []
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        uuid = str(properties.uuid).removeprefix("GPU-")
        found.append(
            GpuFacts(
                properties.name,
                (properties.major, properties.minor),
                total,
                free,
                tuple(others.get(uuid, ())),
                uuid in slowed,
            )
        )
    return tuple(found)


def _processes() -> dict[str, list[str]]:
    """What other processes have, by the UUID of the GPU: its index is another under CUDA_VISIBLE_DEVICES."""
    queried = nvidia_smi(
        "--query-compute-apps=gpu_uuid,pid,process_name,used_memory", "--format=csv,noheader,nounits"
    )
    found: dict[str, list[str]] = {}
    for line in (queried or "").splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != 4 or parts[1] == str(os.getpid()):
            continue
        uuid, pid, name, mib = parts
        size = size_text(int(mib) << 20) if mib.isdigit() else "unknown memory"
        found.setdefault(uuid.removeprefix("GPU-"), []).append(f"process {pid} ({Path(name).name}) {size}")
    return found


def _slowed() -> set[str]:
    """UUIDs of GPUs that heat or the power supply slows down."""
    # Drivers before 535 know the older name alone.
    for reasons in ("clocks_event_reasons", "clocks_throttle_reasons"):
        asked = f"--query-gpu=uuid,{reasons}.hw_slowdown,{reasons}.sw_thermal_slowdown"
        queried = nvidia_smi(asked, "--format=csv,noheader")
        if queried is not None:
            break
    lines = [[part.strip() for part in line.split(",")] for line in (queried or "").splitlines()]
    return {parts[0].removeprefix("GPU-") for parts in lines if "Active" in parts[1:]}


def check_cuda(facts: Cuda, precision: str = "bf16") -> list[Finding]:
    """Driver and build first: where they do not fit, there is no GPU to look at."""
    if facts.hip is not None:
        return [
            warning(
                f"torch {facts.torch} is built for AMD's GPUs (HIP {facts.hip})",
                "longseq is tried on NVIDIA's alone; run `longseq verify CONFIG` before you trust it.",
            )
        ]
    if facts.driver is None:
        build = "without CUDA" if facts.built_for is None else f"for CUDA {facts.built_for}"
        return [
            warning(
                f"no NVIDIA driver, torch {facts.torch} ({build}): runs go on the CPU",
                "That is for small runs. On a machine with GPUs install the driver; in a container start it "
                "with --gpus all.",
            )
        ]
    if facts.built_for is None:
        return [
            error(
                f"driver {facts.driver} is there, but torch {facts.torch} is built without CUDA",
                f"Run pip install --force-reinstall torch --index-url {_index(facts.driver)}.",
            )
        ]
    if facts.failure is not None or not facts.gpus:
        return [_not_started(facts)]
    driver = ok(f"driver {facts.driver}, torch {facts.torch} for CUDA {facts.built_for}")
    return [driver, *_check_gpus(facts, precision)]


def _index(driver: str) -> str:
    """Where pip finds a torch for a driver."""
    new = _major(driver) is None or _major(driver) >= DRIVER_OF_CUDA[13]
    return f"https://download.pytorch.org/whl/{'cu130' if new else 'cu126'}"


def _major(version: str) -> int | None:
    head = version.partition(".")[0]
    return int(head) if head.isdigit() else None


def _not_started(facts: Cuda) -> Finding:
    said = f": {facts.failure}" if facts.failure else ""
    if facts.visible is not None and facts.visible.strip() in ("", "-1"):
        return warning(
            f"CUDA_VISIBLE_DEVICES={facts.visible!r} hides every GPU: runs go on the CPU",
            "Unset it to use them.",
        )
    driver = _major(facts.driver or "")
    needed = DRIVER_OF_CUDA.get(_major(facts.built_for or "") or 0)
    if driver is not None and needed is not None and driver < needed:
        return error(
            f"driver {facts.driver} is too old for torch {facts.torch}, built for CUDA {facts.built_for}"
            f"{said}",
            f"Install driver {needed} or newer, or run pip install --force-reinstall torch --index-url "
            f"{_index(facts.driver or '')}.",
        )
    where = "" if facts.visible is None else f" Look at CUDA_VISIBLE_DEVICES={facts.visible} first."
    return error(
        f"driver {facts.driver} is there, but torch {facts.torch} sees no GPU{said}",
        f"Does nvidia-smi list them?{where} In a container, start it with --gpus all; after an update of the "
        "driver, start the machine anew.",
    )


def _check_gpus(facts: Cuda, precision: str) -> list[Finding]:
    findings = []
    for index, gpu in enumerate(facts.gpus):
        findings += _check_gpu(index, gpu, facts, precision)
    kinds = {(gpu.name, gpu.total_bytes >> 30) for gpu in facts.gpus}
    if len(kinds) > 1:
        names = ", ".join(sorted({f"{name} ({size} GiB)" for name, size in kinds}))
        findings.append(
            warning(
                f"the GPUs are not alike: {names}",
                "The slowest and the smallest decide for all; choose equal ones by CUDA_VISIBLE_DEVICES.",
            )
        )
    return findings


def _check_gpu(index: int, gpu: GpuFacts, facts: Cuda, precision: str) -> list[Finding]:
    major, minor = gpu.capability
    bf16 = "bf16" if major >= 8 else "no bf16"
    total = size_text(gpu.total_bytes)
    line = f"GPU {index}: {gpu.name}, {total}, compute capability {major}.{minor}, {bf16}"
    findings = []
    if not _has_code_for(gpu.capability, facts.architectures):
        findings.append(
            error(
                f"{line}: torch {facts.torch} has no code for it ({', '.join(facts.architectures)})",
                f"Install a torch that has: {_index(facts.driver or '')} or a nightly for a new GPU, an "
                "older torch for an old one.",
            )
        )
    if major < 8:
        advice = "The attention kernels for long sequences need an Ampere GPU or newer; use a newer GPU"
        advice += ", or train.precision=float32 for small runs." if precision == "bf16" else "."
        findings.append(warning(line, advice))
    taken = gpu.total_bytes - gpu.free_bytes
    if taken > OWN_BYTES:
        who = ", ".join(gpu.others) or "nvidia-smi does not say by whom: another container, or a dead process"
        findings.append(
            warning(
                f"GPU {index}: {size_text(taken)} of {total} are taken by others ({who})",
                "End them, or choose free GPUs by CUDA_VISIBLE_DEVICES.",
            )
        )
    if gpu.slowed:
        findings.append(
            warning(
                f"GPU {index} is slowed down by heat or its power supply at this moment",
                "Look at `nvidia-smi -q -d PERFORMANCE,TEMPERATURE`: cooling and power cables.",
            )
        )
    return findings or [ok(f"{line}, {size_text(gpu.free_bytes)} free")]


def _has_code_for(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Whether a build runs on a GPU: machine code of its generation and not above it, or code (compute_)
    that the driver translates."""
    major, minor = capability
    for name in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+?)(\d)[af]?", name)
        if found is None:
            continue
        theirs = int(found[2]), int(found[3])
        if found[1] == "compute" and theirs <= capability:
            return True
        if found[1] == "sm" and theirs[0] == major and theirs[1] <= minor:
            return True
    return not architectures
