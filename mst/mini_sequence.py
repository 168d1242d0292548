"""The op: a token-wise function run tile by tile, and run again in backward.

Nothing of a tile survives it: forward keeps the inputs alone, backward rebuilds one tile at a time. The
weights are inputs of the autograd Function and their gradients are summed in float32 and returned once, so
every hook on a weight (DDP, ZeRO, an optimizer in backward) fires once a backward, as it would without tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor


def mini_sequence(
    fn: Callable[..., Tensor],
    x: Tensor | Sequence[Tensor],
    params: Iterable[Tensor],
    *,
    tile_tokens: int = 4096,
    preserve_rng_state: bool = True,
) -> Tensor:
    """Apply a token-wise function in tiles of tokens, without keeping its intermediates.

    Args:
        fn: Function of one tile, `(1, T, ...)` for each tensor of `x`, to `(1, T, ...)`. Token t of its
            output may depend on token t of its inputs and on `params` alone.
        x: One tensor or several, `(..., L, D)` or `(..., L)`: all with the same token dimensions, which are
            those of `x` but its last where it is one tensor, and those of the integer or shortest tensor
            where there are several.
        params: Every tensor that `fn` uses and that a gradient must reach (`module.parameters()`).
        tile_tokens: Tokens of a tile; the last tile may be shorter.
        preserve_rng_state: Give dropout inside `fn` the same masks in backward as in forward.

    Returns:
        What `fn` returns for all tokens at once: the token dimensions of `x`, then those of a tile's output
        behind `(1, T)`.

    Raises:
        ValueError: `tile_tokens` below 1, inputs that disagree on their tokens, an output that is no tile's,
            or (in backward) a weight used by `fn` that is not in `params`: its gradient would be lost.
    """
    if tile_tokens < 1:
        raise ValueError(f"tile_tokens={tile_tokens} must be at least 1.")
    inputs = (x,) if isinstance(x, Tensor) else tuple(x)
    token_shape = _token_shape(inputs)
    rows = tuple(
        tensor.reshape(1, token_shape.numel(), *tensor.shape[len(token_shape) :]) for tensor in inputs
    )
    params = tuple(param for param in params if param.requires_grad)
    tiling = _Tiling(fn, tile_tokens, len(rows), _autocast_of(rows[0]), preserve_rng_state)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*rows, *params)):
        out = _MiniSequence.apply(tiling, *rows, *params)
    else:
        out = tiling.forward(rows)
    return out.reshape(*token_shape, *out.shape[2:])


@dataclass(frozen=True)
class _Tiling:
    """How one call is cut, and the surroundings its tiles must be rebuilt in."""

    fn: Callable[..., Tensor]
    tile_tokens: int
    num_inputs: int
    autocast: tuple[str, torch.dtype] | None
    preserve_rng_state: bool

    def slices(self, num_tokens: int) -> list[slice]:
        # An empty sequence is one empty tile: fn still says what its output looks like.
        starts = range(0, max(num_tokens, 1), self.tile_tokens)
        return [slice(start, min(start + self.tile_tokens, num_tokens)) for start in starts]

    def run(self, tiles: Sequence[Tensor]) -> Tensor:
        """One tile. Autocast's weight cache is off: a cast made without grad must not be met with grad."""
        context: AbstractContextManager = nullcontext()
        if self.autocast is not None:
            device, dtype = self.autocast
            context = torch.autocast(device, dtype, cache_enabled=False)
        with context:
            out = self.fn(*tiles)
        if out.shape[:2] != tiles[0].shape[:2]:
            raise ValueError(
                f"fn returned {tuple(out.shape)} for a tile of {tuple(tiles[0].shape)}; "
                "a token-wise function keeps the first two dimensions."
            )
        return out

    def forward(self, rows: Sequence[Tensor]) -> Tensor:
        num_tokens = rows[0].shape[1]
        whole: Tensor | None = None
        for tokens in self.slices(num_tokens):
            out = self.run([row[:, tokens] for row in rows])
            if out.shape[1] == num_tokens:
                return out
            if whole is None:
                whole = out.new_empty(1, num_tokens, *out.shape[2:])
            whole[:, tokens] = out
        assert whole is not None
        return whole


class _MiniSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tiling: _Tiling, *tensors: Tensor) -> Tensor:
        rows = tensors[: tiling.num_inputs]
        ctx.tiling = tiling
        # Weights go by ctx, not by save_for_backward: a layer checkpoint around this hands saved tensors
        # back detached, and a gradient could not be taken by them.
        ctx.params = tensors[tiling.num_inputs :]
        ctx.rng_state = _rng_state(rows[0].device) if tiling.preserve_rng_state else None
        ctx.save_for_backward(*rows)
        out = tiling.forward(rows)
        # fn may hand back its input or a saved tensor; autograd wants an output of its own.
        return out.view_as(out) if any(out is row for row in rows) else out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        tiling: _Tiling = ctx.tiling
        rows, params = ctx.saved_tensors, ctx.params
        wanted = ctx.needs_input_grad[1 : 1 + tiling.num_inputs]
        row_grads = [torch.empty_like(row) if want else None for row, want in zip(rows, wanted, strict=True)]
        param_sums = _ParamSums(params)
        with _replayed_rng(rows[0].device, ctx.rng_state):
            for index, tokens in enumerate(tiling.slices(rows[0].shape[1])):
                tiles = [
                    row[:, tokens].detach().requires_grad_(want)
                    for row, want in zip(rows, wanted, strict=True)
                ]
                with torch.enable_grad():
                    out = tiling.run(tiles)
                if not out.requires_grad:
                    continue
                sources = [*(tile for tile in tiles if tile.requires_grad), *params]
                if index == 0:
                    _refuse_unlisted_weights(out, sources)
                grads = iter(torch.autograd.grad(out, sources, grad_out[:, tokens], allow_unused=True))
                for row_grad in row_grads:
                    if row_grad is not None:
                        tile_grad = next(grads)
                        row_grad[:, tokens] = 0 if tile_grad is None else tile_grad
                param_sums.add(list(grads))
        return (None, *row_grads, *param_sums.totals())


class _ParamSums:
    """Sums of the tiles' weight gradients, in at least float32; None for a weight no tile used."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._dtypes = [param.dtype for param in params]
        self._sums: list[Tensor | None] = [None] * len(params)

    def add(self, grads: Sequence[Tensor | None]) -> None:
        for index, grad in enumerate(grads):
            if grad is None:
                continue
            total = self._sums[index]
            if total is None:
                # A single tile needs no wider sum, so the first gradient is taken as it is.
                self._sums[index] = grad
                continue
            wide = torch.promote_types(grad.dtype, torch.float32)
            if total.dtype != wide or total.data_ptr() == grad.data_ptr():
                total = self._sums[index] = total.to(wide, copy=True)
            total += grad

    def totals(self) -> list[Tensor | None]:
        return [
            None if total is None else total.to(dtype)
            for total, dtype in zip(self._sums, self._dtypes, strict=True)
        ]


def _token_shape(inputs: Sequence[Tensor]) -> torch.Size:
    if len(inputs) == 1:
        return inputs[0].shape[:-1]
    num_dims = min(
        tensor.dim() - (1 if tensor.is_floating_point() and tensor.dim() > 1 else 0) for tensor in inputs
    )
    shapes = {tuple(tensor.shape[:num_dims]) for tensor in inputs}
    if len(shapes) > 1:
        raise ValueError(f"the inputs of mini_sequence disagree on their tokens: {sorted(shapes)}.")
    return inputs[0].shape[:num_dims]


def _refuse_unlisted_weights(out: Tensor, sources: Sequence[Tensor]) -> None:
    """A leaf in the tile's graph that is not listed would lose its gradient without a word."""
    known = {id(tensor) for tensor in sources}
    # Behind a listed tensor that is no leaf stands the graph that made it, which is not the tile's.
    seen = {tensor.grad_fn for tensor in sources if tensor.grad_fn is not None}
    pending = [out.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise ValueError(
                f"fn uses a weight of shape {tuple(leaf.shape)} that requires a gradient but is not in "
                "params; pass every weight that fn uses."
            )
        pending.extend(next_node for next_node, _ in node.next_functions)


def _autocast_of(tensor: Tensor) -> tuple[str, torch.dtype] | None:
    device = tensor.device.type
    return (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


def _rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _replayed_rng(device: torch.device, state: tuple[Tensor, Tensor | None] | None) -> AbstractContextManager:
    if state is None:
        return nullcontext()
    return _ReplayedRng(device, state)


class _ReplayedRng:
    """Random numbers of an earlier moment inside, those of now again after it."""

    def __init__(self, device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
        self._state = state
        self._fork = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        self._device = device

    def __enter__(self) -> None:
        self._fork.__enter__()
        cpu_state, device_state = self._state
        torch.set_rng_state(cpu_state)
        if device_state is not None:
            torch.cuda.set_rng_state(device_state, self._device)

    def __exit__(self, *exc_info) -> None:
        self._fork.__exit__(*exc_info)
