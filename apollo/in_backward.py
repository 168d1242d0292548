"""Optimizer in backward: a parameter is stepped once its gradient is complete, and the gradient is freed.

Of all gradients, only those that autograd has at hand are in memory at once. One optimizer stays the owner of
state, parameter groups and learning rates: between two steps it is what it would be after `optimizer.step()`,
and so are its checkpoints.

What cannot be as in the ordinary loop is all that needs every gradient before the first update:

- Clipping. With `clip_norm`, a gradient is multiplied by `min(1, clip_norm / max(previous, own))`: `previous`
  is the norm of all gradients in the step before, `own` that of this parameter's gradient. Exact clipping
  divides by the norm of all gradients in this step, which is known when the last parameter is updated. No
  parameter is updated by a gradient above `clip_norm`; a step whose norm jumps is clipped less than it would
  be, and the one after it more. The first step, with none before it, has the own norms alone.
- Refusing a step. A gradient with a NaN or an infinity counts as zero: its parameter decays and follows its
  momentum, and neither it nor its state is poisoned. Other parameters are updated. The norm that
  `finish_step` returns is then not finite, for the caller to stop or to go on. A whole parameter is judged,
  not elements: what is left of a broken gradient has no meaning.
- Accumulation over backwards, and loss scaling (`torch.amp.GradScaler`), which divides gradients afterwards.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .dispatch import is_dtensor
from .scaling import scale_

NAME_LISTS = ("names", "param_names")
"""Keys of a parameter group that have one entry a parameter: Apollo's, and that of `torch.optim`."""


def step_in_backward(
    optimizer: Optimizer, model: nn.Module | None = None, *, clip_norm: float | None = None
) -> InBackwardHandle:
    """Have every parameter of an optimizer stepped in backward, as soon as its gradient is complete.

        handle = step_in_backward(optimizer, model)
        for batch in batches:
            model(**batch).loss.backward()  # updates; param.grad is None afterwards
            norm = handle.finish_step()     # in place of optimizer.step()
            scheduler.step()

    Call it after `fully_shard`: FSDP2 calls hooks once a gradient is reduced, and the norm of each is then an
    all-reduce of one number. After parameters were unfrozen, remove the handle and call it again.

    Args:
        optimizer: Any that updates a parameter by its own gradient alone: all of `torch.optim` but LBFGS and
            SparseAdam. One that has `step_parameters(params)` is stepped by that.
        model: What the parameters are of: asked whether their gradients are whole in backward, and for names.
        clip_norm: Norm to clip to, by the step before (see above).

    Raises:
        ValueError: `clip_norm` is not above zero, the optimizer needs a closure, a parameter has a gradient
            already, or gradients are not whole in backward: under DistributedDataParallel,
            FullyShardedDataParallel (FSDP's first version) or DeepSpeed.
    """
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm={clip_norm}: must be above 0; leave it out to clip nothing.")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer={type(optimizer).__name__}: its step evaluates the model itself, which cannot be "
            "done in backward. Take one that steps from gradients."
        )
    _refuse_partial_gradients(optimizer, model)
    return InBackwardHandle(optimizer, model, clip_norm)


class InBackwardHandle:
    """Ends the steps that backwards make, and takes the hooks away, as it does when nobody keeps it.

    Attributes:
        previous_norm: Gradient norm of the last step that had a finite one, as a tensor of no dimensions;
            None before the first. To resume exactly with `clip_norm`, save it and set it again.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module | None, clip_norm: float | None) -> None:
        self._optimizer = optimizer
        self._clip_norm = clip_norm
        self._step_parameter: Callable[[nn.Parameter], None] = (
            self._step_by_method if hasattr(optimizer, "step_parameters") else self._step_by_cut_group
        )
        self._names = {param: name for name, param in model.named_parameters()} if model is not None else {}
        self._places: dict[nn.Parameter, tuple[int, int]] = {}
        self._norms: dict[nn.Parameter, Tensor] = {}
        self._lock = threading.Lock()  # autograd has one thread a device
        self.previous_norm: Tensor | None = None
        self._hooks = []
        for param in self._with_gradients():
            raise ValueError(
                f"{self._name(param)} has a gradient already, which the next one would be added to. "
                "Call optimizer.zero_grad() before step_in_backward."
            )
        for group_index, group in enumerate(optimizer.param_groups):
            for index, param in enumerate(group["params"]):
                self._places[param] = group_index, index
                if param.requires_grad:
                    self._hooks.append(param.register_post_accumulate_grad_hook(_weakly(self._take)))

    def finish_step(self) -> Tensor:
        """End a step, in place of `optimizer.step()`; the schedule is stepped after it.

        The optimizer's `step` is called with no gradient left, which moves nothing: step hooks, schedulers
        and profilers see one call a step.

        Returns:
            Norm of all gradients, before clipping, on the first parameter's device; no host sync.

        Raises:
            RuntimeError: No gradient arrived since the last call, or one arrived that no hook took.
        """
        if not self._norms:
            raise RuntimeError("no gradient arrived since the last step: call backward before finish_step.")
        for param in self._with_gradients():
            raise RuntimeError(
                f"{self._name(param)} has a gradient that was not stepped in backward: it requires one only "
                "since step_in_backward. Call optimizer.zero_grad(), handle.remove(), and step_in_backward "
                "again."
            )
        norms = list(self._norms.values())
        norm = torch.linalg.vector_norm(torch.stack([one.to(norms[0]) for one in norms]))
        self._norms.clear()
        earlier = torch.zeros_like(norm) if self.previous_norm is None else self.previous_norm.to(norm)
        self.previous_norm = torch.where(norm.isfinite(), norm, earlier)
        self._optimizer.step()
        return norm

    def remove(self) -> None:
        """Take the hooks away: backward leaves gradients for `optimizer.step()` again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @torch.no_grad()
    def _take(self, param: nn.Parameter) -> None:
        """Step one parameter by its gradient, and free that."""
        if param in self._norms:
            param.grad = None
            raise RuntimeError(
                f"{self._name(param)} has a second gradient before finish_step, and was updated by its "
                "first. Call finish_step after every backward; to accumulate, take a larger micro-batch, or "
                "step without step_in_backward."
            )
        if param.grad.is_sparse:
            raise RuntimeError(
                f"the gradient of {self._name(param)} is sparse; make its layer with sparse=False."
            )
        self._norms[param] = norm = _norm(param.grad)
        grad = param.grad.to_local() if is_dtensor(param.grad) else param.grad
        scale_(grad, self._factor(norm))
        with self._lock:
            self._step_parameter(param)
        param.grad = None

    def _factor(self, norm: Tensor) -> Tensor:
        """What a gradient of this norm is multiplied by: 0 where it is broken."""
        factor = torch.ones_like(norm)
        if self._clip_norm is not None:
            bound = norm if self.previous_norm is None else norm.maximum(self.previous_norm.to(norm))
            factor = self._clip_norm / bound.clamp(min=self._clip_norm)
        return torch.where(norm.isfinite(), factor, 0)

    def _step_by_method(self, param: nn.Parameter) -> None:
        self._optimizer.step_parameters([param])

    def _step_by_cut_group(self, param: nn.Parameter) -> None:
        """The optimizer's own step, for as long as it has this one parameter."""
        optimizer = self._optimizer
        groups = optimizer.param_groups
        group_index, index = self._places[param]
        group = groups[group_index]
        if group.get("fused") and hasattr(param, "quantized"):  # the hook that refuses it is not run here
            raise ValueError(
                f"{type(optimizer).__name__}(fused=True): cannot write the quantised {self._name(param)}; "
                "use longseq.apollo.Apollo, or dequantize_linears(model) first."
            )
        names = {key: [group[key][index]] for key in NAME_LISTS if key in group}
        # What a step writes into its group, such as a count, is dropped: `finish_step` makes it write again.
        optimizer.param_groups = [{**group, "params": [param], **names}]
        try:
            _step_without_hooks(optimizer)
        finally:
            optimizer.param_groups = groups

    def _with_gradients(self) -> list[nn.Parameter]:
        groups = self._optimizer.param_groups
        return [param for group in groups for param in group["params"] if param.grad is not None]

    def _name(self, param: nn.Parameter) -> str:
        return self._names.get(param, f"a parameter of shape {tuple(param.shape)}")


def _weakly(take: Callable[[nn.Parameter], None]) -> Callable[[nn.Parameter], None]:
    """A hook that does not keep its handle: a weight would keep itself through it, unseen by collectors."""
    method = weakref.WeakMethod(take)

    def hook(param: nn.Parameter) -> None:
        alive = method()
        if alive is not None:
            alive(param)

    return hook


def _norm(grad: Tensor) -> Tensor:
    """Norm over all ranks, in at least float32."""
    norm = torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
    return norm.full_tensor() if is_dtensor(norm) else norm


def _step_without_hooks(optimizer: Optimizer) -> None:
    """`optimizer.step()` as its class defines it.

    `Optimizer.__init__` wraps the class's `step` in one that runs step hooks, and marks it `hooked`; a
    scheduler wraps the instance's.
    """
    step = type(optimizer).step
    step = step.__wrapped__ if getattr(step, "hooked", False) else step
    step(optimizer)


def _refuse_partial_gradients(optimizer: Optimizer, model: nn.Module | None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    params: list[Any] = [param for group in optimizer.param_groups for param in group["params"]]
    if hasattr(model, "zero_optimization") or any(hasattr(param, "ds_id") for param in params):
        raise ValueError(
            "DeepSpeed reduces gradients in hooks of its own and steps copies of the weights, so no gradient "
            "is whole in backward. Use FSDP2 (fully_shard), or the engine's own step."
        )
    for module in model.modules() if model is not None else ():
        if isinstance(module, DistributedDataParallel | FullyShardedDataParallel):
            raise ValueError(
                f"{type(module).__name__} reduces a gradient over ranks after the hooks of its parameter, so "
                "every rank would step by its own part. Use FSDP2 (fully_shard), whose hooks come after."
            )
