"""Which layers' checkpoints stay on the GPU, which wait in host memory, and which are rebuilt.

Pure but for `available_host_bytes`: every rank that is given the same numbers decides alike.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import psutil

from .segments import fewest_waiting, kept_layers, rebuilt_on_host

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
            Rebuilt ones wait where inputs of layers whose backward is over have left room on the host, or
            else on the GPU.
        kept: In the place of `every`, the layers that keep their input, from layer 0 upward (`kept_layers`).
    """

    gpu_layers: int = 1
    every: int = 1
    host: bool = True
    kept: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _require_int("gpu_layers", self.gpu_layers, 0)
        _require_int("every", self.every, 1)
        if not isinstance(self.host, bool):
            raise ValueError(f"host={self.host!r} must be True or False.")
        if self.kept is not None:
            self._check_kept()

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
        return layer_index % self.every == 0 if self.kept is None else layer_index in self.kept

    @property
    def rebuilds(self) -> bool:
        """Whether it may be that not every layer keeps its input."""
        return self.every > 1 or self.kept is not None

    def place(self, layer_index: int, num_layers: int) -> Literal["gpu", "host"]:
        """Where that layer's input would wait, were it kept."""
        return "gpu" if not self.host or layer_index >= num_layers - self.gpu_layers else "host"

    def all_places(self, num_layers: int) -> tuple[Where, ...]:
        """`where` of each layer.

        Raises:
            ValueError: A layer of `kept` is not there.
        """
        return _all_places(self, num_layers)

    def count(self, where: Where, num_layers: int) -> int:
        """How many of `num_layers` layers have their input there."""
        return self.all_places(num_layers).count(where)

    def waits(self, num_layers: int) -> tuple[Literal["gpu", "host"], ...]:
        """Where each layer's input is before its backward, rebuilt ones too."""
        return _waits(self, num_layers)

    def rebuilt_beside(self, num_layers: int) -> tuple[int, ...]:
        """Of each layer's backward: rebuilt inputs on the GPU that wait for the backwards below it."""
        return _rebuilt_beside(self, num_layers)

    def freed_inputs(self, layer_index: int, num_layers: int) -> int:
        """How many inputs fewer than after forward wait on the GPU when that layer's backward runs."""
        above = self.all_places(num_layers)[layer_index + 1 :].count("gpu")
        return above - self.rebuilt_beside(num_layers)[layer_index]

    def check_layers(self, num_layers: int) -> None:
        """Raise a ValueError where a layer of `kept` is none of the model's."""
        if self.kept is not None and self.kept[-1] >= num_layers:
            raise ValueError(
                f"kept={self.kept} names layer {self.kept[-1]}, and the model has {num_layers}, from 0 to "
                f"{num_layers - 1}; kept_layers({num_layers}, ...) names layers that it has."
            )

    def _check_kept(self) -> None:
        is_tuple = isinstance(self.kept, tuple) and all(type(index) is int for index in self.kept)
        if not is_tuple or self.kept[:1] != (0,) or sorted({*self.kept}) != [*self.kept]:
            raise ValueError(
                f"kept={self.kept!r} must be a tuple of layers that rises from 0 (layer 0 has none below it "
                "to be rebuilt from), as kept_layers makes it."
            )
        if self.every != 1:
            raise ValueError(f"kept={self.kept} takes the place of every={self.every}; leave that at 1.")


@lru_cache(maxsize=1024)
def _all_places(placement: Placement, num_layers: int) -> tuple[Where, ...]:
    placement.check_layers(num_layers)
    return tuple(placement.where(index, num_layers) for index in range(num_layers))


@lru_cache(maxsize=1024)
def _waits(placement: Placement, num_layers: int) -> tuple[Literal["gpu", "host"], ...]:
    places = placement.all_places(num_layers)
    starts = [index for index, place in enumerate(places) if place != "rebuild"]
    found: list[Literal["gpu", "host"]] = []
    for start, stop in zip(starts, [*starts[1:], num_layers], strict=True):
        on_host = rebuilt_on_host(start, stop, places[stop:].count("host"))
        found.append(placement.place(start, num_layers))
        found += ["host" if index in on_host else "gpu" for index in range(start + 1, stop)]
    return tuple(found)


@lru_cache(maxsize=1024)
def _rebuilt_beside(placement: Placement, num_layers: int) -> tuple[int, ...]:
    found: list[int] = []
    waiting = 0
    for place, waits in zip(placement.all_places(num_layers), placement.waits(num_layers), strict=True):
        waiting = 0 if place != "rebuild" else waiting
        found.append(waiting)
        waiting += place == "rebuild" and waits == "gpu"
    return tuple(found)


@lru_cache(maxsize=1024)
def spread_inputs(num_layers: int, on_gpu: int, on_host: int) -> Placement:
    """The placement that rebuilds least with room for so many inputs beside that of the layer at work.

    Args:
        num_layers: Decoder layers.
        on_gpu: Inputs that may wait on the GPU; these are filled first.
        on_host: And on the host.

    Raises:
        ValueError: There is too little room (`fewest_waiting`).
    """
    waiting = min(on_gpu + on_host, num_layers - 1)
    kept = kept_layers(num_layers, waiting)
    if on_gpu >= waiting:
        gpu_layers, host = num_layers, False
    else:
        gpu_layers, host = num_layers - kept[-1 - on_gpu], True
    return Placement(gpu_layers, host=host, kept=None if len(kept) == num_layers else kept)


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
        "gpu_layers=..., every=..., host=..., kept=...)."
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
    rest waits in host memory. If there is too little of both, as many inputs are kept as there is room for,
    and the others are rebuilt once each (`kept_layers`).

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
    if num_layers * kept_bytes <= gpu_bytes:
        return spread_inputs(num_layers, num_layers, 0)
    on_gpu, on_host = gpu_bytes // kept_bytes, host_bytes // kept_bytes
    # The last layer's input never waits, and lies on the GPU.
    if on_gpu > 0 and on_gpu - 1 + on_host >= fewest_waiting(num_layers):
        return spread_inputs(num_layers, on_gpu - 1, on_host)
    raise ValueError(
        f"The checkpoints of {num_layers} layers, {gib(kept_bytes)} each ({gib(bytes_per_layer)} of input, "
        f"{gib(attention_bytes_per_layer)} of attention), fit neither {gib(gpu_bytes)} of GPU memory and "
        f"{gib(host_bytes)} of host memory, nor do {fewest_waiting(num_layers) + 1} of them, from which all "
        "others can be rebuilt; at least one must fit the GPU. Use fewer tokens a GPU (a larger Ulysses "
        "degree, a shorter sequence), save_attention=False, or a machine with more host memory for each GPU."
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
