"""ZeRO 1 to 3 through DeepSpeed.

DeepSpeed is not told about sequence parallelism: to it every rank is a data-parallel one, so every ZeRO path
divides the summed gradients by the number of ranks. (Told of it, ZeRO 1-2 divide by the data-parallel degree
and ZeRO 3 by all ranks, in 0.19: a silent factor between stages.) It also shards states over all ranks.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .engine import Engine, NonFiniteGradientError, kept_settings
from .groups import ProcessGroups

logger = logging.getLogger(__name__)

TAG = "zero"


@dataclass(frozen=True)
class ZeroOptions:
    """What DeepSpeed is asked for."""

    stage: int
    accumulation_steps: int = 1
    clip_norm: float | None = None
    bf16: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False

    def deepspeed_config(self, world_size: int) -> dict[str, Any]:
        """DeepSpeed's own JSON. Batch sizes only tell it how many micro batches make a step."""
        zero: dict[str, Any] = {"stage": self.stage}
        if self.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if self.offload_parameters:
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.accumulation_steps,
            "train_batch_size": self.accumulation_steps * world_size,
            # DeepSpeed's default is 1.0: it must be switched off by name.
            "gradient_clipping": self.clip_norm or 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            # DeepSpeed's own CPU Adam is compiled at first use; torch's fused one is not.
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        }
        if self.bf16:
            config["bf16"] = {"enabled": True}
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        return config


class DeepSpeedEngine(Engine):
    """A model under `deepspeed.initialize`, with an optimizer of ours."""

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, groups: ProcessGroups, options: ZeroOptions
    ) -> None:
        self._groups = groups
        self._options = options
        self.reducer_divisor = float(groups.world_size)
        with _quiet_deepspeed():
            import deepspeed

            self._engine, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=options.deepspeed_config(groups.world_size)
            )
        self.module = self._engine.module
        _name_the_stage(self._engine.optimizer)
        self._micro_steps = 0

    def __call__(self, **batch: Any) -> Any:
        return self._engine(**batch)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> float | None:
        self._micro_steps += 1
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        if self._micro_steps % self._options.accumulation_steps:
            return None
        if self._engine.optimizer.overflow:  # DeepSpeed has skipped the update, on every rank
            raise NonFiniteGradientError("gradient is inf or NaN")
        return float(self._engine.get_global_grad_norm())

    def save(self, folder: Path) -> None:
        with _quiet_deepspeed():
            # Frozen weights are where they came from: a checkpoint of adapters holds the adapters.
            self._engine.save_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        self._check_layout(folder)
        # Frozen weights are not in a checkpoint; where there are none, every weight must be.
        strict = all(param.requires_grad for param in self.module.parameters())
        with _quiet_deepspeed(), weights_only_loads(), kept_settings(self._engine.optimizer):
            loaded, _ = self._engine.load_checkpoint(
                str(folder), tag=TAG, load_module_strict=strict, load_lr_scheduler_states=False
            )
        if loaded is None:
            raise ValueError(f"DeepSpeed found no checkpoint in {folder}.")

    def _check_layout(self, folder: Path) -> None:
        shards = len(list((folder / TAG).glob("*_optim_states.pt")))
        if not shards:
            raise ValueError(f"{folder} holds no ZeRO checkpoint: there is no *_optim_states.pt in {TAG}/.")
        if shards != self._groups.world_size:
            raise ValueError(
                f"{folder} was written by {shards} processes and this run has {self._groups.world_size}; "
                "ZeRO's shards load on the same number alone. Start with as many, or `longseq export` it "
                "and train from that."
            )


def gather_whole(module: nn.Module) -> Callable[[], None]:
    """Let ZeRO-3 gather a module that runs in tiles once, before its loop, and not at each tile's layers.

    If each tile's call of each linear layer were a collective, ranks whose tile counts differ would wait for
    each other for ever. Whoever makes the engine, the Trainer and accelerate too: it is DeepSpeed that looks
    for the mark. DeepSpeed itself is not imported.

    Returns:
        What takes it back; without effect once an engine has hooks on this module and none on its children.
    """
    if not any(module.children()):
        return lambda: None  # its weights are gathered together as it is
    earlier = module.__dict__.get("_z3_leaf")
    module._z3_leaf = True  # as deepspeed.utils.set_z3_leaf_module does
    # DeepSpeed's own hooks, which look at what the input wants, must come after it.
    hook = module.register_forward_pre_hook(_with_input_grad, prepend=True)

    def take_back() -> None:
        if any(hasattr(param, "ds_z3_leaf_module") for param in module.parameters()):
            return
        hook.remove()
        del module._z3_leaf
        if earlier is not None:
            module._z3_leaf = earlier

    return take_back


def _with_input_grad(module: nn.Module, args: tuple) -> tuple:
    """Let the input of a module that ZeRO-3 gathers whole want a gradient.

    DeepSpeed reduces such a module's gradients, and releases its weights, once its input's is there. Above
    frozen embeddings no input wants one, and the reduction would come before the backward that it waits for.
    What is waited for is counted anew at each call: one without grad, as when a backward rebuilds a layer's
    output, would wipe the count, and the layer would stay gathered after its own backward.
    """
    if "ds_id" not in module.__dict__:  # not under ZeRO-3
        return args
    if torch.is_grad_enabled() and not any(param.requires_grad for param in module.parameters()):
        return args
    return tuple(
        arg.detach().requires_grad_()
        if isinstance(arg, Tensor) and arg.is_floating_point() and not arg.requires_grad
        else arg
        for arg in args
    )


def _name_the_stage(optimizer: Any) -> None:
    """Let the states of ZeRO 1 in bf16 be put together again.

    DeepSpeed keeps these in an optimizer of another class, whose checkpoint is that of ZeRO 1 but does not
    say so; `zero_to_fp32` then takes it for none.
    """
    from deepspeed.checkpoint.constants import ZERO_STAGE
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    if isinstance(optimizer, BF16_Optimizer):
        plain_state = optimizer.state_dict
        optimizer.state_dict = lambda: {**plain_state(), ZERO_STAGE: 1}


def consolidated_weights(folder: Path) -> dict[str, Tensor]:
    """The float32 weights of a ZeRO checkpoint that `DeepSpeedEngine.save` wrote, on the CPU."""
    with _quiet_deepspeed(), weights_only_loads():
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG)


@contextmanager
def weights_only_loads() -> Iterator[None]:
    """Make DeepSpeed's `torch.load` refuse code: its checkpoints need a few of its own classes, no more."""
    earlier = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals(_checkpoint_classes()):
            yield
    finally:
        if earlier is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = earlier


def _checkpoint_classes() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def init_deepspeed_communication() -> None:
    """Let DeepSpeed use the process group that is there, without compiling anything on a CPU."""
    with _quiet_deepspeed():
        import deepspeed

        compatible = deepspeed.ops.__compatible_ops__
        for name in [name for name in compatible if "shm" in name]:
            compatible[name] = False
        deepspeed.init_distributed(dist_init_required=False)


@contextmanager
def _quiet_deepspeed() -> Iterator[None]:
    """DeepSpeed's INFO lines and prints tell a user nothing and go to the debug log; its warnings stay."""
    log = logging.getLogger("DeepSpeed")
    level = log.level
    log.setLevel(logging.WARNING)
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        log.setLevel(level)
        if printed.getvalue():
            logger.debug("%s", printed.getvalue())
