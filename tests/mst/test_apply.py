"""`apply_mini_sequence` on Hugging Face models: the same numbers, less memory, and a way back."""

from __future__ import annotations

import copy
import inspect
import logging

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from longseq.mst import apply_mini_sequence
from longseq.mst.placement import Placement

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


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("checkpoints", ["auto", "gpu", "host", "none", Placement(every=2)], ids=repr)
@pytest.mark.parametrize("loss", ["cce", "mini_sequence", "logits"])
def test_every_way_keeps_the_numbers(loss: str, checkpoints: str | Placement, tie: bool) -> None:
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
    # transformers' norms are computed in float32, ours in float64.
    torch.testing.assert_close(model(input_ids=batch["input_ids"]).logits, wanted, rtol=1e-5, atol=1e-6)
    assert model(input_ids=batch["input_ids"], logits_to_keep=1).logits.shape == (2, 1, VOCAB)


@pytest.mark.parametrize("checkpoints", ["gpu", "host", "none"], ids=repr)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_undo_gives_the_model_back(checkpoints: str, checkpointing: bool) -> None:
    model, batch = make_model(), make_batch()
    if checkpointing:
        model.gradient_checkpointing_enable()
    wanted = step(model, **batch)
    handle = apply_mini_sequence(model, tile_tokens=10, checkpoints=checkpoints)
    step(model, **batch)
    handle.undo()
    handle.undo()
    assert model.is_gradient_checkpointing == checkpointing
    assert_given_back(model, batch, wanted)


def assert_given_back(model: nn.Module, batch: dict, wanted) -> None:
    got = step(model, **batch)
    assert torch.equal(got[0], wanted[0])
    assert all(torch.equal(got[1][name], grad) for name, grad in wanted[1].items())
    assert got[2] is not None
    assert_untouched(model)


def test_undo_after_a_failure_in_the_forward() -> None:
    model, batch = make_model(), make_batch()
    wanted = step(model, **batch)
    handle = apply_mini_sequence(model, tile_tokens=10, checkpoints="host")

    def fail(*args) -> None:
        raise MemoryError

    hook = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(MemoryError):
        model(**batch)
    hook.remove()
    handle.undo()
    assert_given_back(model, batch, wanted)


def test_a_graph_outlives_undo() -> None:
    model, batch = make_model(), make_batch()
    wanted = step(model, **batch)
    handle = apply_mini_sequence(model, tile_tokens=10, checkpoints=Placement(every=2))
    model.zero_grad()
    out = model(**batch)
    handle.undo()
    out.loss.backward()
    grads = {name: param.grad for name, param in model.named_parameters()}
    assert_same_step((out.loss.detach(), grads, None), wanted)


def test_applying_again_after_undo() -> None:
    model, batch = make_model(), make_batch()
    wanted = step(model, **batch)
    for options in ({"head_groups": 2}, {"checkpoints": "host"}, {"save_attention": True}):
        handle = apply_mini_sequence(model, tile_tokens=10, **options)
        assert_same_step(step(model, **batch), wanted)
        handle.undo()


def test_undo_keeps_an_earlier_patch_of_somebody_else() -> None:
    model = make_model()
    mlp, layer = model.model.layers[0].mlp, model.model.layers[1]
    mlp.forward = earlier = mlp.forward
    layer.forward = of_layer = layer.forward
    for checkpoints in ("gpu", "none"):
        apply_mini_sequence(model, tile_tokens=10, checkpoints=checkpoints).undo()
        assert mlp.__dict__["forward"] is earlier
        assert layer.__dict__["forward"] is of_layer


def test_other_models_of_the_class_are_not_touched() -> None:
    touched, other, batch = make_model(), make_model(), make_batch()
    apply_mini_sequence(touched, tile_tokens=10)
    assert other(**batch).logits is not None


def test_applying_twice_is_refused() -> None:
    model = make_model()
    apply_mini_sequence(model)
    with pytest.raises(ValueError, match="has mini-sequences already"):
        apply_mini_sequence(model)


def assert_untouched(model: nn.Module) -> None:
    for module in model.modules():
        assert not {"forward", "_z3_leaf", "_mini_sequence_handle"} & set(module.__dict__)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"tile_tokens": 0}, r"tile_tokens=0 must be 'auto', None or a positive number"),
        ({"tile_tokens": True}, r"tile_tokens=True must be"),
        ({"tile_tokens": "all"}, r"tile_tokens='all' must be"),
        ({"tile_tokens": 8.0}, r"tile_tokens=8\.0 must be"),
        ({"head_groups": 0}, r"head_groups=0 must be 'auto' or a positive number"),
        ({"head_groups": True}, r"head_groups=True must be"),
        ({"head_groups": None}, r"head_groups=None must be"),
        ({"loss": "fused"}, r"loss='fused' must be one of cce, mini_sequence, logits"),
        ({"checkpoints": "disk"}, r"checkpoints='disk' must be .*Placement"),
        ({"checkpoints": None}, r"checkpoints=None must be"),
        ({"save_attention": 3}, r"save_attention=3 must be .* at most 2"),
        ({"save_attention": "disk"}, r"save_attention='disk' must be"),
        ({"checkpoints": "none", "save_attention": 1}, r"save_attention=1 is for streamed layers.*'none'"),
        ({"checkpoints": "none", "head_groups": 2}, r"head_groups=2 is for streamed layers.*choose another"),
        ({"layers": "model.blocks"}, r"LlamaForCausalLM has no \.model\.blocks"),
    ],
    ids=str,
)
def test_wrong_options_are_named(option: dict, said: str) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=said):
        apply_mini_sequence(model, **option)
    assert_untouched(model)


def test_groups_that_do_not_divide_are_refused() -> None:
    model = make_model()
    with pytest.raises(
        ValueError, match=r"head_groups=3 does not divide 2 key/value heads; use 1, 2 or 'auto'"
    ):
        apply_mini_sequence(model, head_groups=3)
    assert_untouched(model)
    apply_mini_sequence(model)


def test_an_attention_kernel_that_does_not_exist_is_refused() -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"attention_kernel='fa9' must be .*auto"):
        apply_mini_sequence(model, attention_kernel="fa9")
    assert_untouched(model)


@pytest.mark.parametrize("kernel", ["cpu", "blockwise"])
def test_an_attention_kernel_by_name(kernel: str) -> None:
    model, batch = make_model(), make_batch()
    wanted = step(model, **batch)
    apply_mini_sequence(model, tile_tokens=10, attention_kernel=kernel)
    assert_same_step(step(model, **batch), wanted)


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


@pytest.mark.parametrize("checkpoints", ["gpu", "host"], ids=repr)
@pytest.mark.parametrize("head_groups", [1, 2])
def test_a_layer_keeps_its_input_alone(checkpoints: str, head_groups: int) -> None:
    model, batch = make_model(), make_batch()
    apply_mini_sequence(model, tile_tokens=10, checkpoints=checkpoints, head_groups=head_groups)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch)
    intermediate = [t for t in kept if t.shape[-1:] == (80,) and t.dim() > 2]
    scores = [t for t in kept if t.shape[-2:] == (37, 37)]
    logits = [t for t in kept if t.shape[-1:] == (VOCAB,) and t.dim() > 1 and t.shape != (32, VOCAB)]
    inputs = [t for t in kept if t.shape == (74, 32)]
    assert not intermediate
    assert not scores
    assert not logits
    # Two layers' inputs, the last one on the GPU in any case; and the loss keeps the gradient of its own.
    assert len(inputs) == (2 if checkpoints == "gpu" else 1) + 1


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


def test_the_signatures_that_others_read_stay() -> None:
    """The Trainer passes on the columns of a data set that the model's forward names."""
    model = make_model()
    layer = model.model.layers[0]
    before = inspect.signature(model.forward), inspect.signature(layer.forward)
    apply_mini_sequence(model)
    assert (inspect.signature(model.forward), inspect.signature(layer.forward)) == before
    assert model.forward.__self__ is model


@pytest.mark.parametrize("return_dict", [None, True, False])
def test_outputs_in_either_form(return_dict: bool | None) -> None:
    model, batch = make_model(), make_batch()
    apply_mini_sequence(model, tile_tokens=10)
    out = model(**batch, return_dict=return_dict)
    assert isinstance(out, tuple) == (return_dict is False)
    assert (out[0] if return_dict is False else out.loss).requires_grad


def test_arguments_by_position() -> None:
    model, batch = make_model(), make_batch()
    wanted = step(model, **batch)[0]
    apply_mini_sequence(model, tile_tokens=10)
    mask = torch.ones_like(batch["input_ids"])
    torch.testing.assert_close(
        model(batch["input_ids"], mask, labels=batch["labels"]).loss.float(),
        wanted.float(),
        rtol=1e-6,
        atol=0,
    )


def test_checkpoints_of_transformers_are_left_to_layers_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    model.gradient_checkpointing_enable()
    apply_mini_sequence(model, tile_tokens=10)
    with caplog.at_level(logging.INFO, logger="longseq.mst.handle"):
        step(model, **make_batch())
        step(model, **make_batch())
    assert [message for message in caplog.messages if "gradient checkpointing" in message] == [
        "gradient checkpointing is left to the streamed layers, which do it themselves."
    ]


def test_layers_that_cannot_be_streamed_keep_the_checkpoints_of_transformers() -> None:
    """A mask of four dimensions: transformers' own forward, under its own checkpoints."""
    model, batch = make_model(), make_batch()
    model.gradient_checkpointing_enable()
    seen: list[bool] = []
    layer = model.model.layers[0]
    layer.self_attn.register_forward_pre_hook(lambda *_: seen.append(layer.gradient_checkpointing))
    apply_mini_sequence(model, tile_tokens=10)
    step(model, **batch)
    assert layer.gradient_checkpointing is False
    mask = torch.ones(37, 37, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    step(model, **batch, attention_mask=mask)
    assert seen == [True, True]  # forward, and again in backward: a streamed layer calls no attention module
    step(model, **batch)
    assert layer.gradient_checkpointing is False
