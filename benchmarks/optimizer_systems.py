"""The optimizers that `optimizer.py` times, and whether they take the step that they should."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from longseq.apollo import Apollo
from longseq.apollo.layout import Layout
from longseq.apollo.low_rank import Projected, start, step_alone

Named = list[tuple[str, nn.Parameter]]
Shapes = Mapping[str, tuple[int, int]]
Keyed = TypeVar("Keyed")
"""Anything that has a `key`."""

BETAS, WEIGHT_DECAY = (0.9, 0.999), 0.01
ADAMW_EPS, PROJECTED_EPS = 1e-8, 1e-6
RANKS = {"llama-3-8b": 256, "llama-7b": 256, "tiny": 8}
SYSTEM_PACKAGES = {"bitsandbytes": "bitsandbytes", "apollo-torch": "apollo_torch"}

CHECK_LR = 0.01
"""Moves a weight by about half of itself: an update that is off shows through rounding to bf16."""
GRADIENT_SCALES = (1.0, 0.1, 3.0)
"""Of a check's steps; the last makes an update grow by more than its limit."""
FLOAT32_TOLERANCE = 1e-4
BF16_SPACING = 2.0**-7
"""The largest distance of neighbouring bf16 numbers over their size."""
STATE_KEYS = ("exp_avg", "exp_avg_sq", "update_norm")
HOST_ELEMENTS = 2**20
"""Up to here a check's float64 steps are taken on the CPU."""


@dataclass(frozen=True)
class System:
    """One optimizer, with what it keeps and must move."""

    key: str
    label: str
    make: Callable[[Named, float], Optimizer]
    """From named weights and a learning rate.

    Raises:
        ImportError: It is not installed.
    """
    rank: int = 0
    """Of its projection; 0: moments of each element."""
    moment_bytes: int = 2
    """Of a number of its moments, where weights are bf16."""
    truth: str | None = None
    """The rule that its float64 twin follows, "adamw" or "low_rank"; None: its numbers are its own."""
    ours: bool = False

    def moments(self, shapes: Shapes) -> int:
        """Numbers in both moments."""
        return sum(
            2 * max(rows, columns) * self.rank if self.rank else 2 * rows * columns
            for rows, columns in shapes.values()
        )

    def state_formula(self, shapes: Shapes) -> int:
        """Numbers of state: a matrix's moments, its step, and with a projection its last update's norm."""
        return self.moments(shapes) + (2 if self.rank else 1) * len(shapes)

    def moved_bytes(self, shapes: Shapes) -> int:
        """Bytes that a step on bf16 must move: weights and moments both ways; gradients twice if projected.

        A projected weight's update needs the norm of all of it, and so a second reading of the gradient.
        """
        elements = sum(rows * columns for rows, columns in shapes.values())
        return elements * (8 if self.rank else 6) + 2 * self.moment_bytes * self.moments(shapes)


def systems_of(shape: str) -> list[System]:
    """All of them, the yardstick first."""
    rank = RANKS[shape]
    found = [
        System("adamw-fused", "torch AdamW, fused", partial(_torch_adamw, fused=True), truth="adamw"),
        System("adamw-foreach", "torch AdamW, foreach", partial(_torch_adamw, foreach=True), truth="adamw"),
        System("adamw-8bit", "bitsandbytes AdamW8bit", _bitsandbytes, moment_bytes=1),
        System("apollo-torch", f"apollo-torch, rank {rank}", partial(_apollo_torch, rank=rank), rank),
        System("apollo-torch-mini", "apollo-torch, Mini", partial(_apollo_torch, rank=1, scale=128.0), 1),
    ]
    for rounding in ("stochastic", "nearest"):
        for key, label, moments, options in (
            ("adamw", "AdamW", 0, {"rule": "adamw"}),
            ("apollo", f"Apollo, rank {rank}", rank, {"rank": rank}),
            ("mini", "Apollo-Mini", 1, {"scale_type": "tensor"}),
        ):
            make = partial(_ours, rounding=rounding, **options)
            truth = "low_rank" if moments else "adamw"
            name, text = f"longseq-{key}-{rounding}", f"longseq {label}, {rounding}"
            found.append(System(name, text, make, moments, 4, truth, ours=True))
    return found


def _torch_adamw(named: Named, lr: float, **kind: bool) -> Optimizer:
    params = [param for _, param in named]
    return torch.optim.AdamW(params, lr, betas=BETAS, eps=ADAMW_EPS, weight_decay=WEIGHT_DECAY, **kind)


def _bitsandbytes(named: Named, lr: float) -> Optimizer:
    optim = importlib.import_module("bitsandbytes.optim")
    params = [param for _, param in named]
    return optim.AdamW8bit(params, lr, betas=BETAS, eps=ADAMW_EPS, weight_decay=WEIGHT_DECAY)


def _apollo_torch(named: Named, lr: float, *, rank: int, scale: float = 1.0) -> Optimizer:
    group = {
        "params": [param for _, param in named],
        "rank": rank,
        "proj": "random",
        "scale_type": "tensor" if rank == 1 else "channel",
        "scale": scale,
        "update_proj_gap": 200,
        "proj_type": "std",
    }
    make = _apollo_torch_module().AdamW
    return make([group], lr, betas=BETAS, eps=PROJECTED_EPS, weight_decay=WEIGHT_DECAY)


def _apollo_torch_module() -> ModuleType:
    """Its APOLLO alone: its package imports bitsandbytes for optimizers that are not measured."""
    spec = importlib.util.find_spec("apollo_torch")
    if spec is None:
        raise ModuleNotFoundError("No module named 'apollo_torch'", name="apollo_torch")
    package = ModuleType("apollo_torch")
    package.__path__ = list(spec.submodule_search_locations or ())
    package.__spec__ = spec
    sys.modules["apollo_torch"] = package
    return importlib.import_module("apollo_torch.apollo")


def _ours(named: Named, lr: float, *, rule: str = "low_rank", **options: Any) -> Optimizer:
    eps = PROJECTED_EPS if rule == "low_rank" else ADAMW_EPS
    group = {"params": [param for _, param in named], "names": [name for name, _ in named], "rule": rule}
    return Apollo([group], lr, betas=BETAS, eps=eps, weight_decay=WEIGHT_DECAY, **options)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of a state dict, those too that its objects have as attributes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)
    elif hasattr(value, "__dict__"):
        yield from tensors_in(vars(value))


def draw_weights(shapes: Shapes, dtype: torch.dtype, device: str) -> Named:
    """Random weights of a size that models have, and gradients."""
    generator = torch.Generator(device).manual_seed(0)
    named = []
    for name, shape in shapes.items():
        weight = torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)
        param = nn.Parameter(weight)
        param.grad = torch.empty_like(weight)
        named.append((name, param))
    draw_gradients(named, 1e-3, generator)
    return named


def draw_gradients(named: Named, scale: float, generator: torch.Generator) -> None:
    """New ones, of values that bf16 has: products with them are then exact on any unit."""
    for _, param in named:
        drawn = torch.empty_like(param.grad, dtype=torch.bfloat16)
        param.grad.copy_(drawn.normal_(0, scale, generator=generator))


def check_shapes(system: System, shapes: Shapes) -> dict[str, tuple[int, int]]:
    """Odd matrices of both ways round, two of them alike, and one of each shape that is timed."""
    least = max(system.rank, 16)
    long, short, square = 2 * least + 37, least + 21, least + 33
    odd = [(long, short), (long, short), (short, long), (square, square)]
    return {f"check.{place}": shape for place, shape in enumerate([*odd, *sorted(set(shapes.values()))])}


def disagreement(system: System, shapes: Shapes, device: str) -> str | None:
    """How a few steps are not those of plain PyTorch in float64; None if they are.

    float32 weights change as the truth's do, to float32's accuracy. bf16 weights are next to the truth's:
    each is one of the two neighbours of what it should be, or the nearer one if that is how it rounds.
    """
    if system.truth is None:
        return None
    dtypes = (torch.float32, torch.bfloat16) if system.ours else (torch.float32,)
    for dtype in dtypes:
        named = draw_weights(check_shapes(system, shapes), dtype, device)
        optimizer = system.make(named, CHECK_LR)
        twins = [_Twin(system.truth, name, param, optimizer) for name, param in named]
        generator = torch.Generator(device).manual_seed(1)
        for step, scale in enumerate(GRADIENT_SCALES, 1):
            draw_gradients(named, 1e-3 * scale, generator)
            for twin in twins:
                twin.take_step()
            optimizer.step()
            for twin in twins:
                wrong = twin.wrong(optimizer)
                if wrong is not None:
                    kind = str(dtype).removeprefix("torch.")
                    return f"{kind} {tuple(twin.param.shape)}, step {step}: {wrong}"
    return None


class _Twin:
    """The float64 copy of a weight, which sets out anew at each step from where the weight is."""

    def __init__(self, truth: str, name: str, param: nn.Parameter, optimizer: Optimizer) -> None:
        self.name, self.param, self.is_low_rank = name, param, truth == "low_rank"
        self._options: dict[str, Any] = optimizer.param_groups[0]
        device = "cpu" if param.numel() <= HOST_ELEMENTS else param.device
        self._before = self._of(param, device)
        self._after = nn.Parameter(self._before.clone())
        self._state: dict[str, Any] = {}
        keys = ("lr", "betas", "eps", "weight_decay")
        adamw = {key: self._options[key] for key in keys}
        self._adamw = torch.optim.AdamW([self._after], **adamw, foreach=False)

    @staticmethod
    def _of(tensor: Tensor, device: Any) -> Tensor:
        return tensor.detach().to(device, torch.float64, copy=True)

    @torch.no_grad()
    def take_step(self) -> None:
        """By the gradient that the weight has."""
        self._before = self._of(self.param, self._before.device)
        self._after.copy_(self._before)
        grad = self._of(self.param.grad, self._before.device)
        if self.is_low_rank:
            layout = Layout.whole(grad.shape)
            one = Projected(self.name, self._after.data, grad, self._state, self._options, layout)
            start([one])
            step_alone(one)
        else:
            self._after.grad = grad
            self._adamw.step()

    @torch.no_grad()
    def wrong(self, optimizer: Optimizer) -> str | None:
        """What of the weight, or of its state, is not as it should be."""
        found, should = self._of(self.param, self._before.device), self._after.data
        if self.param.dtype == torch.float32:
            pairs = [("change", found - self._before, should - self._before)]
        else:
            is_near = self._options.get("rounding") == "nearest"
            allowed = should.abs() * BF16_SPACING / (2 if is_near else 1) + 1e-6 * should.abs().max()
            off = int(((found - should).abs() <= allowed).logical_not().sum())
            if off:
                return f"{off} of {found.numel()} weights are not next to what they should be"
            pairs = []
        if self.is_low_rank:
            state = optimizer.state[self.param]
            pairs += [(key, self._of(state[key], should.device), self._state[key]) for key in STATE_KEYS]
        errors = {what: float((ours - true).norm() / true.norm()) for what, ours, true in pairs}
        far = {what: error for what, error in errors.items() if not error <= FLOAT32_TOLERANCE}
        return ", ".join(f"{what} is off by {error:.2g}" for what, error in far.items()) or None


def choose(everything: Sequence[Keyed], wanted: Iterable[str] | None, option: str) -> list[Keyed]:
    """What has a key, or keys with a beginning, in the order they were asked for; all where nothing was.

    Raises:
        ValueError: A beginning of nothing.
    """
    if not wanted:
        return list(everything)
    found: list[Keyed] = []
    for prefix in wanted:
        exact = [one for one in everything if one.key == prefix]
        matches = exact or [one for one in everything if one.key.startswith(prefix)]
        if not matches:
            keys = ", ".join(one.key for one in everything)
            raise ValueError(f"{option} {prefix} is the beginning of no key; there are {keys}.")
        found += [one for one in matches if one not in found]
    return found
