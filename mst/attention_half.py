"""The first half of a decoder layer, `x + post_norm(o(attention(q, k, v of norm(x))))`.

Token-wise parts run on tiles, attention on one group of heads after the other (see projections.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..distributed.attention import log_sums_of_groups
from ..distributed.exchange import as_wide
from .linear_map import TokenMap
from .projections import Positions, ProjectedHeads, Projections, columns
from .token_norm import TokenNorm
from .weight_sums import WeightSums


class AttentionHalf:
    """Everything of a layer up to the MLP's norm."""

    def __init__(
        self,
        norm: TokenNorm | None,
        projections: Projections,
        output: TokenMap,
        post_norm: TokenNorm | None,
        attention: Any,
        options: Any,
        dtype: torch.dtype,
    ) -> None:
        """`attention` has `forward_groups` and `backward_groups`, as `UlyssesAttention` has."""
        self._norm, self._projections, self._output, self._post_norm = norm, projections, output, post_norm
        self._attention, self._options, self._dtype = attention, options, dtype
        # With the sequence over several ranks, a rank's log-sum-exp is that of its own heads of each group.
        self._splits_log_sums = getattr(attention, "sp_size", 1) == 1

    @property
    def joins_once(self) -> bool:
        """Whether backward needs no more of `join` than its sum."""
        return self._post_norm is None

    def project(
        self,
        hidden: Tensor,
        positions: Positions,
        num_groups: int,
        tiles: list[slice],
        *,
        keep_normed: bool = False,
        saved: Tensor | None = None,
    ) -> ProjectedHeads:
        """Queries, keys and values of `(B x S, D)`; `keep_normed` trades 2 D bytes a token for time.

        `saved` are those of an earlier call, where they were kept.
        """

        def norm_tile(tile: slice) -> Tensor:
            return self._normed(hidden[tile])

        normed: Callable[[slice], Tensor] = norm_tile
        if keep_normed and not self._projections.at_once(num_groups):
            whole = torch.empty(hidden.shape, dtype=self._dtype, device=hidden.device)
            for tile in tiles:
                self._normed(hidden[tile], out=whole[tile])
            normed = whole.__getitem__
        return ProjectedHeads(
            self._projections, normed, positions, num_groups, tiles, self._dtype, hidden.device, saved
        )

    def attend(
        self, projected: ProjectedHeads, positions: Positions, num_groups: int, num_tokens: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Attention's output `(B x S, N x H)`, and the log-sum-exp of each group that it was done in."""
        if projected.at_once and self._splits_log_sums:
            num_groups = 1  # forward needs no room that grows with the heads: only backward is done in groups
        whole: Tensor | None = None
        log_sums = []
        groups = (projected.group(index, num_groups) for index in range(num_groups))
        attended = self._attention.forward_groups(groups, self._options, positions.documents)
        # By `next`, here and below: `enumerate` holds what it gave last until it has the next one.
        for index in range(num_groups):
            out, log_sum = next(attended)
            log_sums.append(log_sum)
            projected.let_go(index)
            out = out.transpose(1, 2).flatten(2).flatten(0, 1)
            if num_groups == 1:
                return out, log_sums
            if whole is None:
                whole = out.new_empty(num_tokens, num_groups * out.shape[1])
            place, out = as_wide((whole[:, columns(index, out.shape[1])], out))
            place.copy_(out)
            del out
        assert whole is not None
        return whole, log_sums

    def join(
        self, hidden: Tensor, attended: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """A tile of `h` (into `out`, if `joins_once`), and the output projection where its norm needs it."""
        if self._post_norm is None:
            return self._output.forward(attended, residual=hidden, out=out), None
        output = self._output.forward(attended)
        return self._post_norm.forward(output, dtype=hidden.dtype).add_(hidden), output

    def new_attended_grad(self, num_tokens: int, device: torch.device) -> Tensor | None:
        """Room for the gradient of attention's output, unless it can be had from `h`'s a group at a time."""
        if self._post_norm is None and self._output.sliceable:
            return None
        return torch.empty(num_tokens, self._projections.heads.widths[0], dtype=self._dtype, device=device)

    def join_backward(
        self,
        attended: Tensor,
        output: Tensor | None,
        grad: Tensor,
        attended_grad: Tensor | None,
        sums: WeightSums,
    ) -> None:
        """A tile of the output projection's gradients, from that of `h`."""
        if self._post_norm is not None:
            grad = self._post_norm.backward(output, grad, sums)
        grad = grad.to(self._dtype)
        if attended_grad is None:
            self._output.add_weight_grads(attended, grad, sums)
        else:
            attended_grad.copy_(self._output.backward(attended, grad, sums))

    def send_ahead(
        self, projected: ProjectedHeads, positions: Positions, attended: Tensor, num_groups: int
    ) -> Any:
        """Send what is kept of attention to the ranks that share a sequence, for `attend_backward`."""
        heads = self._projections.heads.group(num_groups)
        return self._attention.send_ahead(
            (
                *projected.group(index, num_groups),
                positions.heads_first(attended[:, columns(index, heads.widths[0])], heads.num_heads),
            )
            for index in range(num_groups)
        )

    def attend_backward(
        self,
        projected: ProjectedHeads,
        positions: Positions,
        attended: Tensor,
        log_sums: list[Tensor],
        num_groups: int,
        grad: Tensor,
        attended_grad: Tensor | None,
        sums: WeightSums,
        ahead: Any = None,
    ) -> None:
        """From the gradient of `h` to those of queries, keys and values, which stay with `projected`."""
        heads = self._projections.heads.group(num_groups)
        if len(log_sums) < num_groups:
            log_sums = log_sums_of_groups(log_sums[0], num_groups)

        def of_group(index: int) -> tuple[Tensor, ...]:
            group = columns(index, heads.widths[0])
            if attended_grad is None:
                group_grad = self._output.input_grad(grad.to(self._dtype), columns=group)
            else:
                group_grad = attended_grad[:, group]
            group_grad = positions.heads_first(group_grad, heads.num_heads)
            if ahead is not None:
                return group_grad, log_sums[index]
            return (
                group_grad,
                *projected.group(index, num_groups),
                positions.heads_first(attended[:, group], heads.num_heads),
                log_sums[index],
            )

        found = self._attention.backward_groups(
            map(of_group, range(num_groups)), self._options, positions.documents, ahead
        )
        for index in range(num_groups):
            projected.put_grads(index, next(found), sums)

    def project_backward(
        self, projected: ProjectedHeads, tile: slice, hidden: Tensor, grad: Tensor, sums: WeightSums
    ) -> None:
        """A tile's way back to the layer's input: `grad` `(T, D)` of `h` becomes that of `x`."""
        normed_grad = projected.backward(tile, sums)
        if self._norm is None:
            grad += normed_grad
        else:
            self._norm.backward(hidden, normed_grad, sums, residual_grad=grad, out=grad)

    def _normed(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        if self._norm is not None:
            return self._norm.forward(hidden, out=out)
        return hidden.to(self._dtype) if out is None else out.copy_(hidden)
