"""What `end_to_end.py` measures: the ladder of techniques, each rung with one more, and the anchors."""

from __future__ import annotations

import argparse
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import decoder_anchors as anchors
from decoder_model import SHAPES, Prepared
from decoder_variants import attention_kernel
from torch import Tensor, nn

from longseq.launch.planner.catalogue import CARDS
from longseq.mst import apply_mini_sequence
from longseq.mst.layer_memory import Places
from longseq.mst.layer_places import PlaceChooser

CARD_80_GIB = next(card.memory_gib for card in CARDS if card.key == "h100-80g")
START_S, BUILD_S = 20, 5
"""A process with torch and transformers; the weights drawn, and kernels compiled."""
SEARCH_S, LONG_SEARCH_S = 40, 120
"""To find a longest sequence; where it is a million tokens, and host memory is pinned for it."""
PHASES = ("times", "longest", "train")
LONG_TOKENS = 32768
"""Steps of longer sequences are timed once: they take long enough to be exact."""


class SteeredChooser(PlaceChooser):
    """Decides as a run does, of the host memory it is given and the room on the GPU that was measured."""

    room: Callable[[int], int] | None = None
    """Bytes for layers' inputs on the GPU, by tokens; None leaves the run's own estimate."""

    last: Places | None = None
    """Of the last pass."""

    def __call__(self, hidden: Tensor, attended_width: int) -> Places:
        """Places for a pass over `(B x S, D)`."""
        self.last = super().__call__(hidden, attended_width)
        return self.last

    def _free_gpu_bytes(self, hidden: Tensor) -> int:
        if self.room is None or hidden.device.type != "cuda":
            return super()._free_gpu_bytes(hidden)
        return self.room(hidden.shape[0])


@dataclass(frozen=True)
class Ready:
    """A model made ready by a rung."""

    prepared: Prepared
    chooser: SteeredChooser | None = None
    """Of streamed layers."""


@dataclass(frozen=True)
class Rung:
    """One row: what is done about memory, and by which optimizer."""

    name: str
    label: str
    prepare: Callable[[nn.Module, int], Ready]
    """From a model and the bytes of host memory that it may pin."""
    mini: bool = False
    """APOLLO-Mini in backward; else AdamW after it."""
    kernel: str = "cudnn"
    on_host: bool = False
    """Inputs wait in host memory, and as the planner says where that is too small."""
    saves: bool = False
    """What backward would make again is kept: all of it while it fits, then as much as there is room for."""
    longest_as: str | None = None
    """The rung whose longest sequence this one's is: it only keeps more where there is room."""
    host_bytes: Callable[[int, int], int] | None = None
    """What an anchor pins, by layers and bytes of one layer's input."""


@dataclass(frozen=True)
class Setting:
    """A rung on a card.

    Attributes:
        name: Of its files.
        rung: What is done.
        card_gib: Of a smaller card, which is emulated; None is the one that is there.
        about_s: Wall time of all that is asked for, roughly.
        least_s: To its first number.
        gpus: It takes.
    """

    name: str
    rung: Rung
    card_gib: float | None = None
    about_s: float = 0.0
    least_s: float = 0.0
    gpus: int = 1

    @property
    def phases(self) -> tuple[str, ...]:
        """What can be asked of it."""
        if self.rung.saves and self.rung.longest_as is None:
            return ("times",)  # it keeps what no long sequence has room for
        return PHASES if self.card_gib is None else ("longest",)


def others(prepare: Callable[[nn.Module], Prepared]) -> Callable[[nn.Module, int], Ready]:
    """A variant of decoder.py's as a rung's."""
    return lambda model, host_bytes: Ready(prepare(model))


def plain(model: nn.Module) -> Prepared:
    """The model as transformers makes it."""
    return Prepared(anchors.own_loss(model))


def loss_alone(model: nn.Module) -> Prepared:
    """transformers' layers and checkpoints; the loss without logits."""
    handle = apply_mini_sequence(model, checkpoints="none", tile_tokens=None)
    anchors.checkpoint_layers(model)
    return Prepared(anchors.own_loss(model), undo=handle.undo)


def streamed(model: nn.Module, host_bytes: int, *, kernel: str | None = None, **options: Any) -> Ready:
    """All of longseq's, with a chooser of places that can be steered."""
    made: list[SteeredChooser] = []

    def make(*args: Any, **given: Any) -> SteeredChooser:
        made.append(SteeredChooser(*args, **given, available_host=lambda: host_bytes))
        return made[-1]

    apply_module = importlib.import_module("longseq.mst.apply")
    with mock.patch.object(apply_module, "PlaceChooser", make):
        handle = apply_mini_sequence(model, attention_kernel=attention_kernel(model, kernel), **options)
    return Ready(Prepared(anchors.own_loss(model), undo=handle.undo), made[0])


def ours(name: str, label: str, *, kernel: str | None = None, **options: Any) -> Rung:
    """A rung of streamed layers."""
    of_rung = {key: options.pop(key) for key in ("mini", "longest_as") if key in options}
    return Rung(
        name,
        label,
        functools.partial(streamed, kernel=kernel, **options),
        kernel=kernel or "cudnn",
        on_host=options["checkpoints"] == "host",
        saves="save_attention" in options,
        **of_rung,
    )


def rounded_up(num_layers: int, input_bytes: int) -> int:
    """PyTorch's own pinned memory comes in powers of two."""
    return num_layers * (1 << (input_bytes - 1).bit_length())


RUNGS = (
    Rung("plain-no-checkpoints", "transformers", others(plain)),
    Rung("plain", "+ layer checkpoints", others(anchors.transformers_checkpoints)),
    Rung("cce", "+ CCE", others(loss_alone)),
    ours("mst", "+ MST: streamed layers", checkpoints="gpu", head_groups=1),
    ours("host", "+ inputs in host memory", checkpoints="host", head_groups=1),
    ours("groups", "+ 8 groups of heads", checkpoints="host", head_groups=8),
    ours(
        "saved",
        "+ attention saved",
        checkpoints="host",
        head_groups=8,
        save_attention="all",
        longest_as="groups",
    ),
    ours("mini", "8 groups, APOLLO-Mini in backward", checkpoints="host", head_groups=8, mini=True),
    ours(
        "mini-saved",
        "inputs on the GPU, attention saved, APOLLO-Mini in backward",
        checkpoints="gpu",
        head_groups="auto",
        save_attention="all",
        mini=True,
    ),
    ours(
        "mini-saved-fa4",
        "the same, flash-attn-4",
        checkpoints="gpu",
        head_groups="auto",
        save_attention="all",
        kernel="fa4",
        mini=True,
    ),
    Rung("liger", "Liger, layer checkpoints", others(anchors.liger)),
    Rung("alst", "ALST: TiledMLP, tiled loss, layer checkpoints", others(anchors.alst)),
    Rung(
        "alst-host",
        "ALST, layer checkpoints in host memory",
        others(functools.partial(anchors.alst, host=True)),
        host_bytes=rounded_up,
    ),
    Rung("mini-s", "mini-s's scheme, layer checkpoints", others(anchors.mini_s)),
)
ON_80_GIB = ("plain-no-checkpoints", "plain", "mini", "liger", "mini-s")
SETTINGS = (
    *(Setting(rung.name, rung) for rung in RUNGS),
    *(Setting(f"80gb-{rung.name}", rung, CARD_80_GIB) for rung in RUNGS if rung.name in ON_80_GIB),
)
LAST_TIMED = {"plain-no-checkpoints": 4096, "plain": 16384}
"""Rungs that have no room for more: what a schedule counts on, no limit."""


def timed(
    setting: Setting,
    phases: list[str],
    step_s: Callable[[int], float],
    lengths: list[int],
    *,
    repeats: int,
    train_s: float,
) -> Setting:
    """The setting with its seconds, for a schedule.

    Args:
        setting: As it is listed.
        phases: That are asked for.
        step_s: A step's seconds by its tokens.
        lengths: That are timed.
        repeats: At the shortest.
        train_s: A step at the longest length may take so long.
    """
    least_s = START_S + BUILD_S + (repeats + 2) * step_s(min(lengths))
    about_s: float = START_S + BUILD_S
    if "times" in phases and "times" in setting.phases:
        last = LAST_TIMED.get(setting.rung.name, max(lengths))
        steps = 1.1 if setting.rung.host_bytes is None else 2.0
        about_s += sum(steps * step_s(tokens) for tokens in lengths if tokens <= last)
        about_s += (repeats + 1) * step_s(min(lengths))
    if "longest" in phases and "longest" in setting.phases and setting.rung.longest_as is None:
        about_s += LONG_SEARCH_S if setting.rung.on_host else SEARCH_S
    if "train" in phases and "train" in setting.phases and setting.rung.longest_as is None:
        about_s += train_s
    return replace(setting, about_s=about_s, least_s=least_s)


def add_options(options: argparse.ArgumentParser) -> None:
    """What a setting is told, by hand or by `end_to_end.py`."""
    options.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    options.add_argument("--lengths", type=int, nargs="+", default=[16384, 65536, 131072])
    options.add_argument("--repeats", type=int, default=2, help=f"steps under {LONG_TOKENS:,} tokens")
    options.add_argument("--tries", type=int, default=12, help="lengths near the longest")
    options.add_argument("--first-tokens", type=int, help="the length to try first, by a plan for instance")
    options.add_argument("--train-minutes", type=float, default=8, help="of a step at the longest length")
    options.add_argument("--host-gib", type=float, default=115, help="pinned at the most")
    options.add_argument("--gpu-gib", type=float, help="emulate a card of so many, context included")
    options.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    options.add_argument("--layers", type=int, help="default: the shape's")
