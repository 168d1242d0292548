"""`longseq plan --calibrate`: measure the GPU that is there, and keep what was found for later plans.

Twenty seconds: products of the sizes of a large model's layers, attention by the kernel that training would
take, the GPU's own memory, copies of pinned memory, and copies to the next GPU where there is one.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.cache import cache_root
from .machine import outside_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)

FORMAT = 1
HIDDEN, FEED_FORWARD = 4096, 14336
"""Of the layers whose products are timed: Llama-3-8B's."""
PRODUCT_TOKENS = (1024, 4096, 16384)
ATTENTION_TOKENS = (8192, 32768)
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
COPY_BYTES = 2**30
SECONDS_EACH = 1.0
"""Of a timing: long enough that the GPU's clock has come down to what it can hold."""
MIN_MEMORY_BYTES = 8 * 2**30
"""What the probe itself takes, at most."""


def calibration_path(device_name: str, cache_dir: str | None = None) -> Path:
    """Where the figures of a kind of GPU are kept."""
    safe = re.sub(r"[^A-Za-z0-9]+", "-", device_name).strip("-").lower()
    return cache_root(cache_dir) / "calibration" / f"{safe}.json"


def kept(device_name: str, cache_dir: str | None = None) -> dict[str, Any] | None:
    """The figures of a kind of GPU, where they were measured on this machine; None where they were not.

    A file that cannot be read is as none, with a warning: it is made anew in twenty seconds.
    """
    path = calibration_path(device_name, cache_dir)
    try:
        found = json.loads(path.read_text())
        gpu = found["gpu"]
        whole = found["format"] == FORMAT and found["device"] == device_name and "date" in found
        if not whole or not all(value is None or value > 0 for value in gpu.values()):
            raise ValueError("it is of another version or device")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning(
            "%s is not used (%s); measure again with: longseq plan CONFIG --calibrate", path, error
        )
        return None
    return found


def calibrate(cache_dir: str | None = None, *, progress: bool = True) -> Path:
    """Measure this process's GPU and keep the figures.

    Args:
        cache_dir: As `data.cache_dir`.
        progress: Show on standard error what is being measured.

    Returns:
        The file, which plans read from now on.

    Raises:
        ValueError: There is no CUDA GPU, it has no bf16, or too little of its memory is free.
    """
    import torch

    _refuse(torch)
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    found: dict[str, Any] = {}
    probes: list[tuple[str, str, Callable[[torch.device], Any]]] = [
        ("products", "products in bf16", _products),
        ("attention", "attention", _attention),
        ("flash_share", "attention of packed documents", _flash_share),
        ("memory_gb_s", "the GPU's memory", _memory),
        ("host_gb_s", "copies of pinned memory", _host),
        ("link_gb_s", "copies to the next GPU", _link),
    ]
    with _Progress(len(probes), progress) as advance:
        for key, what, probe in probes:
            advance(what)
            found[key] = probe(device)
            torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        context_bytes = outside_bytes(device)  # kernels are loaded by now
    best = max(found["attention"], key=lambda one: one["tokens"])
    kept_of_gpu = {
        "context_bytes": context_bytes,
        "matmul_tflops": max(one["tflops"] for one in found["products"]),
        "attention_forward_tflops": best["forward_tflops"],
        "attention_backward_tflops": best["backward_tflops"],
        "flash_share": found["flash_share"],
        "memory_gb_s": found["memory_gb_s"],
        "host_gb_s": found["host_gb_s"]["lower"],
        "link_gb_s": found["link_gb_s"],
    }
    path = calibration_path(name, cache_dir)
    _write(
        path,
        {
            "format": FORMAT,
            "device": name,
            "date": time.strftime("%Y-%m-%d"),
            "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
            "gpu": kept_of_gpu,
            "measured": found,
        },
    )
    return path


def _refuse(torch: Any) -> None:
    if not torch.cuda.is_available():
        raise ValueError(
            "--calibrate measures the GPU of this machine, and torch sees none here; run it where training "
            "will run, or plan for a GPU by name with --gpu."
        )
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"{torch.cuda.get_device_name()} has no bf16, in which the rates are measured.")
    free, _ = torch.cuda.mem_get_info()
    if free < MIN_MEMORY_BYTES:
        raise ValueError(
            f"{free / 2**30:.1f} GiB of {torch.cuda.get_device_name()} are free and --calibrate takes up to "
            f"{MIN_MEMORY_BYTES / 2**30:.0f}; end what runs there (nvidia-smi shows it), which would be "
            "measured, too."
        )


def seconds_of(work: Callable[[], Any], device: torch.device, seconds: float = SECONDS_EACH) -> float:
    """How long one call takes on the GPU, from calls back to back for about so many seconds."""
    import torch

    for _ in range(2):
        work()
    calls, total = 1, 0.0
    while True:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            work()
        end.record()
        torch.cuda.synchronize(device)
        total = begin.elapsed_time(end) / 1e3
        if total >= seconds / 2:
            return total / calls
        calls = max(calls + 1, int(calls * seconds / max(total, 1e-4)))


def _products(device: torch.device) -> list[dict[str, float]]:
    """Up-projections of several numbers of tokens: forward, and the weight's gradient."""
    import torch

    weight = _normal((FEED_FORWARD, HIDDEN), device)
    found = []
    for tokens in PRODUCT_TOKENS:
        x, grad = _normal((tokens, HIDDEN), device), _normal((tokens, FEED_FORWARD), device)

        def both(x: Tensor = x, grad: Tensor = grad) -> None:
            torch.mm(x, weight.T)
            torch.mm(grad, weight)
            torch.mm(grad.T, x)

        taken = seconds_of(both, device)
        found.append({"tokens": tokens, "tflops": 3 * 2 * tokens * HIDDEN * FEED_FORWARD / taken / 1e12})
    return found


def _attention(device: torch.device) -> list[dict[str, Any]]:
    """Causal attention of one sequence, forward and backward, by the kernel that "auto" takes."""
    from .seconds_layers import RAMP_TOKENS

    found = []
    for tokens in ATTENTION_TOKENS:
        # What very long sequences attain: shorter ones have more blocks on the diagonal, half empty.
        ramp = (tokens + RAMP_TOKENS) / tokens
        operations = 2 * tokens**2 * HEADS * HEAD_DIM * ramp / 1e12
        kernel, forward, backward = _attention_s(device, tokens, "auto")
        rates = {"forward_tflops": operations / forward, "backward_tflops": 2.5 * operations / backward}
        found.append({"tokens": tokens, "kernel": kernel, **rates})
    return found


def _flash_share(device: torch.device) -> float:
    """Of attention's rate, what flash-attention 2 attains, on what is packed where that is faster than it."""
    tokens = ATTENTION_TOKENS[0]
    _, *auto = _attention_s(device, tokens, "auto")
    _, *flash = _attention_s(device, tokens, "flash")
    return min(1.0, sum(auto) / sum(flash))


def _attention_s(device: torch.device, tokens: int, kernel: str) -> tuple[str, float, float]:
    """The kernel, and seconds of a forward and of a backward by it."""
    from ...distributed.attention import attention_backward, attention_forward, choose_kernel
    from ...distributed.attention_kernels import AttentionOptions

    options = AttentionOptions(HEAD_DIM**-0.5, kernel=kernel)
    query, grad = (_normal((1, HEADS, tokens, HEAD_DIM), device) for _ in range(2))
    key, value = (_normal((1, KV_HEADS, tokens, HEAD_DIM), device) for _ in range(2))
    out, lse = attention_forward(query, key, value, options)
    forward = seconds_of(lambda: attention_forward(query, key, value, options), device)
    backward = seconds_of(lambda: attention_backward(grad, query, key, value, out, lse, options), device)
    return choose_kernel(query, key, options)[0], forward, backward


def _memory(device: torch.device) -> float:
    """By a sum of two large tensors into a third; a step's kernels attain a little less than that."""
    import torch

    from .catalogue import MIXED_SHARE

    one, other, out = (_normal((COPY_BYTES // 2,), device) for _ in range(3))
    taken = seconds_of(lambda: torch.add(one, other, out=out), device)
    return MIXED_SHARE * 3 * COPY_BYTES / taken / 1e9


def _host(device: torch.device) -> dict[str, float]:
    """Pinned memory to the GPU and back, one way at a time."""
    import torch

    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    here = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    here.zero_()
    rates = {
        "to_gpu": COPY_BYTES / seconds_of(lambda: there.copy_(here, non_blocking=True), device) / 1e9,
        "to_host": COPY_BYTES / seconds_of(lambda: here.copy_(there, non_blocking=True), device) / 1e9,
    }
    return {**rates, "lower": min(rates.values())}


def _link(device: torch.device) -> float | None:
    """A copy to another GPU of this machine, in one direction; None where there is none.

    NCCL's collectives beside a step's kernels attain less than one large copy does.
    """
    import torch

    from .catalogue import LINK_OF_A_COPY

    others = [index for index in range(torch.cuda.device_count()) if index != device.index]
    if not others:
        return None
    here = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=torch.device("cuda", others[0]))
    taken = seconds_of(lambda: there.copy_(here, non_blocking=True), device)
    return LINK_OF_A_COPY * COPY_BYTES / taken / 1e9


def _normal(shape: tuple[int, ...], device: torch.device) -> Tensor:
    # Not zeros: a GPU that multiplies zeros takes less power and clocks higher.
    import torch

    return torch.randn(shape, dtype=torch.bfloat16, device=device)


class _Progress:
    """A bar of so many steps on standard error, where that is a terminal and it is asked for."""

    def __init__(self, total: int, show: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("measuring {task.description}"), BarColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True, disable=not show)
        self._task = self._progress.add_task("", total=total)
        self._begun = False

    def __enter__(self) -> Callable[[str], None]:
        self._progress.start()
        return self._advance

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _advance(self, what: str) -> None:
        self._progress.update(self._task, description=what, advance=1 if self._begun else 0)
        self._begun = True


def _write(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(content, indent=1))
    draft.replace(path)
