"""The variants that `decoder.py` measures: the anchors of decoder_anchors.py, and ours knob by knob."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import decoder_anchors as anchors
from decoder_anchors import MissingError
from decoder_model import Prepared
from torch import nn

from longseq.distributed import flash_attention_4
from longseq.mst import apply_mini_sequence

OUR_NAME = re.compile(
    r"longseq-(?P<checkpoints>gpu|host)-(?P<groups>auto|g\d+)"
    r"(-save-(?P<save>gpu|host|all|\d+))?(-(?P<kernel>fa4))?"
)
"""What a variant of ours may be called: any such name can be asked for."""


@dataclass(frozen=True)
class Variant:
    """One line of the plots."""

    key: str
    label: str
    prepare: Callable[[nn.Module], Prepared]
    ours: bool = False


def attention_kernel(model: nn.Module, asked: str | None) -> str:
    """The kernel to ask for by name: cuDNN's unless told, which is the anchors' as well."""
    on_gpu = next(model.parameters()).is_cuda
    if asked == "fa4":
        anchors.need_cuda(model, "flash-attn-4")
        if not flash_attention_4.INSTALLED:
            raise MissingError("flash-attn-4 is not installed")
    return (asked or "cudnn") if on_gpu else "auto"


def streamed(model: nn.Module, *, kernel: str | None, **options: Any) -> Prepared:
    """Streamed layers, and the loss by cut cross-entropy."""
    handle = apply_mini_sequence(model, attention_kernel=attention_kernel(model, kernel), **options)
    return Prepared(anchors.own_loss(model), undo=handle.undo)


def tiles_alone(model: nn.Module) -> Prepared:
    """Tiled MLPs and cut cross-entropy under transformers' own layer checkpoints."""
    handle = apply_mini_sequence(model, checkpoints="none")
    anchors.checkpoint_layers(model)
    return Prepared(anchors.own_loss(model), undo=handle.undo)


def our_variant(key: str) -> Variant | None:
    """The variant of a name such as `longseq-host-g4-save-gpu-fa4`; None if it is no such name."""
    found = OUR_NAME.fullmatch(key)
    if found is None:
        return None
    options: dict[str, Any] = {
        "checkpoints": found["checkpoints"],
        "head_groups": _number_or_name(found["groups"].removeprefix("g")),
    }
    if found["save"]:
        options["save_attention"] = _number_or_name(found["save"])
    knobs = [f"{name}={value}" for name, value in options.items()]
    knobs += [f"attention_kernel={found['kernel']}"] if found["kernel"] else []
    prepare = functools.partial(streamed, kernel=found["kernel"], **options)
    return Variant(key, f"longseq, {', '.join(knobs)}", prepare, ours=True)


def _number_or_name(text: str) -> int | str:
    return int(text) if text.isdigit() else text


OURS = (
    "longseq-gpu-g1",
    "longseq-gpu-g2",
    "longseq-gpu-auto",
    "longseq-gpu-auto-save-4",
    "longseq-gpu-auto-save-gpu",
    "longseq-gpu-auto-save-all",
    "longseq-host-g1",
    "longseq-host-g2",
    "longseq-host-g4",
    "longseq-host-g8",
    "longseq-host-auto",
    "longseq-host-auto-save-5",
    "longseq-host-g1-save-gpu",
    "longseq-host-g4-save-gpu",
    "longseq-host-g4-save-host",
    "longseq-gpu-auto-fa4",
    "longseq-host-g4-fa4",
    "longseq-host-g4-save-gpu-fa4",
    "longseq-gpu-auto-save-all-fa4",
)

VARIANTS: tuple[Variant, ...] = (
    Variant("transformers-gpu", "transformers, layer checkpoints", anchors.transformers_checkpoints),
    Variant(
        "transformers-host",
        "transformers, layer checkpoints on the host",
        anchors.transformers_host_checkpoints,
    ),
    Variant("liger", "Liger, layer checkpoints", anchors.liger),
    Variant("alst-gpu", "DeepSpeed TiledMLP + tiled loss (ALST), layer checkpoints", anchors.alst),
    Variant(
        "alst-host",
        "DeepSpeed TiledMLP + tiled loss (ALST), layer checkpoints on the host",
        functools.partial(anchors.alst, host=True),
    ),
    Variant("mini-s", "mini-s's scheme, layer checkpoints", anchors.mini_s),
    Variant("longseq-tiles", "longseq, checkpoints=none, layer checkpoints", tiles_alone, ours=True),
    *(variant for variant in map(our_variant, OURS) if variant is not None),
)


def choose(wanted: list[str] | None) -> list[Variant]:
    """Variants by key, or by the beginning of one, in the order of `VARIANTS`; ours by any of `OUR_NAME`.

    Raises:
        ValueError: A beginning of nothing.
    """
    if not wanted:
        return list(VARIANTS)
    chosen: dict[str, Variant] = {}
    for name in wanted:
        unlisted = our_variant(name)
        exact = [variant for variant in VARIANTS if variant.key == name] or ([unlisted] if unlisted else [])
        found = exact or [variant for variant in VARIANTS if variant.key.startswith(name)]
        if not found:
            raise ValueError(
                f"--variants {name} is the beginning of no variant; there are "
                f"{', '.join(variant.key for variant in VARIANTS)}, and any "
                "longseq-(gpu|host)-(gN|auto)[-save-(gpu|host|all|LAYERS)][-fa4]."
            )
        chosen |= {variant.key: variant for variant in found}
    return sorted(chosen.values(), key=lambda variant: place(variant.key))


def place(key: str) -> int:
    """Where a key stands in `VARIANTS`; behind all where it does not."""
    keys = [variant.key for variant in VARIANTS]
    return keys.index(key) if key in keys else len(keys)
