"""What one decoder layer is made of, and its two halves as they are run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..distributed.attention import AttentionOptions
from ..distributed.groups import ProcessGroups
from ..distributed.ulysses import UlyssesAttention
from ..distributed.zero_init import whole_shape
from .attention_half import AttentionHalf
from .linear_map import LinearMap, ModuleMap, token_map
from .mlp_half import GatedMLP, MLPHalf, ModuleMLP
from .projections import HeadNorms, HeadShape, Projections
from .token_norm import token_norm

AUTO_GROUPS = 2
"""What "auto" takes: attention's working set is halved for next to no time, and queries, keys and values of
all heads still come from one product. benchmarks/results/decoder_head_groups.md has what more groups cost."""
GROUP_ROWS = 2**17
"""Query heads x tokens that keep a group's kernels busy: one group where a sequence is shorter."""


@dataclass(frozen=True)
class LayerParts:
    """The modules of a decoder layer by what they do; None where a family has no such thing."""

    attention: nn.Module
    query_key_value: tuple[nn.Module, ...]
    """Three modules, or the one that is all of them."""
    output: nn.Module
    mlp: nn.Module
    gate_up: tuple[nn.Module, ...]
    """Two modules, or the one that is both."""
    down: nn.Module
    activation: str | None
    heads: HeadShape
    scale: float
    input_norm: nn.Module | None = None
    query_norm: nn.Module | None = None
    key_norm: nn.Module | None = None
    post_attention_norm: nn.Module | None = None
    mlp_norm: nn.Module | None = None
    post_mlp_norm: nn.Module | None = None
    window: int | None = None
    softcap: float | None = None
    intermediate_size: int = 0

    def halves(
        self, dtype: torch.dtype, autocast: tuple[str, torch.dtype] | None, kernel: str
    ) -> tuple[AttentionHalf, MLPHalf]:
        """Both halves with weights in the dtype of the products."""

        def norm(module: nn.Module | None):
            return token_norm(module, dtype, autocast)

        attention = AttentionHalf(
            norm(self.input_norm),
            self._projections(dtype, autocast),
            token_map(self.output, dtype, autocast),
            norm(self.post_attention_norm),
            getattr(self.attention, "longseq_attention", None) or UlyssesAttention(ProcessGroups()),
            AttentionOptions(scale=self.scale, window=self.window, softcap=self.softcap, kernel=kernel),
            dtype,
        )
        mlp = MLPHalf(norm(self.mlp_norm), self._mlp(dtype, autocast), norm(self.post_mlp_norm), dtype)
        return attention, mlp

    def head_groups(self, asked: int | str, num_tokens: int) -> int:
        """Groups of key/value heads that attention runs in.

        Raises:
            ValueError: A number that does not divide the key/value heads, or whose groups have fewer query
                heads than there are ranks to share them.
        """
        heads = self.heads
        size = getattr(getattr(self.attention, "longseq_attention", None), "sp_size", 1)
        fitting = [
            n
            for n in range(1, heads.num_kv_heads + 1)
            if heads.num_kv_heads % n == 0 and heads.num_heads // n >= size
        ]
        if asked == "auto":
            is_busy = heads.num_heads // AUTO_GROUPS * num_tokens >= GROUP_ROWS
            # Groups that ranks share less evenly than all heads would cost time.
            is_even = AUTO_GROUPS in fitting and heads.num_kv_heads % (AUTO_GROUPS * size) == 0
            return AUTO_GROUPS if is_busy and is_even else 1
        if asked not in fitting:
            shared = f", or has fewer query heads than its {size} ranks" if size > 1 else ""
            raise ValueError(
                f"head_groups={asked} does not divide {heads.num_kv_heads} key/value heads{shared}; use "
                f"{', '.join(map(str, fitting))} or 'auto'."
            )
        return int(asked)

    def refuse_dropout(self, layer: nn.Module) -> None:
        """Streamed layers run twice and would draw other masks the second time.

        Raises:
            ValueError: The layer is in training and drops something.
        """
        found = [
            said
            for name, module in layer.named_modules()
            if module.training
            for said in dropouts_of(name, module)
        ]
        if found:
            raise ValueError(
                f"{type(layer).__name__} drops out in training: {', '.join(found)}. A streamed layer is run "
                "again in backward and would drop others; set it to 0 (LoRA: lora_dropout=0), or pass "
                "checkpoints='none' to apply_mini_sequence."
            )

    def _projections(self, dtype: torch.dtype, autocast: tuple[str, torch.dtype] | None) -> Projections:
        maps = [token_map(module, dtype, autocast) for module in self.query_key_value]
        queries, keys, _ = self.heads.widths
        if len(maps) == 1:
            placed = [(maps[0], 0), (maps[0], queries), (maps[0], queries + keys)]
        else:
            placed = [(one, 0) for one in maps]
        norms = HeadNorms(
            token_norm(self.query_norm, dtype, autocast),
            token_norm(self.key_norm, dtype, autocast),
            whole=self.query_norm is not None and whole_shape(self.query_norm.weight)[0] != self.heads.width,
        )
        return Projections(placed, self.heads, norms)

    def _mlp(self, dtype: torch.dtype, autocast: tuple[str, torch.dtype] | None) -> GatedMLP | ModuleMLP:
        maps: list[Any] = [token_map(module, dtype, autocast) for module in (*self.gate_up, self.down)]
        if self.activation is None or not all(isinstance(one, LinearMap) for one in maps):
            return ModuleMLP(ModuleMap(self.mlp, dtype, autocast))
        return GatedMLP(maps[:-1], maps[-1], self.activation)


def dropouts_of(name: str, module: nn.Module) -> list[str]:
    """What a module itself drops out, as `name (p=0.1)` or, where that is a number of its own, `name=0.1`."""
    if isinstance(module, nn.Dropout):
        return [f"{name} (p={module.p})"] if module.p > 0 else []
    numbers = [(key, value) for key, value in vars(module).items() if "drop" in key]
    return [
        f"{name}.{key}={value}".lstrip(".")
        for key, value in numbers
        if isinstance(value, float) and value > 0
    ]
