"""Workloads and knobs of runs whose memory was measured, and a count of what is alive on a CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from longseq.launch.config_file import parse_config
from longseq.launch.planner.knobs import Knobs
from longseq.launch.planner.machine import Gpu, Machine
from longseq.launch.planner.workload import Workload
from longseq.mst.layer_memory import SavedAttention
from longseq.mst.pinned_slab import BLOCK_BYTES
from longseq.mst.placement import Placement
from longseq.mst.tiling import choose_tile_tokens

GIB = 2**30
VOCABULARY = 128256
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": VOCABULARY,
    },
    "3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
    },
}
GPU, HOST = Placement(gpu_layers=0, host=False), Placement(gpu_layers=1)
NOTHING, EVERYTHING = SavedAttention(), SavedAttention(gpu_layers=32, everything=True)
HOPPER = Machine(Gpu("NVIDIA H100 80GB HBM3", 79 * GIB, 0, *[1.0] * 7), 1, 1, 10**12)


@cache
def measured_work(shape: str, optimizer: str = "adamw", lora: bool = False) -> Workload:
    """Of a run that cuDNN attended in; "mini" is APOLLO-Mini in backward on bf16 weights."""
    from transformers import LlamaConfig

    mini = {"name": "apollo-mini", "weights": "bf16", "in_backward": True}
    values: dict[str, Any] = {
        "model": {"config": {"model_type": "llama", **SHAPES[shape]}},
        "data": {"tokenizer": "bytes", "pack": False},
        "optimizer": mini if optimizer == "mini" else {"name": optimizer},
    }
    if lora:
        values["model"] |= {"name": "a checkpoint that nobody reads", "lora": {"rank": 16}}
    work = Workload.from_config(parse_config(values), LlamaConfig(**SHAPES[shape]))
    return replace(work, layer=replace(work.layer, kernel="cudnn"))


def measured_knobs(work: Workload, length: int, **values: Any) -> Knobs:
    """Of one GPU and one micro-batch, tiles and groups of heads as the layers' own "auto" takes them."""
    sp_size, stream = values.get("ulysses_degree", 1), values.get("stream", True)
    tokens, heads = -(-length // sp_size), work.layer.heads
    intermediates = 3 if stream else 6
    tile = choose_tile_tokens(
        tokens,
        work.shape.intermediate_size,
        work.weight_bytes(values.get("zero_stage", 0)),
        num_intermediates=intermediates,
    )
    known = {
        "micro_batch": 1,
        "accumulation": 1,
        "ulysses_degree": 1,
        "data_degree": 1,
        "zero_stage": 0,
        "offload_optimizer": False,
        "offload_parameters": False,
        "stream": True,
        "head_groups": 2 if heads.num_heads // 2 * tokens >= 2**17 else 1,
        "inputs": GPU,
        "attention": NOTHING,
        "tile_tokens": tile,
    }
    return Knobs(length=length, **(known | values))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operators have made and somebody still holds."""

    def __init__(self, not_counted: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in not_counted}
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        # Blocks of the slab are host memory, on a GPU.
        if key in self._sizes or key in self._known or storage.nbytes() == BLOCK_BYTES:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class _Work:
    """Holds what was sent, as a collective that is under way does, for as long as it is held itself."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors

    def wait(self) -> None:
        """It is done."""


@contextmanager
def exchanges_of_copies(seen: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Exchange copies that are not counted: gloo's threads let go of tensors when they come to it.

    `seen` is called when all is there that an exchange takes.
    """
    original = dist.all_to_all_single

    def exchange(received: Tensor, sent: Tensor, async_op: bool, **kwargs: Any) -> _Work:
        assert async_op
        seen()
        with _disable_current_modes():
            there = torch.empty_like(received)
            original(there, sent.clone(), **kwargs)
            received.copy_(there)
        return _Work(received, sent)

    with patch.object(dist, "all_to_all_single", exchange):
        yield
