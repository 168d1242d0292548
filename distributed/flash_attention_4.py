"""flash-attn-4 (`pip install flash-attn-4`), an optional kernel for Hopper and Blackwell.

Forward + backward of Llama-3-8B at 65,536 tokens runs 7 % faster with it than with cuDNN's kernel on an H200
(benchmarks/results/decoder.md). It is imported on first use: its compiler takes seconds to load.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .attention_kernels import (
    AttentionOptions,
    Documents,
    Kernel,
    by_head,
    by_token,
    installed_version,
    needs_low_precision_gpu,
    packed_arguments,
)

INSTALLED = installed_version("flash-attn-4") is not None


def _interface() -> ModuleType:
    try:
        from flash_attn.cute import interface
    except ImportError as error:
        raise ImportError(
            f"flash-attn-4 is installed but cannot be imported ({error}); repair it (pip install --upgrade "
            "'longseq[fa4]'), remove it, or ask for another kernel (attention_kernel='cudnn')."
        ) from error
    return interface


def _refusal(query: Tensor, key: Tensor, options: AttentionOptions, documents: Documents) -> str | None:
    reason = needs_low_precision_gpu(query)
    if reason:
        return reason
    generation = torch.cuda.get_device_capability(query.device)[0]
    if generation not in (9, 10, 11):
        return f"it needs a Hopper or Blackwell data-centre GPU, not compute capability {generation}.x"
    width = query.shape[-1]
    # What flash_attn.cute.interface validates for each generation, in forward and backward.
    fits = 8 <= width <= (256 if generation == 9 else 128) or width == 256
    if width % 8 or not fits:
        return f"it takes heads of a multiple of 8 up to {256 if generation == 9 else 128}, not {width}"
    if width == 256 and generation != 9 and options.softcap is not None:
        return "its backward of heads of 256 has no softcap on Blackwell"
    # Last: it is no use to install what could not do it.
    return None if INSTALLED else "it is not installed (pip install flash-attn-4)"


def _arguments(query: Tensor, options: AttentionOptions, documents: Documents) -> dict[str, Any]:
    """What forward and backward are both told."""
    arguments: dict[str, Any] = {
        "softmax_scale": options.scale,
        "causal": options.window is None,
        "softcap": options.softcap or 0.0,
    }
    if options.window is not None:
        arguments |= {"window_size_left": options.window - 1, "window_size_right": 0}
    return arguments | packed_arguments(query, documents)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions, documents: Documents
) -> tuple[Tensor, Tensor]:
    tensors = (by_token(tensor, documents) for tensor in (query, key, value))
    out, lse, *_ = _interface()._flash_attn_fwd(
        *tensors, **_arguments(query, options, documents), return_lse=True
    )
    return by_head(out), lse


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    documents: Documents,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (by_token(tensor, documents) for tensor in (query, key, value, out, grad_out))
    grads = _interface()._flash_attn_bwd(*tensors, lse, **_arguments(query, options, documents))
    return by_head(grads[0]), by_head(grads[1]), by_head(grads[2])


FLASH_4 = Kernel(_refusal, _forward, _backward, counts_in_32_bits=True)
