"""Models that are born sharded: under ZeRO-3 no rank ever holds more than one whole weight.

DeepSpeed is imported where a weight is sharded or is to be, and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..apollo.selection import whole_shape
from .zero import _quiet_deepspeed

NAMED_AT_MOST = 5
"""Weights that an error names."""


def is_sharded(param: Tensor) -> bool:
    """Whether ZeRO-3 has spread a weight over the ranks; its own shape is then `(0,)`."""
    return hasattr(param, "ds_id")


@contextmanager
def gathered(params: Iterable[Tensor]) -> Iterator[None]:
    """Have weights whole on every rank, to be read alone; all ranks call it alike."""
    apart = [param for param in params if is_sharded(param) and param.ds_status.name == "NOT_AVAILABLE"]
    if not apart:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(apart):
        yield


@contextmanager
def rewritten(params: Iterable[Tensor]) -> Iterator[None]:
    """Have sharded weights whole on every rank, to be written; what rank 0 wrote is kept by all."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(params), modifier_rank=0):
        yield


@contextmanager
def gathered_when_called(module: nn.Module) -> Iterator[None]:
    """Have each module's own weights whole while it is called, where no engine does so."""
    opened: dict[nn.Module, ExitStack] = {}

    def enter(called: nn.Module, args: tuple) -> None:
        opened[called] = ExitStack()
        opened[called].enter_context(gathered(called.parameters(recurse=False)))

    def leave(called: nn.Module, args: tuple, output: Any) -> None:
        opened.pop(called).close()

    owners = [one for one in module.modules() if any(map(is_sharded, one.parameters(recurse=False)))]
    hooks = [one.register_forward_pre_hook(enter) for one in owners]
    hooks += [one.register_forward_hook(leave) for one in owners]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for stack in opened.values():  # of calls that raised
            stack.close()


@contextmanager
def born_sharded(config: Mapping[str, Any]) -> Iterator[None]:
    """Give away each weight of the modules that are made inside, as soon as its module is there.

    A module's own constructor still fills it, on this device and in the dtype asked for; what is to be
    written later goes through `rewritten`.

    Args:
        config: DeepSpeed's configuration, as the engine is given it: ZeRO stage 3.
    """
    import deepspeed

    # Without overrides buffers keep their dtype: rotary frequencies in bfloat16 would be other positions.
    with _quiet_deepspeed(), deepspeed.zero.Init(config_dict_or_path=dict(config), tensor_overrides=()):
        yield


def load_sharded(
    module: nn.Module, files: Sequence[Path], *, source: str, ignored: Iterable[str] = ()
) -> None:
    """Fill a sharded module from safetensors, one weight after the other; all ranks call it.

    Every rank reads the names, so that all raise alike; rank 0 reads the weights and sends them.

    Args:
        module: Its weights are sharded.
        files: Of the checkpoint, each name in one of them.
        source: What the checkpoint is called in errors.
        ignored: Regular expressions of names in the files that need not belong to the module.

    Raises:
        ValueError: A weight is missing, or of another shape, or belongs to nothing.
    """
    from safetensors import safe_open

    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt", device="cpu")) for file in files]
        stored = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (no mapping)
        wanted = _tensors_by_names(module)
        _check_names(wanted, stored, source, tuple(ignored))
        found = {next(name for name in names if name in stored): tensor for names, tensor in wanted.items()}
        _check_shapes(found, stored, source)
        for name, tensor in found.items():
            with rewritten([tensor]) if is_sharded(tensor) else torch.no_grad(), torch.no_grad():
                if not is_sharded(tensor) or dist.get_rank() == 0:
                    tensor.copy_(stored[name].get_tensor(name))


def _tensors_by_names(module: nn.Module) -> dict[tuple[str, ...], Tensor]:
    """Weights and saved buffers, each by all the names that it has: tied ones have several."""
    state = module.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return {tuple(same): state[same[0]] for same in names.values()}


def _check_names(
    wanted: Mapping[tuple[str, ...], Tensor],
    stored: Mapping[str, Any],
    source: str,
    ignored: tuple[str, ...],
) -> None:
    missing = [names[0] for names in wanted if not any(name in stored for name in names)]
    known = {name for names in wanted for name in names}
    unexpected = [
        name for name in stored if name not in known and not any(re.search(rule, name) for rule in ignored)
    ]
    said = [
        f"{title} {', '.join(names[:NAMED_AT_MOST])}{', ...' if len(names) > NAMED_AT_MOST else ''}"
        for title, names in (("it lacks", missing), ("the model has no", unexpected))
        if names
    ]
    if said:
        raise ValueError(
            f"the weights of {source} are not those of the model: {'; '.join(said)}. Load it with "
            "transformers and save it again with save_pretrained, which gives every weight its name."
        )


def _check_shapes(found: Mapping[str, Tensor], stored: Mapping[str, Any], source: str) -> None:
    wrong = [
        f"{name} is {shape} and the model's {tuple(whole_shape(tensor))}"
        for name, tensor in found.items()
        if (shape := tuple(stored[name].get_slice(name).get_shape())) != tuple(whole_shape(tensor))
    ]
    if wrong:
        raise ValueError(
            f"the weights of {source} have other shapes: {'; '.join(wrong[:NAMED_AT_MOST])}. Its config.json "
            "is of another model."
        )
