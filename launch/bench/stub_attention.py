"""Attention without its kernel: zeros, and the memory that the kernel would take, for as long.

A step at millions of tokens is hours of attention. Its memory can be had without: everything else of the step
is real, the exchanges between ranks that share a sequence included, so the allocator sees what a real run
would have it see. The loss is of no use: a length that is found so is "memory-verified, not trained".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...distributed import ulysses
from ...distributed.attention import KERNELS, choose_kernel
from ...distributed.attention_kernels import AttentionOptions, Documents, Kernel
from ...distributed.groups import ProcessGroups
from ...distributed.per_head import PerHead
from ...distributed.short_offsets import with_short_offsets
from ...distributed.ulysses import HeadsGrad, HeadsOut, UlyssesAttention


class StubAttention(UlyssesAttention):
    """`UlyssesAttention` whose methods find the stub where they would find the kernel.

    Attributes:
        num_calls: Of the kernel's place, forward and backward: 0 after a step says that nothing was stubbed.
    """

    def __init__(self, kernel: str | None = None, groups: ProcessGroups | None = None) -> None:
        """Methods of this instance alone are other ones.

        Args:
            kernel: Whose memory is taken; None is the one that the problem would get.
            groups: Of the attention in whose place this is; one rank without.
        """
        super().__init__(groups or ProcessGroups())
        self.num_calls = 0
        self._kernel = kernel
        names = dict(vars(ulysses))
        for name, function in vars(ulysses).items():
            if isinstance(function, FunctionType) and function.__module__ == ulysses.__name__:
                names[name] = _seeing(names, function)
        names |= {
            "attention_forward": self.kernel_forward,
            "attention_backward": self.kernel_backward,
            "local_attention": self._local_attention,
        }
        for name, method in vars(UlyssesAttention).items():
            if isinstance(method, FunctionType) and name != "__init__":
                own = MethodType(_seeing(names, method), self)
                setattr(self, "_call" if name == "__call__" else name, own)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `UlyssesAttention`; Python asks the class for this one."""
        return self._call(*args, **kwargs)

    def kernel_forward(
        self,
        query: Tensor,  # (B, N, L, H)
        key: Tensor,  # (B, K, L, H)
        value: Tensor,
        options: AttentionOptions | None,
        documents: Tensor | Documents | None = None,
        per_head: PerHead | None = None,
    ) -> HeadsOut:
        """Output of zeros, and the log-sum-exp in the kernel's layout."""
        self.num_calls += 1
        kernel = self._kernel_of(query, key, options, documents, per_head)
        rows = query.shape[:3]
        if kernel == "cudnn":
            rows = (*rows, 1)
        elif kernel not in ("cpu", "blockwise") and _is_packed(documents):
            rows = rows[1:]
        return torch.zeros_like(query), query.new_zeros(rows, dtype=torch.float32)

    def kernel_backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        options: AttentionOptions | None,
        documents: Tensor | Documents | None = None,
        per_head: PerHead | None = None,
    ) -> HeadsGrad:
        """Gradients of zero, made beside a workspace that is gone with the call."""
        self.num_calls += 1
        name = self._kernel_of(query, key, options, documents, per_head)
        kernel = Kernel(_never, _no_forward, partial(_zero_gradients, name))
        if KERNELS[name].counts_in_32_bits:
            kernel = with_short_offsets(kernel)  # which copies what reaches too far
        return kernel.backward(grad_out, query, key, value, out, lse, options, documents)

    def _kernel_of(self, query: Tensor, key: Tensor, options: Any, documents: Any, per_head: Any) -> str:
        if self._kernel is not None:
            return self._kernel
        return choose_kernel(query, key, options, documents, per_head)[0]

    def _local_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        document_offsets: Tensor | Documents | None = None,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        **rules: Any,
    ) -> Tensor:
        per_head = PerHead(sinks, alibi_slopes)
        return _Zeros.apply(
            query, key, value, sinks, self, (AttentionOptions(**rules), document_offsets, per_head)
        )


def _never(*problem: Any) -> None:
    """No refusal: the kernel in whose place this is was asked."""


def _no_forward(*problem: Any) -> HeadsOut:
    raise AssertionError("only the backward of a stub takes a kernel's memory")


def _zero_gradients(
    name: str, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, *rest: Any
) -> HeadsGrad:
    """Gradients of zero, made beside the workspace of the kernel of that name."""
    sizes = workspace(name, query, key, out)
    held = [torch.empty(count, dtype=dtype, device=query.device) for count, dtype in sizes]
    grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    del held
    return grads


class _Zeros(torch.autograd.Function):
    """Keeps for backward what attention keeps."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        stub: StubAttention,
        problem: tuple[Any, ...],
    ) -> Tensor:
        out, lse = stub.kernel_forward(query, key, value, *problem)
        ctx.save_for_backward(query, key, value, out, lse, sinks)
        ctx.stub, ctx.problem = stub, problem
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, sinks = ctx.saved_tensors
        grads = ctx.stub.kernel_backward(grad_out, *tensors, *ctx.problem)
        return *grads, torch.zeros_like(sinks) if ctx.needs_input_grad[3] else None, None, None


def workspace(
    kernel: str, query: Tensor, key: Tensor, out: Tensor | None = None
) -> list[tuple[int, torch.dtype]]:
    """What a kernel's backward allocates beside its results: numbers of elements, and their types.

    Found by taking what was measured on an H200 apart: cuDNN keeps a float32 dq, dk and dv for each query
    head, and a float32 a row, and so does flash-attention 2, which takes the output in one piece;
    flash-attn-3 and 4 float32 dq, dk and dv, and two a row. PyTorch's own on a CPU makes each gradient for
    every query head; attention by blocks has float32 keys, values and their gradients.
    """
    num_rows = query.shape[:3].numel()
    if kernel in ("fa3", "fa4"):
        return [
            (query.numel(), torch.float32),
            (2 * key.numel(), torch.float32),
            (2 * num_rows, torch.float32),
        ]
    if kernel == "cpu":
        return [(3 * query.numel(), query.dtype)]
    if kernel == "blockwise":
        return [(4 * key.numel(), torch.float32)]
    sizes = [(query.numel(), torch.float32), (2 * query.numel(), query.dtype), (num_rows, torch.float32)]
    if kernel == "flash" and out is not None and not out.transpose(1, 2).is_contiguous():
        sizes.append((query.numel(), query.dtype))
    return sizes


def stub_attention(model: nn.Module) -> list[StubAttention]:
    """Put stubs in the place of all attention that `apply_ulysses` has put there, with its process groups.

    Returns:
        The stubs.
    """
    stubs: dict[int, StubAttention] = {}
    for module in model.modules():
        real = getattr(module, "longseq_attention", None)
        if real is not None:
            stubs.setdefault(id(real), StubAttention(groups=real._groups))
            module.longseq_attention = stubs[id(real)]
    return list(stubs.values())


def _is_packed(documents: Tensor | Documents | None) -> bool:
    if isinstance(documents, Tensor):
        documents = Documents.of(documents)
    return documents is not None and len(documents.spans) > 1


def _seeing(names: dict[str, Any], function: FunctionType) -> Callable:
    """A function's code among other names of its module."""
    copy = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
