"""Where the layers' inputs and attention outputs are kept, decided from the bytes there are."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed.ulysses import UlyssesAttention
from .layer_memory import Places, SavedAttention
from .placement import Placement, available_host_bytes, choose_placement, gib

logger = logging.getLogger(__name__)

ALL_ON_GPU = Placement(gpu_layers=0, host=False)
SPARE_SHARE = 0.08
"""Of a GPU's memory, left for what nobody counts: fragments, workspaces, the caller's own tensors."""
WORKING_WIDTHS = 12
"""Hidden widths a token that a layer's backward takes at the most (one group of heads, Llama-3: 11)."""
EXCHANGE_WIDTHS = 8
"""And where ranks share a sequence: queries, keys, values, output and a gradient, sent and received."""
NEWS = 16
"""Times as large as the inputs that were told of, new ones are told of again."""
TILE_BYTES = 4 * 2**30
"""What tiles, float32 sums and the LM head take at the most, whatever the length."""


@dataclass
class PlaceChooser:
    """Chooses at the start of a pass; what was forced is not weighed."""

    model: nn.Module
    num_layers: int
    inputs: Placement | str
    """A placement, or "auto"."""
    attention: SavedAttention | str
    """What is saved, or "auto": as much as there is room for."""
    available_host: Callable[[], int] = available_host_bytes
    _host_bytes: int | None = None
    _said: Places | None = None
    _said_bytes: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.inputs, Placement):
            self.inputs.check_layers(self.num_layers)

    def __call__(self, hidden: Tensor, attended_width: int) -> Places:
        """Places for a pass over `(B x S, D)`."""
        places = self._choose(hidden, attended_width)
        # A few tokens may come first, as a trial: what is said of them is no news of a real sequence.
        if places != self._said or hidden.nbytes > NEWS * self._said_bytes:
            self._say(places, hidden)
            self._said, self._said_bytes = places, hidden.nbytes
        return places

    def _choose(self, hidden: Tensor, attended_width: int) -> Places:
        inputs, attention, layers = self.inputs, self.attention, self.num_layers
        if hidden.device.type != "cuda":
            everything = SavedAttention(gpu_layers=layers)
            return Places(
                ALL_ON_GPU if inputs == "auto" else inputs, everything if attention == "auto" else attention
            )
        if inputs != "auto" and attention != "auto":
            return Places(inputs, attention)
        numbers = [self._free_gpu_bytes(hidden), self._free_host_bytes(), -hidden.nbytes]
        gpu, host, most = least_of_ranks(numbers, lockstep_group(self.model), hidden.device)
        input_bytes = -most
        # An eighth of a width for the log-sum-exp: 4 bytes a head of 16 to 256 elements.
        saved_width = attended_width + attended_width // 8
        # Keys and values are as wide as queries at most.
        everything_width = saved_width + 3 * attended_width + hidden.shape[1]
        saved_bytes, everything_bytes = (
            input_bytes * width // hidden.shape[1] for width in (saved_width, everything_width)
        )
        if attention != "auto":
            gpu -= attention.gpu_layers * (everything_bytes if attention.everything else saved_bytes)
            host -= (layers - attention.gpu_layers) * saved_bytes if attention.host else 0
        if inputs == "auto":
            inputs = choose_placement(layers, input_bytes, max(gpu, 0), max(host, 0))
        if attention == "auto":
            # Rebuilt ones wait as well.
            on_gpu = inputs.count("gpu", layers)
            most = max(on_gpu - inputs.freed_inputs(index, layers) for index in range(layers))
            gpu -= most * input_bytes
            host -= inputs.count("host", layers) * input_bytes
            if layers * everything_bytes <= gpu:
                return Places(inputs, SavedAttention(layers, everything=True))
            on_gpu = min(layers, max(gpu, 0) // saved_bytes)
            attention = SavedAttention(on_gpu, host=(layers - on_gpu) * saved_bytes <= host)
        return Places(inputs, attention)

    def _say(self, places: Places, hidden: Tensor) -> None:
        layers = range(self.num_layers)
        inputs = places.inputs.all_places(self.num_layers)
        saved = [places.attention.where(index, self.num_layers) for index in layers]
        logger.info(
            "inputs of %d layers, %s each: %d on the GPU, %d in host memory, %d rebuilt; attention's output: "
            "%d on the GPU, %d in host memory, %d rebuilt",
            self.num_layers,
            gib(hidden.nbytes),
            *(inputs.count(where) for where in ("gpu", "host", "rebuild")),
            *(saved.count(where) for where in ("gpu", "host", None)),
        )

    def _free_gpu_bytes(self, hidden: Tensor) -> int:
        """What layers may keep on the GPU beside the work itself and the gradients that are to come."""
        free, total = torch.cuda.mem_get_info(hidden.device)
        unused = torch.cuda.memory_reserved(hidden.device) - torch.cuda.memory_allocated(hidden.device)
        grads = sum(
            param.numel() * param.element_size()
            for param in self.model.parameters()
            if param.requires_grad and param.grad is None
        )
        widths = WORKING_WIDTHS + (EXCHANGE_WIDTHS if shared_attention(self.model) is not None else 0)
        work = widths * hidden.nbytes + TILE_BYTES
        return int(free + unused - SPARE_SHARE * total) - grads - work

    def _free_host_bytes(self) -> int:
        # Once: afterwards what we have pinned ourselves would count as taken.
        if self._host_bytes is None:
            self._host_bytes = self.available_host()
        return self._host_bytes


def lockstep_group(model: nn.Module) -> dist.ProcessGroup | None:
    """Ranks whose layers' collectives go together: each must rebuild the same layers, or they hang.

    Those that share a weight (DeepSpeed's ZeRO-3) or a sequence (Ulysses); None where there are no others.
    """
    for param in model.parameters():
        if hasattr(param, "ds_process_group"):
            return param.ds_process_group
    attention = shared_attention(model)
    return None if attention is None else attention.group


def shared_attention(model: nn.Module) -> UlyssesAttention | None:
    """The attention of a sequence that several ranks share; None where each has its own."""
    for module in model.modules():
        attention = getattr(module, "longseq_attention", None)
        if isinstance(attention, UlyssesAttention):
            return attention if attention.sp_size > 1 else None
    return None


def least_of_ranks(numbers: list[int], group: dist.ProcessGroup | None, device: torch.device) -> list[int]:
    """Each number's least over a group: one collective, which is waited for; none without a group."""
    if group is None:
        return numbers
    least = torch.tensor(numbers, dtype=torch.int64, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
    return least.tolist()


def parse_save_attention(value: bool | int | str | SavedAttention, num_layers: int) -> SavedAttention | str:
    """What a user's `save_attention=` means.

    Args:
        value: False (nothing is saved), True (as much as there is room for), a number (of the last so many
            layers, on the GPU), "gpu" or "host" (of every layer), "all" (of every layer on the GPU, with
            queries, keys, values and what the MLP half starts from), or a `SavedAttention`.
        num_layers: Decoder layers.

    Raises:
        ValueError: Anything else.
    """
    if isinstance(value, SavedAttention):
        return value
    if value is True:
        return "auto"
    if value is False:
        return SavedAttention()
    if value == "gpu":
        return SavedAttention(gpu_layers=num_layers)
    if value == "all":
        return SavedAttention(gpu_layers=num_layers, everything=True)
    if value == "host":
        return SavedAttention(host=True)
    if isinstance(value, int) and 0 <= value <= num_layers:
        return SavedAttention(gpu_layers=value)
    raise ValueError(
        f"save_attention={value!r} must be True, False, 'gpu', 'host', 'all', a number of layers, at most "
        f"{num_layers}, or a SavedAttention."
    )
