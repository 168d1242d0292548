"""What the training loop needs of a trainer, and the one that needs no library: `LocalEngine`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .groups import ProcessGroups

REDUCE_BUCKET_BYTES = 2**28
SETTINGS = ("betas", "eps", "weight_decay")
"""Of an optimizer, what is the config's to say and not the checkpoint's."""


class NonFiniteGradientError(RuntimeError):
    """A gradient is inf or NaN; the weights were not touched."""


class Engine(ABC):
    """Runs a model forward, backward and through one optimizer step.

    Call it like the model. A step is: `backward` once for each of the `accumulation_steps` micro batches,
    `step` after each of them; the last `step` reduces, clips and updates.
    """

    module: nn.Module
    reducer_divisor: float
    """What summed gradients are divided by on their way over the ranks; see `distributed/loss.py`."""

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
    def save(self, folder: Path) -> None:
        """Write weights and optimizer state; every rank calls it."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read what `save` wrote; every rank calls it."""


class LocalEngine(Engine):
    """The whole model on each rank; gradients are summed over the ranks before the update.

    Weights, gradients and optimizer states are float32; `bf16` is autocast.
    """

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
        self._accumulation_steps = accumulation_steps
        self._clip_norm = clip_norm
        self._bf16 = bf16
        self._micro_steps = 0
        self._params = [param for param in module.parameters() if param.requires_grad]

    def __call__(self, **batch: Any) -> Any:
        device = self._params[0].device.type
        with torch.autocast(device, torch.bfloat16) if self._bf16 else nullcontext():
            return self.module(**batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> float | None:
        self._micro_steps += 1
        if self._micro_steps % self._accumulation_steps:
            return None
        self._sum_over_ranks()
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
        from safetensors.torch import save_file

        if not self._groups.is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        # Frozen weights are where they came from: a checkpoint of adapters holds the adapters.
        parameters = self.module.named_parameters(remove_duplicate=False)
        frozen = {name for name, param in parameters if not param.requires_grad}
        state = {name: tensor for name, tensor in self.module.state_dict().items() if name not in frozen}
        weights = {name: tensor.contiguous() for name, tensor in unique_tensors(state).items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        torch.save(self._optimizer.state_dict(), folder / "optimizer.pt")

    def load(self, folder: Path) -> None:
        from safetensors.torch import load_file

        weights = load_file(folder / "model.safetensors")
        missing, unexpected = self.module.load_state_dict(weights, strict=False)
        # Tied weights are written once; what a name shares with one that was read is not missing.
        state = self.module.state_dict()
        there = {state[name].data_ptr() for name in weights if name in state}
        there |= {param.data_ptr() for param in self.module.parameters() if not param.requires_grad}
        missing = [name for name in missing if state[name].data_ptr() not in there]
        if missing or unexpected:
            raise ValueError(
                f"{folder} is of another model: missing {missing[:3]}, unexpected {list(unexpected)[:3]}."
            )
        device = self._params[0].device
        state = torch.load(folder / "optimizer.pt", map_location=device, weights_only=True)
        with kept_settings(self._optimizer):
            self._optimizer.load_state_dict(state)

    def _sum_over_ranks(self) -> None:
        if self._groups.world_size == 1:
            return
        # Every rank must send the same: a weight that this rank's tokens did not reach has gradient 0.
        for param in self._params:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        for bucket in _buckets([param.grad for param in self._params]):
            flat = torch.cat([grad.reshape(-1) for grad in bucket])
            dist.all_reduce(flat)
            for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
                grad.copy_(part.view_as(grad))


@contextmanager
def kept_settings(optimizer: Optimizer) -> Iterator[None]:
    """What a config says of betas, eps and decay outlives the loading of a state that has its own."""
    settings = [{name: group[name] for name in SETTINGS if name in group} for group in optimizer.param_groups]
    yield
    for group, mine in zip(optimizer.param_groups, settings, strict=True):
        group.update(mine)


def unique_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which tensors that share memory (tied weights) stand once."""
    seen: set[int] = set()
    unique = {}
    for name, tensor in state.items():
        if tensor.numel() and tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        unique[name] = tensor
    return unique


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
