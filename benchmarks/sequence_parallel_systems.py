"""What `sequence_parallel.py` measures: a model under its engine, step by step; ours is here."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import decoder_anchors as anchors
import torch
from decoder_model import SHAPES, hold_gradients
from decoder_variants import attention_kernel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from longseq.distributed import ProcessGroups, apply_ulysses, global_token_loss, shard_batch
from longseq.distributed.loss import count_tokens
from longseq.distributed.zero_init import born_sharded, is_sharded, rewritten
from longseq.launch.evaluation import summed_nll
from longseq.mst import apply_mini_sequence

CLIP_NORM = 1.0
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Setup:
    """What a launch measures."""

    shape: str
    num_layers: int
    groups: ProcessGroups
    device: torch.device
    use_zero: bool
    """ZeRO-3 and AdamW; else one process with all weights and gradients on its GPU, and no optimizer."""

    @property
    def config(self) -> LlamaConfig:
        """Of the model."""
        return LlamaConfig(**SHAPES[self.shape], num_hidden_layers=self.num_layers, use_cache=False)


class StepEngine(Protocol):
    """What a step needs of longseq's own engines, and of others."""

    reducer_divisor: float

    def __call__(self, **batch: Any) -> Any:
        """The model's output."""

    def backward(self, loss: Tensor) -> None:
        """Make the gradients."""

    def step(self, lr: float) -> float | None:
        """Update the weights; the gradients' norm before clipping, if there is one."""


class System(ABC):
    """A model under its engine. Steps change no weight: each step's numbers are the first one's."""

    engine: StepEngine
    model: nn.Module
    num_warm_ups = 1
    names: re.Pattern[str]
    """What its variants are called."""
    rule: str
    """The same, for who has to read it."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    @classmethod
    def named(cls, key: str) -> re.Match[str]:
        """A variant's name, taken apart.

        Raises:
            ValueError: It is none.
        """
        found = cls.names.fullmatch(key)
        if found is None:
            raise ValueError(f"--variants {key} is no variant of this system; its are {cls.rule}.")
        return found

    @abstractmethod
    def use(self, key: str) -> None:
        """Be this variant from now on.

        Raises:
            MissingError: This environment does not have it.
        """

    @abstractmethod
    def leave(self) -> None:
        """Be transformers' own model, whose sequences are on one rank."""

    @abstractmethod
    def rebuilt_layers(self) -> int | None:
        """How many layers' attention is sent twice for backward; None where the layers decide that."""

    @abstractmethod
    def _step(self, ids: Tensor) -> tuple[float, float | None]: ...

    def step(self, ids: Tensor) -> tuple[float, float | None]:
        """Forward, backward and the optimizer on `(1, L)` token ids, the whole of this rank's sequence.

        Returns:
            The mean loss over all ranks' tokens, and the gradients' norm where an engine has one.
        """
        with self.around():
            return self._step(ids)

    def plain_step(self, ids: Tensor) -> tuple[float, float | None]:
        """The same by transformers' own layers, checkpointed, each rank on the whole of the same sequence."""
        self.leave()
        anchors.checkpoint_layers(self.model)
        ids = ids.to(self.setup.device)
        with kernel_of_sdpa(self.setup.device, None):
            loss = self.engine(input_ids=ids, labels=ids, use_cache=False).loss
            self.engine.backward(loss)
            norm = self.engine.step(0.0)
        self.model.gradient_checkpointing_disable()
        return loss.item(), norm

    def around(self) -> AbstractContextManager:
        """What a step runs inside of."""
        return nullcontext()

    def clear(self) -> None:
        """Before a step, outside of its time."""
        if not self.setup.use_zero:
            hold_gradients(self.model)

    def norm(self, of_step: float | None) -> float:
        """The gradients' norm, from what the step has left where it has not said."""
        if of_step is not None:
            return of_step
        norms = [
            torch.linalg.vector_norm(param.grad, dtype=torch.float32) for param in self.model.parameters()
        ]
        return torch.linalg.vector_norm(torch.stack(norms)).item()


class PlainEngine:
    """Forward and backward alone."""

    reducer_divisor = 1.0

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, **batch: Any) -> Any:
        return self._module(**batch)

    def backward(self, loss: Tensor) -> None:
        """As `StepEngine.backward`."""
        loss.backward()

    def step(self, lr: float) -> None:
        """Nothing: there is no optimizer."""


class Ours(System):
    """What longseq.launch makes of a config, and does in a step."""

    names = re.compile(
        r"(?P<checkpoints>auto|gpu|host)(\+groups(?P<groups>\d+))?"
        r"(\+(?P<save>gpu|host|all|auto|\d+))?(\+(?P<kernel>fa4))?"
    )
    rule = "(auto|gpu|host)[+groupsN][+gpu|host|all|auto|LAYERS][+fa4]"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._handles: list[Any] = []
        self._saved: int | None = 0
        if not setup.use_zero:
            self.model = build_model(setup, None)
            self.engine = PlainEngine(self.model)
            return
        from longseq.distributed.zero import DeepSpeedEngine
        from longseq.distributed.zero_config import ZeroOptions

        options = ZeroOptions(stage=3, clip_norm=CLIP_NORM, bf16=True)
        self.model = build_model(setup, options.deepspeed_config(setup.groups.world_size))
        # The engine looks once which modules are gathered whole; the marks stay when the handle goes.
        handle = apply_mini_sequence(self.model)
        self.engine = DeepSpeedEngine(self.model, adamw(self.model), setup.groups, options)
        handle.undo()

    def use(self, key: str) -> None:
        """As `System.use`."""
        found = self.named(key)
        save = number_or_name(found["save"] or "none")
        self.leave()
        self._handles.append(apply_ulysses(self.model, self.setup.groups))
        self._handles.append(
            apply_mini_sequence(
                self.model,
                checkpoints=found["checkpoints"],
                head_groups=int(found["groups"] or 0) or "auto",
                save_attention={"none": False, "auto": True}.get(save, save),
                # By name, so that a flash-attn-4 that is installed does not stand beside the other's cuDNN.
                attention_kernel=attention_kernel(self.model, found["kernel"]),
            )
        )
        layers = self.setup.num_layers
        self._saved = {"none": 0, "auto": None}.get(save, save if isinstance(save, int) else layers)

    def leave(self) -> None:
        """As `System.leave`."""
        while self._handles:
            self._handles.pop().undo()

    def rebuilt_layers(self) -> int | None:
        """As `System.rebuilt_layers`."""
        return None if self._saved is None else self.setup.num_layers - self._saved

    def _step(self, ids: Tensor) -> tuple[float, float | None]:
        setup, engine = self.setup, self.engine
        batch = shard_batch({"input_ids": ids, "labels": ids}, setup.groups)
        num_tokens = count_tokens([batch["shift_labels"]], setup.groups, setup.device)
        nll = summed_nll(engine, batch, setup.device)
        engine.backward(global_token_loss(nll, num_tokens, reducer_divisor=engine.reducer_divisor))
        loss = float(setup.groups.all_sum(nll.detach().double()) / num_tokens)
        return loss, engine.step(0.0)


def number_or_name(text: str) -> int | str:
    """`"4"` is a number of layers, everything else a name."""
    return int(text) if text.isdigit() else text


def build_model(setup: Setup, zero_config: dict[str, Any] | None) -> LlamaForCausalLM:
    """The same random weights in every system and on every number of ranks, in bfloat16.

    Args:
        setup: The launch.
        zero_config: DeepSpeed's: the weights are cut over the ranks as they are made. None: all are here.
    """
    sharded = nullcontext() if zero_config is None else born_sharded(zero_config)
    with sharded, setup.device:
        model = LlamaForCausalLM._from_config(setup.config, dtype=DTYPE, attn_implementation="sdpa")
    for index, param in enumerate(model.parameters()):
        _draw(param, index, setup)
    return model.train()


@torch.no_grad()
def _draw(param: Tensor, index: int, setup: Setup) -> None:
    """Fill one weight by a seed of its own; where it is cut, rank 0 draws it whole for all."""
    with rewritten([param]) if is_sharded(param) else nullcontext():
        if setup.groups.is_main:
            if param.dim() < 2:
                param.fill_(1)
            else:
                param.normal_(0, 0.02, generator=torch.Generator(param.device).manual_seed(1000 + index))


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """Of all weights, as one kernel on a GPU."""
    params = list(model.parameters())
    return torch.optim.AdamW(params, lr=0.0, fused=params[0].device.type == "cuda" or None)


def kernel_of_sdpa(device: torch.device, asked: str | None) -> AbstractContextManager:
    """cuDNN's kernel (or "flash"), or an error, for who asks PyTorch for attention on a GPU."""
    if device.type != "cuda":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {None: SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    return sdpa_kernel([backends[asked]])
