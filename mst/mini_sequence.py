"""The op: a token-wise function run tile by tile, and run again in backward.

Nothing of a tile survives it: forward keeps the inputs alone, backward rebuilds one tile at a time. The
weights are inputs of the autograd Function and their gradients are summed in float32 and returned once, so
every hook on a weight (DDP, ZeRO, an optimizer in backward) fires once a backward, as it would without tiles.

The graph has two nodes. `_Keep` saves the inputs, `_Run` computes the outputs and saves nothing; in backward
`_Run` comes first and leaves the outputs' gradients to `_Keep`, which does the work. The reason is the layer
checkpoint: its recomputation ends as soon as the layer's last saved tensor is there again, and the last one
here is saved before a tile has run. A layer that saves nothing after this (a residual sum does not) therefore
runs the tiles twice a step, in forward and in backward, and not a third time in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from .tiling import number_of_tiles

Output = TypeVar("Output", Tensor, tuple[Tensor, ...])


def mini_sequence(
    fn: Callable[..., Output],
    x: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    params: Iterable[Tensor],
    *,
    tile_tokens: int = 4096,
    preserve_rng_state: bool = True,
    min_tiles: int = 0,
    token_dims: int | None = None,
) -> Output:
    """Apply a token-wise function in tiles of tokens, without keeping its intermediates.

    Inside a layer checkpoint with `use_reentrant=False`, `fn` runs twice a step and tile where nothing that
    comes after it in the layer saves a tensor (pre-norm), else three times (a norm after the MLP). With
    `use_reentrant=True` it is three times always.

    Args:
        fn: Function of one tile, `(1, T, ...)` for each tensor of `x`, to one tensor `(1, T, ...)` or a tuple
            of such; outputs may be integers. Token t of an output may depend on token t of the inputs and on
            `params` alone.
        x: One tensor or a sequence of them, handed on by position, or a mapping, handed on by keyword:
            `(..., L, D)` or `(..., L)`, all with the same token dimensions.
        params: Every tensor that `fn` uses and that a gradient must reach (`module.parameters()`).
        tile_tokens: Tokens of a tile; the last tile may be shorter.
        preserve_rng_state: Give dropout inside `fn` the same masks in backward as in forward.
        min_tiles: Run `fn` on tiles of no tokens until so many have run, in forward and in backward alike.
            For ranks whose lengths differ while `fn` has collectives: pass all of them the same number, the
            largest `number_of_tiles`. Results and gradients stay what they were.
        token_dims: Leading dimensions of every input that count tokens. None goes by the first input: all
            but the last of a floating-point tensor, all of an integer or bool one.

    Returns:
        What `fn` returns for all tokens at once, tensor or tuple: the token dimensions of `x`, then those of
        a tile's output behind `(1, T)`. Never a view of an input.

    Raises:
        ValueError: `tile_tokens` below 1, inputs that disagree on their tokens, outputs that are no tile's,
            or in backward a weight used by `fn` that is not in `params` (its gradient would be lost), or
            `create_graph=True`.
    """
    if tile_tokens < 1:
        raise ValueError(f"tile_tokens={tile_tokens} must be at least 1.")
    names = tuple(x) if isinstance(x, Mapping) else None
    inputs = (x,) if isinstance(x, Tensor) else tuple(x.values() if isinstance(x, Mapping) else x)
    token_shape = _token_shape(inputs, token_dims)
    rows = tuple(
        tensor.reshape(1, token_shape.numel(), *tensor.shape[len(token_shape) :]) for tensor in inputs
    )
    params = tuple(param for param in params if param.requires_grad)
    device = rows[0].device
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*rows, *params))
    tiling = _Tiling(
        fn,
        names,
        tile_tokens,
        min_tiles,
        _autocast_of(device),
        _rng_state(device) if differentiable and preserve_rng_state else None,
    )
    if differentiable:
        mailbox = _Mailbox()
        token = _Keep.apply(tiling, mailbox, len(rows), *rows, *params)
        out = _Run.apply(tiling, mailbox, rows, token)
    else:
        out = tiling.forward(rows)
        _refuse_unlisted_weights(_as_tuple(out), [])
    if isinstance(out, Tensor):
        return out.reshape(token_shape + out.shape[2:])
    return tuple(each.reshape(token_shape + each.shape[2:]) for each in out)


@dataclass(frozen=True)
class _Tiling:
    """How one call is cut, and the surroundings its tiles must be rebuilt in."""

    fn: Callable[..., Tensor | tuple[Tensor, ...]]
    names: tuple[str, ...] | None
    tile_tokens: int
    min_tiles: int
    autocast: tuple[str, bool, torch.dtype] | None
    rng_state: tuple[Tensor, Tensor | None] | None

    def slices(self, num_tokens: int) -> list[slice]:
        """The tokens of each tile; dummy tiles are empty and come last."""
        num_tiles = max(number_of_tiles(num_tokens, self.tile_tokens), self.min_tiles)
        bounds = [min(index * self.tile_tokens, num_tokens) for index in range(num_tiles + 1)]
        return [slice(start, stop) for start, stop in pairwise(bounds)]

    def run(self, tiles: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """One tile, under the autocast of the call, whatever backward is called in."""
        context: AbstractContextManager = nullcontext()
        if self.autocast is not None:
            device, enabled, dtype = self.autocast
            # No weight cache: a cast made without grad must not be met with grad.
            context = torch.autocast(device, dtype, enabled=enabled, cache_enabled=False)
        with context:
            if self.names is None:
                out = self.fn(*tiles)
            else:
                out = self.fn(**dict(zip(self.names, tiles, strict=True)))
        for each in _as_tuple(out):
            if each.shape[:2] != tiles[0].shape[:2]:
                raise ValueError(
                    f"fn returned {tuple(each.shape)} for a tile of {tuple(tiles[0].shape)}; "
                    "a token-wise function keeps the first two dimensions."
                )
        return out

    def forward(self, rows: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        num_tokens = rows[0].shape[1]
        wholes: list[Tensor] = []
        is_tensor = True
        for tokens in self.slices(num_tokens):
            out = self.run([row[:, tokens] for row in rows])
            parts = _as_tuple(out)
            if not wholes:
                is_tensor = isinstance(out, Tensor)
                if tokens == slice(0, num_tokens):
                    wholes = _own(parts, rows)
                    continue
                wholes = [part.new_empty(1, num_tokens, *part.shape[2:]) for part in parts]
            if tokens.start == tokens.stop:
                continue  # a dummy tile is run, and not looked at
            _check_like_first(parts, wholes)
            for whole, part in zip(wholes, parts, strict=True):
                whole[:, tokens] = part
        return wholes[0] if is_tensor else tuple(wholes)

    def backward(
        self,
        rows: Sequence[Tensor],
        wanted: Sequence[bool],
        params: Sequence[Tensor],
        out_grads: Sequence[Tensor | None],
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Gradients of the rows that want one, and of the weights; None for what no tile used."""
        row_sums, param_sums = _RowGrads(rows), _ParamGrads(params)
        is_checked = False
        with _replayed_rng(rows[0].device, self.rng_state):
            for tokens in self.slices(rows[0].shape[1]):
                tiles = [
                    row[:, tokens].detach().requires_grad_(want)
                    for row, want in zip(rows, wanted, strict=True)
                ]
                with torch.enable_grad():
                    outs = _as_tuple(self.run(tiles))
                # An output that the loss does not use has no gradient, nor has one that fn detached.
                pairs = [
                    (out, grad[:, tokens])
                    for out, grad in zip(outs, out_grads, strict=True)
                    if grad is not None and out.requires_grad
                ]
                if not pairs:
                    continue
                sources = [*(tile for tile in tiles if tile.requires_grad), *params]
                if not is_checked:
                    _refuse_unlisted_weights(outs, sources)
                    is_checked = True
                used, upstream = zip(*pairs, strict=True)
                with without_hooks(params):
                    grads = iter(torch.autograd.grad(used, sources, upstream, allow_unused=True))
                row_sums.put(tokens, [next(grads) if want else None for want in wanted])
                param_sums.add(list(grads), is_dummy=tokens.start == tokens.stop)
        return row_sums.grads, param_sums.totals()


class _Mailbox:
    """Where `_Run` leaves the gradients of the outputs for `_Keep`, within one backward."""

    def __init__(self) -> None:
        self._grads: tuple[Tensor | None, ...] | None = None

    def leave(self, grads: tuple[Tensor | None, ...]) -> None:
        # What lies here was left by a backward that failed on its way: nobody will come for it.
        self._grads = grads

    def take(self) -> tuple[Tensor | None, ...]:
        grads, self._grads = self._grads, None
        if grads is None:
            raise RuntimeError("two backward passes through one mini_sequence overlapped; run them in turn.")
        return grads


class _Keep(torch.autograd.Function):
    """Saves the inputs; its token ties `_Run` to it."""

    @staticmethod
    def forward(ctx, tiling: _Tiling, mailbox: _Mailbox, num_inputs: int, *tensors: Tensor) -> Tensor:
        ctx.tiling, ctx.mailbox, ctx.num_inputs = tiling, mailbox, num_inputs
        # Weights go by ctx, not by save_for_backward: a layer checkpoint around this hands saved tensors
        # back detached, and a gradient could not be taken by them.
        ctx.params = tensors[num_inputs:]
        ctx.save_for_backward(*tensors[:num_inputs])
        # On the inputs' device, so that both nodes run on its stream in backward; empty, so that it is free.
        return torch.empty(0, dtype=torch.float32, device=tensors[0].device)

    @staticmethod
    def backward(ctx, _token_grad: Tensor):
        out_grads = ctx.mailbox.take()
        wanted = ctx.needs_input_grad[3 : 3 + ctx.num_inputs]
        if all(grad is None for grad in out_grads):
            return (None,) * len(ctx.needs_input_grad)
        row_grads, param_grads = ctx.tiling.backward(ctx.saved_tensors, wanted, ctx.params, out_grads)
        return None, None, None, *row_grads, *param_grads


class _Run(torch.autograd.Function):
    """Computes the outputs; saves nothing."""

    @staticmethod
    def forward(ctx, tiling: _Tiling, mailbox: _Mailbox, rows: tuple[Tensor, ...], token: Tensor):
        ctx.mailbox, ctx.device = mailbox, token.device
        ctx.set_materialize_grads(False)
        out = tiling.forward(rows)
        ctx.mark_non_differentiable(
            *(each for each in _as_tuple(out) if not (each.is_floating_point() or each.is_complex()))
        )
        return out

    @staticmethod
    def backward(ctx, *out_grads: Tensor | None):
        if torch.is_grad_enabled():
            raise ValueError(
                "create_graph=True: mini_sequence has no second derivative, for it keeps no graph of its "
                "tiles; call fn itself where the gradient is differentiated."
            )
        ctx.mailbox.leave(out_grads)
        return None, None, None, torch.empty(0, dtype=torch.float32, device=ctx.device)


class _RowGrads:
    """Gradients of the inputs, filled tile by tile; None for an input that no tile used."""

    def __init__(self, rows: Sequence[Tensor]) -> None:
        self._rows = rows
        self.grads: list[Tensor | None] = [None] * len(rows)

    def put(self, tokens: slice, tile_grads: Sequence[Tensor | None]) -> None:
        for index, (row, tile_grad) in enumerate(zip(self._rows, tile_grads, strict=True)):
            if tile_grad is None:
                continue
            if self.grads[index] is None:
                if tile_grad.shape == row.shape:
                    self.grads[index] = tile_grad  # the only tile
                    continue
                self.grads[index] = torch.zeros_like(row)  # zeros: a later tile may not use this input
            self.grads[index][:, tokens] = tile_grad


class _ParamGrads:
    """Sums of the tiles' weight gradients, in at least float32; None for a weight that no tile used."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._dtypes = [param.dtype for param in params]
        self._sums: list[Tensor | None] = [None] * len(params)
        self._is_own = [False] * len(params)

    def add(self, grads: Sequence[Tensor | None], *, is_dummy: bool) -> None:
        for index, grad in enumerate(grads):
            if grad is None:
                continue
            total = self._sums[index]
            if is_dummy:
                # The gradient of no tokens is zero, also where fn divides by their number and says NaN.
                self._sums[index] = torch.zeros_like(grad) if total is None else total
            elif total is None:
                self._sums[index] = grad  # a single tile needs no wider sum
            elif self._is_own[index]:
                total += grad
            else:
                # Not in place: autograd may have handed the same first gradient to two weights, or a view
                # of the gradient it came from.
                wide = torch.promote_types(grad.dtype, torch.float32)
                self._sums[index] = total + grad if total.dtype == wide else total.to(wide).add_(grad)
                self._is_own[index] = True

    def totals(self) -> list[Tensor | None]:
        return [
            None if total is None else total.to(dtype)
            for total, dtype in zip(self._sums, self._dtypes, strict=True)
        ]


def _token_shape(inputs: Sequence[Tensor], token_dims: int | None) -> torch.Size:
    if not inputs:
        raise ValueError("x=() has no tensor; mini_sequence needs one to cut.")
    if token_dims is None:
        token_dims = max(inputs[0].dim() - inputs[0].is_floating_point(), 0)
    shapes = {tensor.shape[:token_dims] for tensor in inputs}
    if len(shapes) > 1:
        raise ValueError(
            f"the inputs of mini_sequence disagree on their tokens: {sorted(map(tuple, shapes))} are the "
            f"first {token_dims} dimensions of each; pass token_dims if fewer of them count tokens."
        )
    return inputs[0].shape[:token_dims]


def _as_tuple(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if isinstance(out, Tensor):
        return (out,)
    if not isinstance(out, (tuple, list)) or not out or not all(isinstance(each, Tensor) for each in out):
        raise ValueError(
            f"fn returned a {type(out).__name__}; mini_sequence takes a tensor or a tuple of tensors."
        )
    return tuple(out)


@contextmanager
def without_hooks(params: Iterable[Tensor]) -> Iterator[None]:
    """No hook on a weight (`Tensor.register_hook`) is called inside: autograd would for each tile's part.

    The hooks are for the whole gradient, and are called with it where it leaves this library's backward.
    """
    hooked = [param._backward_hooks for param in params if param._backward_hooks]
    taken = [(hooks, dict(hooks)) for hooks in hooked]
    for hooks, _ in taken:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, own in taken:
            hooks.update(own)


def _own(parts: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of a single tile, without a copy unless fn handed back an input or one tensor twice."""
    taken = {row.untyped_storage().data_ptr() for row in rows}
    owned = []
    for part in parts:
        # detach: autograd forbids to change a view made in a Function in place, which a fresh tensor seen
        # through `view` would be.
        memory = part.untyped_storage().data_ptr()
        owned.append(part.clone() if memory in taken else part.detach())
        taken.add(memory)
    return owned


def _check_like_first(parts: Sequence[Tensor], wholes: Sequence[Tensor]) -> None:
    looks, wanted = ([(t.shape[2:], t.dtype) for t in tensors] for tensors in (parts, wholes))
    if looks != wanted:
        raise ValueError(
            f"fn returned {looks} for one tile and {wanted} for an earlier one (dimensions behind the "
            "tokens, dtype); a token-wise function returns the same kind for all."
        )


def _refuse_unlisted_weights(outs: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """A leaf in the tile's graph that is not listed would lose its gradient without a word."""
    known = {id(tensor) for tensor in sources}
    # Behind a listed tensor that is no leaf stands the graph that made it, which is not the tile's.
    seen = {tensor.grad_fn for tensor in sources if tensor.grad_fn is not None}
    pending = [out.grad_fn for out in outs]
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


def _autocast_of(device: torch.device) -> tuple[str, bool, torch.dtype] | None:
    kind = device.type
    if not torch.amp.is_autocast_available(kind):
        return None
    return kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def _rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _replayed_rng(device: torch.device, state: tuple[Tensor, Tensor | None] | None) -> Iterator[None]:
    """Random numbers of an earlier moment inside, those of now again after it."""
    if state is None:
        yield
        return
    cpu_state, device_state = state
    with torch.random.fork_rng(devices=[] if device_state is None else [device]):
        torch.set_rng_state(cpu_state)
        if device_state is not None:
            torch.cuda.set_rng_state(device_state, device)
        yield
