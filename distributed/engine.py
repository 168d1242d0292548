"""What the training loop needs of a trainer, and the one that needs no library: `LocalEngine`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .groups import ProcessGroups
from .state_files import (
    WEIGHT,
    Piece,
    SavedState,
    load_buffers,
    loaded_scalar,
    persistent_buffers,
    split_state,
    write_pieces,
)

REDUCE_BUCKET_BYTES = 2**28


class NonFiniteGradientError(RuntimeError):
    """A gradient is inf or NaN; the weights were not touched."""


class Engine(ABC):
    """Runs a model forward, backward and through one optimizer step.

    Call it like the model. A step is: `backward` once for each of the `accumulation_steps` micro batches,
    `step` after each of them; the last `step` reduces, clips and updates.
    """

    module: nn.Module
    zero_stage: int
    """What is spread over the ranks: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too."""
    reducer_divisor: float
    """What summed gradients are divided by on their way over the ranks; see `distributed/loss.py`."""
    accumulation_steps: int
    """Micro batches of a step."""

    @abstractmethod
    def __call__(self, **batch: Any) -> Any:
        """The model's output."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro batch."""

    @abstractmethod
    def step(self, lr: float) -> float | None:
        """Update the weights if this was the last micro batch.

        Returns:
            The global gradient norm before clipping, or None between two updates.

        Raises:
            NonFiniteGradientError: Before the update, on every rank.
        """

    @abstractmethod
    def reduced_grad(self, param: nn.Parameter) -> Tensor | None:
        """The whole gradient that the last micro batch's `step` will use; every rank calls it before that."""

    @abstractmethod
    def reset_optimizer(self) -> None:
        """Bring the optimizer's state back to before its first step."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write weights and optimizer state into a folder of their own; every rank calls it."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read what `save` of any engine wrote, on any number of ranks; every rank calls it.

        Raises:
            ValueError: It is of another model, or a part of it is not there.
        """


class LocalEngine(Engine):
    """The whole model on each rank; gradients are summed over the ranks before the update.

    Weights, gradients and optimizer states are float32; `bf16` is autocast.
    """

    zero_stage = 0
    reducer_divisor = 1.0

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        groups: ProcessGroups,
        *,
        accumulation_steps: int = 1,
        clip_norm: float | None = None,
        bf16: bool = False,
    ) -> None:
        self.module = module
        self._optimizer = optimizer
        self._groups = groups
        self.accumulation_steps = accumulation_steps
        self._clip_norm = clip_norm
        self._bf16 = bf16
        self._micro_steps = 0
        self._is_summed = False
        self._params = [param for param in module.parameters() if param.requires_grad]

    def __call__(self, **batch: Any) -> Any:
        device = self._params[0].device.type
        with torch.autocast(device, torch.bfloat16) if self._bf16 else nullcontext():
            return self.module(**batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> float | None:
        self._micro_steps += 1
        if self._micro_steps % self.accumulation_steps:
            return None
        self._sum_over_ranks()
        self._is_summed = False
        norm_tensor = nn.utils.clip_grad_norm_(self._params, self._clip_norm or float("inf"))
        norm = float(norm_tensor)  # the step's one wait for the device: no update may follow a NaN
        if not torch.isfinite(norm_tensor):
            self._optimizer.zero_grad(set_to_none=True)
            raise NonFiniteGradientError(f"gradient norm is {norm}")
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def save(self, folder: Path) -> None:
        if not self._groups.is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        weights, states = [], []
        # Frozen weights are where they came from: a checkpoint of adapters holds the adapters.
        for name, param in self._named_params():
            tensors, scalars = split_state(self._optimizer.state.get(param, {}), param)
            weights.append(Piece(name, tuple(param.shape), 0, {WEIGHT: param}))
            states.append(Piece(name, tuple(param.shape), 0, tensors, scalars))
        buffers = persistent_buffers(self.module)
        write_pieces(folder / "model.safetensors", weights, num_files=2, buffers=buffers)
        write_pieces(folder / "optimizer.safetensors", states, num_files=2)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        saved = SavedState(folder)
        shapes = {name: tuple(param.shape) for name, param in self._named_params()}
        saved.check(shapes, persistent_buffers(self.module))
        group_of = {param: group for group in self._optimizer.param_groups for param in group["params"]}
        for name, param in self._named_params():
            param.copy_(saved.whole(name, dtype=param.dtype))
            # The settings in the groups stay the config's.
            self._optimizer.state[param] = {
                **{key: saved.whole(name, key, param.dtype).to(param.device) for key in saved.states(name)},
                **{
                    key: loaded_scalar(value, group=group_of[param], device=param.device)
                    for key, value in saved.scalars(name).items()
                },
            }
        load_buffers(self.module, saved)

    def _named_params(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, param) for name, param in self.module.named_parameters() if param.requires_grad]

    def reduced_grad(self, param: nn.Parameter) -> Tensor | None:
        self._sum_over_ranks()
        return param.grad

    def reset_optimizer(self) -> None:
        self._optimizer.state.clear()

    def _sum_over_ranks(self) -> None:
        if self._groups.world_size == 1 or self._is_summed:
            return
        self._is_summed = True
        # Every rank must send the same: a weight that this rank's tokens did not reach has gradient 0.
        for param in self._params:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        for bucket in _buckets([param.grad for param in self._params]):
            flat = torch.cat([grad.reshape(-1) for grad in bucket])
            dist.all_reduce(flat)
            for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
                grad.copy_(part.view_as(grad))


def _buckets(grads: list[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    size = 0
    for grad in grads:
        fits = buckets and buckets[-1][0].dtype == grad.dtype and size + grad.nbytes <= REDUCE_BUCKET_BYTES
        if fits:
            buckets[-1].append(grad)
            size += grad.nbytes
        else:
            buckets.append([grad])
            size = grad.nbytes
    return buckets
