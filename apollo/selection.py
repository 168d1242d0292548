"""Which rule updates which weight, by the kind of layer that it is in and by its shape."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Rule = Literal["low_rank", "adamw", "adamw_8bit", "factored"]
"""`low_rank` is APOLLO; `adamw_8bit` keeps AdamW's moments in bytes; `factored` has Adafactor's row and
column means for a second moment, and no first one."""


def parameter_groups(
    model: nn.Module,
    *,
    embeddings: Rule = "adamw",
    weight_decay: float | None = None,
    overrides: Mapping[str, Rule] | None = None,
) -> list[dict[str, Any]]:
    """A model's trainable weights as groups for `Apollo`, each with names and a rule.

    Matrices of linear layers and batches of matrices (experts) are projected; biases, norms and all else that
    has one dimension get AdamW. Embeddings and the output head are matrices too, but most of their rows have
    no gradient in a step: the paper gives them AdamW, whose states then are most of what is left (for
    Llama-3-8B 7.8 GiB beside 14.5 MiB of APOLLO-Mini's).

    Args:
        model: Its parameters' names seed the projections, so they must be those of every other layout.
        embeddings: The rule of embeddings and of the output head.
        weight_decay: Of matrices; those of one dimension have none. None leaves it to the optimizer.
        overrides: Rules by regular expressions that are searched for in names; the last that matches counts.

    Raises:
        ValueError: An unknown rule, an expression that matches no name, or a rule that a weight cannot have.
    """
    for rule in (embeddings, *(overrides or {}).values()):
        if rule not in get_args(Rule):
            raise ValueError(f"rule {rule!r} is not known; use {', '.join(get_args(Rule))}.")
    found = {name: param for name, param in model.named_parameters() if param.requires_grad}
    _check_matches(overrides or {}, found)
    vocabulary = {id(weight) for weight in _vocabulary_weights(model)}
    groups: dict[tuple[Rule, bool], dict[str, Any]] = {}
    for name, param in found.items():
        shape = whole_shape(param)
        rule: Rule = "adamw"
        if len(shape) in (2, 3):
            rule = embeddings if id(param) in vocabulary else "low_rank"
        for pattern, other in (overrides or {}).items():
            rule = other if re.search(pattern, name) else rule
        if (rule == "low_rank" and len(shape) not in (2, 3)) or (rule == "factored" and len(shape) < 2):
            raise ValueError(f"rule {rule!r} of {name}: {tuple(shape)} is no matrix; give it 'adamw'.")
        decays = len(shape) >= 2
        group = groups.setdefault((rule, decays), {"params": [], "names": [], "rule": rule})
        group["params"].append(param)
        group["names"].append(name)
        if weight_decay is not None:
            group["weight_decay"] = weight_decay if decays else 0.0
        elif not decays:
            group["weight_decay"] = 0.0
    return list(groups.values())


def whole_shape(param: Tensor) -> torch.Size:
    """The shape of a weight, also of one that ZeRO-3 has sharded: its own is then `(0,)`."""
    return torch.Size(getattr(param, "ds_shape", param.shape))


def _vocabulary_weights(model: nn.Module) -> Iterable[Tensor]:
    """Of embeddings, and of what makes logits where the model says which layer that is."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield module.weight
        head = getattr(module, "get_output_embeddings", None)
        for layer in (head() if callable(head) else None, getattr(module, "lm_head", None)):
            if isinstance(getattr(layer, "weight", None), Tensor):
                yield layer.weight


def _check_matches(overrides: Mapping[str, Rule], found: Iterable[str]) -> None:
    names = list(found)
    for pattern in overrides:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(
                f"overrides: {pattern!r} matches no trainable parameter; there are such as {names[:3]}."
            )
