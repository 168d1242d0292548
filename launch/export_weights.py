"""A model's weights in Hugging Face's files, written one after the other: the model is nowhere whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.checked_file import BytesFile, write_file
from ..distributed.state_files import SavedState
from ..distributed.tensor_file import TensorFile, TensorSource
from .byte_progress import byte_progress

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
"""A size that every file system and hub takes."""
NAMED_AT_MOST = 3


class ModelShape:
    """What `from_pretrained` expects in a model's files, learnt from the model on the meta device.

    Args:
        architecture: Its Hugging Face config.
        dtype: Of its weights.

    Attributes:
        model: The model, without weights.
        tensors: Weights and saved buffers by the model's own names, tied ones once.
        aliases: Other names of tied weights, and which of `tensors` each is.
        file_names: The names that `tensors` have in files, by the model's own.

    Raises:
        NotImplementedError: The files hold other tensors than the model, such as several in one.
    """

    def __init__(self, architecture: Any, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            self.model: nn.Module = AutoModelForCausalLM.from_config(architecture, dtype=dtype)
        state = self.model.state_dict(keep_vars=True)
        first_name: dict[int, str] = {}
        names = {name: first_name.setdefault(id(tensor), name) for name, tensor in state.items()}
        self.aliases = {name: first for name, first in names.items() if name != first}
        self.tensors = {name: tensor for name, tensor in state.items() if name not in self.aliases}
        self.file_names = _file_names(self.model, self.tensors)

    def check(self, shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
        """See that all of the model is there, and nothing else.

        Raises:
            ValueError: Names that are missing or unexpected, or a weight of another shape.
        """
        missing = [name for name in self.tensors if name not in shapes]
        unexpected = [name for name in shapes if name not in self.tensors and name not in self.aliases]
        if missing or unexpected:
            raise ValueError(
                f"{what} are of another model: missing {missing[:NAMED_AT_MOST]}, unexpected "
                f"{unexpected[:NAMED_AT_MOST]}."
            )
        for name, tensor in self.tensors.items():
            if tuple(shapes[name]) != tuple(tensor.shape):
                raise ValueError(
                    f"{what} are of another model: {name} has shape {tuple(shapes[name])} there, and "
                    f"{tuple(tensor.shape)} in its config."
                )

    def target(self, name: str, read: Callable[[torch.dtype], Tensor]) -> TensorSource:
        """A tensor to be written, read in the dtype that it is to have."""
        tensor = self.tensors[name]
        return TensorSource(tensor.dtype, tuple(tensor.shape), lambda: read(tensor.dtype))


def _file_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    from transformers.core_model_loading import revert_weight_conversion

    reverted = revert_weight_conversion(model, dict(tensors))
    own_name = {id(tensor): name for name, tensor in tensors.items()}
    names = {own_name[id(tensor)]: name for name, tensor in reverted.items() if id(tensor) in own_name}
    if len(names) != len(tensors) or len(reverted) != len(tensors):
        raise NotImplementedError(
            f"transformers writes the weights of {type(model).__name__} otherwise than it keeps them, which "
            "this export does not know how to do."
        )
    return names


def saved_weights(shape: ModelShape, saved: SavedState) -> dict[str, TensorSource]:
    """The weights of a checkpoint that has all of a model's.

    Raises:
        ValueError: They are of another model, or not whole.
    """
    for name in saved.shapes:
        saved.require_weight(name)
    buffers = saved.buffer_shapes()
    shape.check({**saved.shapes, **buffers}, "the weights")

    def read(name: str) -> Callable[[torch.dtype], Tensor]:
        if name in buffers:
            return lambda dtype: saved.buffer(name).to(dtype)
        return lambda dtype: saved.whole(name, dtype=dtype)

    return {name: shape.target(name, read(name)) for name in shape.tensors}


def write_model(
    folder: Path, shape: ModelShape, weights: Mapping[str, TensorSource], max_shard_bytes: int
) -> None:
    """Write weights as `save_pretrained` does: one file, or numbered ones of a limited size and an index.

    Args:
        folder: Is there.
        shape: The model.
        weights: By the model's names.
        max_shard_bytes: Of a file; a tensor that is larger has one of its own.

    Raises:
        WriteError: The disk is full, or will not be written.
    """
    total = sum(source.num_bytes for source in weights.values())
    with byte_progress(f"writing {folder.name}", total) as done:
        named = {shape.file_names[own]: _reported(source, done) for own, source in weights.items()}
        shards = _cut(named.items(), max_shard_bytes)
        if len(shards) == 1:
            _write(folder, WEIGHTS, shards[0])
            return
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _write(folder, file, shard)
            weight_map.update(dict.fromkeys(shard, file))
    metadata = {"total_parameters": shape.model.num_parameters(), "total_size": total}
    index = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    write_file(folder / INDEX, BytesFile(INDEX, index.encode()))


def _reported(source: TensorSource, done: Callable[[int], None]) -> TensorSource:
    def read() -> Tensor:
        tensor = source.read()
        done(source.num_bytes)
        return tensor

    return replace(source, read=read)


def _cut(weights: Iterable[tuple[str, TensorSource]], max_bytes: int) -> list[dict[str, TensorSource]]:
    shards: list[dict[str, TensorSource]] = [{}]
    size = 0
    for name, source in weights:
        if shards[-1] and size + source.num_bytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = source
        size += source.num_bytes
    return shards


def _write(folder: Path, name: str, tensors: Mapping[str, TensorSource]) -> None:
    write_file(folder / name, TensorFile(name, tensors, {"format": "pt"}))
