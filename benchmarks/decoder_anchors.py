"""What others do about long sequences on one GPU, as `decoder.py` measures it."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

import torch
from decoder_model import Prepared
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama import modeling_llama

MINI_S_MLP_TOKENS = 4096
MINI_S_HEAD_CHUNKS = 64
ALST_LOGITS_BYTES = 2**30
"""Of float32 logits in a shard, as ALST's own trainer cuts them."""


class MissingError(Exception):
    """A variant that this environment does not have; the text says what is missing."""


def need(module: str, package: str) -> None:
    """Raise `MissingError` unless a module can be imported."""
    if importlib.util.find_spec(module) is None:
        raise MissingError(f"{package} is not installed")


def need_cuda(model: nn.Module, what: str) -> None:
    """Raise `MissingError` unless the model is on a GPU."""
    if not next(model.parameters()).is_cuda:
        raise MissingError(f"{what} needs a CUDA GPU")


def checkpoint_layers(model: nn.Module, **options: Any) -> None:
    """transformers' own checkpoints, one a layer."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False}, **options)


def own_loss(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the model returns where it is given labels."""
    return lambda ids: model(input_ids=ids, labels=ids).loss


def transformers_checkpoints(model: nn.Module) -> Prepared:
    """Layer checkpoints, nothing else."""
    checkpoint_layers(model)
    return Prepared(own_loss(model))


def transformers_host_checkpoints(model: nn.Module) -> Prepared:
    """Layer checkpoints in pinned host memory, copied on the compute stream."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None or "offload" not in inspect.signature(enable).parameters:
        raise MissingError("this transformers has no activation_checkpointing_enable(offload=...)")
    need_cuda(model, "a checkpoint on the host")
    checkpoint_layers(model, offload=True)
    return Prepared(own_loss(model))


def liger(model: nn.Module) -> Prepared:
    """Liger's norms, rotary embedding, MLP and fused loss, and layer checkpoints."""
    need("liger_kernel", "liger-kernel")
    need_cuda(model, "Liger")
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    before = dict(vars(modeling_llama))

    def undo() -> None:
        vars(modeling_llama).update(before)

    try:
        apply_liger_kernel_to_llama(model=model)  # changes names of transformers' module too
        checkpoint_layers(model)
    except Exception:
        undo()
        raise
    return Prepared(own_loss(model), undo=undo)


def alst(model: nn.Module, *, host: bool = False) -> Prepared:
    """DeepSpeed's `TiledMLP` and `TiledFusedLogitsLoss` with layer checkpoints, on the host if asked."""
    need("deepspeed", "deepspeed")
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    offload = AlstOffload() if host else None
    if host:
        need_cuda(model, "a checkpoint on the host")
    tile_mlps(model)
    checkpoint_layers(model)
    params = [model.lm_head.weight]

    def loss(ids: Tensor) -> Tensor:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        labels = F.pad(ids[:, 1:], (0, 1), value=-100)
        shards = max(1, math.ceil(ids.numel() * model.config.vocab_size * 4 / ALST_LOGITS_BYTES))

        # The mean is taken in here: of a gradient that comes to it from outside, the head's own weights
        # would see nothing, and a mean of shards of unequal lengths would not be the tokens' mean.
        def shard_loss(head: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            total = F.cross_entropy(head(x).float(), y, ignore_index=-100, reduction="sum")
            return total / (ids.shape[1] - 1)

        return TiledFusedLogitsLoss.apply(
            shard_loss, model.lm_head, hidden, labels, None, shards, params, "sum"
        )

    return Prepared(loss) if offload is None else Prepared(loss, around=offload, forget=offload.forget)


class AlstOffload:
    """DeepSpeed's copies of layer inputs on a stream of their own, with one pool of buffers for all steps."""

    def __init__(self) -> None:
        try:
            from deepspeed.runtime.activation_checkpointing.offload_activations import (
                get_checkpoint_hidden_states_offloading_ctx_manager as make_manager,
            )
        except ImportError:
            raise MissingError("this deepspeed has no offload_activations (0.19.8 has)") from None
        self._make = make_manager
        self._manager: AbstractContextManager | None = None

    def __call__(self) -> AbstractContextManager:
        self._manager = self._manager or self._make()
        return self._manager

    def forget(self) -> None:
        self._manager = None


def tile_mlps(model: nn.Module) -> None:
    """DeepSpeed's `TiledMLP` in each layer, on the instances."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    for layer in model.model.layers:
        layer.mlp.forward = MethodType(_tiled_by(TiledMLP), layer.mlp)


def _tiled_by(tiled_mlp: Any) -> Callable[[nn.Module, Tensor], Tensor]:
    """An MLP's forward by `TiledMLP`, with as many tiles as its documentation says."""

    def of_tile(mlp: nn.Module, x: Tensor) -> Tensor:
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))

    def forward(mlp: nn.Module, x: Tensor) -> Tensor:
        shards = math.ceil(x.shape[-2] / x.shape[-1])
        return tiled_mlp.apply(of_tile, mlp, x, shards, list(mlp.parameters()))

    return forward


def mini_s(model: nn.Module) -> Prepared:
    """The scheme of the MST paper's own code, written anew: see `NOTE` in decoder.py for what differs."""
    for layer in model.model.layers:
        layer.mlp.forward = _by_chunks(layer.mlp.forward)
    checkpoint_layers(model)

    def loss(ids: Tensor) -> Tensor:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        return _ChunkedHead.apply(hidden[0, :-1], ids[0, 1:], model.lm_head.weight)

    return Prepared(loss)


def _by_chunks(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cat([forward(chunk) for chunk in x.split(MINI_S_MLP_TOKENS, dim=1)], dim=1)


class _ChunkedHead(torch.autograd.Function):
    """Mean loss of the head; each chunk's gradients are made in forward, the weight's right into `.grad`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        hidden_grad = torch.empty_like(hidden)
        loss = torch.zeros((), device=hidden.device)
        parts = (tensor.chunk(MINI_S_HEAD_CHUNKS) for tensor in (hidden, labels, hidden_grad))
        for x, y, x_grad in zip(*parts, strict=True):
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                chunk_loss = F.cross_entropy(F.linear(x, weight).float(), y, reduction="sum") / len(labels)
            chunk_loss.backward(inputs=[x, weight])
            x_grad.copy_(x.grad)
            loss += chunk_loss.detach()
        ctx.save_for_backward(hidden_grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # The loss is what backward starts from: its gradient is 1, which the weight's has assumed.
        return ctx.saved_tensors[0], None, None
