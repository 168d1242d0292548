"""Small causal language models of every family, and the float64 truth of their training steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from numerics import relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from longseq.launch.verify.truth import exact
from longseq.mst import apply_mini_sequence

VOCAB, HIDDEN, LENGTH = 131, 48, 37  # multiples of no tile

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 9},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "gemma2": {
        "sliding_window": 9,
        "query_pre_attn_scalar": 11,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "sliding_window": 9,
        "query_pre_attn_scalar": 11,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "olmo2": {},
}
"""What each family has of its own, in sizes at which it shows."""


def make_model(
    family: str = "llama", *, dtype: torch.dtype = torch.float64, attention: str = "eager", **fields: Any
) -> nn.Module:
    """A model in training whose every weight matters: no norm of ones, no bias of zeros."""
    config = AutoConfig.for_model(
        family,
        **{
            "hidden_size": HIDDEN,
            "intermediate_size": 112,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "vocab_size": VOCAB,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **FAMILIES.get(family, {}),
            **fields,
        },
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    randomize(model)
    return model.train()


@torch.no_grad()
def randomize(model: nn.Module, *, only: str = "") -> None:
    """New weights (of names with `only` in them) that are numbers of bfloat16, so that any dtype has them."""
    generator = torch.Generator().manual_seed(1)
    for name, param in model.named_parameters():
        if only not in name:
            continue
        noise = torch.randn(param.shape, generator=generator)
        if param.dim() > 1:
            noise = noise / param.shape[1] ** 0.5
        elif "norm" in name:
            noise = 0.3 * noise + float(not _is_gemma(model))
        param.copy_(noise.bfloat16())


def make_batch(rows: int = 2, length: int = LENGTH, *, masked: int = 11) -> dict[str, Tensor]:
    """Token ids and labels; the first row's first labels do not count."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, :masked] = -100
    return {"input_ids": ids, "labels": labels}


# -- the truth ------------------------------------------------------------------------------------------


def cross_entropy(
    logits: Tensor, labels: Tensor, *, num_items: float | None = None, shift: bool = True
) -> Tensor:
    """The mean over the labels that count (or their sum over `num_items`), in the dtype of the logits."""
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)
    return total / max(int((labels != -100).sum()), 1) if num_items is None else total / num_items


# -- steps ----------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What a training step gives: the loss, and the gradients by the weights' names."""

    loss: Tensor
    grads: dict[str, Tensor]


def true_step(model: nn.Module, batch: dict[str, Any], *, upstream: float = 1.0) -> Step:
    """The truth of a model's step; gradients of `inputs_embeds` too, where the batch has them."""
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if "inputs_embeds" in inputs:
        inputs["inputs_embeds"] = inputs["inputs_embeds"].detach().double().requires_grad_()
    true = exact(model)
    return take_step(true, inputs, upstream=upstream, loss_of=lambda out: cross_entropy(out.logits, labels))


def take_step(
    model: nn.Module,
    batch: dict[str, Any],
    *,
    upstream: float = 1.0,
    loss_of: Callable[[Any], Tensor] = lambda out: out.loss,
) -> Step:
    """Forward and backward from clean gradients."""
    model.zero_grad()
    embeds = batch.get("inputs_embeds")
    if embeds is not None:
        embeds.grad = None
    loss = loss_of(model(**batch))
    (loss * upstream).backward()
    return Step(loss.detach(), grads_of(model, embeds))


def grads_of(model: nn.Module, embeds: Tensor | None = None) -> dict[str, Tensor]:
    """Copies of the gradients that there are."""
    named: Iterable[tuple[str, Tensor]] = model.named_parameters()
    grads = {name: param.grad.clone() for name, param in named if param.grad is not None}
    if embeds is not None and embeds.grad is not None:
        grads["inputs_embeds"] = embeds.grad.clone()
    return grads


def streamed_step(model: nn.Module, batch: dict[str, Any], *, upstream: float = 1.0, **options: Any) -> Step:
    """A step with mini-sequences, which are taken off again."""
    handle = apply_mini_sequence(model, **options)
    try:
        if options.get("loss") == "logits":  # transformers' own loss is float32
            rest = {name: value for name, value in batch.items() if name != "labels"}
            loss_of = lambda out: cross_entropy(out.logits, batch["labels"])  # noqa: E731
            return take_step(model, rest, upstream=upstream, loss_of=loss_of)
        return take_step(model, batch, upstream=upstream)
    finally:
        handle.undo()


def assert_same_step(found: Step, truth: Step, *, tolerance: float = 1e-10, what: object = "") -> None:
    """Loss and every gradient agree to float64's roundings, and no gradient is there too many or too few."""
    assert found.grads.keys() == truth.grads.keys(), what
    errors = {"loss": relative_error(found.loss, truth.loss)}
    errors |= {name: relative_error(grad, truth.grads[name]) for name, grad in found.grads.items()}
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"{what}: relative errors {wrong}"


def _is_gemma(model: nn.Module) -> bool:
    return any(type(module).__name__.startswith("Gemma") for module in model.modules())


def with_lora(model: nn.Module, **options: Any) -> nn.Module:
    """Peft's wrapper with an adapter that does something, on every linear layer unless told otherwise."""
    import peft

    options = {"r": 4, "lora_alpha": 10, "target_modules": "all-linear", **options}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    adapted.to(model.dtype)
    randomize(adapted, only="lora_")
    return adapted.train()
