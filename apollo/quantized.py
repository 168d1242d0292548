"""Q-APOLLO's weights: linear layers in 8 bits, rounded stochastically when they are written.

A layer's `weight` stays an `nn.Parameter` of its whole shape, so that autograd, hooks, clipping and
optimizers find what they always do; but it owns one element. That is NaN, so that whoever takes it for the
values will notice; the values are to be had from `weight.quantized`. An optimizer that does not go there
cannot write it: torch refuses to write to many elements that are one.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from .int8 import Groups, Product, check_group_size
from .rounding import PIECE


class QuantizedWeight:
    """The values of a `QuantizedLinear.weight`: `weight.quantized`."""

    def __init__(self, layer: QuantizedLinear) -> None:
        # Weakly: layers that are let go must free their memory without waiting for the garbage collector.
        self._layer = weakref.ref(layer)

    def __getstate__(self) -> QuantizedLinear:
        return self.layer

    def __setstate__(self, layer: QuantizedLinear) -> None:
        self._layer = weakref.ref(layer)

    @property
    def layer(self) -> QuantizedLinear:
        """Whose weight it is.

        Raises:
            RuntimeError: The layer is no more.
        """
        layer = self._layer()
        if layer is None:
            raise RuntimeError(
                "the layer of this quantised weight is gone, and its values with it; make the optimizer from "
                "the parameters of the model that is trained."
            )
        return layer

    @property
    def nbytes(self) -> int:
        """Of codes, scales and zeros."""
        return sum(tensor.nbytes for tensor in self.layer.groups[:3])

    @torch.no_grad()
    def dequantize(self, rows: slice | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """A new tensor of (rows of) the values `(out, in)`, in `dtype` or else the weight's."""
        groups = self.layer.groups.part(slice(None) if rows is None else rows)
        dtype = self.layer.weight.dtype if dtype is None else dtype
        return groups.dequantize(torch.empty(groups.codes.shape, dtype=dtype, device=groups.codes.device))

    @torch.no_grad()
    def store(self, value: Tensor, key32: int | None = None, rows: slice | None = None) -> None:
        """Write (rows of) the weight, with new scales. A group with a value that is not finite becomes NaN.

        Args:
            value: `(out, in)`, or as many rows as `rows` has; quantised in float32.
            key32: 32 bits; another one for each weight and step. Each element is rounded up or down so that
                its mean over keys is right, by a hash of the key and of its place in the whole weight
                (`rounding.stochastically_rounded`). None rounds to nearest.
            rows: Which rows; groups never span two, so that slices give what the whole gives.

        Raises:
            ValueError: A shape that is another, or values that are not floating-point.
        """
        rows = slice(None) if rows is None else rows
        groups, width = self.layer.groups.part(rows), self.layer.in_features
        if value.shape != groups.codes.shape or not value.is_floating_point():
            raise ValueError(
                f"value of {value.dtype} and shape {tuple(value.shape)}: must be floating-point, and of "
                f"shape {tuple(groups.codes.shape)} for these rows; pass rows= for a part of the weight."
            )
        first, device = rows.indices(self.layer.out_features)[0], groups.codes.device
        is_ready = value.device == device and value.dtype != torch.float64
        at_once = len(value) if is_ready else max(1, PIECE // max(width, 1))
        for start in range(0, len(value), max(at_once, 1)):
            place = slice(start, start + at_once)
            part = value[place] if is_ready else value[place].to(device, torch.float32)
            groups.part(place).quantize(part, key32, (first + start) * width)


class QuantizedLinear(nn.Module):
    """`nn.Linear` whose weight is kept in 8 bits, dequantised a tile at a time and trained as any other.

    Tiles are of rows in forward, and of columns in backward. Streamed layers (`longseq.mst`) do without this
    module's forward: they dequantise a layer's weights at once, for as long as they work on that layer.

    The state dict has `weight_codes`, `weight_scale` and `weight_zero` in place of `weight`; a checkpoint
    with `weight` loads too, rounded to nearest. Scales stay float32 in any dtype that the module is cast to.

    Args:
        in_features, out_features, bias, device, dtype: As `nn.Linear`'s; so are the first values.
        group_size: Elements of a row that share a scale; a power of two, 16 or more.

    Raises:
        ValueError: Another group size.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        group_size: int = 128,
    ) -> None:
        super().__init__()
        vars(self).update(vars(nn.Linear(in_features, out_features, bias, device, dtype)))
        self._take_over(group_size)

    @property
    def groups(self) -> Groups:
        """The weight as it is kept."""
        return Groups(self.weight_codes, self.weight_scale, self.weight_zero, self.group_size)

    def forward(self, x: Tensor) -> Tensor:
        """`x @ W.T + bias` of `(..., in)`; under autocast in its dtype.

        Raises:
            ValueError: `x` has not the weight's dtype.
            RuntimeError: With gradients, if `weight` was replaced: no step on it would reach the values.
        """
        bias, kind = self.bias, x.device.type
        strides = zip(self.weight.shape, self.weight.stride(), strict=True)
        if torch.is_grad_enabled() and any(stride for size, stride in strides if size > 1):
            raise RuntimeError(
                "the weight of a quantised layer has been replaced, by FSDP, ZeRO or an assignment; give "
                "values to weight.quantized.store() instead."
            )
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
            bias = None if bias is None else bias.to(x.dtype)
        elif x.dtype != self.weight.dtype:
            raise ValueError(
                f"x.dtype={x.dtype}: must be the weight's, {self.weight.dtype}; cast one of them."
            )
        return Product.apply(x, self.weight, bias, self.groups)

    def extra_repr(self) -> str:
        """Sizes, and where the values are."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        kept = f"8 bits in groups of {self.group_size}; weight itself is NaN, see weight.quantized"
        return f"{sizes}, bias={self.bias is not None}, {kept}"

    @torch.no_grad()
    def _take_over(self, group_size: int) -> None:
        """Quantise the weight that is there, which stays the same Parameter and frees its memory."""
        check_group_size(group_size)
        self.group_size = group_size
        weight, (rows, columns) = self.weight, self.weight.shape
        scale = weight.new_empty(rows, -(-columns // group_size), dtype=torch.float32)
        self.register_buffer("weight_codes", weight.new_empty(rows, columns, dtype=torch.uint8))
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero", torch.empty_like(scale))
        _refuse_fused_optimizers()
        weight.quantized = QuantizedWeight(self)
        weight.quantized.store(weight.detach())
        weight.data = _placeholder(weight)

    @torch.no_grad()
    def _give_back(self) -> None:
        """The reverse of `_take_over`."""
        weight = self.weight
        weight.data = weight.quantized.dequantize()
        del weight.quantized, self.weight_codes, self.weight_scale, self.weight_zero, self.group_size

    @contextmanager
    def _without_weight(self) -> Iterator[None]:
        """What torch does with all parameters must not make this one its whole size."""
        parameters = self._parameters
        self._parameters = {name: param for name, param in parameters.items() if name != "weight"}
        try:
            yield
        finally:
            parameters.update(self._parameters)  # in the old order
            self._parameters = parameters

    @torch.no_grad()
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        weight, scale, zero = self.weight, self.weight_scale, self.weight_zero
        with self._without_weight():
            super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
            self.weight_zero = zero.to(self.weight_zero.device)
        grad, weight.grad = weight.grad, None
        weight.data = fn(weight.data.as_strided((1,), (1,))).expand(weight.shape)
        weight.grad = None if grad is None else fn(grad)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedLinear:
        weight = self.weight
        twin = nn.Parameter(_placeholder(weight), weight.requires_grad)
        copied = type(self).__new__(type(self))
        memo[id(weight)], memo[id(self)] = twin, copied
        vars(copied).update(copy.deepcopy(vars(self), memo))
        twin.quantized = QuantizedWeight(copied)
        return copied

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "weight"]

    @torch.no_grad()
    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        own = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
        plain = None if prefix + "weight_codes" in own else own.pop(prefix + "weight", None)
        if plain is not None:
            if plain.shape == self.weight.shape:
                self.weight.quantized.store(plain)
            else:
                shapes = f"{tuple(plain.shape)} in the checkpoint and {tuple(self.weight.shape)} here"
                lists[-1].append(f"size mismatch for {prefix}weight: {shapes}.")
            own |= {prefix + name: value for name, value in self._buffers.items()}
        with self._without_weight():
            super()._load_from_state_dict(own, prefix, local_metadata, strict, *lists)
        if self.weight_codes.device != self.weight.device:  # the checkpoint's own tensors were assigned
            self.weight.data = _placeholder(self.weight, self.weight_codes.device)


def _placeholder(weight: Tensor, device: torch.device | None = None) -> Tensor:
    """NaN of the weight's shape and dtype that takes the memory of one element."""
    device = weight.device if device is None else device
    return torch.full((1,), torch.nan, dtype=weight.dtype, device=device).expand(weight.shape)


@functools.cache
def _refuse_fused_optimizers() -> None:
    """torch's fused optimizers on the CPU write past a single element's memory without a check."""

    def check(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            if group.get("fused") and any(hasattr(param, "quantized") for param in group["params"]):
                raise ValueError(
                    f"{type(optimizer).__name__}(fused=True): cannot write quantised weights; use "
                    "longseq.apollo.Apollo, or dequantize_linears(model) first."
                )

    register_optimizer_step_pre_hook(check)


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize_linears` did: layers, and bytes of their weights before and after."""

    num_layers: int
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        mib = 2**20
        sizes = f"{self.bytes_before / mib:.1f} MiB of weights take {self.bytes_after / mib:.1f} MiB"
        return f"{self.num_layers} linear layers in 8 bits: {sizes}"


def quantize_linears(
    model: nn.Module, *, group_size: int = 128, skip: Sequence[str] = ("*lora_*",)
) -> QuantizationReport:
    """Make a model's linear layers `QuantizedLinear`, in place and one after the other, where they are.

    Modules and their parameters stay the objects that they are, with their hooks; the memory of each weight
    is freed before the next layer is begun. `model.save_pretrained` then saves plain weights.

    To be done before a model is wrapped. DistributedDataParallel takes it with `init_sync=False` (it would
    write the parameters) and `broadcast_buffers=False` (it would send all codes at each forward): ranks that
    start alike stay alike, since they round alike. FSDP and ZeRO, which shard parameters, cannot take it.
    peft's LoRA is to be added before it, as peft knows no layer but `nn.Linear`.

    Args:
        model: Any. Only `nn.Linear` itself is made another, no subclass; the output head stays.
        group_size: See `QuantizedLinear`.
        skip: Names of modules that stay, with `*` as in file names.

    Raises:
        ValueError: Nothing to be done, or a layer that cannot be done: its weight is tied to another, is not
            here, or its forward has been replaced. Nothing is changed then.
    """
    check_group_size(group_size)
    linears = _linears_of(model, skip)
    before = sum(linear.weight.nbytes for linear in linears)
    for linear in linears:
        # As torch.nn.utils.parametrize does: hooks, and all who hold the module, need not hear of it.
        linear.__class__ = QuantizedLinear
        linear._take_over(group_size)
    if hasattr(model, "save_pretrained") and not hasattr(model, "peft_config"):  # adapters are saved alone
        model.save_pretrained = functools.partial(_save_pretrained, model)
    return QuantizationReport(len(linears), before, sum(one.weight.quantized.nbytes for one in linears))


def dequantize_linears(model: nn.Module) -> int:
    """Make a model's `QuantizedLinear` layers `nn.Linear` again, of the values that they have; how many."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    for layer in layers:
        layer._give_back()
        layer.__class__ = nn.Linear
    vars(model).pop("save_pretrained", None)
    return len(layers)


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the model has with plain weights; those that are quantised here, in host memory."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            prefix = f"{name}." if name else ""
            for kept in module._buffers:
                del state[prefix + kept]
            state[f"{prefix}weight"] = module.weight.quantized.dequantize().cpu()
    return state


def _save_pretrained(
    model: Any, *args: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
) -> Any:
    """transformers' own would save codes, and its `from_pretrained` would make up the weights it misses."""
    state_dict = plain_state_dict(model) if state_dict is None else state_dict
    return type(model).save_pretrained(model, *args, state_dict=state_dict, **kwargs)


def _linears_of(model: nn.Module, skip: Sequence[str]) -> list[nn.Linear]:
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    spared = set() if head is None else set(head.modules())
    uses = Counter(param for _, param in model.named_parameters(remove_duplicate=False))
    linears = []
    for name, module in model.named_modules():
        is_skipped = module in spared or any(fnmatchcase(name, pattern) for pattern in skip)
        if type(module) is nn.Linear and not is_skipped:
            _check_linear(name, module, uses[module.weight])
            linears.append(module)
    if not linears:
        raise ValueError(f"{type(model).__name__} has no nn.Linear to quantise that skip={skip!r} leaves.")
    return linears


def _check_linear(name: str, linear: nn.Linear, num_uses: int) -> None:
    weight, problem = linear.weight, None
    if num_uses > 1:
        problem = "is tied to another; untie them"
    elif weight.is_meta or hasattr(weight, "ds_id") or type(weight.data) is not Tensor:
        problem = "is not whole and here; quantise before the model is spread over ranks, and load it first"
    elif "forward" in vars(linear):
        problem = "is not used by its module's own forward, which has been replaced; quantise before that"
    if problem is not None:
        raise ValueError(f"the weight of {name} {problem}, or name the module in skip.")
