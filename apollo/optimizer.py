"""`Apollo`: steps of AdamW's kind with a state of a few numbers a channel, on any layout of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from . import low_rank, whole_matrices
from .eight_bit import adamw_8bit
from .elementwise import adamw
from .factored import factored
from .layout import Matrices
from .low_rank import Projected
from .options import CHANNEL_RANK, TENSOR_ALPHA, TENSOR_RANK, ScaleType, check, named, named_groups
from .placement import FlatPart, Placed, place, place_flat
from .portable import as_dtensors, in_8_bits
from .projection import mixed
from .report import MemoryReport, memory_report
from .selection import Rule, whole_shape
from .sharded import Exchange
from .slots import Rounding, Slot

Work = tuple[dict[str, Any], Placed]

ELEMENTWISE: dict[str, Callable[..., None]] = {
    "adamw": adamw,
    "adamw_8bit": adamw_8bit,
    "factored": factored,
}


class Apollo(Optimizer):
    """APOLLO and APOLLO-Mini (arXiv 2412.05270).

    A projected weight of m x n keeps `2 max(m, n) rank + 2` numbers: two moments of a projection of its
    gradient, the norm of its last update, and a step count. The projection itself comes from the seed, the
    parameter's name and the step, so that one process, DDP, FSDP2 and ZeRO take the same steps, and any of
    them goes on from another's state. No step waits for the device.

    Args:
        params: Parameters, `(name, parameter)` pairs such as `model.named_parameters()`, or groups, such as
            `parameter_groups(model)` makes. Without names they are known by their places, and a run can be
            gone on with only in the same order.
        lr: Learning rate. The paper's for pre-training; 1e-5 to 1e-4 for fine-tuning.
        rank: Of the projection; None is 256, and 1 where `scale_type` is "tensor". A quarter of the hidden
            size in the paper. Weights whose shorter side is not above it get AdamW.
        scale_type: "channel" scales each row (of a tall matrix; each column of a wide one) by itself,
            "tensor" a whole matrix (APOLLO-Mini).
        update_gap: Steps for which a projection stays.
        alpha: What updates are multiplied by, as it is: apollo-torch's `scale` is its square. None is 1, and
            the root of 128 where `scale_type` is "tensor"; for fine-tuning the paper has 2 or 1 there.
        betas: Decay of the moments, AdamW's too.
        eps: Added to the root of the second moment, AdamW's too.
        weight_decay: Decoupled, as AdamW's.
        norm_growth_limit: An update's norm is at most so many times the last one's; None sets no limit.
        rounding: How bf16 weights are written: "stochastic", "nearest", or "master", which keeps a float32
            copy. Wider weights are not rounded.
        seed: Of the projections and of stochastic rounding.

    A group may set any of these for itself, and `rule`: "low_rank", "adamw", "adamw_8bit" or "factored". None
    is "low_rank" for matrices and batches of matrices, "adamw" for all else.

    Raises:
        ValueError: An option that is out of range, or a group with names that are not its parameters'.
    """

    _flat_parts: Mapping[Tensor, tuple[dict[str, Any], Sequence[FlatPart]]] = MappingProxyType({})
    _flat_group: dist.ProcessGroup | None = None
    _known_groups: Sequence[tuple[int, int]] = ()
    _known_places: Mapping[Tensor, tuple[dict[str, Any], str]] = MappingProxyType({})

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        *,
        rank: int | None = None,
        scale_type: ScaleType = "channel",
        update_gap: int = 200,
        alpha: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        norm_growth_limit: float | None = 1.01,
        rounding: Rounding = "stochastic",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "rank": rank,
            "scale_type": scale_type,
            "update_gap": update_gap,
            "alpha": alpha,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "norm_growth_limit": norm_growth_limit,
            "rounding": rounding,
            "seed": seed,
            "rule": None,
        }
        super().__init__(named_groups(params), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As any optimizer's; `names` are the parameters', by their places if left out."""
        group = named(param_group, len(self.param_groups))
        taken = {name for other in self.param_groups for name in other["names"]}
        if not taken.isdisjoint(group["names"]):
            raise ValueError(
                f"param group {len(self.param_groups)} and one before it both have "
                f"{sorted(taken.intersection(group['names']))}; give each one its own name."
            )
        for key, value in self.defaults.items():
            group.setdefault(key, value)
        if group["rank"] is None:
            group["rank"] = CHANNEL_RANK if group["scale_type"] == "channel" else TENSOR_RANK
        if group["alpha"] is None:
            group["alpha"] = 1.0 if group["scale_type"] == "channel" else TENSOR_ALPHA
        check(group)
        group["has_matrix"] = any(len(whole_shape(param)) > 1 for param in group["params"])
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights that have a gradient.

        Ranks that share weights must call it together, with gradients of the same weights.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update(self._due())
        return loss

    @torch.no_grad()
    def step_parameters(self, params: Sequence[Tensor]) -> None:
        """Update some weights alone, as when each has its step in the backward pass.

        Raises:
            KeyError: A parameter that is not this optimizer's.
        """
        places = self._places()
        found = [(places[param], param) for param in params]
        self._update((group, place(name, param, self.state)) for (group, name), param in found)

    def _places(self) -> Mapping[Tensor, tuple[dict[str, Any], str]]:
        """Group and name of each parameter; made anew where the groups or their members have changed."""
        now = [(id(group), len(group["params"])) for group in self.param_groups]
        if self._known_groups != now:
            self._known_groups = now
            self._known_places = {
                param: (group, name)
                for group in self.param_groups
                for name, param in zip(group["names"], group["params"], strict=True)
            }
        return self._known_places

    def lay_out(
        self,
        flat_parts: Mapping[Tensor, tuple[dict[str, Any], Sequence[FlatPart]]],
        group: dist.ProcessGroup | None,
    ) -> None:
        """Say what the flat tensors are made of that take the parameters' places in the groups.

        Args:
            flat_parts: For each flat tensor its group, one of `param_groups`, and its parts, those too of
                which this rank has no element, in the same order on every rank.
            group: The ranks that share them.
        """
        self._flat_parts, self._flat_group = dict(flat_parts), group

    def reset(self) -> None:
        """Forget all steps that were taken."""
        self.state.clear()

    def memory_report(self) -> MemoryReport:
        """Bytes of states and weights, by rule."""
        return memory_report(self)

    def state_dict(self) -> dict[str, Any]:
        """As any optimizer's; 8-bit moments of DTensors are float32 in it, for another number of ranks."""
        saved = super().state_dict()
        params = [param for group in self.param_groups for param in group["params"]]
        saved["state"] = {
            key: as_dtensors(params[key], state) if isinstance(key, int) else state
            for key, state in saved["state"].items()
        }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's, except that states are not cast to the weights' dtype where that is narrower.

        Raises:
            ValueError: States of other parameters.
        """
        saved_names = [name for group in state_dict["param_groups"] for name in group.get("names", ())]
        names = [name for group in self.param_groups for name in group["names"]]
        if saved_names != names:
            other = next((name for name in saved_names if name not in names), "in another order")
            raise ValueError(
                f"the states are of other parameters: {len(saved_names)} there ({other}), {len(names)} here; "
                "make the optimizer with the groups and names that it was saved with."
            )
        groups_before = self.param_groups
        super().load_state_dict(state_dict)
        made_anew = {id(old): new for old, new in zip(groups_before, self.param_groups, strict=True)}
        self._flat_parts = {
            flat: (made_anew[id(group)], parts) for flat, (group, parts) in self._flat_parts.items()
        }
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        members = [(group, param) for group in self.param_groups for param in group["params"]]
        for index, (group, param) in zip(indices, members, strict=True):
            if index in state_dict["state"]:
                state = _copied(state_dict["state"][index], param)
                was_dtensor = "exp_avg" in state and "exp_avg_scale" not in state
                is_8_bit = self.rule_of(group, param.shape) == "adamw_8bit"
                self.state[param] = in_8_bits(state) if is_8_bit and was_dtensor else state
        for _, placed in self._placed_flat(self._flat_parts):
            if placed.owner in self.state:
                self.state[placed.owner] = _copied(placed.kept, placed.weight)

    def rule_of(self, group: Mapping[str, Any], shape: tuple[int, ...]) -> Rule:
        """The rule of a weight of a group; a projection is narrower than the weight's shorter side."""
        return _rule_of(group["rule"], group["rank"], shape)

    def placed(self) -> Iterator[Work]:
        """Each parameter with its group, as far as it is here."""
        if self._flat_parts:
            return self._placed_flat(self._flat_parts)
        return self._due()

    def _due(self) -> Iterator[Work]:
        """What a step is about: of flat tensors, DeepSpeed may have some of them in the groups at a time."""
        for group in self.param_groups:
            if self._flat_parts:
                yield from self._placed_flat(group["params"])
            else:
                yield from self._placed_in(group)

    def _placed_flat(self, flats: Iterable[Tensor]) -> Iterator[Work]:
        me = 0 if self._flat_group is None else dist.get_rank(self._flat_group)
        for flat in flats:
            group, parts = self._flat_parts[flat]
            for part in parts:
                yield group, place_flat(part, flat, self._flat_group, me, self.state)

    def _placed_in(self, group: dict[str, Any]) -> Iterator[Work]:
        params = group["params"]
        has_matrix = any(param.dim() > 1 for param in params)
        if len(params) != len(group["names"]) or (group["has_matrix"] and not has_matrix):
            raise RuntimeError(
                f"{len(group['names'])} parameters of a group have become {len(params)}, as when DeepSpeed "
                "lays them end to end; call longseq.distributed.lay_out_apollo(engine.optimizer, "
                "engine.module) after deepspeed.initialize."
            )
        for name, param in zip(group["names"], params, strict=True):
            yield group, place(name, param, self.state)

    def _update(self, work: Iterable[Work]) -> None:
        projected: list[Work] = []
        others: dict[tuple[str, int, str], list[Work]] = {}
        for group, placed in work:
            if placed.grad is None:
                continue
            if placed.grad.is_sparse:
                raise RuntimeError(
                    f"the gradient of {placed.name} is sparse; make its layer with sparse=False."
                )
            rule = self.rule_of(group, placed.layout.shape)
            if rule == "low_rank":
                projected.append((group, placed))
            elif placed.weight.numel() or placed.whole is not None:  # of a DTensor each rank has a shard
                # Weights in 8 bits one by one: each has a float32 copy meanwhile.
                alone = "" if placed.quantized is None else placed.name
                others.setdefault((rule, id(group), alone), []).append((group, placed))
        _update_projected(projected)
        for (rule, *_), members in others.items():
            _update_others(rule, members[0][0], [placed for _, placed in members])
        for members in (projected, *others.values()):
            self.state.update((placed.owner, placed.kept) for _, placed in members)


@cache
def _rule_of(rule: Rule | None, rank: int, shape: tuple[int, ...]) -> Rule:
    is_matrix = len(shape) in (2, 3)
    rule = rule or ("low_rank" if is_matrix else "adamw")
    return "adamw" if rule == "low_rank" and not (is_matrix and Matrices.of(shape).width > rank) else rule


def _update_projected(work: list[Work]) -> None:
    alone: list[Projected] = []
    by_ranks: dict[Any, list[Projected]] = {}
    states = []
    for group, placed in work:
        state = placed.local()
        one = Projected(
            placed.name, placed.weight, placed.grad, state, group, placed.layout, placed.me, placed.quantized
        )
        states.append((placed, state))
        (alone if placed.group is None else by_ranks.setdefault(placed.group, [])).append(one)
    low_rank.start([*alone, *(one for members in by_ranks.values() for one in members)])
    for one in whole_matrices.step(alone):
        low_rank.step_alone(one)
    for ranks, members in by_ranks.items():
        low_rank.step_together(members, Exchange(members, ranks))
    for placed, state in states:
        placed.keep(state)


def _update_others(rule: str, group: dict[str, Any], members: list[Placed]) -> None:
    slots = [_slot(rule, placed, group["seed"]) for placed in members]
    ELEMENTWISE[rule](
        slots,
        lr=group["lr"],
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        rounding=group["rounding"],
    )
    for placed, slot in zip(members, slots, strict=True):
        if placed.quantized is not None:
            key = mixed(slot.key, int(slot.state["step"])) & 0xFFFFFFFF
            placed.quantized.store(slot.weight, key)
        elif slot.weight.data_ptr() != placed.weight.data_ptr():  # a copy, see `_slot`
            placed.weight.copy_(slot.weight.view(placed.weight.shape))
        shape = placed.weight.shape
        placed.keep(
            {
                key: value.view(shape) if value.shape == slot.weight.shape and key != "step" else value
                for key, value in slot.state.items()
            }
        )


def _slot(rule: str, placed: Placed, seed: int) -> Slot:
    if rule == "factored" and placed.group is not None:
        raise ValueError(
            f"rule 'factored' of {placed.name}: means of rows and columns are of whole matrices, and this "
            "one is spread over ranks; use 'adamw_8bit' or 'low_rank'."
        )
    weight, state = placed.weight, placed.local()
    if placed.quantized is not None:
        weight = placed.quantized.dequantize(dtype=torch.float32)
    row_stride = placed.layout.shape[-1] if placed.layout.shape else 0
    shape = weight.shape[-2:] if weight.dim() in (1, 2) else (-1, row_stride) if weight.dim() else (1,)
    state = {
        key: value.view(shape) if value.shape == weight.shape and key != "step" else value
        for key, value in state.items()
    }
    grad, key = placed.grad.reshape(shape), placed.key(seed)
    # Kernels of convolutions may lie with channels last: then it is a copy, row by row.
    return Slot(weight.reshape(shape), grad, state, key, placed.first, row_stride)


def _copied(state: Mapping[str, Any], weight: Tensor) -> dict[str, Any]:
    """A saved state where its weight is, as wide as a step wants it: kernels are told addresses alone."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    copied = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            is_kept = key == "step" or key.endswith("_scale") or not value.is_floating_point()
            device = "cpu" if key == "step" else weight.device
            value = value.to(device, value.dtype if is_kept else wide, copy=True)
        copied[key] = value
    return copied
