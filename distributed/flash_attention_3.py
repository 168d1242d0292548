"""flash-attn-3 (`pip install flash-attn-3 --index-url https://download.pytorch.org/whl/cu130`), for Hopper.

PyTorch's `activate_flash_attention_impl("FA3")` would put the same package behind the kernel "flash", but for
all of the process, and without its softcap. So its operators are called here, as PyTorch itself calls them:
their schema has outlived several forms of the package's Python functions. It is imported on first use.
"""

from __future__ import annotations

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
    needs_width,
    packed_arguments,
)

INSTALLED = installed_version("flash-attn-3") is not None


def _operators() -> Any:
    try:
        import flash_attn_interface  # noqa: F401  (it registers the operators)
    except ImportError as error:
        raise ImportError(
            f"flash-attn-3 is installed but cannot be imported ({error}); install the one that was built for "
            "this PyTorch's CUDA (https://download.pytorch.org/whl/cu126 or cu130), remove it, or ask for "
            "another kernel (attention_kernel='cudnn')."
        ) from error
    return torch.ops.flash_attn_3


def _refusal(query: Tensor, key: Tensor, options: AttentionOptions, documents: Documents) -> str | None:
    reason = needs_low_precision_gpu(query)
    if reason:
        return reason
    major, minor = torch.cuda.get_device_capability(query.device)
    if major != 9:
        return f"it needs a Hopper GPU, not compute capability {major}.{minor}"
    # Last: it is no use to install what could not do it.
    return needs_width(query, 256) or (
        None
        if INSTALLED
        else "it is not installed (pip install flash-attn-3 --index-url https://download.pytorch.org/whl/cu130)"
    )


def _arguments(query: Tensor, options: AttentionOptions, documents: Documents) -> dict[str, Any]:
    """What forward and backward are both told."""
    window = options.window
    arguments: dict[str, Any] = {
        "softmax_scale": options.scale,
        "is_causal": window is None,
        "window_size_left": -1 if window is None else window - 1,
        "window_size_right": -1 if window is None else 0,
        "softcap": options.softcap or 0.0,
    }
    return arguments | packed_arguments(query, documents)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions, documents: Documents
) -> tuple[Tensor, Tensor]:
    tensors = (by_token(tensor, documents) for tensor in (query, key, value))
    # One split of the keys: several are for a few queries against many keys, and need room of their own.
    out, lse, *_ = _operators().fwd(*tensors, **_arguments(query, options, documents), num_splits=1)
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
    tensors = [by_token(tensor, documents) for tensor in (grad_out, query, key, value, out)]
    grads = [torch.empty_like(tensor) for tensor in tensors[1:4]]  # which the call fills
    _operators().bwd(
        *tensors,
        lse,
        *grads,
        **_arguments(query, options, documents),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return by_head(grads[0]), by_head(grads[1]), by_head(grads[2])


FLASH_3 = Kernel(_refusal, _forward, _backward)
