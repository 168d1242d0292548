"""What attention is asked for, and the kernels that come with PyTorch: cuDNN, flash-attention 2, the CPU's.

A kernel is three functions. `refusal` says why it cannot do a problem, or None; it looks at dtypes, devices,
shapes and options only, so that forward and backward agree. `forward` gives the output and the log-sum-exp of
each row of scores, a natural logarithm, in a layout of the kernel's own; `backward` takes both and gives the
three gradients. None of them is traced by autograd, and none makes an L x L mask. Sinks need nothing of a
kernel (per_head.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOW_PRECISION = (torch.bfloat16, torch.float16)
KERNEL_NAMES = ("auto", "fa4", "fa3", "cudnn", "flash", "fa2", "cpu", "blockwise")


@dataclass(frozen=True)
class AttentionOptions:
    """Causal attention: which scores count, what is done to them, and which kernel does it.

    Raises:
        ValueError: A window or softcap that is not positive, or a kernel that does not exist.
    """

    scale: float
    """Factor of the scores."""
    window: int | None = None
    """A token sees itself and the `window - 1` tokens before it: transformers' `sliding_window`."""
    softcap: float | None = None
    """Scores become `softcap * tanh(scores / softcap)`, as in Gemma 2 (arXiv 2408.00118)."""
    kernel: str = "auto"
    """One of `KERNEL_NAMES`."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"window={self.window} must be at least 1, the token itself; None has no window."
            )
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap={self.softcap} must be positive; None caps nothing.")
        if self.kernel not in KERNEL_NAMES:
            raise ValueError(f"kernel={self.kernel!r} does not exist; use one of {', '.join(KERNEL_NAMES)}.")


@dataclass(frozen=True, eq=False)
class Documents:
    """Where the documents of a sequence begin and end; made once a step, its layers share one device copy."""

    bounds: tuple[int, ...]
    """The first token of each document and the end of the last; rising, without empty documents."""
    longest: int
    """Tokens of the longest document."""
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, offsets: Tensor) -> Documents:
        """Documents from offsets `(documents + 1,)`, best on the CPU: a GPU's are waited for.

        Raises:
            ValueError: Offsets that are not a list of two or more, or that fall.
        """
        if offsets.dim() != 1 or len(offsets) < 2:
            raise ValueError(f"document_offsets are {tuple(offsets.shape)}; they must be (documents + 1,).")
        bounds = offsets.tolist()
        falls = [(a, b) for a, b in pairwise(bounds) if b < a]
        if falls:
            raise ValueError(f"document_offsets fall from {falls[0][0]} to {falls[0][1]}; they must rise.")
        # An empty document has no token that anyone could ask for; not every kernel takes one.
        rising = (bounds[0], *(b for a, b in pairwise(bounds) if b > a))
        return cls(rising, max((b - a for a, b in pairwise(rising)), default=0))

    @classmethod
    def whole(cls, length: int) -> Documents:
        """One document, or none where there is no token."""
        return cls((0, length) if length else (0,), length)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First token of each document, and the one behind its last."""
        return list(pairwise(self.bounds))

    def offsets_on(self, device: torch.device) -> Tensor:
        """The bounds as int32 on a device, sent there once."""
        if device not in self._copies:
            bounds = torch.tensor(self.bounds, dtype=torch.int32)
            self._copies[device] = bounds.to(device, non_blocking=True)
        return self._copies[device]


class Kernel(NamedTuple):
    """One way to compute attention; see the head of this file."""

    refusal: Callable[[Tensor, Tensor, AttentionOptions, Documents], str | None]
    forward: Callable[[Tensor, Tensor, Tensor, AttentionOptions, Documents], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    no_alibi: str | None = "it has no ALiBi slopes"
    """Why it cannot take ALiBi slopes; None where `forward` and `backward` take them `(N,)` as a last one."""
    counts_in_32_bits: bool = False
    """Whether it loses elements that are 2^31 behind a tensor's first: see short_offsets.py."""


def installed_version(package: str) -> str | None:
    """The version of a package as pip names it, without importing it; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def needs_low_precision_gpu(query: Tensor) -> str | None:
    """Why tensor-core kernels cannot take these queries, or None."""
    if not query.is_cuda:
        return f"it needs a CUDA GPU, not {query.device.type}"
    if query.dtype not in LOW_PRECISION:
        return f"it takes bfloat16 and float16, not {str(query.dtype).removeprefix('torch.')}"
    return None


def needs_ampere(query: Tensor) -> str | None:
    """Why flash-attention 2's code cannot run on the GPU of these queries, or None."""
    major, minor = torch.cuda.get_device_capability(query.device)
    return None if major >= 8 else f"it needs an Ampere GPU or newer, not compute capability {major}.{minor}"


def needs_width(query: Tensor, most: int) -> str | None:
    """Why a kernel of heads of up to `most` numbers cannot take these queries, or None."""
    width = query.shape[-1]
    return (
        f"it takes heads of a multiple of 8 up to {most}, not {width}" if width % 8 or width > most else None
    )


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor itself where each head's row lies in one piece, as kernels ask; strided views stay views.

    Gradients may be expanded scalars, whose strides of 0 not every kernel takes.
    """
    return tensor if tensor.stride(-1) == 1 and 0 not in tensor.stride() else tensor.contiguous()


def _cudnn_refusal(query: Tensor, key: Tensor, options: AttentionOptions, documents: Documents) -> str | None:
    reason = needs_low_precision_gpu(query) or needs_ampere(query)
    if reason:
        return reason
    if options.window is not None or options.softcap is not None:
        return "it has no window and no softcap"
    if len(documents.spans) > 1:
        return "it takes one document a row"
    return needs_width(query, 128) or ("it takes no sequence of one token" if query.shape[2] == 1 else None)


def _cudnn_forward(
    query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions, documents: Documents
) -> tuple[Tensor, Tensor]:
    query, key, value = dense_rows(query), dense_rows(key), dense_rows(value)
    results = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, True, False, scale=options.scale
    )
    return results[0], results[1]


def _cudnn_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    documents: Documents,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = dense_rows(query), dense_rows(key), dense_rows(value)
    grad_out, out = dense_rows(grad_out), dense_rows(out)
    length = query.shape[2]
    # Seed and offset are those of a dropout that there is not.
    unused = torch.zeros((), dtype=torch.int64, device=query.device)
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(grad_out, query, key, value, out, lse, unused, unused),
        *(None, None, None, length, length, 0.0, True),
        scale=options.scale,
    )


CUDNN = Kernel(_cudnn_refusal, _cudnn_forward, _cudnn_backward, counts_in_32_bits=True)


def _flash_refusal(query: Tensor, key: Tensor, options: AttentionOptions, documents: Documents) -> str | None:
    reason = needs_low_precision_gpu(query) or needs_ampere(query)
    if reason:
        return reason
    return "it has no softcap" if options.softcap is not None else needs_width(query, 256)


def by_token(tensor: Tensor, documents: Documents) -> Tensor:
    """`(B, heads, L, H)` -> `(B, L, heads, H)`, or `(L, heads, H)` where documents are packed; a view."""
    tokens = dense_rows(tensor).transpose(1, 2)
    return tokens[0] if len(documents.spans) > 1 else tokens


def packed_arguments(query: Tensor, documents: Documents) -> dict[str, Any]:
    """Where packed documents begin and end, in the words of the flash-attn packages; nothing for one."""
    if len(documents.spans) <= 1:
        return {}
    offsets = documents.offsets_on(query.device)
    return {
        "cu_seqlens_q": offsets,
        "cu_seqlens_k": offsets,
        "max_seqlen_q": documents.longest,
        "max_seqlen_k": documents.longest,
    }


def by_head(tensor: Tensor) -> Tensor:
    """The way back from `by_token`."""
    return (tensor if tensor.dim() == 4 else tensor.unsqueeze(0)).transpose(1, 2)


def _flash_arguments(query: Tensor, options: AttentionOptions, documents: Documents) -> tuple[tuple, dict]:
    """Offsets and lengths, dropout and causality as both directions take them; scale and window."""
    packed = len(documents.spans) > 1
    offsets = documents.offsets_on(query.device) if packed else None
    window = (
        {} if options.window is None else {"window_size_left": options.window - 1, "window_size_right": 0}
    )
    positional = (offsets, offsets, documents.longest, documents.longest, 0.0, options.window is None)
    return positional, {"scale": options.scale, **window}


def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions, documents: Documents
) -> tuple[Tensor, Tensor]:
    positional, named = _flash_arguments(query, options, documents)
    tensors = (by_token(tensor, documents) for tensor in (query, key, value))
    out, lse, *_ = torch.ops.aten._flash_attention_forward(*tensors, *positional, False, **named)
    return by_head(out), lse


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    documents: Documents,
) -> tuple[Tensor, Tensor, Tensor]:
    positional, named = _flash_arguments(query, options, documents)
    tensors = (by_token(tensor, documents) for tensor in (grad_out, query, key, value, out))
    # The state of a dropout that there is not, and an argument that its own definition calls unused.
    rng_state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    unused = torch.empty(0, device=query.device)
    grads = torch.ops.aten._flash_attention_backward(*tensors, lse, *positional, rng_state, unused, **named)
    return by_head(grads[0]), by_head(grads[1]), by_head(grads[2])


FLASH = Kernel(_flash_refusal, _flash_forward, _flash_backward, no_alibi="its backward has no ALiBi slopes")


def _cpu_refusal(query: Tensor, key: Tensor, options: AttentionOptions, documents: Documents) -> str | None:
    if query.device.type != "cpu":
        return f"it runs on the CPU, not on {query.device.type}"
    if options.window is not None or options.softcap is not None:
        return "it has no window and no softcap"
    return None


def _cpu_parts(documents: Documents, num_kv_heads: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Each document of each row alone, as `(K, N / K, tokens, H)`; the heads of a group share a view."""
    groups = tensors[0].shape[1] // num_kv_heads
    parts = []
    for row in range(tensors[0].shape[0]):
        for start, stop in documents.spans:
            slices = (tensor[row, :, start:stop].unflatten(0, (num_kv_heads, -1)) for tensor in tensors)
            parts.append(tuple(part.expand(-1, groups, *part.shape[2:]) for part in slices))
    return parts


def _cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions, documents: Documents
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(query)
    statistics = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = torch.empty(query.shape[:3], dtype=statistics, device=query.device)
    parts = _cpu_parts(documents, key.shape[1], query, key, value)
    for part, (row, start, stop) in zip(parts, _cpu_places(query, documents), strict=True):
        part_out, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *part, 0.0, True, scale=options.scale
        )
        out[row, :, start:stop] = part_out.flatten(0, 1)
        lse[row, :, start:stop] = part_lse.flatten(0, 1)
    return out, lse


def _cpu_places(query: Tensor, documents: Documents) -> list[tuple[int, int, int]]:
    return [(row, start, stop) for row in range(query.shape[0]) for start, stop in documents.spans]


def _cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    documents: Documents,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    num_kv_heads = key.shape[1]
    parts = _cpu_parts(documents, num_kv_heads, grad_out, query, key, value, out)
    for part, (row, start, stop) in zip(parts, _cpu_places(query, documents), strict=True):
        part_lse = lse[row, :, start:stop].unflatten(0, (num_kv_heads, -1))
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *part, part_lse, 0.0, True, scale=options.scale
        )
        grads[0][row, :, start:stop] = found[0].flatten(0, 1)
        for grad, of_group in zip(grads[1:], found[1:], strict=True):
            grad[row, :, start:stop] = of_group.sum(1)
    return grads


CPU = Kernel(_cpu_refusal, _cpu_forward, _cpu_backward)
