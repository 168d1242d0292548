"""`apply_ulysses` on a Hugging Face model of one process: documents, refusals and the way back."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_samples import VOCAB, tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

from longseq.distributed import ProcessGroups, apply_ulysses
from longseq.distributed.attention_kernels import Documents

OFFSETS = (0, 13, 14, 37)


def ids_of(rows: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (rows, 37), generator=torch.Generator().manual_seed(0))


def restarting_positions(rows: int = 1) -> Tensor:
    lengths = torch.tensor(OFFSETS).diff().tolist()
    return torch.cat([torch.arange(length) for length in lengths]).expand(rows, -1)


def document_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Each document through the model alone."""
    bounds = pairwise(OFFSETS)
    return torch.cat([model(input_ids=ids[:, a:b], use_cache=False).logits for a, b in bounds], dim=1)


def assert_near(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("told_by", ["document_offsets", "position_ids"])
def test_packed_documents_are_as_if_alone(told_by: str) -> None:
    model, ids = tiny_llama(torch.float64), ids_of()
    wanted = document_logits(model, ids)
    apply_ulysses(model)
    batch = {"input_ids": ids, "position_ids": restarting_positions()}
    if told_by == "document_offsets":
        batch["document_offsets"] = torch.tensor(OFFSETS, dtype=torch.int32)
    assert_near(model(**batch, use_cache=False).logits, wanted)


def test_plain_rows_keep_their_numbers() -> None:
    model, ids = tiny_llama(torch.float64), ids_of(rows=3)
    wanted = model(input_ids=ids, labels=ids, use_cache=False)
    apply_ulysses(model)
    got = model(input_ids=ids, labels=ids, use_cache=False)
    assert_near(got.logits, wanted.logits)
    torch.testing.assert_close(got.loss, wanted.loss)
    assert_near(
        model(input_ids=ids, position_ids=torch.arange(37).expand(3, -1)).logits,
        wanted.logits,
    )


def test_undo_gives_the_model_back() -> None:
    model, ids = tiny_llama(torch.float64), ids_of()
    implementation = model.config._attn_implementation
    wanted = model(input_ids=ids).logits
    handle = apply_ulysses(model)
    handle.undo()
    handle.undo()
    assert model.config._attn_implementation == implementation
    assert not any(hasattr(module, "longseq_attention") for module in model.modules())
    mask = torch.ones(1, 37, dtype=torch.long)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, wanted)
    assert model.generate(ids, attention_mask=mask, max_new_tokens=2, pad_token_id=0).shape == (1, 39)


def test_other_models_of_the_class_are_not_touched() -> None:
    touched, other, ids = tiny_llama(), tiny_llama(), ids_of()
    apply_ulysses(touched)
    assert other(input_ids=ids, attention_mask=torch.ones(1, 37)).logits is not None


def test_a_saved_config_does_not_ask_for_this_attention(tmp_path: Path) -> None:
    model = tiny_llama()
    apply_ulysses(model)
    model.config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "longseq" not in json.dumps(saved)


def test_applying_twice_is_refused() -> None:
    model = tiny_llama()
    handle = apply_ulysses(model)
    with pytest.raises(ValueError, match=r"has this attention already; call handle\.undo\(\)"):
        apply_ulysses(model)
    handle.undo()
    apply_ulysses(model)


@pytest.mark.parametrize("by_name", [True, False])
def test_an_attention_mask_is_refused(by_name: bool) -> None:
    model, ids, mask = tiny_llama(), ids_of(), torch.ones(1, 37)
    apply_ulysses(model)
    with pytest.raises(ValueError, match="attention_mask is not taken"):
        model(ids, attention_mask=mask) if by_name else model(ids, mask)


def test_packed_documents_in_several_rows_are_refused() -> None:
    model = tiny_llama()
    apply_ulysses(model)
    with pytest.raises(ValueError, match="restart inside a batch of 2 rows"):
        model(input_ids=ids_of(2), position_ids=restarting_positions(2))


def test_attention_dropout_is_refused() -> None:
    model = tiny_llama(attention_dropout=0.1)
    apply_ulysses(model)
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1"):
        model(input_ids=ids_of())


def small_model(family: str, **fields: Any) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes, **heads, **fields)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()


def loss_and_grads(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    grads = {name: param.grad.clone() for name, param in model.named_parameters()}
    return {"logits": out.logits.detach(), **grads}


WINDOWED = {
    "mistral": {"sliding_window": 9, "initializer_range": 0.5},
    "gemma2": {
        "sliding_window": 9,
        "attn_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 5,
        "initializer_range": 0.5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


@pytest.mark.parametrize("family", WINDOWED)
def test_windows_and_softcaps_are_those_of_transformers(family: str) -> None:
    fields, ids = WINDOWED[family], ids_of(2)
    model = small_model(family, **fields)
    wanted = loss_and_grads(model, ids)
    others = [{"sliding_window": 8}, {"sliding_window": 10}, {"attn_logit_softcapping": 2.1}]
    for other in others[: 3 if family == "gemma2" else 2]:
        wrong = loss_and_grads(small_model(family, **{**fields, **other}), ids)
        assert not torch.allclose(wrong["logits"], wanted["logits"], rtol=1e-3, atol=1e-3)
    apply_ulysses(model)
    for name, value in loss_and_grads(model, ids).items():
        # transformers' eager attention takes its softmax in float32, whatever the model's dtype.
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_window_that_the_layer_does_not_ask_for_is_not_left_out() -> None:
    model = small_model("gemma2", **WINDOWED["gemma2"])
    apply_ulysses(model)
    model.model.layers[0].self_attn.sliding_window = None
    with pytest.raises(ValueError, match="asks for sliding_window=None, its config for 9"):
        model(input_ids=ids_of())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types has chunked_attention"),
        ({"is_causal": False}, "sees tokens that come later"),
    ],
)
def test_other_kinds_of_attention_are_refused(fields: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    if "layer_types" in fields:
        model.config.layer_types = fields["layer_types"]
    else:
        model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(ValueError, match=message):
        apply_ulysses(model)
    assert not any(hasattr(module, "longseq_attention") for module in model.modules())


def test_what_a_family_asks_of_its_attention_is_not_swallowed() -> None:
    model = tiny_llama()
    apply_ulysses(model)
    with pytest.raises(ValueError, match=r"LlamaAttention asks for position_bias=1\.0"):
        model(input_ids=ids_of(), position_bias=1.0)


def test_documents_are_read_once_a_call() -> None:
    model, seen = tiny_llama(), []
    apply_ulysses(model)
    inner = model.model.layers[0].self_attn.longseq_attention

    def attention(*tensors: Tensor, document_offsets: Any, **options: Any) -> Tensor:
        seen.append(document_offsets)
        return inner(*tensors, document_offsets=document_offsets, **options)

    for layer in model.model.layers:
        layer.self_attn.longseq_attention = attention
    model(input_ids=ids_of(), position_ids=restarting_positions())
    assert isinstance(seen[0], Documents)
    assert seen[0].bounds == OFFSETS
    assert len(seen) == 2
    assert seen[0] is seen[1]


def test_a_model_without_decoder_layers_is_refused_by_name() -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=VOCAB)
    )
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no \.model\.layers"):
        apply_ulysses(model)


def test_uneven_shares_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    apply_ulysses(tiny_llama(num_key_value_heads=4), ProcessGroups(0, 3, 3))
    assert "4 query and 4 key/value heads unevenly (2+1+1): attention takes 50% longer" in caplog.text


def test_adapters_see_the_same_checks() -> None:
    peft = pytest.importorskip("peft")
    model, ids = tiny_llama(torch.float64), ids_of()
    wanted = document_logits(model, ids)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    apply_ulysses(adapted)
    assert_near(adapted(input_ids=ids, position_ids=restarting_positions()).logits, wanted)
    with pytest.raises(ValueError, match="attention_mask is not taken"):
        adapted(input_ids=ids, attention_mask=torch.ones(1, 37))


def test_sinks_of_a_family_are_done() -> None:
    """GPT-OSS: a learned logit a head beside the scores, layers with and without a window."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        hidden_size=32,
        intermediate_size=16,
        vocab_size=VOCAB,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=2,
        sliding_window=7,
        attn_implementation="eager",
    )
    model = GptOssForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    ids, found = ids_of(), []
    for applied in (False, True):
        handle = apply_ulysses(model) if applied else None
        model.zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits
        logits.square().mean().backward()
        found.append([logits.detach(), *(param.grad.clone() for param in model.parameters())])
        sinks = [layer.self_attn.sinks.grad.abs().max() for layer in model.model.layers]
        assert min(sinks) > 0
    handle.undo()
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)
