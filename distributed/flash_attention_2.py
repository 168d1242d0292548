"""flash-attn (`pip install flash-attn --no-build-isolation`), flash-attention 2 as a package of its own.

PyTorch's kernel "flash" is the same code; the package also has a softcap and ALiBi slopes, in both
directions. It is imported on first use.
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
    needs_ampere,
    needs_low_precision_gpu,
    needs_width,
    packed_arguments,
)

VERSION = installed_version("flash-attn")
OLDEST = (2, 7, 1)
"""From here on the functions below take a window as two numbers, and a softcap."""


def _interface() -> ModuleType:
    try:
        from flash_attn import flash_attn_interface
    except ImportError as error:
        raise ImportError(
            f"flash-attn is installed but cannot be imported ({error}); build it for this PyTorch (pip "
            "install --no-build-isolation --force-reinstall --no-deps flash-attn), remove it, or ask for "
            "another kernel (attention_kernel='flash')."
        ) from error
    return flash_attn_interface


def _refusal(query: Tensor, key: Tensor, options: AttentionOptions, documents: Documents) -> str | None:
    reason = needs_low_precision_gpu(query) or needs_ampere(query) or needs_width(query, 256)
    if reason:
        return reason
    # Last: it is no use to install what could not do it.
    if VERSION is None:
        return "it is not installed (pip install flash-attn --no-build-isolation)"
    oldest = ".".join(map(str, OLDEST))
    return None if _release(VERSION) >= OLDEST else f"it needs flash-attn {oldest} or newer, not {VERSION}"


def _release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: "2.8.3.post2" is (2, 8, 3)."""
    parts = []
    for part in version.split(".")[:3]:
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)


def _arguments(
    query: Tensor, options: AttentionOptions, documents: Documents, slopes: Tensor | None
) -> dict[str, Any]:
    """What forward and backward are both told."""
    window = options.window
    if slopes is not None:
        slopes = slopes.to(query.device, torch.float32).contiguous()
        # Without a window the kernel adds slope * key, not slope * (key - query): each row's log-sum-exp is
        # then off by slope * query, which sinks must not see, and far from the start the sum has few digits
        # left for the score. A window that hides nothing makes the kernel count from the query.
        window = window or documents.longest
    arguments: dict[str, Any] = {
        "dropout_p": 0.0,
        "softmax_scale": options.scale,
        "causal": window is None,
        "window_size_left": -1 if window is None else window - 1,
        "window_size_right": -1 if window is None else 0,
        "softcap": options.softcap or 0.0,
        "alibi_slopes": slopes,
    }
    return arguments | packed_arguments(query, documents)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: AttentionOptions,
    documents: Documents,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    flash, packed = _interface(), len(documents.spans) > 1
    run = flash._flash_attn_varlen_forward if packed else flash._flash_attn_forward
    tensors = (by_token(tensor, documents) for tensor in (query, key, value))
    out, lse, *_ = run(*tensors, **_arguments(query, options, documents, slopes), return_softmax=False)
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
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    flash, packed = _interface(), len(documents.spans) > 1
    run = flash._flash_attn_varlen_backward if packed else flash._flash_attn_backward
    tensors = [by_token(tensor, documents) for tensor in (grad_out, query, key, value, out)]
    grads = [torch.empty_like(tensor) for tensor in tensors[1:4]]  # which the call fills
    run(
        *tensors,
        lse,
        *grads,
        **_arguments(query, options, documents, slopes),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return by_head(grads[0]), by_head(grads[1]), by_head(grads[2])


FLASH_2 = Kernel(_refusal, _forward, _backward, no_alibi=None)
