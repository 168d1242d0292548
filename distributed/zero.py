"""ZeRO 1 to 3 through DeepSpeed.

DeepSpeed is not told about sequence parallelism: to it every rank is a data-parallel one, so every ZeRO path
divides the summed gradients by the number of ranks. (Told of it, ZeRO 1-2 divide by the data-parallel degree
and ZeRO 3 by all ranks, in 0.19: a silent factor between stages.) It also shards states over all ranks.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..apollo import Apollo
from .apollo_state import apollo_pieces, lay_out_apollo, load_apollo
from .engine import Engine, NonFiniteGradientError
from .groups import ProcessGroups
from .tensor_file import TensorFile
from .zero_config import ZeroOptions
from .zero_state import load_partitions, partition_file

logger = logging.getLogger(__name__)


class DeepSpeedEngine(Engine):
    """A model under `deepspeed.initialize`, with an optimizer of ours."""

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, groups: ProcessGroups, options: ZeroOptions
    ) -> None:
        self._groups = groups
        self._options = options
        self.zero_stage = options.stage
        self.reducer_divisor = float(groups.world_size)
        with _quiet_deepspeed():
            import deepspeed

            _cast_what_is_whole(module, options)
            config = options.deepspeed_config(groups.world_size, module)
            self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self.module = self._engine.module
        self._apollo = optimizer if isinstance(optimizer, Apollo) else None
        if self._apollo is not None:
            lay_out_apollo(self._engine.optimizer, self.module)
        self._micro_steps = 0
        self.accumulation_steps = options.accumulation_steps

    def __call__(self, **batch: Any) -> Any:
        return self._engine(**batch)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> float | None:
        self._micro_steps += 1
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        if self._micro_steps % self.accumulation_steps:
            return None
        if self._engine.optimizer.overflow:  # DeepSpeed has skipped the update, on every rank
            raise NonFiniteGradientError("gradient is inf or NaN")
        return float(self._engine.get_global_grad_norm())

    def reduced_grad(self, param: nn.Parameter) -> Tensor | None:
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(param)

    def reset_optimizer(self) -> None:
        # In place: DeepSpeed has handed these tensors on.
        for state in self._engine.optimizer.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()

    def state_files(self) -> list[TensorFile]:
        name = f"rank-{self._groups.rank:05d}.safetensors"
        states = [] if self._apollo is None else apollo_pieces(self._apollo)
        num_files = self._groups.world_size
        return [partition_file(name, self._engine.optimizer, self.module, num_files=num_files, states=states)]

    def load(self, folder: Path) -> None:
        with _quiet_deepspeed():
            load_states = None if self._apollo is None else partial(load_apollo, self._apollo)
            load_partitions(folder, self._engine.optimizer, self.module, load_states)


def _cast_what_is_whole(module: nn.Module, options: ZeroOptions) -> None:
    """As DeepSpeed does, except where some weights are sharded already: adapters would stay float32."""
    for param in module.parameters() if options.bf16 else ():
        if not hasattr(param, "ds_id") and param.is_floating_point():
            param.data = param.data.bfloat16()


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
    module.register_full_backward_hook = partial(_register_behind, module)

    def take_back() -> None:
        module.__dict__.pop("register_full_backward_hook", None)
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


def _register_behind(module: nn.Module, hook: Callable, *args: Any, **kwargs: Any) -> RemovableHandle:
    """`register_full_backward_hook`, such that DeepSpeed's hook holds no gradient of the module's output.

    PyTorch keeps that for the hook until it has run, which is all through the module's backward: as much as
    a layer's input, which may else be written over. DeepSpeed's hook reduces gradients of weights and never
    looks at it; it wants to be called once the input's gradient is there, before the weights are released.
    """
    if not getattr(hook, "__module__", "").startswith("deepspeed."):
        return type(module).register_full_backward_hook(module, hook, *args, **kwargs)

    def watch_inputs(module: nn.Module, args: tuple) -> tuple:
        wanting = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
        if not (wanting and torch.is_grad_enabled()):
            return args
        watched = iter(_Watched.apply(partial(hook, module, None, None), *wanting))
        return tuple(next(watched) if isinstance(arg, Tensor) and arg.requires_grad else arg for arg in args)

    # Behind DeepSpeed's other hooks on the input, and so ahead of them in backward.
    return module.register_forward_pre_hook(watch_inputs)


class _Watched(torch.autograd.Function):
    """Hands tensors on, and calls somebody once all their gradients are there."""

    @staticmethod
    def forward(ctx, call: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        return tensors

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        ctx.call()
        return None, *grads


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
