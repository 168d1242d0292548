"""The safetensors format, written and read piece by piece: no file is ever whole in memory.

The library of that name wants all tensors of a file at once to write it, and maps files into memory to read
them. Here a file is written from tensors that are made one after the other, and elements are read into the
tensor that they are for.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""By what safetensors calls them."""
NAMES = {dtype: name for name, dtype in reversed(DTYPES.items())}
BUFFER_BYTES = 2**25
"""At most this much of a tensor is copied at a time."""
LONGEST_HEADER_BYTES = 10**8
"""As the library has it: a length beyond is no length."""


@dataclass(frozen=True)
class TensorSource:
    """A tensor that is there when it is asked for.

    Attributes:
        dtype: Of its elements.
        shape: Its shape.
        read: Makes or hands over the tensor, on any device; called once, when its turn has come.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSource:
        """A tensor that is there already."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def num_bytes(self) -> int:
        """Of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """A safetensors file to be written.

    Args:
        name: Of the file.
        sources: Tensors by their names in the file.
        metadata: Of the file.

    Attributes:
        head: What stands before the tensors.
        sources: In the order in which they are written.

    Raises:
        ValueError: A tensor of a dtype that safetensors has no name for.
    """

    def __init__(self, name: str, sources: Mapping[str, TensorSource], metadata: Mapping[str, str]) -> None:
        self.name = name
        ordered = sorted(sources.items(), key=lambda item: -item[1].dtype.itemsize)  # so all are aligned
        self.sources = [source for _, source in ordered]
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        end = 0
        for key, source in ordered:
            if source.dtype not in NAMES:
                raise ValueError(
                    f"{key} is {source.dtype}; safetensors hold {', '.join(DTYPES)}. Keep it in one "
                    "of these, or register the buffer with persistent=False."
                )
            begin, end = end, end + source.num_bytes
            dtype, shape = NAMES[source.dtype], list(source.shape)
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.head = len(text).to_bytes(8, "little") + text
        self.num_bytes = len(self.head) + end

    def chunks(self) -> Iterator[memoryview | bytes]:
        """All bytes of the file; of a tensor elsewhere than in host memory no more than `BUFFER_BYTES`."""
        yield self.head
        for source in self.sources:
            # A generator of its own: nothing here holds a tensor while the next one is made.
            yield from _chunks(flat_bytes(source.read()))


def _chunks(flat: Tensor) -> Iterator[memoryview]:
    step = BUFFER_BYTES if flat.device.type != "cpu" else max(1, flat.numel())
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step].cpu().numpy().data


def flat_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, `(bytes,)`; no copy of one that is contiguous."""
    tensor = tensor.detach()
    # What has to be copied is copied in host memory, for the other may be full.
    tensor = tensor if tensor.is_contiguous() else tensor.cpu().contiguous()
    return tensor.reshape(-1).view(torch.uint8)


class StoredTensors:
    """The tensors of a safetensors file, read as far as they are asked for.

    Attributes:
        metadata: Of the file.
        shapes: By name.
        dtypes: By name.

    Raises:
        ValueError: The file is not there, or no whole safetensors; it is named.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._first_byte: dict[str, int] = {}
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
        weakref.finalize(self, os.close, self._descriptor)
        try:
            self._read_header()
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is no whole safetensors file: {_reason(error)}.") from error

    def _read_header(self) -> None:
        size = os.fstat(self._descriptor).st_size
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if size < 8 or length > min(LONGEST_HEADER_BYTES, size - 8):
            raise ValueError(f"it has {size:,} bytes, less than its header")
        header = json.loads(os.pread(self._descriptor, length, 8))
        self.metadata = header.pop("__metadata__", {})
        for key, entry in header.items():
            first, last = entry["data_offsets"]
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            if dtype not in DTYPES:
                raise ValueError(f"{key} is of dtype {dtype}, and only {', '.join(DTYPES)} can be read")
            self.shapes[key], self.dtypes[key] = shape, DTYPES[dtype]
            self._first_byte[key] = 8 + length + first
            if last - first != math.prod(shape) * DTYPES[dtype].itemsize or first < 0:
                raise ValueError(f"the place of {key} is not of its size")
            if 8 + length + last > size:
                raise ValueError(f"it has {size:,} bytes, and {key} ends at {8 + length + last:,}")

    def read_into(self, out: Tensor, key: str, first: int = 0) -> None:
        """Fill a flat tensor, of any dtype and device, with elements from `first` on."""
        dtype = self.dtypes[key]
        offset = self._first_byte[key] + first * dtype.itemsize
        if out.dtype == dtype and out.device.type == "cpu" and out.stride() == (1,):
            self._fill(out.detach().view(torch.uint8), offset)
            return
        step = BUFFER_BYTES // dtype.itemsize
        buffer = torch.empty(min(step, out.numel()), dtype=dtype)
        for start in range(0, out.numel(), step):
            part = buffer[: min(step, out.numel() - start)]
            self._fill(part.view(torch.uint8), offset + start * dtype.itemsize)
            out[start : start + part.numel()].copy_(part)

    def _fill(self, raw: Tensor, offset: int) -> None:
        data = memoryview(raw.numpy())
        while len(data):
            try:
                count = os.preadv(self._descriptor, [data[: 2**30]], offset)
            except OSError as error:
                raise ValueError(f"{self.path} cannot be read: {error.strerror}.") from error
            if count == 0:
                raise ValueError(f"{self.path} ends at byte {offset:,}, before what it is said to hold.")
            data, offset = data[count:], offset + count

    def tensor(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """A whole tensor on the CPU, in its own dtype or another."""
        out = torch.empty(self.shapes[key], dtype=dtype or self.dtypes[key])
        self.read_into(out.view(-1), key)
        return out


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return "its header is no JSON"
    return str(error) if isinstance(error, ValueError) else f"its header lacks or distorts {error}"
