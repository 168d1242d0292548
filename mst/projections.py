"""Queries, keys and values of a call: all of them at once, or a group of heads at a time.

All at once costs one product; their gradients then take their place. A group at a time (where groups are
many) leaves only a group's alive, and is done again in backward: 12 KiB a token less in a Llama-3-8B layer,
for one product in 33 more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.rope import rotate_
from .linear_map import JointMap, TokenMap
from .token_norm import TokenNorm
from .weight_sums import WeightSums

MOST_GROUPS_AT_ONCE = 2
"""With more groups, the projections of all heads would be the larger part of what attention needs."""


@dataclass(frozen=True)
class HeadShape:
    """Query heads N, key/value heads K, width H of each."""

    num_heads: int
    num_kv_heads: int
    width: int

    @property
    def widths(self) -> tuple[int, int, int]:
        """Of queries, keys and values."""
        kv_width = self.num_kv_heads * self.width
        return self.num_heads * self.width, kv_width, kv_width

    def group(self, num_groups: int) -> HeadShape:
        """The heads of one of several equal groups."""
        return HeadShape(self.num_heads // num_groups, self.num_kv_heads // num_groups, self.width)


@dataclass(frozen=True)
class Positions:
    """Where the tokens of a call stand, and who sees whom."""

    batch: int
    cos: Tensor | None
    sin: Tensor | None
    documents: object | None = None
    """Bounds of documents over all `B x S` tokens; None is one document a row."""

    def heads_first(self, buffer: Tensor, num_heads: int) -> Tensor:
        """`(B x S, n x H)` as attention takes it, `(B, n, S, H)`; one row where documents are told."""
        rows = 1 if self.documents is not None else self.batch
        return buffer.unflatten(-1, (num_heads, -1)).unflatten(0, (rows, -1)).transpose(1, 2)

    def rotate_(self, buffer: Tensor, num_heads: int) -> None:
        """Rotary embedding of `(B x S, n x H)`, in place."""
        if self.cos is not None:
            rotate_(self._by_token(buffer, num_heads), self.cos, self.sin)

    def rotate_back(self, grad: Tensor, num_heads: int, out: Tensor) -> None:
        """The gradient of what `rotate_` was given, from that of what it made; `out` may be `grad`."""
        if self.cos is not None:
            grad, out = self._by_token(grad, num_heads), self._by_token(out, num_heads)
            rotate_(grad, self.cos, self.sin, inverse=True, out=out)
        elif out is not grad:
            out.copy_(grad)

    def _by_token(self, buffer: Tensor, num_heads: int) -> Tensor:
        return buffer.unflatten(-1, (num_heads, -1)).unflatten(0, (self.batch, -1))


class HeadNorms(NamedTuple):
    """Norms of queries and keys, of each head or (`whole`) over all heads together."""

    query: TokenNorm | None = None
    key: TokenNorm | None = None
    whole: bool = False


class Projections:
    """The maps to queries, keys and values."""

    def __init__(self, maps: list[tuple[TokenMap, int]], heads: HeadShape, norms: HeadNorms) -> None:
        """`maps` are those of q, k and v with the first row of each: where it is fused, one map thrice."""
        self.heads, self.norms = heads, norms
        self._maps = maps
        plain = all(one.sliceable for one, _ in maps)
        self._fused = maps[0][0] is maps[1][0]
        self.sliceable = plain and not norms.whole
        self._whole = self._joint(0, 1) if plain else None

    def at_once(self, num_groups: int) -> bool:
        """Whether all heads are projected at once."""
        return num_groups <= MOST_GROUPS_AT_ONCE or not self.sliceable

    def of_group(self, index: int, num_groups: int) -> Callable[[Tensor, Tensor], None]:
        """What projects `(T, D)` into `(T, q + k + v)` of one group of heads."""
        if num_groups > 1:
            return self._joint(index, num_groups).forward
        return self._forward_modules if self._whole is None else self._whole.forward

    def backward(
        self, x: Tensor, grad_q: Tensor, grad_kv: Tensor, joined: Tensor | None, sums: WeightSums
    ) -> Tensor:
        """Gradient of `x` `(T, D)`; `joined` is both gradients side by side, where they are."""
        grad_k, grad_v = grad_kv.chunk(2, dim=-1)
        if self._whole is None and self._fused:
            return self._maps[0][0].backward(x, torch.cat([grad_q, grad_kv], dim=-1), sums)
        if self._whole is None:
            total = None
            for (one, _), grad in zip(self._maps, (grad_q, grad_k, grad_v), strict=True):
                total = one.backward(x, grad, sums, add_to=total)
            return total
        self._whole.add_weight_grads(x, (grad_q, grad_k, grad_v), sums)
        if joined is not None:
            return self._whole.input_grad(joined)
        total = self._whole.input_grad(grad_q, first=0)
        return self._whole.input_grad(grad_kv, first=grad_q.shape[1], add_to=total)

    def _joint(self, index: int, num_groups: int) -> JointMap:
        pieces = []
        for (one, first), width in zip(self._maps, self.heads.widths, strict=True):
            part = width // num_groups
            pieces.append((one, slice(first + index * part, first + (index + 1) * part)))
        return JointMap(pieces)

    def _forward_modules(self, x: Tensor, out: Tensor) -> None:
        if self._fused:
            self._maps[0][0].forward(x, out=out)
            return
        for (one, _), place in zip(self._maps, out.split(self.heads.widths, dim=-1), strict=True):
            one.forward(x, out=place)


class ProjectedHeads:
    """The queries, keys and values of one call, and then their gradients."""

    def __init__(
        self,
        projections: Projections,
        normed: Callable[[slice], Tensor],
        positions: Positions,
        num_groups: int,
        tiles: list[slice],
        dtype: torch.dtype,
        device: torch.device,
        saved: Tensor | None = None,
    ) -> None:
        """`normed` gives a tile `(T, D)` of what is projected; `saved` is `all_heads` of an earlier call."""
        self._projections, self._normed, self._positions = projections, normed, positions
        self._num_groups, self._tiles, self._dtype = num_groups, tiles, dtype
        self._device = device
        self._part = projections.heads.group(num_groups)
        self._raw: dict[tuple[str, int], Tensor] = {}
        self._grad_q: Tensor | None = None
        self._grad_kv: Tensor | None = None
        self._all: Tensor | None = saved
        self._all_grads: Tensor | None = None
        self._is_saved = saved is not None
        self._prepared: tuple[Tensor, Tensor] | None = None
        if projections.at_once(num_groups):
            if not self._is_saved:
                self._all = self._project(0, 1)
            self._prepare_all()

    @property
    def at_once(self) -> bool:
        """Whether the projections of all heads are here, and stay."""
        return self._all is not None

    @property
    def all_heads(self) -> Tensor | None:
        """The projections of all heads `(S, q + k + v)`, rotated but where a norm comes first; or None."""
        return self._all

    def group(self, index: int, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a group, as attention takes them; all heads are one group of one."""
        part = self._projections.heads.group(num_groups)
        if self._all is None:
            assert num_groups == self._num_groups
            query, key, value = self._project(index, self._num_groups).split(part.widths, dim=-1)
        else:
            parts = self._all.split(self._projections.heads.widths, dim=-1)
            query, key, value = (
                one[:, columns(index, width)] for one, width in zip(parts, part.widths, strict=True)
            )
        query, key = self._prepare(index, part, query, key)
        place = self._positions.heads_first
        return (
            place(query, part.num_heads),
            place(key, part.num_kv_heads),
            place(value, part.num_kv_heads),
        )

    def let_go(self, index: int) -> None:
        """A group has been attended to and no gradient of it will come: forget what went into its norms."""
        self._raw.pop(("query", index), None)
        self._raw.pop(("key", index), None)

    def take_room(self, attended: Tensor | None) -> None:
        """Say where gradients go: over all projections, else over attention's output, else beside it."""
        if self._all is not None and not self._projections.norms.whole:
            # What is saved is autograd's, for another backward.
            self._all_grads = torch.empty_like(self._all) if self._is_saved else self._all
            return
        queries, keys, _ = self._projections.heads.widths
        num_tokens = self._tiles[-1].stop
        new = {"dtype": self._dtype, "device": self._device}
        self._grad_q = torch.empty(num_tokens, queries, **new) if attended is None else attended
        self._grad_kv = torch.empty(num_tokens, 2 * keys, **new)

    def put_grads(self, index: int, grads: tuple[Tensor, Tensor, Tensor], sums: WeightSums) -> None:
        """A group's gradients as attention gives them, back through the rotation and per-head norms."""
        part, norms = self._part, self._projections.norms
        query, key, value = (grad.transpose(1, 2).flatten(2).flatten(0, 1) for grad in grads)
        queries, keys, values = self._grad_places()
        places = queries[:, columns(index, part.widths[0])], keys[:, columns(index, part.widths[1])]
        self._put(("query", index), query, places[0], part.num_heads, norms.query, sums)
        self._put(("key", index), key, places[1], part.num_kv_heads, norms.key, sums)
        values[:, columns(index, part.widths[2])] = value

    def backward(self, tile: slice, sums: WeightSums) -> Tensor:
        """Gradient of a tile of what was projected."""
        projections = self._projections
        if self._grad_q is None:
            joined = self._all_grads[tile]
            queries = projections.heads.widths[0]
            grad_q, grad_kv = joined[:, :queries], joined[:, queries:]
        else:
            joined, grad_q, grad_kv = None, self._grad_q[tile], self._grad_kv[tile]
        if projections.norms.whole:
            raw_q, raw_k, _ = self._all[tile].split(projections.heads.widths, dim=-1)
            grad_k = grad_kv[:, : raw_k.shape[1]]
            projections.norms.query.backward(raw_q, grad_q, sums, out=grad_q)
            projections.norms.key.backward(raw_k, grad_k, sums, out=grad_k)
        return projections.backward(self._normed(tile), grad_q, grad_kv, joined, sums)

    def _project(self, index: int, num_groups: int) -> Tensor:
        project = self._projections.of_group(index, num_groups)
        width = sum(self._projections.heads.widths) // num_groups
        out = torch.empty(self._tiles[-1].stop, width, dtype=self._dtype, device=self._device)
        for tile in self._tiles:
            project(self._normed(tile), out[tile])
        return out

    def _prepare_all(self) -> None:
        """Rotate all heads at once, in place where no norm is between."""
        heads, norms = self._projections.heads, self._projections.norms
        query, key, _ = self._all.split(heads.widths, dim=-1)
        if norms.whole:
            # What went into the norm is needed again, so the normalised ones live beside it.
            query, key = norms.query.forward(query), norms.key.forward(key)
            self._prepared = query, key
        if norms.whole or (norms.query is None and not self._is_saved):
            self._positions.rotate_(query, heads.num_heads)
            self._positions.rotate_(key, heads.num_kv_heads)

    def _prepare(self, index: int, part: HeadShape, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """A group's queries and keys, normalised and rotated."""
        norms = self._projections.norms
        if self._prepared is not None:
            query, key = self._prepared
            return query[:, columns(index, part.widths[0])], key[:, columns(index, part.widths[1])]
        if norms.query is not None:
            self._raw |= {("query", index): query, ("key", index): key}
            query = _normed_heads(norms.query, query, part.num_heads)
            key = _normed_heads(norms.key, key, part.num_kv_heads)
        elif self._all is not None:
            return query, key
        self._positions.rotate_(query, part.num_heads)
        self._positions.rotate_(key, part.num_kv_heads)
        return query, key

    def _put(
        self,
        name: tuple[str, int],
        grad: Tensor,
        place: Tensor,
        num_heads: int,
        norm: TokenNorm | None,
        sums: WeightSums,
    ) -> None:
        if norm is None or self._projections.norms.whole:
            self._positions.rotate_back(grad, num_heads, place)
            return
        self._positions.rotate_back(grad, num_heads, grad)
        raw, grad, place = (
            flat.unflatten(-1, (num_heads, -1)) for flat in (self._raw.pop(name), grad, place)
        )
        norm.backward(raw, grad, sums, out=place)

    def _grad_places(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._grad_q is None:
            return self._all_grads.split(self._projections.heads.widths, dim=-1)
        return self._grad_q, *self._grad_kv.chunk(2, dim=-1)


def columns(index: int, width: int) -> slice:
    """The columns of one of several equal groups."""
    return slice(index * width, (index + 1) * width)


def _normed_heads(norm: TokenNorm, flat: Tensor, num_heads: int) -> Tensor:
    return norm.forward(flat.unflatten(-1, (num_heads, -1))).flatten(1)
