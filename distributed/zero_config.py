"""What DeepSpeed is asked for: its own configuration, made of a run's options and of the model's sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ..apollo.selection import whole_shape

PERSISTENT_NUMEL = 100_000
"""Weights up to this size (norms, biases) are small. Where most of them would each be gathered by itself,
they stay whole on every rank, as by DeepSpeed's default."""


class GatheredSizes(NamedTuple):
    """Elements that ZeRO-3 gathers at once.

    Attributes:
        layer: Of the largest module that is gathered whole, or of the largest of all where none is.
        sharded: Those of them that are not whole already.
        beside: In small weights of other modules that are not whole: of the final norm.
        whole: Weights up to so many elements stay whole.
    """

    layer: int
    sharded: int
    beside: int
    whole: int


SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
"""Ours always: a user counts what a sequence-parallel group takes, and DeepSpeed what a rank does."""
AUTO = "auto"
"""In Hugging Face's JSONs: whatever the trainer says."""


@dataclass(frozen=True)
class ZeroOptions:
    """What DeepSpeed is asked for."""

    stage: int
    accumulation_steps: int = 1
    clip_norm: float | None = None
    bf16: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    user: Mapping[str, Any] | None = None
    """A DeepSpeed JSON whose values are put over these; whoever reads it sees that it contradicts none."""

    def deepspeed_config(self, world_size: int, module: nn.Module | None = None) -> dict[str, Any]:
        """DeepSpeed's own JSON. Batch sizes only tell it how many micro batches make a step.

        Args:
            world_size: Number of ranks.
            module: The model, whose layers decide how much is sent at once; without it that is DeepSpeed's
                own choice.
        """
        zero: dict[str, Any] = {"stage": self.stage}
        if module is not None:
            zero |= _communication(self.stage, gathered_sizes(module))
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
        return _merged(config, self.user or {})


def gathered_sizes(module: nn.Module) -> GatheredSizes:
    """How many elements ZeRO-3 gathers at once: a marked module with all below it, another with its own."""
    units = list(_gathered_together(module))
    gathered = [numels for numels, is_marked in units if is_marked] or [numels for numels, _ in units]
    small = [(n, is_marked) for numels, is_marked in units for n in numels if n <= PERSISTENT_NUMEL]
    whole = 0 if 2 * sum(is_marked for _, is_marked in small) > len(small) else PERSISTENT_NUMEL
    return GatheredSizes(
        layer=max(map(sum, gathered), default=0),
        sharded=max((sum(n for n in numels if n > whole) for numels in gathered), default=0),
        beside=sum(n for n, is_marked in small if not is_marked and n > whole),
        whole=whole,
    )


def _gathered_together(module: nn.Module) -> Iterator[tuple[list[int], bool]]:
    # The mark that gather_whole (zero.py) leaves, and DeepSpeed looks for.
    is_marked = bool(module.__dict__.get("_z3_leaf"))
    yield [whole_shape(param).numel() for param in module.parameters(recurse=is_marked)], is_marked
    for child in () if is_marked else module.children():
        yield from _gathered_together(child)


def _communication(stage: int, sizes: GatheredSizes) -> dict[str, Any]:
    """How much is sent at once, and how early: one decoder layer, while the one before it computes.

    Read from deepspeed/runtime/zero/partitioned_param_coordinator.py and stage3.py, 0.19.8:

    - A module that is marked is gathered in one go when it is entered. At every entry of any module, further
      weights are sent for in the order of the step before, on a stream of their own: as many as the prefetch
      bucket holds, whatever is on its way already. Marks make no difference there, and weights that are
      whole already do not count. A bucket of one layer brings all of the next one under this one's computing;
      the default, 50 M, a quarter of a Llama-3-8B layer, the rest of which is waited for. In backward the
      final norm comes before the last layer: without room for both, that layer's last weight would be sent
      with the layer below, which then had to be there, in two places, while the last one runs. The same room
      brings the second layer's first weight along with the first layer, in forward, where memory is plenty.
    - `max_live_parameters` bounds what is whole and what is on its way together. With two layers it is this
      one and the next. By default (1 G), the entries before the first layer send for four of them, and
      four stay there. Nothing is sent for beside an embedding or LM head that is larger than that: the
      layer after it is waited for, once a pass.
    - Weights that are needed again within `max_reuse_distance` are not released. By default (1 G) the last
      four layers would wait whole for their backward, through the loss, where memory is short. With 1 it is
      only what the very next module needs: the LM head, whose backward follows its forward.
    - Small weights that stay whole are let go before every update and gathered behind it, each by a
      collective of its own. In marked modules they come with the others, and so they do not stay.
    - The gradients of a marked module are reduced together after its backward, beside the next one's. They
      fill a bucket of a layer at once: smaller ones make the host wait for the GPU, since no more than three
      may be on their way.
    - `contiguous_gradients` copies them into a buffer of one bucket that stays. What is sent is put together
      from there in yet another one, so that the copy only costs its time and 2 bytes an element.
    - `stage3_allgather_sequential` would spare the buffer that a layer is gathered through, but with it
      DeepSpeed sends for one weight ahead and no more (engine.py).
    """
    bucket = max(sizes.layer, 1)
    if stage < 3:
        return {"reduce_bucket_size": bucket}
    return {
        "overlap_comm": True,
        "contiguous_gradients": False,
        "reduce_bucket_size": bucket,
        "stage3_prefetch_bucket_size": sizes.sharded + sizes.beside,
        "stage3_max_live_parameters": 2 * sizes.sharded,
        "stage3_max_reuse_distance": 1,
        "stage3_param_persistence_threshold": sizes.whole,
    }


def _merged(ours: Mapping[str, Any], user: Mapping[str, Any]) -> dict[str, Any]:
    """The user's values over ours, which they do not contradict; "auto" is ours, else DeepSpeed's default."""
    both = _laid_over(ours, user)
    for key in SIZES:
        both[key] = ours[key]
    if not both.get("fp16", {}).get("enabled"):
        both.pop("fp16", None)
    both.pop("bfloat16", None)  # DeepSpeed's older name: ours is there already
    both.pop("sequence_parallel_size", None)
    return {key: value for key, value in both.items() if key not in ("optimizer", "scheduler") or value}


def _laid_over(ours: Mapping[str, Any], user: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(ours)
    for key, value in user.items():
        if value == AUTO:
            continue
        if isinstance(value, Mapping):
            below = ours.get(key)
            both[key] = _laid_over(below if isinstance(below, Mapping) else {}, value)
        else:
            both[key] = value
    return both


def refuse_what_deepspeed_does(config: Mapping[str, Any]) -> None:
    """Have DeepSpeed check a configuration, before anything is done that takes long.

    Raises:
        ValueError: With its reason.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    from .zero import _quiet_deepspeed

    try:
        with _quiet_deepspeed():
            DeepSpeedConfig(dict(config))
    except Exception as error:  # of several classes, assertions among them
        raise ValueError(f"parallel.deepspeed_config: DeepSpeed does not take it: {error}") from error
