"""The streamed decoder layer: only its input is kept, and backward runs two forwards in all.

Backward rebuilds attention's output (or takes it where it was saved), takes the MLP half forward and backward
one tile at a time, then attention backward one group of heads at a time, and at last the projections, tile by
tile. Gradients are written by hand, so that each buffer can take the next one's place: at many groups a token
costs its input, its gradient, attention's output, keys' and values' gradients and one group's working set.
Weight gradients sum in float32 and reach autograd once a layer, so hooks on weights fire as they would.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .attention_half import AttentionHalf
from .gradient_owner import GradientOwner
from .layer_memory import Chain, KeptOfAttention, OpenMemory, Rerun, Rows, log_sum_name
from .layer_parts import LayerParts
from .mlp_half import MLPHalf
from .projections import Positions
from .tiling import choose_tile_tokens
from .weight_sums import WeightSums

FREED_INPUTS = 4
"""Layer inputs gone from the GPU that make up for attention in one group instead of two: half of what the
kernel takes is 3.25 of them (see `workspace` in launch/bench/stub_attention.py, and the three gradients)."""


@dataclass(frozen=True)
class StreamOptions:
    """How layers are streamed."""

    tile_tokens: int | str | None = "auto"
    """None runs all tokens as one tile."""
    head_groups: int | str = "auto"
    attention_kernel: str = "auto"


@dataclass(frozen=True)
class Call:
    """One call of a layer: what its backward must know beside the input."""

    positions: Positions
    num_groups: int
    tiles: list[slice]
    dtype: torch.dtype
    autocast: tuple[str, torch.dtype] | None


class StreamedLayer:
    """A decoder layer of a known shape, run by tiles and groups of heads."""

    def __init__(
        self, module: nn.Module, parts: LayerParts, index: int, options: StreamOptions, chain: Chain
    ) -> None:
        self.module, self.index = module, index
        self._parts, self._options, self.chain = parts, options, chain
        self._original = module.forward
        self._signature = inspect.signature(module.forward)

    @property
    def attended_width(self) -> int:
        """Of attention's output, N x H."""
        return self._parts.heads.widths[0]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What takes the place of the module's forward."""
        named = self._signature.bind(*args, **kwargs).arguments
        named.update(named.pop("kwargs", {}))
        if not _can_stream(named):
            return self._original(*args, **kwargs)
        hidden = named["hidden_states"]
        self._parts.refuse_dropout(self.module)
        call = self._call(hidden, named)
        params = [param for param in self.module.parameters() if param.requires_grad]
        if torch.is_grad_enabled() and (hidden.requires_grad or params):
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            rerun = Rerun(self.module, self.module.forward, hidden.shape, args[1:], rest, call.autocast)
            return _Streamed.apply(self, call, rerun, hidden, *params)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            out, _ = self.run(_flat(hidden), call)
        return out.view(hidden.shape)

    def run(
        self, hidden: Tensor, call: Call, *, keeps: KeptOfAttention = "nothing"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward of `(B x S, D)`, without grad: the output, and by name what is kept of attention."""
        attention, mlp = self._halves(call)
        projected = attention.project(hidden, call.positions, call.num_groups, call.tiles, keep_normed=True)
        attended, log_sums = attention.attend(projected, call.positions, call.num_groups, hidden.shape[0])
        kept: dict[str, Tensor] = {}
        if keeps != "nothing":
            kept["attended"] = attended
            kept |= {log_sum_name(index): log_sum for index, log_sum in enumerate(log_sums)}
        if keeps == "all" and projected.all_heads is not None:
            kept["projected"] = projected.all_heads
        if keeps == "all" and attention.joins_once:
            kept["joined"] = torch.empty_like(hidden)
        del projected
        reuse = not kept and attended.shape == hidden.shape and attended.dtype == hidden.dtype
        out = attended if reuse and attended.is_contiguous() else torch.empty_like(hidden)
        for tile in call.tiles:
            place = kept["joined"][tile] if "joined" in kept else None
            joined, _ = attention.join(hidden[tile], attended[tile], place)
            mlp.forward(joined, out[tile])
        return out, kept

    def backward(
        self, call: Call, kept: OpenMemory, grad: Tensor, out: Tensor, params: list[Tensor]
    ) -> list[Tensor | None]:
        """Gradient of the input into `out` (which may be `grad`), and the weights'."""
        attention, mlp = self._halves(call)
        sums = WeightSums(params)
        hidden, projected, attended, ahead = kept.input, None, kept.attended, None
        num_groups = self._groups_of_backward(call, kept)
        if attended is None:
            projected = attention.project(hidden, call.positions, num_groups, call.tiles, keep_normed=True)
            attended, log_sums = attention.attend(projected, call.positions, num_groups, grad.shape[0])
            attended = Rows(attended)
            room: Tensor | None = attended.whole()
            if not projected.at_once:
                projected = None  # and with it what keeps the normalised tokens
        else:
            log_sums, room = kept.log_sums(), attended.writable()
            if kept.projected is not None:
                projected = attention.project(
                    hidden, call.positions, num_groups, call.tiles, saved=kept.projected
                )
                # The MLP half does not need the links between GPUs: what is known is sent beside it.
                ahead = attention.send_ahead(projected, call.positions, attended.whole(), num_groups)
        attended_grad = attention.new_attended_grad(grad.shape[0], grad.device)
        for tile in call.tiles:
            if kept.joined is None:
                joined, output = attention.join(hidden[tile], attended[tile])
            else:
                joined, output = kept.joined[tile], None
            mlp.backward(joined, grad[tile], out[tile], sums)
            tile_grad = None if attended_grad is None else attended_grad[tile]
            attention.join_backward(attended[tile], output, out[tile], tile_grad, sums)
            del joined, output
        sums.finish()
        if projected is None:
            projected = attention.project(hidden, call.positions, num_groups, call.tiles)
        projected.take_room(room)
        attention.attend_backward(
            projected,
            call.positions,
            attended.whole(),
            log_sums,
            num_groups,
            out,
            attended_grad,
            sums,
            ahead,
        )
        del ahead
        kept.release_log_sums()
        for tile in call.tiles:
            attention.project_backward(projected, tile, hidden[tile], out[tile], sums)
            kept.release(tile)
        return sums.totals(params)

    def _groups_of_backward(self, call: Call, kept: OpenMemory) -> int:
        """The call's groups; one, with "auto", where later layers' inputs have left room for it."""
        is_free = self._options.head_groups == "auto" and kept.freed_inputs >= FREED_INPUTS
        # Ranks of one sequence keep the log-sum-exp of each group, for that group alone.
        return 1 if is_free and kept.num_log_sums <= 1 else call.num_groups

    def _call(self, hidden: Tensor, named: dict[str, Any]) -> Call:
        device = hidden.device.type
        autocast = None
        if torch.is_autocast_enabled(device):
            autocast = (device, torch.get_autocast_dtype(device))
        num_tokens = hidden.shape[:-1].numel()
        tile_tokens = self._options.tile_tokens
        if tile_tokens == "auto":
            width = self._parts.intermediate_size
            tile_tokens = choose_tile_tokens(
                num_tokens, width, hidden.dtype.itemsize, num_intermediates=MLPHalf.INTERMEDIATES
            )
        cos, sin = named.get("position_embeddings") or (None, None)
        return Call(
            positions=Positions(hidden.shape[0], cos, sin, named.get("document_offsets")),
            num_groups=self._parts.head_groups(self._options.head_groups, num_tokens),
            tiles=_tiles(num_tokens, tile_tokens or num_tokens),
            dtype=hidden.dtype if autocast is None else autocast[1],
            autocast=autocast,
        )

    def _halves(self, call: Call) -> tuple[AttentionHalf, MLPHalf]:
        # Made at each call: under ZeRO-3 and autocast a weight is not the tensor that it was.
        return self._parts.halves(call.dtype, call.autocast, self._options.attention_kernel)


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, layer: StreamedLayer, call: Call, rerun: Rerun, hidden: Tensor, *params: Tensor
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            flat = _flat(hidden)
            this_pass, memory = layer.chain.enter(layer.index, rerun, flat, layer.attended_width)
            out, kept = layer.run(flat, call, keeps=this_pass.keeps_of_attention(layer.index))
            this_pass.keep_attention(memory, kept)
            memory.settle()
        out = out.view(hidden.shape)
        this_pass.gave(out)
        ctx.layer, ctx.call, ctx.memory = layer, call, memory
        # Weights go by ctx, not by save_for_backward: ZeRO-3 has changed what they hold by then.
        ctx.params = params
        ctx.save_for_backward(*memory.hand_over())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        references = GradientOwner.references(grad)
        layer, call = ctx.layer, ctx.call
        owned = layer.chain.gradients.owns(grad, references)
        flat = _flat(grad).contiguous()  # a sum's gradient is one number, expanded
        with torch.autocast(grad.device.type, enabled=False):
            kept = ctx.memory.open(ctx.saved_tensors)
            # No view of another tensor, so that whoever looks finds its memory in one pair of hands.
            out = grad if owned else torch.empty_like(grad, memory_format=torch.contiguous_format)
            grads = layer.backward(call, kept, flat, _flat(out), list(ctx.params))
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.memory.free_host()
        layer.chain.gradients.own(out)
        return None, None, None, out, *grads


def _tiles(num_tokens: int, tile_tokens: int) -> list[slice]:
    # An empty sequence is one empty tile.
    starts = range(0, max(num_tokens, 1), max(tile_tokens, 1))
    return [slice(start, min(start + tile_tokens, num_tokens)) for start in starts]


def _flat(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])


def _can_stream(named: dict[str, Any]) -> bool:
    """Whole causal sequences without a cache; everything else is the module's own business."""
    mask = named.get("attention_mask")
    # A mask of one element is the sign that there is nothing to mask (see inputs.py).
    return named.get("past_key_values") is None and (mask is None or mask.numel() == 1)
