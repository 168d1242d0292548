"""Which layers' checkpoints stay on the GPU, which wait in host memory, and which are rebuilt.

Pure but for `available_host_bytes`: every rank that is given the same numbers decides alike.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

Where = Literal["gpu", "host", "rebuild"]


@dataclass(frozen=True)
class Placement:
    """Where each decoder layer's input waits for its backward.

    Attributes:
        gpu_layers: Of the last `gpu_layers` layers, the inputs that are kept stay on the GPU: backward wants
            them first, so a trip to the host would pay least there.
        every: Only layers 0, `every`, 2 x `every`, ... keep their input; those between are rebuilt in
            backward by running forward again from the nearest kept one below.
        host: Inputs kept below the last `gpu_layers` wait in host memory; False keeps all on the GPU.
    """

    gpu_layers: int = 1
    every: int = 1
    host: bool = True

    def __post_init__(self) -> None:
        _require_int("gpu_layers", self.gpu_layers, 0)
        _require_int("every", self.every, 1)
        if not isinstance(self.host, bool):
            raise ValueError(f"host={self.host!r} must be True or False.")

    def where(self, layer_index: int, num_layers: int) -> Where:
        """Where the input of layer `layer_index` (from 0) of `num_layers` waits.

        Raises:
            ValueError: There is no such layer.
        """
        if not 0 <= layer_index < num_layers:
            raise ValueError(f"layer_index={layer_index} is none of 0 to {num_layers - 1}.")
        return self.place(layer_index, num_layers) if self.is_kept(layer_index) else "rebuild"

    def is_kept(self, layer_index: int) -> bool:
        """Whether that layer keeps its input, and is not rebuilt."""
        return layer_index % self.every == 0

    def place(self, layer_index: int, num_layers: int) -> Literal["gpu", "host"]:
        """Where that layer's input would wait, were it kept."""
        return "gpu" if not self.host or layer_index >= num_layers - self.gpu_layers else "host"

    def count(self, where: Where, num_layers: int) -> int:
        """How many of `num_layers` layers have their input there."""
        return sum(self.where(index, num_layers) == where for index in range(num_layers))


def parse_placement(value: str | Placement) -> Placement | Literal["auto"] | None:
    """What a user's `checkpoints=` means.

    Args:
        value: "auto" (chosen from the memory there is), "none" (no checkpoints), "gpu" (every layer's input
            on the GPU), "host" (all but the last layer's in host memory), or a `Placement`.

    Returns:
        A `Placement`; "auto" where `choose_placement` has to decide; None for "none".

    Raises:
        ValueError: Anything else.
    """
    if isinstance(value, Placement):
        return value
    if value == "auto":
        return "auto"
    if value == "none":
        return None
    if value == "gpu":
        return Placement(gpu_layers=0, host=False)
    if value == "host":
        return Placement(gpu_layers=1)
    raise ValueError(
        f'checkpoints={value!r} must be "auto", "none", "gpu", "host" or a Placement('
        "gpu_layers=..., every=..., host=...)."
    )


def choose_placement(
    num_layers: int,
    bytes_per_layer: int,
    gpu_bytes: int,
    host_bytes: int,
    *,
    attention_bytes_per_layer: int = 0,
) -> Placement:
    """The placement that rebuilds least and then copies least, of those that fit.

    All on the GPU if that fits. Else as many of the last layers as fit stay there, one at least, and the
    rest waits in host memory. If host memory is too small for that, only each k-th input is kept, with the
    smallest k that fits: keeping fewer costs (k-1)/k of a forward more, so k is no larger than it must be.

    Args:
        num_layers: Decoder layers.
        bytes_per_layer: Of one layer's input, (S, D).
        gpu_bytes: GPU memory free for checkpoints, beside what one layer's forward and backward take (the
            buffer that a checkpoint comes back into is part of those).
        host_bytes: Host memory that this process may pin (`available_host_bytes`). Ranks that must agree
            take the least of theirs, each asked before any has begun to pin.
        attention_bytes_per_layer: Kept beside each kept input: attention's output and log-sum-exp.

    Raises:
        ValueError: Nothing fits, or a number that cannot be.
    """
    _require_int("num_layers", num_layers, 1)
    _require_int("bytes_per_layer", bytes_per_layer, 0)
    _require_int("attention_bytes_per_layer", attention_bytes_per_layer, 0)
    kept_bytes = bytes_per_layer + attention_bytes_per_layer
    for every in range(1, num_layers + 1):
        num_kept = -(-num_layers // every)
        # Backward holds all rebuilt inputs of a segment at once.
        room = gpu_bytes - (every - 1) * bytes_per_layer
        if room < 0:
            break
        on_gpu = num_kept if kept_bytes == 0 else min(num_kept, room // kept_bytes)
        if on_gpu == num_kept:
            return Placement(gpu_layers=num_layers, every=every, host=False)
        if on_gpu > 0 and (num_kept - on_gpu) * kept_bytes <= host_bytes:
            return Placement(gpu_layers=on_gpu * every, every=every)
    raise ValueError(
        f"The checkpoints of {num_layers} layers, {gib(kept_bytes)} each ({gib(bytes_per_layer)} of input, "
        f"{gib(attention_bytes_per_layer)} of attention), fit neither {gib(gpu_bytes)} of GPU memory and "
        f"{gib(host_bytes)} of host memory, nor do those of every k-th layer for any k; at least one must "
        "fit the GPU. Use fewer tokens a GPU (a larger Ulysses degree, a shorter sequence), "
        "save_attention=False, or a machine with more host memory for each GPU."
    )


def available_host_bytes(share: float = 0.85) -> int:
    """Host memory that this process may pin: its share of what is free, for other ranks need theirs.

    Args:
        share: Of the free memory; the rest is left to the system, the page cache and the data loader.

    Returns:
        Bytes: free memory within the machine's and the container's limits, times `share`, over the
        processes of this machine (`local_world_size`). Wrong once a rank has begun to pin.

    Raises:
        ValueError: `share` not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must be above 0 and at most 1.")
    return int(free_host_bytes() * share) // local_world_size()


def free_host_bytes() -> int:
    """Host memory free to the whole machine or container: psutil's `available` within the cgroup limits."""
    free = [
        psutil.virtual_memory().available,
        *_cgroup_free(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")),
    ]
    return max(0, min(free))


def local_world_size() -> int:
    """Processes of this job on this machine, 1 unless a launcher says otherwise: torchrun, or DeepSpeed's."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1))


def gib(num_bytes: int) -> str:
    """Bytes for a message."""
    return f"{num_bytes / 2**30:.2f} GiB" if abs(num_bytes) >= 2**24 else f"{num_bytes:,} bytes"


_CGROUP_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _cgroup_free(membership: Path, mount: Path) -> list[int]:
    """Free bytes under each memory limit of this process's control groups, versions 1 and 2.

    Limits nest: a group's own may be wide and its parent's tight. In a container the path named in
    `membership` may be the host's and not exist here; then the groups above it, up to `mount`, tell.
    """
    free = []
    for line in (_read(membership) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = mount, _CGROUP_FILES[2]
        elif "memory" in controllers.split(","):
            root, names = mount / "memory", _CGROUP_FILES[1]
        else:
            continue
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            if folder == root or root in folder.parents:
                free.extend(_free_in_group(folder, *names))
    return free


def _free_in_group(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> list[int]:
    """Limit less usage, in a list that is empty without a limit; file cache that can go is not usage."""
    limit, usage = _read(folder / limit_name), _read(folder / usage_name)
    if limit is None or usage is None or limit.strip() == "max":
        return []
    cache = 0
    for line in (_read(folder / "memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name == cache_name:
            cache = int(value)
    return [int(limit) - max(0, int(usage) - cache)]


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:  # not Linux, not this version, or not for us to read
        return None


def _require_int(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}.")
