"""Bugs that long-sequence libraries have had, each put by hand into one place of the code that trains.

A planter takes pytest's monkeypatch; a bug of arguments is made by a function that returns its planter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor

import longseq.distributed.loss as token_loss
import longseq.distributed.sequence as sequence
from longseq.cce import portable
from longseq.distributed import exchange, probe, ulysses
from longseq.launch import evaluation, model
from longseq.mst import apply, layer_parts, mlp_half, model_forward, weight_sums
from longseq.mst import lm_head as head
from longseq.mst.rebuilt_inputs import RebuiltInputs

Plant = Callable[[pytest.MonkeyPatch], None]


# -- the LM head --------------------------------------------------------------------------------------


class _WeightGradient(torch.autograd.Function):
    """A weight whose gradient is made wrong on its way."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, wrong: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.weight, ctx.wrong = weight, wrong
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return ctx.wrong(grad, ctx.weight), None


def with_wrong_weight_gradient(wrong: Callable[[Tensor, Tensor], Tensor]) -> Plant:
    original = head.linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return original(hidden, _WeightGradient.apply(weight, wrong), labels, **options)

    return lambda patch: patch.setattr(head, "linear_cross_entropy", loss)


def compounding(grad: Tensor, weight: Tensor) -> Tensor:
    """What is in `.grad` already is added again: right for the first micro-batch alone."""
    return grad if weight.grad is None else grad + weight.grad


class _Unscaled(torch.autograd.Function):
    """Gradients made in forward, of which the upstream gradient scales the hidden states' alone."""

    @staticmethod
    def forward(ctx: Any, loss: Callable, hidden: Tensor, weight: Tensor) -> Tensor:
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
        with torch.enable_grad():
            total = loss(*leaves)
        ctx.grads = torch.autograd.grad(total, leaves)
        return total.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor):
        return None, ctx.grads[0] * upstream, ctx.grads[1]


def plant_unscaled_weight_gradient(patch: pytest.MonkeyPatch) -> None:
    original = head.linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return _Unscaled.apply(lambda x, w: original(x, w, labels, **options), hidden, weight)

    patch.setattr(head, "linear_cross_entropy", loss)


def plant_lost_tail(patch: pytest.MonkeyPatch) -> None:
    """`q_len // tiles` tokens a tile: what is left over goes missing."""
    original = head.linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
        kept = labels.shape[1] // 4 * 4  # three tokens too few
        return original(hidden[:, :kept], weight, labels[:, :kept], **options)

    patch.setattr(head, "linear_cross_entropy", loss)


def plant_mean_of_nothing(patch: pytest.MonkeyPatch) -> None:
    original = head.linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
        count = (labels != -100).sum()
        return original(hidden, weight, labels, **options) / count * count

    patch.setattr(head, "linear_cross_entropy", loss)


def plant_mean_of_tiles(patch: pytest.MonkeyPatch) -> None:
    original = head.linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
        means = [
            original(x, weight, y, **options) / (y != -100).sum().clamp(min=1)
            for x, y in zip(hidden.split(16, dim=1), labels.split(16, dim=1), strict=True)
        ]
        return torch.stack(means).mean() * (labels != -100).sum()

    patch.setattr(head, "linear_cross_entropy", loss)


def plant_last_chunk_wins(patch: pytest.MonkeyPatch) -> None:
    """A chunk's product with the head overwrites those before it."""
    original = portable._add_product
    patch.setattr(
        portable, "_add_product", lambda total, left, right, first: original(total, left, right, True)
    )


def without_option(name: str) -> Plant:
    original = head.linear_cross_entropy

    @wraps(original)
    def loss(*args: Any, **options: Any) -> Tensor:
        return original(*args, **{**options, name: {"softcap": None, "logit_scale": 1.0}[name]})

    return lambda patch: patch.setattr(head, "linear_cross_entropy", loss)


def plant_ignored_token_count(patch: pytest.MonkeyPatch) -> None:
    original = model_forward.lm_head_loss

    def loss(*args: Any, **options: Any) -> Tensor:
        return original(*args, **{**options, "num_items": None})

    patch.setattr(model_forward, "lm_head_loss", loss)


# -- tiles and layers ---------------------------------------------------------------------------------


class _BackwardATile(torch.autograd.Function):
    """What public tile ops do: `torch.autograd.backward` for each tile, into the weights' own `.grad`."""

    @staticmethod
    def forward(ctx: Any, fn: Callable, x: Tensor, anchor: Tensor) -> Tensor:
        ctx.fn = fn
        ctx.save_for_backward(x)
        with torch.no_grad():
            return torch.cat([fn(tile) for tile in x.split(16, dim=1)], dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        (x,) = ctx.saved_tensors
        grads = []
        for tile, tile_grad in zip(x.split(16, dim=1), grad.split(16, dim=1), strict=True):
            tile = tile.detach().requires_grad_()
            with torch.enable_grad():
                torch.autograd.backward(ctx.fn(tile), tile_grad)
            grads.append(tile.grad)
        return None, torch.cat(grads, dim=1), None


def plant_backward_a_tile(patch: pytest.MonkeyPatch) -> None:
    def op(fn: Callable, x: Tensor, params: Any, **_: Any) -> Tensor:
        return _BackwardATile.apply(fn, x, torch.zeros((), requires_grad=True))

    patch.setattr(apply, "mini_sequence", op)


def plant_crash_below_a_tile(patch: pytest.MonkeyPatch) -> None:
    original = apply.mini_sequence

    def op(fn: Callable, x: Tensor, params: Any, **options: Any) -> Tensor:
        range(0, x.shape[1], x.shape[1] // 8)
        return original(fn, x, params, **options)

    patch.setattr(apply, "mini_sequence", op)


def plant_third_forward(patch: pytest.MonkeyPatch) -> None:
    original = mlp_half.GatedMLP.backward

    def backward(self: Any, x: Tensor, *args: Any) -> Tensor:
        self.forward(x)
        return original(self, x, *args)

    patch.setattr(mlp_half.GatedMLP, "backward", backward)


def plant_narrow_sums(patch: pytest.MonkeyPatch) -> None:
    """Weight gradients of tiles added up in bfloat16."""
    original = weight_sums.WeightSums.buffer

    def buffer(self: Any, param: Tensor) -> Tensor:
        if param.dim() > 1 and id(param) not in self._sums:
            self._sums[id(param)] = torch.zeros_like(param)
        return original(self, param)

    def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
        total += (left.float() @ right.float()).to(total.dtype)

    def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        return (left.float() @ right.float()).to(dtype)

    patch.setattr(weight_sums.WeightSums, "buffer", buffer)
    patch.setattr(weight_sums, "add_product", add_product)
    patch.setattr(weight_sums, "wide_product", product)


def plant_rebuilt_input_of_another_layer(patch: pytest.MonkeyPatch) -> None:
    """Of a segment's rebuilt inputs, the highest layer takes the lowest one."""
    patch.setattr(RebuiltInputs, "take", lambda self, _: self._waiting.pop(min(self._waiting)))


def plant_lost_window(patch: pytest.MonkeyPatch) -> None:
    original = layer_parts.AttentionOptions
    patch.setattr(layer_parts, "AttentionOptions", lambda **options: original(**{**options, "window": None}))


def plant_documents_that_meet(patch: pytest.MonkeyPatch) -> None:
    original = ulysses.local_attention

    def attention(*args: Any, **options: Any) -> Tensor:
        return original(*args, **{**options, "document_offsets": None})

    patch.setattr(ulysses, "local_attention", attention)


def plant_thawed_base(patch: pytest.MonkeyPatch) -> None:
    original = model.add_adapters

    def add(base: Any, config: Any) -> Any:
        adapted = original(base, config)
        adapted.get_input_embeddings().weight.requires_grad_(True)
        return adapted

    patch.setattr(model, "add_adapters", add)


def plant_lost_adapters(patch: pytest.MonkeyPatch) -> None:
    original = weight_sums.WeightSums.wants

    def wants(self: Any, param: Tensor | None) -> bool:
        return original(self, param) and min(param.shape) > 4

    patch.setattr(weight_sums.WeightSums, "wants", wants)


# -- steps, ranks and reducers ------------------------------------------------------------------------


def plant_mean_of_means(patch: pytest.MonkeyPatch) -> None:
    """The mean over each micro-batch, and the mean of those."""
    summed = evaluation.summed_nll

    def mean(engine: Any, batch: dict[str, Tensor], device: torch.device) -> Tensor:
        return summed(engine, batch, device) / (batch["shift_labels"] != -100).sum().clamp(min=1)

    def count(micro_batches: Any, groups: Any, device: torch.device) -> Tensor:
        return torch.tensor(float(len(list(micro_batches))), dtype=torch.float64)

    patch.setattr(evaluation, "summed_nll", mean)
    patch.setattr(token_loss, "count_tokens", count)


def plant_count_of_this_rank(patch: pytest.MonkeyPatch) -> None:
    """Each rank divides by its own tokens, and the means are averaged."""

    def count(micro_batches: Any, groups: Any, device: torch.device) -> Tensor:
        local = sum((labels != -100).sum() for labels in micro_batches)
        return local.to(torch.float64) * groups.world_size

    patch.setattr(token_loss, "count_tokens", count)


def plant_label_lost_at_the_border(patch: pytest.MonkeyPatch) -> None:
    """Labels shifted inside each shard: its last token has nothing to predict."""
    original = sequence.shard_batch

    def shard(batch: dict[str, Tensor], groups: Any, **options: Any) -> dict[str, Tensor]:
        found = original(batch, groups, **options)
        found["shift_labels"][:, -1] = -100
        return found

    patch.setattr(sequence, "shard_batch", shard)


def plant_kv_gradient_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    """Of a key/value head that ranks share, the gradient of the first of them alone."""
    original = torch.stack
    unpack = exchange.Exchange._unpack_uneven

    def first_alone(parts: list[Tensor], *args: Any, **options: Any) -> Tensor:
        return original([parts[0], *(torch.zeros_like(part) for part in parts[1:])], *args, **options)

    def unpack_uneven(self: Any, *args: Any) -> Any:
        torch.stack = first_alone
        try:
            return unpack(self, *args)
        finally:
            torch.stack = original

    patch.setattr(exchange.Exchange, "_unpack_uneven", unpack_uneven)


class _DeadCollective(torch.autograd.Function):
    """An exchange whose backward is of an empty buffer: gradients are zero without a word."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, *sizes: Any) -> Tensor:
        ctx.shape = sent.shape
        return exchange_all_to_all(sent, *sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return grad.new_zeros(ctx.shape), None, None, None


exchange_all_to_all = exchange._all_to_all


def plant_dead_collective(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(exchange, "_all_to_all", _DeadCollective.apply)


def plant_unknown_divisor(patch: pytest.MonkeyPatch) -> None:
    """What the reducer divides by is taken for granted: gradients are too small by the number of ranks."""
    patch.setattr(probe, "measure_reducer_divisor", lambda *args: 1.0)


def plant_evaluation_of_one_shard(patch: pytest.MonkeyPatch) -> None:
    """Training is right, and evaluation is of this rank's tokens alone."""
    original = token_loss.count_tokens

    def count(micro_batches: Any, groups: Any, device: torch.device) -> Tensor:
        if torch.is_grad_enabled():
            return original(micro_batches, groups, device)
        return sum((labels != -100).sum() for labels in micro_batches).to(torch.float64)

    patch.setattr(token_loss, "count_tokens", count)
