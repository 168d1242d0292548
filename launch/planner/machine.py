"""The machine that a plan is for: one kind of GPU, how many, and the memory of their hosts."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .catalogue import CARDS, CONTEXT_BYTES, MEASURED, attained, card_of

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

GPUS_A_NODE = 8
HOST_BYTES_A_GPU = 128 * 2**30
"""Of a machine that is only named, unless it is said."""
HOST_SHARE = 0.85
"""Of the host's memory, what a run is planned with: the system, the data and other programs have the rest."""
GPU_LIMIT, HOST_LIMIT = "LONGSEQ_GPU_BYTES", "LONGSEQ_HOST_BYTES"
"""Variables of the environment: what this machine is taken to have at most, of each GPU and of the host."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, as far as a plan needs it. Rates are what large calls attain, not a datasheet's peaks.

    Attributes:
        name: As torch says it, or the catalogue's.
        memory_bytes: Total, as the driver says it.
        context_bytes: Of it, what CUDA and its libraries take outside of torch's allocator.
        matmul_tflops: Of products in bf16 with float32 sums.
        attention_forward_tflops: Of causal attention, its half of the square counted alone.
        attention_backward_tflops: The same, backward.
        memory_gb_s: Its own memory, reading and writing together.
        host_gb_s: Between pinned host memory and the GPU, one direction.
        link_gb_s: To the other GPUs of its node, what one sends at once.
        network_gb_s: To GPUs of other nodes.
        flash_share: Of attention's rates, what flash-attention 2 attains, which packed documents, windows and
            wide heads take where no flash-attn package is installed.
        rates: Where the rates come from, in words.
    """

    name: str
    memory_bytes: int
    context_bytes: int
    matmul_tflops: float
    attention_forward_tflops: float
    attention_backward_tflops: float
    memory_gb_s: float
    host_gb_s: float
    link_gb_s: float
    network_gb_s: float
    flash_share: float = 1.0
    rates: str = "given"


@dataclass(frozen=True)
class Machine:
    """What a run is given.

    Attributes:
        gpu: Of which all are.
        num_gpus: Over all nodes, one process each.
        gpus_per_node: As many share a host's memory.
        host_bytes: Of each node, for all its processes together.
    """

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int
    host_bytes: int


def named_machine(
    gpu: str, num_gpus: int, host_bytes: int | None = None, gpus_per_node: int | None = None
) -> Machine:
    """A machine that need not be there.

    Args:
        gpu: A key of the catalogue (`h100-80g`), or a name as torch says it.
        num_gpus: In all.
        host_bytes: Memory of each node; None counts 128 GiB for each of its GPUs. Of either a run is
            planned with 85 %.
        gpus_per_node: None is 8, or all where they are fewer.

    Raises:
        ValueError: No such GPU (the message lists them), or GPUs that do not fill their nodes.
    """
    card = next((card for card in CARDS if card.key == gpu.lower()), None) or card_of(gpu)
    if card is None:
        raise ValueError(_unknown(gpu))
    if num_gpus < 1:
        raise ValueError(f"num_gpus={num_gpus} must be 1 or above.")
    per_node = gpus_per_node or min(num_gpus, GPUS_A_NODE)
    if num_gpus % per_node and num_gpus > per_node:
        raise ValueError(
            f"{num_gpus} GPUs do not fill nodes of {per_node}; use {num_gpus - num_gpus % per_node} or "
            f"{num_gpus + -num_gpus % per_node}, or say how many a node has."
        )
    per_node = min(per_node, num_gpus)
    whole = HOST_BYTES_A_GPU * per_node if host_bytes is None else host_bytes
    found = Gpu(
        card.key,
        int(card.memory_gib * 2**30),
        CONTEXT_BYTES,
        **attained(card),
        rates=_origin(card.key),
    )
    return Machine(found, num_gpus, per_node, int(whole * HOST_SHARE))


def this_machine(num_gpus: int) -> Machine | None:
    """The machine that this process is on; None where it has no GPU.

    Everything in it is the same for all ranks of a run, whenever each asks: the GPU's and the host's whole
    memory, not what is free of it at the moment, which other ranks change while they start.

    Args:
        num_gpus: Of the run, over all nodes.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    per_node = min(int(local) if local else torch.cuda.device_count(), num_gpus)
    gpu_bytes = _limited(properties.total_memory, GPU_LIMIT)
    found = gpu_of(properties.name, gpu_bytes, properties.multi_processor_count)
    return Machine(found, num_gpus, per_node, int(_limited(host_limit_bytes(), HOST_LIMIT) * HOST_SHARE))


@contextmanager
def taken_to_have(gpu_bytes: int | None, host_bytes: int | None) -> Iterator[None]:
    """Have this process's machine be planned with less than it has; None leaves what there is.

    Args:
        gpu_bytes: Of each GPU, CUDA's context included.
        host_bytes: Of each node.
    """
    given = {GPU_LIMIT: gpu_bytes, HOST_LIMIT: host_bytes}
    earlier = {name: os.environ.get(name) for name in given}
    os.environ.update({name: str(size) for name, size in given.items() if size is not None})
    try:
        yield
    finally:
        for name, value in earlier.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _limited(num_bytes: int, variable: str) -> int:
    limit = os.environ.get(variable)
    return num_bytes if limit is None else min(num_bytes, int(limit))


def gpu_of(
    name: str, memory_bytes: int, num_multiprocessors: int | None = None, *, calibrated: bool = True
) -> Gpu:
    """A GPU by the name and memory that its driver says, with rates as they were measured, else scaled.

    Args:
        name: Of the device.
        memory_bytes: Total.
        num_multiprocessors: By which rates are guessed for a GPU that nobody has written down.
        calibrated: Take what `--calibrate` has found here.
    """
    from .calibrate import kept

    measured = kept(name) if calibrated else None
    card = card_of(name)
    if card is not None:
        rates, origin = attained(card), _origin(card.key)
    else:
        rates, origin = _guessed(num_multiprocessors)
        if measured is None:
            logger.warning(
                "%s is not in the catalogue of GPUs: its rates are guessed, and with them every second of a "
                "plan (memory is not). Measure them with: longseq plan CONFIG --calibrate",
                name,
            )
    found = Gpu(name, memory_bytes, CONTEXT_BYTES, **rates, rates=origin)
    return found if measured is None else replace(found, **_of_gpu(measured))


def outside_bytes(device: torch.device | None = None) -> int:
    """What a GPU, the current one if none is named, has in use outside of this process's torch allocator.

    CUDA's context, kernels and communicators, and all that other programs hold.
    """
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def host_limit_bytes(
    membership: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> int:
    """Host memory that this machine or container has, used or not.

    Args:
        membership: Names this process's control groups, of version 1 or 2.
        mount: Where they are.
    """
    import psutil

    limits = [psutil.virtual_memory().total]
    for line in (_read(membership) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = mount / "memory" if controllers else mount
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        group = root / path.strip("/")
        # Limits nest; in a container the path may be the host's, and then the groups above it tell.
        for folder in (group, *group.parents):
            limit = _read(folder / name) if folder == root or root in folder.parents else None
            if limit is not None and limit.strip() != "max":
                limits.append(int(limit))
    return min(limits)


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:  # not Linux, not this version, or not for us to read
        return None


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgtKMGT]?)(?:i?[bB])?")
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(text: str) -> int:
    """Memory as people type it: `512G` and `512GiB` are 512 x 2**30 bytes, `1.9T` 1.9 x 2**40.

    Raises:
        ValueError: It is no size, or none above 0.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise ValueError(f"{text!r} is no size of memory; write one such as 512G or 1.9T.")
    return int(float(found[1]) * 1024 ** _POWERS[found[2].lower()])


def _of_gpu(measured: dict[str, Any]) -> dict[str, Any]:
    return {
        **{name: value for name, value in measured["gpu"].items() if value is not None},
        "rates": f"measured here on {measured['date']}",
    }


def _origin(key: str) -> str:
    if key in MEASURED:
        return "measured on GPUs of this kind"
    return "its datasheet's, by the shares that others attain of theirs; not measured"


def _guessed(num_multiprocessors: int | None) -> tuple[dict[str, float], str]:
    """Those of an A100, which has 108 multiprocessors, by their number."""
    model = next(card for card in CARDS if card.key == "a100-40g")
    share = (num_multiprocessors or 108) / 108
    compute = ("matmul_tflops", "attention_forward_tflops", "attention_backward_tflops", "memory_gb_s")
    rates = {name: rate * share if name in compute else rate for name, rate in attained(model).items()}
    rates["link_gb_s"] = rates["host_gb_s"]
    return rates, "guessed by the number of multiprocessors; not measured"


def _unknown(gpu: str) -> str:
    keys = [card.key for card in CARDS]
    near = get_close_matches(gpu.lower(), keys, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    return f"{gpu} is no GPU of the catalogue; {guess}use one of {', '.join(keys)}."
