"""Which rule a model's weights get."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_samples import tiny_llama

from longseq.apollo import Apollo, parameter_groups
from longseq.apollo.selection import whole_shape


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(3, 12, 6))
        self.down_proj = nn.Parameter(torch.zeros(3, 6, 6))


class Model(nn.Module):
    """Every kind of weight; what makes logits is found by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(19, 6)
        self.conv = nn.Conv2d(3, 4, 2)
        self.proj = nn.Linear(6, 12)
        self.experts = Experts()
        self.norm = nn.LayerNorm(6)
        self.scale = nn.Parameter(torch.ones(()))
        self.lm_head = nn.Linear(6, 19, bias=False)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)


class WithOwnHead(nn.Module):
    """The model says itself which layer makes logits."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.logits = nn.Embedding(19, 6), nn.Linear(6, 19)
        self.hidden = nn.Linear(6, 6)

    def get_output_embeddings(self) -> nn.Module:
        return self.logits


def rules(model: nn.Module, **options: Any) -> dict[str, str]:
    groups = parameter_groups(model, **options)
    for group in groups:
        known = dict(model.named_parameters())
        for name, param in zip(group["names"], group["params"], strict=True):
            assert known[name] is param
    return {name: group["rule"] for group in groups for name in group["names"]}


MATRICES = {"proj.weight", "experts.gate_up_proj", "experts.down_proj"}
VOCABULARY = {"embed.weight", "lm_head.weight"}
OTHERS = {"conv.weight", "conv.bias", "proj.bias", "norm.weight", "norm.bias", "scale"}


def test_types_and_shapes() -> None:
    wanted = dict.fromkeys(MATRICES, "low_rank") | dict.fromkeys(VOCABULARY | OTHERS, "adamw")
    assert rules(Model()) == wanted


@pytest.mark.parametrize("rule", ["low_rank", "adamw", "adamw_8bit", "factored"])
def test_embeddings_and_head_have_their_rule(rule: str) -> None:
    found = rules(Model(), embeddings=rule)
    assert {found[name] for name in VOCABULARY} == {rule}
    assert {found[name] for name in MATRICES} == {"low_rank"}
    assert {found[name] for name in OTHERS} == {"adamw"}
    # And Apollo takes them so.
    model = Model()
    optimizer = Apollo(parameter_groups(model, embeddings=rule), rank=2)
    for param in model.parameters():
        param.grad = torch.ones_like(param) if param.requires_grad else None
    optimizer.step()
    names = {one.rule: set(one.names) for one in optimizer.memory_report().rules}
    assert names[rule] >= VOCABULARY
    assert names["low_rank"] >= MATRICES
    assert names["adamw"] >= OTHERS


def test_a_head_is_found_by_what_the_model_says() -> None:
    wanted = {"words.weight": "factored", "logits.weight": "factored", "logits.bias": "adamw"}
    wanted |= {"hidden.weight": "low_rank", "hidden.bias": "adamw"}
    assert rules(WithOwnHead(), embeddings="factored") == wanted
    inside = rules(nn.ModuleDict({"wrapped": WithOwnHead()}), embeddings="factored")
    assert inside == {f"wrapped.{name}": rule for name, rule in wanted.items()}


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama(tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    found = rules(model, embeddings="adamw_8bit")
    embeddings = {name for name, rule in found.items() if rule == "adamw_8bit"}
    assert embeddings == {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert all(
        ("norm" in name) == (rule == "adamw") for name, rule in found.items() if name not in embeddings
    )
    assert len(found) == len(dict(model.named_parameters()))


def test_small_matrices_are_found_by_the_optimizer() -> None:
    """LoRA's have a side that is no longer than the rank: the model does not know the rank."""
    model = nn.ModuleDict({"lora_A": nn.Linear(20, 4, bias=False), "base": nn.Linear(20, 30, bias=False)})
    model["base"].requires_grad_(False)
    assert rules(model) == {"lora_A.weight": "low_rank"}
    for rank, rule in ((4, "adamw"), (3, "low_rank")):
        [one] = Apollo(parameter_groups(model), rank=rank).memory_report().rules
        assert one.rule == rule


def test_overrides_the_last_that_matches_counts() -> None:
    model = Model()
    assert rules(model, overrides={"experts": "factored", r"experts\.down": "adamw"}) == {
        **rules(model),
        "experts.gate_up_proj": "factored",
        "experts.down_proj": "adamw",
    }
    turned = rules(model, overrides={r"experts\.down": "adamw", "experts": "factored"})
    assert turned["experts.down_proj"] == "factored"
    found = rules(model, embeddings="adamw", overrides={"^embed": "low_rank", r"norm\.bias$": "adamw_8bit"})
    assert (found["embed.weight"], found["norm.bias"], found["norm.weight"]) == (
        "low_rank",
        "adamw_8bit",
        "adamw",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embeddings": "sgd"}, "rule 'sgd' is not known; use low_rank, adamw, adamw_8bit, factored"),
        ({"overrides": {"proj": "lowrank"}}, "rule 'lowrank' is not known"),
        ({"overrides": {"attention": "adamw"}}, "overrides: 'attention' matches no trainable parameter"),
        ({"overrides": {"frozen": "adamw"}}, "overrides: 'frozen' matches no trainable parameter"),
        ({"overrides": {"norm": "low_rank"}}, r"rule 'low_rank' of norm.weight: \(6,\) is no matrix"),
        ({"overrides": {"norm": "factored"}}, r"rule 'factored' of norm.weight: \(6,\) is no matrix"),
        ({"overrides": {"conv": "low_rank"}}, r"rule 'low_rank' of conv.weight: \(4, 3, 2, 2\) is no matrix"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameter_groups(Model(), **options)


@pytest.mark.parametrize(("given", "matrices"), [(0.3, 0.3), (None, 0.1), (0.0, 0.0)])
def test_weights_of_one_dimension_do_not_decay(given: float | None, matrices: float) -> None:
    model = Model()
    optimizer = Apollo(parameter_groups(model, weight_decay=given), rank=2, weight_decay=0.1)
    decay = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["names"]}
    for name, param in model.named_parameters():
        if param.requires_grad:
            assert decay[name] == (matrices if param.dim() >= 2 else 0.0)


def test_a_model_without_trainable_weights() -> None:
    assert parameter_groups(nn.Linear(3, 3).requires_grad_(False)) == []


def test_weights_that_zero_3_has_sharded_are_known_by_their_whole_shape() -> None:
    model = Model()
    for param in model.parameters():
        shape = param.shape
        param.data = torch.empty(0)
        param.ds_shape = shape
    assert rules(model) == rules(Model())
    plain: Tensor = torch.zeros(3, 4)
    assert whole_shape(plain) == (3, 4)
