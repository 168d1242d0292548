"""DeepSpeed's ALST, as `sequence_parallel.py` measures it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import MethodType, SimpleNamespace
from typing import Any

import decoder_anchors as anchors
from sequence_parallel_systems import (
    CLIP_NORM,
    PlainEngine,
    Setup,
    System,
    adamw,
    build_model,
    kernel_of_sdpa,
)
from torch import Tensor, nn
from torch.nn import functional as F

from longseq.distributed import shard_batch


class Alst(System):
    """DeepSpeed's Ulysses for transformers, its tiled MLP and tiled loss, layer checkpoints and ZeRO-3.

    As Hugging Face's integration sets it up; gradients travel in bfloat16, as ours do, and not in the float32
    that DeepSpeed chooses beside sequence parallelism. Tokens are cut by `shard_batch`, which gives what
    DeepSpeed's data loader gives, without the gathering of batches.
    """

    # Another number of tiles is another order of modules: ZeRO-3 finds that out in one step, learns the new
    # order in the next, and fetches weights ahead from then on.
    num_warm_ups = 2
    names = re.compile(r"(?P<checkpoints>gpu|host)(\+(?P<kernel>flash))?")
    rule = "(gpu|host)[+flash]"

    def __init__(self, setup: Setup) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        anchors.need("deepspeed", "deepspeed")
        super().__init__(setup)
        self._attentions = ALL_ATTENTION_FUNCTIONS
        self._plain_attention = self._ulysses_attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
        self._around: Callable[[], AbstractContextManager] = nullcontext
        self._kernel: str | None = None
        if not setup.use_zero:
            self.model = build_model(setup, None)
            self.engine = PlainEngine(self.model)
            return
        sp_size = setup.groups.sp_size
        config = alst_config(setup)
        mpu = None
        if sp_size > 1:
            from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

            named_config = setup.config
            named_config._attn_implementation = "sdpa"
            mpu = UlyssesSPAttentionHF.register_with_transformers(
                model_name_or_path=SimpleNamespace(config=named_config),
                core_attn_implementation="sdpa",
                sequence_parallel_size=sp_size,
                micro_batch_size=1,
            )
            self._ulysses_attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
        self.model = build_model(setup, config)
        self.engine = AlstEngine(self.model, config, mpu)

    def use(self, key: str) -> None:
        """As `System.use`."""
        found = self.named(key)
        self.leave()
        self._kernel = found["kernel"]
        self._attentions["sdpa"] = self._ulysses_attention
        anchors.tile_mlps(self.model)
        anchors.checkpoint_layers(self.model)
        self.model.forward = MethodType(alst_forward, self.model)
        if found["checkpoints"] == "host":
            anchors.need_cuda(self.model, "a checkpoint on the host")
            self._around = anchors.AlstOffload()

    def leave(self) -> None:
        """As `System.leave`."""
        self._attentions["sdpa"] = self._plain_attention
        self._around, self._kernel = nullcontext, None
        self.model.gradient_checkpointing_disable()
        for module in (self.model, *(layer.mlp for layer in self.model.model.layers)):
            module.__dict__.pop("forward", None)

    def rebuilt_layers(self) -> int:
        """As `System.rebuilt_layers`: its checkpoints run attention again, and keep what that sent."""
        return 0

    def around(self) -> AbstractContextManager:
        """As `System.around`."""
        return kernel_of_sdpa(self.setup.device, self._kernel)

    def forget(self) -> None:
        """Let go of the pinned buffers: they are one pool for all steps of a length."""
        if isinstance(self._around, anchors.AlstOffload):
            self._around.forget()

    def _step(self, ids: Tensor) -> tuple[float, float | None]:
        groups, device = self.setup.groups, self.setup.device
        batch = shard_batch({"input_ids": ids, "labels": ids}, groups)
        del batch["document_offsets"]  # of one document: its own attention is causal as it is
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with self._around():
            loss = self.engine(**batch, loss_scale=groups.sp_size / (ids.shape[1] - 1))
            self.engine.backward(loss)
        mean = float(groups.all_sum(loss.detach().double()) / groups.world_size)
        return mean, self.engine.step(0.0)


class AlstEngine:
    """DeepSpeed's own engine, told of the sequence's ranks by `mpu`."""

    reducer_divisor = 1.0

    def __init__(self, module: nn.Module, config: dict[str, Any], mpu: Any) -> None:
        import deepspeed

        self._engine, *_ = deepspeed.initialize(model=module, optimizer=adamw(module), config=config, mpu=mpu)

    def __call__(self, **batch: Any) -> Any:
        return self._engine(**batch)

    def backward(self, loss: Tensor) -> None:
        """As `StepEngine.backward`."""
        self._engine.backward(loss)

    def step(self, lr: float) -> float:
        """As `StepEngine.step`."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        return float(self._engine.get_global_grad_norm())


def alst_forward(
    model: nn.Module, input_ids: Tensor, position_ids: Tensor, shift_labels: Tensor, loss_scale: float
) -> Tensor:
    """The loss of this rank's tokens, whose mean over the ranks is that of all of them.

    DeepSpeed's recipe gathers the ranks' means and counts, differentiably, and takes the mean of that. Its
    tiled loss does not hand a gradient from outside on to the head's weights, so the factor that the recipe
    amounts to stands inside of the tiles.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    hidden = model.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
    shards = max(1, math.ceil(input_ids.numel() * model.config.vocab_size * 4 / anchors.ALST_LOGITS_BYTES))

    def shard_loss(head: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(head(x).float(), y, ignore_index=-100, reduction="sum") * loss_scale

    return TiledFusedLogitsLoss.apply(
        shard_loss, model.lm_head, hidden, shift_labels, None, shards, [model.lm_head.weight], "sum"
    )


def alst_config(setup: Setup) -> dict[str, Any]:
    """DeepSpeed's config: ZeRO-3 by what Hugging Face fills in for "auto", and the dtypes that ours has."""
    hidden, groups = setup.config.hidden_size, setup.groups
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": groups.dp_size,
        "gradient_clipping": CLIP_NORM,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "seq_parallel_communication_data_type": "bf16",
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 10**9,
            "reduce_bucket_size": hidden**2,
            "stage3_prefetch_bucket_size": int(0.9 * hidden**2),
            "stage3_param_persistence_threshold": 10 * hidden,
            "stage3_max_live_parameters": 10**9,
            "stage3_max_reuse_distance": 10**9,
        },
    }
    if groups.sp_size > 1:
        config["sequence_parallel_size"] = groups.sp_size
    return config
