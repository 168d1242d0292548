"""LoRA adapters, merged into their model one weight after the other, or written apart as peft reads them."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..distributed.checked_file import write_file
from ..distributed.state_files import SavedState
from ..distributed.tensor_file import StoredTensors, TensorFile, TensorSource
from .config import LoraConfig, ModelConfig
from .export_weights import NAMED_AT_MOST, ModelShape
from .sharded_model import OLD_FREQUENCIES

PREFIX = "base_model.model."
"""What peft puts before a model's names."""
ADAPTER_FILE = "adapter_model.safetensors"
_PART = re.compile(rf"{re.escape(PREFIX)}(?P<layer>.+)\.lora_(?P<half>[AB])\.default\.weight")


def merged_weights(config: ModelConfig, shape: ModelShape, saved: SavedState) -> dict[str, TensorSource]:
    """Weights of the base model, `W + alpha / rank * B @ A` where there are adapters, computed in float32.

    Args:
        config: Names the base model, whose weights are read from its own files.
        shape: The base model.
        saved: Checkpoint of the adapters.

    Raises:
        ValueError: Adapters or base weights are of another model, or the base's files are not there.
    """
    lora = config.lora
    assert lora is not None
    assert config.name is not None
    adapted = _adapted_layers(lora, shape, saved)
    base = _base_weights(config.name)
    known = {name: source for name, source in base.items() if not re.search(OLD_FREQUENCIES, name)}
    for alias, name in shape.aliases.items():
        if name not in known and alias in known:
            known[name] = known[alias]
    shape.check({name: source.shape for name, source in known.items()}, f"the weights of {config.name}")

    def read(name: str) -> Callable[[torch.dtype], Tensor]:
        layer = name.removesuffix(".weight")
        if not name.endswith(".weight") or layer not in adapted:
            return lambda dtype: known[name].read().to(dtype)
        return lambda dtype: _merged(known[name].read().float(), saved, layer, lora).to(dtype)

    return {name: shape.target(name, read(name)) for name in shape.tensors}


def _merged(weight: Tensor, saved: SavedState, layer: str, lora: LoraConfig) -> Tensor:
    down, up = (saved.whole(f"{PREFIX}{layer}.lora_{half}.default.weight") for half in "AB")
    # As peft's own merging does it, to the bit.
    return weight.add_((up @ down).mul_(lora.alpha / lora.rank))


def _adapted_layers(lora: LoraConfig, shape: ModelShape, saved: SavedState) -> set[str]:
    """Layers that have adapters: all that the config names, each with both halves of the right shape."""
    there: dict[str, dict[str, tuple[int, ...]]] = {}
    unexpected = []
    for name, its_shape in saved.shapes.items():
        saved.require_weight(name)
        match = _PART.fullmatch(name)
        if match is None:
            unexpected.append(name)
        else:
            there.setdefault(match["layer"], {})[match["half"]] = its_shape
    wanted = {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in shape.tensors.items()
        if name.endswith(".weight") and _is_target(name.removesuffix(".weight"), lora)
    }
    unexpected += [layer for layer in there if layer not in wanted]
    missing = [layer for layer in wanted if layer not in there]
    if missing or unexpected:
        raise ValueError(
            f"the adapters are of another model: missing {missing[:NAMED_AT_MOST]}, unexpected "
            f"{unexpected[:NAMED_AT_MOST]}."
        )
    for layer, (rows, columns) in wanted.items():
        if there[layer] != {"A": (lora.rank, columns), "B": (rows, lora.rank)}:
            raise ValueError(
                f"the adapters are of another model: those of {layer} have shapes {there[layer]}, and its "
                f"weight is {rows} by {columns}, with model.lora.rank={lora.rank}."
            )
    return set(wanted)


def _is_target(layer: str, lora: LoraConfig) -> bool:
    return any(layer == target or layer.endswith(f".{target}") for target in lora.target_modules)


def write_adapters(folder: Path, config: ModelConfig, saved: SavedState, dtype: torch.dtype | None) -> None:
    """Write adapters as `PeftModel.from_pretrained(base, folder)` loads them.

    Args:
        folder: Is there.
        config: Names the base model and says what was adapted.
        saved: Checkpoint of the adapters.
        dtype: Of the adapters; None keeps their own.

    Raises:
        WriteError: The disk is full, or will not be written.
        ValueError: The checkpoint holds other weights than adapters.
    """
    from peft import LoraConfig as PeftLoraConfig

    lora = config.lora
    assert lora is not None
    weights: dict[str, TensorSource] = {}
    for name, its_shape in saved.shapes.items():
        saved.require_weight(name)
        if _PART.fullmatch(name) is None:
            raise ValueError(f"the checkpoint holds {name}, which is no adapter of a linear layer.")
        kept = dtype or saved.dtype(name)
        weights[name.replace(".default.weight", ".weight")] = TensorSource(
            kept, its_shape, _reader(saved, name, kept)
        )
    write_file(folder / ADAPTER_FILE, TensorFile(ADAPTER_FILE, weights, {"format": "pt"}))
    PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        task_type="CAUSAL_LM",
        base_model_name_or_path=config.name,
        inference_mode=True,
    ).save_pretrained(folder)


def _reader(saved: SavedState, name: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: saved.whole(name, dtype=dtype)


def _base_weights(name: str) -> Mapping[str, TensorSource]:
    """The tensors in a model's own files, each read when it is asked for.

    Raises:
        ValueError: There are no such files, or not all.
    """
    sources: dict[str, TensorSource] = {}
    for file in _files(name, "model.safetensors"):
        stored = StoredTensors(file)
        for key, shape in stored.shapes.items():
            sources[key] = TensorSource(stored.dtypes[key], shape, _stored(stored, key))
    if sources:
        return sources
    for file in _files(name, "pytorch_model.bin"):
        sources |= {key: TensorSource.of(tensor) for key, tensor in _unpickled(file).items()}
    if not sources:
        raise ValueError(
            f"model.name={name!r} has neither safetensors nor pytorch_model.bin, so that adapters cannot be "
            "merged into it; write them alone with --adapters apart."
        )
    return sources


def _stored(stored: StoredTensors, key: str) -> Callable[[], Tensor]:
    return lambda: stored.tensor(key)


def _unpickled(file: Path) -> dict[str, Tensor]:
    try:
        # Mapped, so that no more of it is in memory than is looked at.
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{file} cannot be read piece by piece ({str(error).splitlines()[0]}); load the model with "
            "transformers and save it with save_pretrained, or write the adapters with --adapters apart."
        ) from error


def _files(name: str, single: str) -> list[Path]:
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    quietly = {"_raise_exceptions_for_missing_entries": False}
    index = cached_file(name, f"{single}.index.json", **quietly)
    if index is None:
        file = cached_file(name, single, **quietly)
        return [] if file is None else [Path(file)]
    try:
        files = [Path(file) for file in get_checkpoint_shard_files(name, index)[0]]
    except OSError as error:
        raise ValueError(f"model.name={name!r}: {error}") from error
    lost = [file.name for file in files if not file.is_file()]
    if lost:
        raise ValueError(f"model.name={name!r} has no {', '.join(lost)}, which {index} names.")
    return files
