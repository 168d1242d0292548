"""`apply_mini_sequence` on Hugging Face models: the same numbers, less memory, and a way back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from longseq.mst import apply_mini_sequence

VOCAB = 131


def make_model(model_type: str = "llama", **fields) -> nn.Module:
    config = AutoConfig.for_model(
        model_type,
        **{
            "hidden_size": 32,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": VOCAB,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            **fields,
        },
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager").train()


def make_batch() -> dict[str, Tensor]:
    ids = torch.randint(0, VOCAB, (2, 37))
    labels = ids.clone()
    labels[0, :11] = -100
    return {"input_ids": ids, "labels": labels}


def step(model: nn.Module, **batch) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.loss.detach(), grads, out.logits


def assert_same_step(got, wanted) -> None:
    # transformers' own loss is float32 even for a float64 model.
    torch.testing.assert_close(got[0].float(), wanted[0].float(), rtol=1e-6, atol=0)
    assert got[1].keys() == wanted[1].keys()
    for name, grad in got[1].items():
        torch.testing.assert_close(grad, wanted[1][name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_family_keeps_its_numbers(model_type: str) -> None:
    model, batch = make_model(model_type), make_batch()
    wanted = step(model, **batch)
    apply_mini_sequence(model, tile_tokens=10)
    assert_same_step(step(model, **batch), wanted)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("checkpoints", ["gpu", "none"])
@pytest.mark.parametrize("loss", ["cce", "mini_sequence", "logits"])
def test_every_way_keeps_the_numbers(loss: str, checkpoints: str, tie: bool) -> None:
    model, batch = make_model(tie_word_embeddings=tie), make_batch()
    wanted = step(model, **batch)
    apply_mini_sequence(model, tile_tokens=10, loss=loss, checkpoints=checkpoints, loss_memory_mib=1)
    got = step(model, **batch)
    assert_same_step(got, wanted)
    assert (got[2] is None) == (loss != "logits")


def test_num_items_and_shifted_labels_mean_what_transformers_means() -> None:
    model, batch = make_model(), make_batch()
    batch["num_items_in_batch"] = torch.tensor(101)
    wanted = step(model, **batch)
    apply_mini_sequence(model, tile_tokens=10)
    assert_same_step(step(model, **batch), wanted)
    labels = batch.pop("labels")
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    assert_same_step(step(model, **batch, shift_labels=shifted), wanted)


def test_without_labels_there_are_logits() -> None:
    model, batch = make_model().eval(), make_batch()
    wanted = model(input_ids=batch["input_ids"]).logits
    apply_mini_sequence(model, tile_tokens=10)
    torch.testing.assert_close(model(input_ids=batch["input_ids"]).logits, wanted, rtol=1e-12, atol=1e-12)
    assert model(input_ids=batch["input_ids"], logits_to_keep=1).logits.shape == (2, 1, VOCAB)


def test_undo_gives_the_model_back() -> None:
    model, batch = make_model(), make_batch()
    wanted = step(model, **batch)
    handle = apply_mini_sequence(model, tile_tokens=10)
    step(model, **batch)
    handle.undo()
    handle.undo()
    got = step(model, **batch)
    assert torch.equal(got[0], wanted[0])
    assert all(torch.equal(got[1][name], grad) for name, grad in wanted[1].items())
    assert got[2] is not None
    for module in model.modules():
        assert not {"forward", "gathers_whole", "_mini_sequence_handle"} & set(module.__dict__)


def test_undo_keeps_an_earlier_patch_of_somebody_else() -> None:
    model = make_model()
    mlp = model.model.layers[0].mlp
    mlp.forward = earlier = mlp.forward
    apply_mini_sequence(model, tile_tokens=10).undo()
    assert mlp.__dict__["forward"] is earlier


def test_other_models_of_the_class_are_not_touched() -> None:
    touched, other, batch = make_model(), make_model(), make_batch()
    apply_mini_sequence(touched, tile_tokens=10)
    assert other(**batch).logits is not None


def test_applying_twice_is_refused() -> None:
    model = make_model()
    apply_mini_sequence(model)
    with pytest.raises(ValueError, match="has mini-sequences already"):
        apply_mini_sequence(model)


@pytest.mark.parametrize(
    ("option", "error", "named"),
    [
        ({"tile_tokens": 0}, ValueError, "tile_tokens=0"),
        ({"loss": "fused"}, ValueError, "loss='fused'"),
        ({"checkpoints": "disk"}, ValueError, "checkpoints='disk'"),
        ({"checkpoints": "host"}, NotImplementedError, "checkpoints='host'"),
        ({"head_groups": 4}, NotImplementedError, "head_groups=4"),
        ({"save_attention": True}, NotImplementedError, "save_attention"),
    ],
)
def test_wrong_options_are_named(option: dict, error: type[Exception], named: str) -> None:
    model = make_model()
    with pytest.raises(error, match=named):
        apply_mini_sequence(model, **option)
    assert "forward" not in model.__dict__


def test_an_unknown_family_is_refused_by_name() -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=VOCAB)
    )
    with pytest.raises(ValueError, match=r"model_type='gpt2'.*llama"):
        apply_mini_sequence(model)


def test_adapters_keep_their_numbers() -> None:
    peft = pytest.importorskip("peft")
    model = make_model()
    names = ["q_proj", "gate_proj", "down_proj"]
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM")
    ).double()
    for name, param in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param)
    batch = make_batch()
    wanted = step(adapted, **batch)
    apply_mini_sequence(adapted, tile_tokens=10)
    got = step(adapted, **batch)
    assert_same_step(got, wanted)
    assert got[1].keys() == {name for name, p in adapted.named_parameters() if p.requires_grad}


def test_an_adapter_on_the_head_goes_by_mini_sequences() -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        make_model(), peft.LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    ).double()
    batch = make_batch()
    wanted = step(adapted, **batch)
    apply_mini_sequence(adapted, tile_tokens=10, loss_memory_mib=1)
    assert_same_step(step(adapted, **batch), wanted)


def test_a_layer_keeps_its_input_alone() -> None:
    model, batch = make_model(), make_batch()
    apply_mini_sequence(model, tile_tokens=10, checkpoints="gpu")
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch)
    intermediate = [t for t in kept if t.shape[-1:] == (80,) and t.dim() > 2]
    scores = [t for t in kept if t.shape[-2:] == (37, 37)]
    logits = [t for t in kept if t.shape[-1:] == (VOCAB,) and t.dim() > 1 and t.shape != (32, VOCAB)]
    assert not intermediate
    assert not scores
    assert not logits


def test_a_copy_is_refused_for_it_would_compute_with_the_originals_weights() -> None:
    model = make_model()
    handle = apply_mini_sequence(model)
    with pytest.raises(ValueError, match="cannot be copied"):
        copy.deepcopy(model)
    handle.undo()
    copy.deepcopy(model)


def test_mlps_can_be_left_alone() -> None:
    model, calls = make_model(), []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda *args: calls.append(args))
    apply_mini_sequence(model, tile_tokens=None, checkpoints="none")
    step(model, **make_batch())
    assert len(calls) == 2
