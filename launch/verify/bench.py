"""What the techniques are tried on: the clone, its truths, and the config as it is for the clone."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...distributed.groups import ProcessGroups
from ..config import RunConfig
from ..config_rules import streams_layers
from ..model import add_adapters, build_model
from .batches import TILE, Batch, Sample, make_long_sample, make_rows, make_samples
from .clone import Heads, draw_weights, heads_for, heads_of, possible_groups, small_config, small_model
from .compare import EXACT, NEAR, Step
from .truth import exact, plain_step

MOST_PROCESSES = 4
"""Processes that are started at most; a config with more ranks a sequence has its heads scaled down."""
DEFAULT_PROCESSES = 2
DEEP_LAYERS = 6
"""The fewest for segments of rising length of which one has two rebuilt inputs: one waits on the host."""


@dataclass(frozen=True)
class Layout:
    """The processes of the check.

    Attributes:
        processes: How many are started.
        degree: Of them, those that share a sequence.
        zero_stage: 0 to 3.
    """

    processes: int
    degree: int
    zero_stage: int

    @classmethod
    def of(cls, config: RunConfig) -> Layout:
        """As the config has it, as far as a few processes go; `auto` is taken as all that it may become."""
        parallel = config.parallel
        auto_degree = 1 if parallel.num_gpus == 1 else DEFAULT_PROCESSES
        degree = auto_degree if parallel.ulysses_degree == "auto" else parallel.ulysses_degree
        stage = 3 if parallel.zero_stage == "auto" else parallel.zero_stage
        if degree > MOST_PROCESSES:
            degree = DEFAULT_PROCESSES
        several = degree > 1 or stage > 0 or parallel.num_gpus not in ("auto", 1)
        processes = max(degree, DEFAULT_PROCESSES) if several else 1
        return cls(processes, degree, stage)

    @property
    def micro_batches(self) -> int:
        """Of a step, on each rank: the samples are shared by the ranks that take different ones."""
        return -(-len(make_samples()) // (self.processes // self.degree))


@dataclass
class Bench:
    """One clone, in float64, and what plain PyTorch makes of its batches.

    Attributes:
        config: The user's.
        original: Hugging Face config of the user's model.
        heads: Of the clone.
        layout: Processes that the config asks for.
        folder: Where the clone's weights are, for those who load them as training does.
    """

    config: RunConfig
    original: Any
    heads: Heads
    layout: Layout
    folder: Path
    samples: list[Sample] = field(default_factory=make_samples)
    rows: Sample = field(default_factory=make_rows)
    long: Sample = field(default_factory=lambda: make_long_sample(259))

    @classmethod
    def make(cls, config: RunConfig, architecture: Any, folder: Path) -> Bench:
        """Draw the clone of a model and write it into a folder."""
        layout = Layout.of(config)
        degree = config.parallel.ulysses_degree
        heads = heads_of(architecture)
        if degree != "auto" and degree > MOST_PROCESSES:
            heads = heads_for(heads, degree, layout.degree)
        bench = cls(config, architecture, heads, layout, folder)
        bench.base.save_pretrained(folder)
        return bench

    @cached_property
    def architecture(self) -> Any:
        """Of the clone."""
        return small_config(self.original, heads=self.heads)

    @cached_property
    def base(self) -> nn.Module:
        """The clone as transformers has it, in float64, without adapters; not to be changed."""
        return small_model(self.architecture, "cpu", torch.float64, seed=self.config.train.seed)

    @cached_property
    def deep(self) -> nn.Module:
        """A clone of more layers, with nothing rounded to float32."""
        small = small_config(self.original, heads=self.heads, layers=DEEP_LAYERS)
        return exact(small_model(small, "cpu", torch.float64, seed=self.config.train.seed))

    @cached_property
    def plain(self) -> nn.Module:
        """The clone with the config's adapters, if it has any."""
        return with_adapters(copy.deepcopy(self.base), self.clone_config)

    @cached_property
    def true(self) -> nn.Module:
        """`base` with nothing rounded to float32."""
        return exact(self.base)

    @cached_property
    def true_plain(self) -> nn.Module:
        """`plain` with nothing rounded to float32."""
        return exact(self.plain)

    @cached_property
    def clone_config(self) -> RunConfig:
        """The config with the clone in place of the model, and tiles and placement as its batches need."""
        config, sequence = self.config, self.config.sequence
        placement = "none"
        if self.streams:
            placement = "gpu" if sequence.checkpoints == "auto" else sequence.checkpoints
        lora = config.model.lora
        if lora is not None:
            lora = lora.model_copy(update={"dropout": 0.0})  # its masks would be others in each of two runs
        return config.model_copy(
            update={
                "model": config.model.model_copy(
                    update={"name": str(self.folder), "config": {}, "lora": lora}
                ),
                "sequence": sequence.model_copy(
                    update={
                        "length": TILE,
                        "tile_tokens": TILE,
                        "checkpoints": placement,
                        "head_groups": self.head_groups,
                    }
                ),
                "train": config.train.model_copy(update={"micro_batch_sequences": 1}),
            }
        )

    @property
    def streams(self) -> bool:
        """Whether the user's run streams its layers."""
        sequence = self.config.sequence
        if sequence.length == "max":
            return sequence.checkpoints != "none"
        if sequence.checkpoints == "auto" and (
            sequence.head_groups != "auto" or sequence.save_attention not in ("none", "auto")
        ):
            return True  # as a plan takes it: what was asked for is of streamed layers
        degree = self.config.parallel.ulysses_degree
        tokens = sequence.length * self.config.train.micro_batch_sequences
        return streams_layers(sequence, tokens // (1 if degree == "auto" else degree))

    @property
    def may_stream(self) -> bool:
        """Whether it does, or a plan may choose so: on a GPU `auto` goes by memory, not by length."""
        lora = self.config.model.lora
        drops = lora is not None and lora.dropout > 0
        return self.streams or (self.config.sequence.checkpoints == "auto" and not drops)

    @property
    def head_groups(self) -> int | str:
        """Groups of heads: two where `auto` takes so many of long sequences; no more than the clone has."""
        asked, degree = self.config.sequence.head_groups, self.layout.degree
        if asked == "auto":
            return 2 if self.streams and self.heads.keys % (2 * degree) == 0 else asked
        if self.heads == heads_of(self.original):
            return asked  # which is refused if it does not divide
        return max(n for n in possible_groups(self.heads, degree) if n <= asked)

    @property
    def finest_groups(self) -> int:
        """The most groups of heads that `auto` may come to; 1 where nothing is left to it."""
        if self.config.sequence.head_groups != "auto" or not self.may_stream:
            return 1
        return possible_groups(self.heads, self.layout.degree)[-1]

    @property
    def tolerance(self) -> float:
        """Of the whole path in float64."""
        return EXACT if self.streams and self.config.sequence.loss != "logits" else NEAR

    def truth(self, samples: list[Sample], *, adapters: bool = False) -> Step:
        """What one step over these micro-batches comes to; kept."""
        key = (tuple(sample.name for sample in samples), adapters)
        if key not in self._truths:
            model = self.true_plain if adapters else self.true
            self._truths[key] = plain_step(model, [sample.batch for sample in samples])
        return self._truths[key]

    @cached_property
    def _truths(self) -> dict[Any, Step]:
        return {}

    def fresh(self) -> nn.Module:
        """A copy of the exact clone to put one technique on."""
        return copy.deepcopy(self.true)

    def batches(self, samples: list[Sample]) -> list[Batch]:
        """Of samples."""
        return [sample.batch for sample in samples]


def with_adapters(model: nn.Module, config: RunConfig) -> nn.Module:
    """Adapters as the config has them, none of them zero."""
    model = add_adapters(model, config.model)
    if config.model.lora is not None:
        dtype = next(model.parameters()).dtype
        draw_weights(model, only="lora_", seed=config.train.seed)
        for param in model.parameters():
            param.data = param.data.to(dtype)
    return model.train()


def trained_model(
    config: RunConfig, groups: ProcessGroups, dtype: torch.dtype, zero: Any = None
) -> nn.Module:
    """The clone as training builds it: `launch.model.build_model`, with adapters that are not zero."""
    model = build_model(config, groups, torch.device("cpu"), dtype, zero)
    if config.model.lora is not None:
        draw_weights(model, only="lora_", seed=config.train.seed)
        for param in model.parameters():
            if param.requires_grad:
                param.data = param.data.to(dtype)
    return model
