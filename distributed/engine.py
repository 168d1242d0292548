"""What the training loop needs of a trainer, and the one that needs no library: `LocalEngine`."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..apollo import Apollo
from ..apollo.in_backward import step_in_backward
from .apollo_state import apollo_pieces, load_apollo
from .checked_file import BytesFile, Writable, write_file
from .groups import ProcessGroups
from .state_files import (
    WEIGHT,
    Piece,
    SavedState,
    load_buffers,
    loaded_scalar,
    persistent_buffers,
    piece_file,
    split_state,
)

REDUCE_BUCKET_BYTES = 2**28
NORM_FILE = "in_backward.json"
"""In a checkpoint, what the step after it clips by where weights are updated in backward."""


class NonFiniteGradientError(RuntimeError):
    """A gradient is inf or NaN; the weights were not touched."""


class Engine(ABC):
    """Runs a model forward, backward and through one optimizer step.

    Call it like the model. A step is: `begin_step`, then for each of the `accumulation_steps` micro batches
    `backward` and `step`; the last `step` reduces, clips and updates.
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

    def begin_step(self, lr: float) -> None:  # noqa: B027
        """Say the learning rate of the step, for an engine that updates weights during `backward`."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro batch."""

    @abstractmethod
    def step(self, lr: float) -> float | None:
        """Update the weights if this was the last micro batch.

        Returns:
            The global gradient norm before clipping, or None between two updates.

        Raises:
            NonFiniteGradientError: On every rank, before the update; where that is made during `backward`,
                after it, and weights whose own gradient is finite were updated.
        """

    @abstractmethod
    def reduced_grad(self, param: nn.Parameter) -> Tensor | None:
        """The whole gradient that the last micro batch's `step` will use; every rank calls it before that."""

    @abstractmethod
    def reset_optimizer(self) -> None:
        """Bring the optimizer's state back to before its first step."""

    @abstractmethod
    def state_files(self) -> Sequence[Writable]:
        """This rank's files of weights and optimizer state, as they are now; every rank calls it.

        Their tensors are those that are trained, not copies: they are to be written, or copied, before the
        next step.
        """

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state into a folder of their own; every rank calls it.

        Raises:
            WriteError: A file could not be written; nothing is left of it.
        """
        for file in self.state_files():
            folder.mkdir(parents=True, exist_ok=True)
            write_file(folder / file.name, file)

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read what `save` of any engine wrote, on any number of ranks; every rank calls it.

        Raises:
            ValueError: It is of another model, or a part of it is not there.
        """


class LocalEngine(Engine):
    """The whole model on each rank; gradients are summed over the ranks before the update.

    Weights keep the dtype that they have; `bf16` is autocast. `in_backward` updates each weight as soon as
    its gradient is complete (`apollo/in_backward.py`), and clips by the norm of the step before.
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
        in_backward: bool = False,
    ) -> None:
        if in_backward and (groups.world_size > 1 or accumulation_steps > 1):
            raise ValueError(
                f"in_backward=True with {groups.world_size} processes and {accumulation_steps} "
                "micro-batches a step: a weight would be updated before its gradient is whole. Use one of "
                "each."
            )
        if any(hasattr(param, "quantized") for param in module.parameters()):
            raise ValueError(
                "the model has weights in 8 bits (apollo.quantize_linears), which this engine's checkpoints "
                "do not hold; train it in a loop of your own, or without quantize_linears."
            )
        self.module = module
        self._optimizer = optimizer
        self._groups = groups
        self.accumulation_steps = accumulation_steps
        self._clip_norm = clip_norm
        self._bf16 = bf16
        self._micro_steps = 0
        self._is_summed = False
        self._params = [param for param in module.parameters() if param.requires_grad]
        self._in_backward = step_in_backward(optimizer, module, clip_norm=clip_norm) if in_backward else None

    def __call__(self, **batch: Any) -> Any:
        device = self._params[0].device.type
        with torch.autocast(device, torch.bfloat16) if self._bf16 else nullcontext():
            return self.module(**batch)

    def begin_step(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> float | None:
        if self._in_backward is not None:
            return _finite(float(self._in_backward.finish_step()))
        self._micro_steps += 1
        if self._micro_steps % self.accumulation_steps:
            return None
        self._sum_over_ranks()
        self._is_summed = False
        norm_tensor = _norm([param.grad for param in self._params if param.grad is not None])
        norm = float(norm_tensor)  # the step's one wait for the device: no update may follow a NaN
        if not math.isfinite(norm):
            self._optimizer.zero_grad(set_to_none=True)
        _finite(norm)
        if self._clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self._params, self._clip_norm, norm_tensor)
        self.begin_step(lr)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def state_files(self) -> list[Writable]:
        if not self._groups.is_main:
            return []
        # Frozen weights are where they came from: a checkpoint of adapters holds the adapters.
        weights = [
            Piece(name, tuple(param.shape), 0, {WEIGHT: param}) for name, param in self._named_params()
        ]
        buffers = persistent_buffers(self.module)
        files: list[Writable] = [
            piece_file("model.safetensors", weights, num_files=2, buffers=buffers),
            piece_file("optimizer.safetensors", self._state_pieces(), num_files=2),
        ]
        if self._in_backward is not None and self._in_backward.previous_norm is not None:
            norm = {"previous_norm": float(self._in_backward.previous_norm)}
            files.append(BytesFile(NORM_FILE, json.dumps(norm).encode()))
        return files

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        saved = SavedState(folder)
        shapes = {name: tuple(param.shape) for name, param in self._named_params()}
        saved.check(shapes, persistent_buffers(self.module))
        for name, param in self._named_params():
            param.copy_(saved.whole(name, dtype=param.dtype))
        if isinstance(self._optimizer, Apollo):
            load_apollo(self._optimizer, saved)
        else:
            self._load_states(saved)
        load_buffers(self.module, saved)
        if self._in_backward is not None and (folder / NORM_FILE).is_file():
            norm = json.loads((folder / NORM_FILE).read_text())["previous_norm"]
            device = self._params[0].device
            self._in_backward.previous_norm = torch.tensor(norm, dtype=torch.float64, device=device)

    def _state_pieces(self) -> list[Piece]:
        if isinstance(self._optimizer, Apollo):
            return apollo_pieces(self._optimizer)
        pieces = []
        for name, param in self._named_params():
            tensors, scalars = split_state(self._optimizer.state.get(param, {}), param)
            pieces.append(Piece(name, tuple(param.shape), 0, tensors, scalars))
        return pieces

    def _load_states(self, saved: SavedState) -> None:
        """The settings in the groups stay the config's."""
        saved.check_elementwise()
        group_of = {param: group for group in self._optimizer.param_groups for param in group["params"]}
        for name, param in self._named_params():
            self._optimizer.state[param] = {
                **{key: saved.whole(name, key, param.dtype).to(param.device) for key in saved.states(name)},
                **{
                    key: loaded_scalar(value, group=group_of[param], device=param.device)
                    for key, value in saved.scalars(name).items()
                },
            }

    def _named_params(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, param) for name, param in self.module.named_parameters() if param.requires_grad]

    def reduced_grad(self, param: nn.Parameter) -> Tensor | None:
        self._sum_over_ranks()
        return param.grad

    def reset_optimizer(self) -> None:
        self._optimizer.state.clear()
        if self._in_backward is not None:
            self._in_backward.previous_norm = None

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


def _norm(grads: list[Tensor]) -> Tensor:
    """Of all gradients together, in at least float32: `clip_grad_norm_` takes it in their own dtype."""
    if not grads:
        return torch.zeros(())
    wide = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2.0, wide)))


def _finite(norm: float) -> float:
    if not math.isfinite(norm):
        raise NonFiniteGradientError(f"gradient norm is {norm}")
    return norm


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
