"""What `sequence_parallel.py` finds out about communication: what is sent, how often, and what it costs."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longseq.launch.bench import kernel_kinds
from longseq.launch.bench.gaps import Event, Span, length, merged, overlap
from longseq.launch.bench.profile import top_kernels
from longseq.launch.bench.recording import record

COLLECTIVES = (
    "all_to_all_single",
    "all_to_all",
    "all_gather_into_tensor",
    "all_gather",
    "reduce_scatter_tensor",
    "reduce_scatter",
    "all_reduce",
    "broadcast",
    "reduce",
)
"""Functions of torch.distributed, by which ours and DeepSpeed's collectives go alike."""


@dataclass
class CollectiveCounter:
    """Calls and bytes of this rank's collectives, by kind, while `counting`.

    Bytes are those of the larger side: what an all-gather gives, what a reduce-scatter takes.
    """

    calls: Counter[str] = field(default_factory=Counter)
    num_bytes: Counter[str] = field(default_factory=Counter)
    _is_counting: bool = False

    def install(self) -> None:
        """Wrap torch.distributed's functions, before DeepSpeed has made its backend, which keeps them."""
        for name in COLLECTIVES:
            setattr(dist, name, self._wrapped(name, getattr(dist, name)))

    @contextmanager
    def counting(self) -> Iterator[CollectiveCounter]:
        """Count from zero."""
        self.calls.clear()
        self.num_bytes.clear()
        self._is_counting = True
        try:
            yield self
        finally:
            self._is_counting = False

    def _wrapped(self, name: str, original: Callable) -> Callable:
        @functools.wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._is_counting:
                self.calls[name] += 1
                self.num_bytes[name] += max(map(_nbytes, (*args, *kwargs.values())), default=0)
            return original(*args, **kwargs)

        return counted


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_nbytes, value)) if isinstance(value, (list, tuple)) else 0


def exchanged_bytes(
    config: Any, local_tokens: int, sp_size: int, *, rebuilds_attention: bool, dtype_bytes: int = 2
) -> int:
    """Bytes that a rank hands to a layer's all-to-alls in a step; (P - 1) / P of them leave it.

    With N query and K key/value heads of H, P ranks and S = L / P tokens a rank, in elements a token:

    * forward sends queries, keys and values and gets the output back: (2N + 2K) H;
    * where attention's output is rebuilt, our backward does the same again: (2N + 2K) H;
    * our backward itself sends queries, keys, values, output and the output's gradient, and gets three
      gradients back: (4N + 4K) H.

    So (8N + 8K) H, or (6N + 6K) H where the output was saved. ALST sends (2N + 2K) H each in forward, in the
    checkpoint's second forward and in backward, (6N + 6K) H: the whole sequence's queries, keys, values and
    output stay where they are from its second forward to its backward.

    Args:
        config: The model's Hugging Face config.
        local_tokens: S.
        sp_size: P; must divide K. With one there is no exchange.
        rebuilds_attention: (8N + 8K) H, not (6N + 6K) H.
        dtype_bytes: Of an element.
    """
    if sp_size == 1:
        return 0
    heads = config.num_attention_heads + config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (8 if rebuilds_attention else 6) * heads * head_dim * dtype_bytes * local_tokens


def kind_of(name: str) -> str:
    """ "all-to-all", "all-gather", "reduce-scatter", "other NCCL", "host copy" or "compute"."""
    kind = kernel_kinds.kind_of(name)
    if kind == "NCCL":
        for sign, collective in (
            ("SendRecv", "all-to-all"),
            ("AllGather", "all-gather"),
            ("ReduceScatter", "reduce-scatter"),
        ):
            if sign in name:
                return collective
        return "other NCCL"
    return "compute" if kernel_kinds.computes(kind) else "host copy"


def profiled(step: Callable[[], Any]) -> list[Event]:
    """The kernels and copies of one step on this rank's GPU."""
    return record(step, torch.device("cuda", torch.cuda.current_device())).on_gpu


def times(kernels: Sequence[Event]) -> dict[str, Any]:
    """Where a step's time went, in seconds of this rank's GPU.

    Returns:
        `span` from the first kernel's start to the last one's end; NCCL's time by kind, which has in it what
        a rank waits for others; `NCCL`, all of it; `exposed NCCL`, with no computing beside it; `idle`, with
        nothing at all; `top`, the kernels that took most together, with their calls.
    """
    if not kernels:
        return {}
    spans: dict[str, list[Span]] = {}
    for start, end, name in kernels:
        spans.setdefault(kind_of(name), []).append((start, end))
    compute = merged(spans.get("compute", []))
    nccl = merged(
        span for kind, found in spans.items() if kind not in ("compute", "host copy") for span in found
    )
    everything = merged((start, end) for start, end, _ in kernels)
    span = everything[-1][1] - everything[0][0]
    found = {
        "span": span,
        "compute": length(compute),
        "NCCL": length(nccl),
        "exposed NCCL": length(nccl) - overlap(nccl, compute),
        "idle": span - length(everything),
        **{kind: length(merged(of_kind)) for kind, of_kind in spans.items() if kind != "compute"},
    }
    top = [{"kernel": name, "calls": calls, "s": seconds} for name, seconds, calls in top_kernels(kernels)]
    return {name: ns / 1e9 for name, ns in found.items()} | {"top": top}
