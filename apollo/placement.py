"""What of a parameter is here: all of it, a DTensor's shard, or a run of elements of a flat shard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from .dispatch import is_dtensor
from .layout import Layout, Range
from .projection import parameter_key


class FlatPart(NamedTuple):
    """Consecutive elements of a parameter in a flat tensor of many, as ZeRO keeps them.

    Attributes:
        name: Of the parameter.
        layout: The elements that each rank has.
        offset: Of this rank's, in the flat tensor.
    """

    name: str
    layout: Layout
    offset: int


@dataclass
class Placed:
    """A parameter, its gradient and its state, as far as they are here.

    Attributes:
        name: Of the parameter.
        weight: This rank's elements, written in place.
        grad: Their gradient, if there is one.
        layout: Where all elements are.
        me: This rank in the layout.
        group: The ranks of the layout; None where one has it all.
        kept: Its state as the optimizer has it, which `local` and `keep` read and fill.
        owner: What the optimizer keeps the state under.
        whole: The DTensor that this is a shard of.
        quantized: What holds the values, where the weight does not.
    """

    name: str
    weight: Tensor
    grad: Tensor | None
    layout: Layout
    me: int = 0
    group: dist.ProcessGroup | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    owner: Any = None
    whole: Any = None
    quantized: Any = None

    def key(self, seed: int) -> int:
        """Its own 64 bits."""
        return parameter_key(seed, self.name)

    @property
    def first(self) -> int:
        """Place of the first element here in the flat whole."""
        start, dim = self.layout.bounds[self.me].start, self.layout.dim
        return start if dim is None else start * math.prod(self.layout.shape[dim + 1 :])

    @property
    def owned(self) -> Range:
        """The channels whose moments are here."""
        return self.layout.owned[self.me]

    def local(self) -> dict[str, Any]:
        """The state's tensors that are here; of a weight that is none's shard, the state itself."""
        if self.whole is None:
            return self.kept
        return {key: local_part(value) for key, value in self.kept.items()}

    def keep(self, local: dict[str, Any]) -> None:
        """Take over what a rule has added to its local state; shards of a whole become DTensors again."""
        for key, value in local.items():
            if key not in self.kept:
                self.kept[key] = value if self.whole is None else self._sharded(key, value)

    def _sharded(self, key: str, value: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Shard

        assert self.whole is not None
        mesh, placements = self.whole.device_mesh, self.whole.placements
        if value.shape == self.weight.shape and key != "step":
            return DTensor.from_local(
                value, mesh, placements, shape=self.whole.shape, stride=self.whole.stride(), run_check=False
            )
        if value.dim() >= 2:  # low-rank moments, by channel or by matrix
            by_first = [Shard(0) if isinstance(one, Shard) else one for one in placements]
            matrices = self.layout.matrices
            whole = (*self.whole.shape[:-2], matrices.channels, value.shape[-1])
            stride = tuple(_strides(whole))
            return DTensor.from_local(value, mesh, by_first, shape=whole, stride=stride, run_check=False)
        return value


def place(name: str, param: Tensor, states: Mapping[Any, dict[str, Any]]) -> Placed:
    """A parameter that is whole here, or a DTensor.

    Raises:
        ValueError: A DTensor that is sharded over more than one dimension of its mesh, or is a partial sum.
    """
    grad = param.grad
    if not is_dtensor(param):
        quantized = getattr(param, "quantized", None)
        whole = Layout.whole(param.shape)
        return Placed(name, param, grad, whole, kept=states.get(param, {}), owner=param, quantized=quantized)
    from torch.distributed.tensor import Replicate, Shard

    mesh_dims = [i for i, one in enumerate(param.placements) if not isinstance(one, Replicate)]
    if len(mesh_dims) > 1 or any(type(param.placements[i]) is not Shard for i in mesh_dims):
        raise ValueError(
            f"{name} is a DTensor with placements {param.placements}; Apollo takes one Shard(dim) and "
            "Replicate() beside it. Shard it over one dimension of the mesh."
        )
    if grad is not None and (not is_dtensor(grad) or grad.placements != param.placements):
        raise ValueError(f"the gradient of {name} is not sharded as the weight is; reduce it first.")
    local = Placed(
        name,
        param.to_local(),
        None if grad is None else grad.to_local(),
        Layout.whole(param.shape),
        kept=states.get(param, {}),
        owner=param,
        whole=param,
    )
    # Of a mesh of one process, all of it is here.
    if mesh_dims and param.device_mesh.size(mesh_dims[0]) > 1:
        mesh, [mesh_dim] = param.device_mesh, mesh_dims
        local.layout = Layout.chunked(param.shape, param.placements[mesh_dim].dim, mesh.size(mesh_dim))
        local.me, local.group = mesh.get_local_rank(mesh_dim), mesh.get_group(mesh_dim)
    return local


def place_flat(
    part: FlatPart,
    flat: Tensor,
    group: dist.ProcessGroup | None,
    me: int,
    states: Mapping[Any, dict[str, Any]],
) -> Placed:
    """A parameter's elements in a flat tensor; of one rank's, in the parameter's own shape."""
    place = slice(part.offset, part.offset + part.layout.bounds[me].size)
    grad = None if flat.grad is None else flat.grad[place]
    # Its state is kept by name: torch takes a key that is a tensor for one of the groups' parameters.
    kept = states.get(part.name, {})
    if len(part.layout.bounds) > 1:
        return Placed(part.name, flat[place], grad, part.layout, me, group, kept, owner=part.name)
    shape = part.layout.shape
    grad = None if grad is None else grad.view(shape)
    return Placed(part.name, flat[place].view(shape), grad, Layout.whole(shape), kept=kept, owner=part.name)


def local_part(value: Any) -> Any:
    """Of a DTensor, what is here."""
    return value.to_local() if is_dtensor(value) else value


def _strides(shape: tuple[int, ...]) -> list[int]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return strides[::-1]
