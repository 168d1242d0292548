"""Weights and optimizer states in safetensors files, cut anywhere, and put together as anyone needs them.

A file holds pieces: consecutive elements of a parameter, or of one of its optimizer states, seen flat. Which
ones is in the file's metadata, as JSON, beside the states that are single numbers:

    {"num_files": 2,
     "tensors": {"exp_avg/norm.weight":
                 {"parameter": "norm.weight", "state": "exp_avg", "start": 40, "shape": [64]}},
     "scalars": {"norm.weight": {"step": {"dtype": "float32", "value": 3.0}}},
     "buffers": ["rotary.table"]}

`shape` is the whole parameter's, or the whole state's where the optimizer keeps less of it. A piece that is
all of it is stored in that shape, any other one flat."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .tensor_file import StoredTensors, TensorFile, TensorSource

INDEX = "longseq"
WEIGHT = "weight"
"""Among the tensors of a piece, the parameter itself."""

ANOTHER_MODEL = "Set model.* as its own config (config.yaml beside it) does, or set another log.run_dir."
NUMBERS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of one parameter, or of a state of it that has another shape.

    Attributes:
        parameter: Its name in the model.
        shape: Of the whole parameter, or state.
        start: The first element, in the flat whole.
        tensors: `WEIGHT` and optimizer states, of one size.
        scalars: Optimizer states that are numbers, such as `step`.
    """

    parameter: str
    shape: tuple[int, ...]
    start: int
    tensors: dict[str, Tensor]
    scalars: dict[str, Any] = field(default_factory=dict)


def split_state(state: Mapping[str, Any], like: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state of one tensor: what has the tensor's shape, and what is a number.

    Raises:
        ValueError: A state that is neither.
    """
    tensors, scalars = {}, {}
    for key, value in state.items():
        # Of a weight that is a number itself, every state has the shape of its count of steps.
        if isinstance(value, Tensor) and value.shape == like.shape and (value.dim() or key != "step"):
            tensors[key] = value
        elif (value.dim() == 0) if isinstance(value, Tensor) else isinstance(value, NUMBERS):
            scalars[key] = value
        else:
            shown = (
                f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(type(value))
            )
            raise ValueError(
                f"the optimizer's state {key!r} is {shown}, neither a number nor of its weight's shape "
                f"{tuple(like.shape)}; a checkpoint cannot hold it. Use an optimizer with elementwise states."
            )
    return tensors, scalars


def loaded_scalar(saved: Any, *, group: Mapping[str, Any], device: torch.device) -> Any:
    """A scalar state as torch's optimizers keep it: fused and capturable ones want it beside the weights."""
    if not isinstance(saved, dict):
        return saved
    on_device = group.get("fused") or group.get("capturable")
    dtype = getattr(torch, saved["dtype"])
    return torch.tensor(saved["value"], dtype=dtype, device=device if on_device else "cpu")


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that are part of a model's state; those that share memory stand once."""
    names = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in names}


def piece_file(
    name: str, pieces: Iterable[Piece], *, num_files: int, buffers: Mapping[str, Tensor] | None = None
) -> TensorFile:
    """A file of a checkpoint, to be written.

    Args:
        name: Of the file, `*.safetensors`, in a folder of the checkpoint's own.
        pieces: What this rank owns.
        num_files: How many files the checkpoint has.
        buffers: Buffers of the model; one file of a checkpoint has them.

    Raises:
        ValueError: A tensor of a dtype that safetensors has no name for.
    """
    sources = {key: TensorSource.of(buffer) for key, buffer in (buffers or {}).items()}
    entries, scalars = {}, {}
    for piece in pieces:
        for state, tensor in piece.tensors.items():
            key = piece.parameter if state == WEIGHT else f"{state}/{piece.parameter}"
            sources[key] = TensorSource.of(tensor.detach())
            entries[key] = {
                "parameter": piece.parameter,
                "state": state,
                "start": piece.start,
                "shape": list(piece.shape),
            }
        if piece.scalars:
            scalars[piece.parameter] = {key: _plain(value) for key, value in piece.scalars.items()}
    index = {"num_files": num_files, "tensors": entries, "scalars": scalars, "buffers": list(buffers or {})}
    return TensorFile(name, sources, {"format": "pt", INDEX: json.dumps(index)})


def _plain(value: Any) -> Any:
    """A number as JSON holds it, to the last bit."""
    return (
        {"dtype": str(value.dtype).split(".")[1], "value": value.item()}
        if isinstance(value, Tensor)
        else value
    )


class _Stored(NamedTuple):
    """A piece in a file."""

    path: Path
    key: str
    start: int
    stop: int


class SavedState:
    """The pieces of all files of a checkpoint, read when and as far as they are asked for.

    Attributes:
        shapes: Of the parameters, by name.

    Raises:
        ValueError: There is no such file in the folder, or one that is not whole.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open_files: dict[Path, StoredTensors] = {}
        self._buffers: dict[str, Path] = {}
        self._pieces: dict[str, dict[str, list[_Stored]]] = {}
        self._scalars: dict[str, dict[str, Any]] = {}
        self._shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._num_files, self._num_there = 0, 0
        for path in sorted(folder.glob("*.safetensors")):
            stored = StoredTensors(path)
            if INDEX not in stored.metadata:
                continue
            self._num_there += 1
            self._open_files[path] = stored
            try:
                self._add(path, json.loads(stored.metadata[INDEX]))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise ValueError(f"{path} has an index that says nothing of use ({error!r}).") from error
        if not self._num_there:
            raise ValueError(
                f"{folder} holds no engine's checkpoint: there is no *.safetensors of one in it. Bring them "
                "back, move the checkpoint away to go on from the one before it, or train into another "
                "log.run_dir."
            )

    def _add(self, path: Path, index: dict[str, Any]) -> None:
        self._num_files = max(self._num_files, index["num_files"])
        self._buffers |= dict.fromkeys(index["buffers"], path)
        for key, entry in index["tensors"].items():
            name = entry["parameter"]
            shape = self._shapes[name, entry["state"]] = tuple(entry["shape"])
            if entry["state"] == WEIGHT or name not in self.shapes:
                self.shapes[name] = shape
            numel = math.prod(self._open_files[path].shapes[key])
            stored = _Stored(path, key, entry["start"], entry["start"] + numel)
            self._pieces.setdefault(name, {}).setdefault(entry["state"], []).append(stored)
        for name, scalars in index["scalars"].items():
            self._scalars.setdefault(name, scalars)

    def states(self, parameter: str) -> list[str]:
        """The tensor-valued optimizer states that there are of a parameter."""
        return [state for state in self._pieces[parameter] if state != WEIGHT]

    def state_shape(self, parameter: str, state: str) -> tuple[int, ...]:
        """Of a whole state; that of its weight, unless the optimizer keeps less."""
        return self._shapes[parameter, state]

    def check_elementwise(self) -> None:
        """See that every state has the shape of its weight, for an optimizer that has such states.

        Raises:
            ValueError: One has not.
        """
        for (name, state), shape in self._shapes.items():
            if shape != self.shapes[name]:
                raise ValueError(
                    f"{self._folder} holds {state} of {name} of shape {shape}, where the weight's is "
                    f"{self.shapes[name]}: it was written by another optimizer, such as apollo. Set "
                    "optimizer.* as it was then, or start a new run from the weights (longseq export)."
                )

    def scalars(self, parameter: str) -> dict[str, Any]:
        """The optimizer's numbers of a parameter, for `loaded_scalar`."""
        return self._scalars.get(parameter, {})

    def check(self, shapes: Mapping[str, tuple[int, ...]], buffers: Collection[str]) -> None:
        """See that all of a model is there, and nothing else.

        Args:
            shapes: Of the model's trainable parameters, by name.
            buffers: Names of its persistent buffers.

        Raises:
            ValueError: Parameters or buffers that are missing, unexpected, or of another shape, elements
                that are in no file, or in two.
        """
        there, wanted = {*self.shapes, *self._buffers}, {*shapes, *buffers}
        missing, unexpected = sorted(wanted - there), sorted(there - wanted)
        if missing or unexpected:
            lost = self._lost_files()
            raise ValueError(
                f"{self._folder} {'is not whole' if lost else 'is of another model'}: missing {missing[:3]}, "
                f"unexpected {unexpected[:3]}.{lost or ' ' + ANOTHER_MODEL}"
            )
        for name, shape in shapes.items():
            if self.shapes[name] != tuple(shape):
                raise ValueError(
                    f"{self._folder} is of another model: {name} has shape {self.shapes[name]} there and "
                    f"{tuple(shape)} here. {ANOTHER_MODEL}"
                )
            for state in self._pieces[name]:
                self._check_whole(name, state)
            if WEIGHT not in self._pieces[name]:
                raise ValueError(f"{self._folder} holds no weight {name}.{self._lost_files()}")
        if self._num_there != self._num_files:
            raise ValueError(f"{self._folder} is not whole.{self._lost_files()}")

    def _check_whole(self, name: str, state: str) -> None:
        stop = 0
        what = name if state == WEIGHT else f"{state} of {name}"
        pieces = self._pieces[name][state]
        pieces.sort(key=lambda piece: piece.start)
        numel = math.prod(self._shapes[name, state])
        for start, next_stop in [*((piece.start, piece.stop) for piece in pieces), (numel, numel)]:
            if start > stop:
                raise ValueError(
                    f"{self._folder} lacks elements {stop} to {start - 1} of {what}.{self._lost_files()}"
                )
            if start < stop:
                raise ValueError(
                    f"{self._folder} has elements from {start} on of {what} twice: files of two checkpoints "
                    f"are mixed in it.{self._lost_files()}"
                )
            stop = next_stop

    def _lost_files(self) -> str:
        if self._num_there == self._num_files:
            return ""
        fewer = self._num_there < self._num_files
        return (
            f" It was written as {self._num_files} files and {self._num_there} are there; "
            f"{'bring the others back' if fewer else 'remove those that are not of it'}."
        )

    def read_into(self, out: Tensor, parameter: str, state: str, start: int) -> None:
        """Fill a flat tensor, of any dtype and device, with a parameter's elements from `start` on."""
        stop = start + out.numel()
        for piece in self._pieces[parameter][state]:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                part = out[first - start : last - start]
                self._open_files[piece.path].read_into(part, piece.key, first - piece.start)

    def whole(self, parameter: str, state: str = WEIGHT, dtype: torch.dtype = torch.float32) -> Tensor:
        """All of a weight or a state, in its shape, on the CPU."""
        out = torch.empty(self._shapes[parameter, state], dtype=dtype)
        self.read_into(out.view(-1), parameter, state, 0)
        return out

    def buffer(self, name: str) -> Tensor:
        """A buffer, on the CPU."""
        return self._open_files[self._buffers[name]].tensor(name)

    def buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the buffers, by name."""
        return {name: self._open_files[path].shapes[name] for name, path in self._buffers.items()}

    def dtype(self, parameter: str) -> torch.dtype:
        """What a weight is kept in."""
        piece = self._pieces[parameter][WEIGHT][0]
        return self._open_files[piece.path].dtypes[piece.key]

    def require_weight(self, name: str) -> None:
        """See that a weight is whole.

        Raises:
            ValueError: Elements that are in no file, or in two.
        """
        if WEIGHT not in self._pieces[name]:
            raise ValueError(f"{self._folder} holds no weight {name}.{self._lost_files()}")
        self._check_whole(name, WEIGHT)

    def weights(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
        """Names and whole weights, then buffers, one at a time on the CPU; integers keep their own dtype.

        Raises:
            ValueError: Elements that are in no file, or in two.
        """
        for name in self.shapes:
            self.require_weight(name)
            yield name, self.whole(name, dtype=dtype)
        for name in self._buffers:
            buffer = self.buffer(name)
            yield name, buffer.to(dtype) if buffer.is_floating_point() else buffer


def load_buffers(module: nn.Module, saved: SavedState) -> None:
    """Bring a model's persistent buffers back."""
    for name, buffer in persistent_buffers(module).items():
        buffer.copy_(saved.buffer(name))
