"""Which linear layers are told apart into a weight and a low-rank pair, and which run their own forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from longseq.mst.lm_head import lm_head_loss
from longseq.mst.low_rank import as_linear_head, linear_parts

peft = pytest.importorskip("peft")

D, V, RANK = 16, 50, 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(D, V, bias=True)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)


def adapted_head(**options) -> nn.Module:
    config = peft.LoraConfig(**{"target_modules": ["lm_head"], "r": RANK, "lora_alpha": 8, **options})
    head = peft.get_peft_model(Model(), config).base_model.model.lm_head
    for name, parameter in head.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return head


def test_a_plain_head() -> None:
    head = nn.Linear(D, V)
    weight, bias, lora = as_linear_head(head)
    assert weight is head.weight
    assert bias is head.bias
    assert lora is None


def test_an_adapted_head_is_its_weight_and_a_pair() -> None:
    head = adapted_head()
    weight, bias, (a, b, scale) = as_linear_head(head)
    hidden = torch.randn(7, D)
    ours = hidden @ (weight + scale * b @ a).T + bias
    torch.testing.assert_close(ours, head(hidden))


def test_the_adapter_is_trained_through_the_loss() -> None:
    head = adapted_head()
    hidden, labels = torch.randn(1, 9, D), torch.randint(0, V, (1, 9))
    gradients = []
    for loss in ("cce", "mini_sequence"):
        head.zero_grad()
        lm_head_loss(head, head.forward, hidden, labels, shift=True, num_items=None, loss=loss).backward()
        gradients.append({name: p.grad for name, p in head.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 2
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_an_adapter_in_float32_keeps_its_gradient_so() -> None:
    head = adapted_head()
    head.get_base_layer().bfloat16()
    weight, _, (a, b, _) = as_linear_head(head)
    assert a.dtype == b.dtype == weight.dtype == torch.bfloat16
    (a.sum() + b.sum()).backward()
    assert head.lora_A["default"].weight.grad.dtype == torch.float32


def test_a_layer_of_a_decoder_keeps_its_adapters_own_weights() -> None:
    """Gradients are handed out by weight: as a head's, in the dtype of the base, they would be others."""
    head = adapted_head()
    head.get_base_layer().bfloat16()
    weight, bias, (a, b, scale) = linear_parts(head)
    base = head.get_base_layer()
    assert weight is base.weight
    assert bias is base.bias
    assert a is head.lora_A["default"].weight
    assert b is head.lora_B["default"].weight
    assert scale == 8 / RANK


@pytest.mark.parametrize("train", [True, False])
def test_adapter_dropout_is_no_part(train: bool) -> None:
    """Nor in evaluation, where it does nothing: what a layer is must not change with its mode."""
    assert linear_parts(adapted_head(lora_dropout=0.1).train(train)) is None
    assert linear_parts(adapted_head(lora_dropout=0.0).train(train)) is not None


@pytest.mark.parametrize("scale", [{"use_rslora": True}, {"lora_alpha": 3}])
def test_the_scale_is_the_adapters(scale: dict) -> None:
    head = adapted_head(**scale)
    weight, bias, (a, b, factor) = linear_parts(head)
    hidden = torch.randn(7, D)
    torch.testing.assert_close(hidden @ (weight + factor * b @ a).T + bias, head(hidden))


def test_several_adapters_at_once_run_their_own_forward() -> None:
    model = peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["lm_head"], r=RANK))
    model.add_adapter("other", peft.LoraConfig(target_modules=["lm_head"], r=RANK))
    head = model.base_model.model.lm_head
    assert linear_parts(head).lora[0] is head.lora_A["default"].weight
    model.set_adapter("other")
    assert linear_parts(head).lora[0] is head.lora_A["other"].weight
    model.base_model.set_adapter(["default", "other"])
    assert linear_parts(head) is None


class Half(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


@pytest.mark.parametrize(
    "module", [Half(D, V), nn.Bilinear(D, D, V), nn.Identity(), nn.Embedding(V, D)], ids=str
)
def test_what_is_no_linear_layer(module: nn.Module) -> None:
    """A subclass may do anything."""
    assert linear_parts(module) is None


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}])
def test_heads_that_are_more_than_a_pair_run_their_own_forward(options: dict) -> None:
    assert as_linear_head(adapted_head(**options)) is None


def test_a_merged_or_disabled_adapter_is_none() -> None:
    head = adapted_head()
    head.enable_adapters(False)
    assert as_linear_head(head).lora is None
    head.enable_adapters(True)
    head.merge()
    assert as_linear_head(head).lora is None


def test_other_modules_are_no_linear_head() -> None:
    assert as_linear_head(nn.Sequential(nn.Linear(D, V))) is None
