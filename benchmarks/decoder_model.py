"""The model that `decoder.py` measures, and what a step on it costs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from longseq.mst import pinned_memory

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 1048576,
    "rope_theta": 500000.0,
}
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "rope_theta": 10000.0,
}
TINY = {  # eight key/value heads: every number of head groups that the big one has
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 8,
    "vocab_size": 512,
    "rope_theta": 500000.0,
}
SHAPES = {"llama-3-8b": LLAMA_3_8B, "llama-7b": LLAMA_7B, "tiny": TINY}
NUM_LAYERS = {"llama-3-8b": 32, "llama-7b": 32, "tiny": 2}


@dataclass(frozen=True)
class Prepared:
    """A model made ready by a variant."""

    loss: Callable[[Tensor], Tensor]
    """From token ids `(1, S)`, which are the labels too."""
    undo: Callable[[], None] = lambda: None
    """What the variant did outside of the model's own instance is taken back."""
    around: Callable[[], AbstractContextManager] = nullcontext
    """What a step, forward and backward, runs inside of."""
    forget: Callable[[], None] = lambda: None
    """Called before another length: buffers that the variant keeps for the last are let go."""


@dataclass(frozen=True)
class Step:
    """What one forward and backward took."""

    seconds: float
    loss: float
    forward_peak_gib: float | None
    """Of the forward alone; like the other peaks None on a CPU."""
    peak_gib: float | None
    reserved_gib: float | None
    """With what the allocator could not use."""


def build(shape: str, num_layers: int, device: str) -> LlamaForCausalLM:
    """The same random weights at each call, in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], num_hidden_layers=num_layers)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.config.use_cache = False
    return model.train()


def hold_gradients(model: nn.Module) -> None:
    """Zeros in each `.grad`, which then stays: the memory of a run whose optimizer steps after backward."""
    for param in model.parameters():
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        else:
            param.grad.zero_()


def draw_tokens(model: nn.Module, num_tokens: int) -> Tensor:
    """Token ids `(1, S)`, the same for each variant."""
    torch.manual_seed(1)
    weight = model.get_input_embeddings().weight
    return torch.randint(0, weight.shape[0], (1, num_tokens), device=weight.device)


def run_step(prepared: Prepared, ids: Tensor) -> Step:
    """Forward and backward once."""
    on_gpu = ids.is_cuda
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    started = time.perf_counter()
    with fixed_attention(ids.device), prepared.around():
        loss = prepared.loss(ids)
        # Memory is counted where it is asked for, on the host: the GPU need not have come so far.
        forward_peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
        loss.backward()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return Step(
        seconds,
        loss.item(),
        forward_peak,
        torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None,
    )


def fixed_attention(device: torch.device) -> AbstractContextManager:
    """cuDNN's kernel for everybody who asks PyTorch for attention, or an error; ours ask for it by name."""
    if device.type != "cuda":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION])


def host_gib() -> float:
    """Host memory held for checkpoints now: ours, and what PyTorch's own allocator has pinned."""
    # A model's slab is nobody's public attribute; there is none but that of the model measured.
    ours = sum(len(memory.blocks) * memory.block_bytes for memory in list(pinned_memory._memories))
    others = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) if _has_cuda() else 0
    return (ours + others) / 2**30


def free() -> None:
    """Give back to the device and to the host what nothing holds.

    Raises:
        RuntimeError: An earlier error has ended this process's use of the GPU.
    """
    gc.collect()
    if _has_cuda():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        empty_host_cache = getattr(torch._C, "_host_emptyCache", None)
        if empty_host_cache is not None:
            empty_host_cache()


def held_gib() -> float:
    """GPU memory that something holds, 0 on a CPU."""
    return torch.cuda.memory_allocated() / 2**30 if _has_cuda() else 0.0


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` finds, or why it found nothing as `note`; the step that failed holds nothing any more.

    Raises:
        SystemExit: An error of the kind after which the GPU can be used by a new process alone.
    """
    try:
        return work()
    except torch.OutOfMemoryError:
        note = "out of memory"
    except MemoryError:
        note = "out of host memory"
    except Exception as error:  # an anchor of any kind may fail in any way, and its row says how
        lines = str(error).strip().splitlines() or [""]
        note = f"{type(error).__name__}: {lines[0]}"[:120]
    try:
        free()  # only here is the traceback gone, and what its frames held
    except RuntimeError:
        raise SystemExit(f"{note}; the GPU takes nothing more from this process.") from None
    return {"note": note}


class Budget:
    """The minutes that a run may take, and what its next step will."""

    def __init__(
        self, minutes: float | None, work: Callable[[int], float] = lambda num_tokens: num_tokens**2
    ) -> None:
        """`work` says how the work of a step grows with its tokens; by their square it is surely less."""
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._work = work
        self._seen: dict[int, float] = {}

    def add(self, num_tokens: int, seconds: float) -> None:
        """A step over so many tokens took so long; the slowest is remembered."""
        self._seen[num_tokens] = max(seconds, self._seen.get(num_tokens, 0.0))

    def allows(self, num_tokens: int, num_steps: int, start_s: float = 0.0) -> bool:
        """Whether so many steps still fit; an unknown length is guessed from the nearest one's time."""
        if self._end is None:
            return True
        step_s = 0.0
        if self._seen:
            nearest = min(self._seen, key=lambda seen: abs(seen - num_tokens))
            step_s = self._seen[nearest] * max(1.0, self._work(num_tokens) / self._work(nearest))
        return time.monotonic() + start_s + 1.1 * num_steps * step_s <= self._end


def _has_cuda() -> bool:
    return torch.cuda.is_available()
