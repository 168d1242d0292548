"""Every family through its streamed layers; models that fit no family are refused with what was found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from layer_problems import (
    FAMILIES,
    VOCAB,
    assert_same_step,
    make_batch,
    make_model,
    streamed_step,
    take_step,
    true_step,
    with_lora,
)
from numerics import relative_error
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from longseq.mst import apply_mini_sequence
from longseq.mst.families import find_parts
from longseq.mst.placement import Placement

KNOBS = [
    {"tile_tokens": 10},
    {"tile_tokens": 7, "head_groups": 4, "checkpoints": "host", "loss": "mini_sequence"},
    {"tile_tokens": None, "head_groups": 2, "save_attention": "host", "checkpoints": "host"},
    {"tile_tokens": 10, "head_groups": 4, "save_attention": "gpu", "checkpoints": "gpu", "loss": "logits"},
    {"tile_tokens": 1000, "head_groups": 2, "save_attention": 1, "checkpoints": Placement(every=2)},
    {"tile_tokens": 10, "head_groups": 2, "save_attention": "all", "checkpoints": "host"},
    {"tile_tokens": 10, "checkpoints": "none"},
]
"""Each knob in each of its ways, and groups with and without all heads' projections at once."""

VARIANTS = [
    ("llama", {"num_key_value_heads": 8}),
    ("llama", {"num_key_value_heads": 1}),
    ("llama", {"head_dim": 10}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    ("qwen3", {"attention_bias": True}),
    ("phi3", {"sliding_window": 9, "head_dim": 16, "hidden_size": 128, "partial_rotary_factor": 0.5}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma3_text", {"final_logit_softcapping": 3.0}),
    ("olmo2", {"num_key_value_heads": 8, "attention_bias": True}),
]
"""What configurations of these families differ in."""


def check_knobs(model: nn.Module, knobs: list[dict]) -> None:
    batch = make_batch()
    truth = true_step(model, batch)
    for options in knobs:
        # A tiled MLP alone leaves transformers' norms and softmax, which are float32.
        tolerance = 1e-5 if options.get("checkpoints") == "none" else 1e-10
        step = streamed_step(model, batch, **options)
        assert_same_step(step, truth, tolerance=tolerance, what=options)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_numbers(family: str) -> None:
    check_knobs(make_model(family), KNOBS)


@pytest.mark.parametrize(("family", "fields"), VARIANTS, ids=str)
def test_configurations_keep_their_numbers(family: str, fields: dict) -> None:
    num_kv_heads = fields.get("num_key_value_heads", 4)
    check_knobs(
        make_model(family, **fields), [{"tile_tokens": 10, "head_groups": n} for n in (1, num_kv_heads)]
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_family_beside_transformers_itself(family: str, attention: str) -> None:
    """To its own roundings, for the truth of these tests was written here."""
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers' SDPA leaves the softcap out")
    model, batch = make_model(family, attention=attention), make_batch()
    theirs = take_step(model, batch)
    assert_same_step(streamed_step(model, batch, tile_tokens=10), theirs, tolerance=1e-5)


def test_parts_are_those_of_the_config() -> None:
    parts = find_parts(make_model("gemma2"))
    assert parts.known
    assert parts.softcap == 3.0
    assert [layer.window for layer in parts.parts] == [9, None, 9]
    assert {layer.softcap for layer in parts.parts} == {2.0}
    assert {layer.scale for layer in parts.parts} == {11**-0.5}
    assert {layer.intermediate_size for layer in parts.parts} == {112}
    assert find_parts(make_model("llama")).softcap is None


def test_parts_are_found_under_an_adapter() -> None:
    pytest.importorskip("peft")
    model = make_model("phi3")
    parts = find_parts(with_lora(model))
    assert parts.causal_lm is model
    assert parts.decoder is model.model
    assert {layer.intermediate_size for layer in parts.parts} == {112}


# -- models of other families ---------------------------------------------------------------------------

WITHOUT_FACTORS = {"residual_multiplier": 1.0, "attention_multiplier": 0.3, "logits_scaling": 2.0}
FITTING = {
    "ministral": {},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "granite": WITHOUT_FACTORS,
    "exaone4": {},
    "gemma": {},
    "cwm": {},
    "olmo3": {},
    "stablelm": {},
}
"""Models of no known family whose layers are built like those of one."""


@pytest.mark.parametrize("family", FITTING)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_layers_of_another_family_that_fit(family: str, attention: str) -> None:
    fields = {"hidden_size": 64, **FITTING[family]}
    model, batch = make_model(family, dtype=torch.float32, attention=attention, **fields), make_batch()
    plain = take_step(model, batch)
    step = streamed_step(model, batch, layers="model.layers", tile_tokens=10, head_groups=4)
    assert_same_step(step, plain, tolerance=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_layers_that_fit_in_any_dtype(dtype: torch.dtype, attention: str) -> None:
    model = make_model("ministral", dtype=dtype, attention=attention)
    apply_mini_sequence(model, layers="model.layers").undo()
    fresh = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    apply_mini_sequence(fresh, layers="model.layers")


def half_precision_attention(module: nn.Module, query: Tensor, *args: object, **kwargs: object) -> None:
    raise RuntimeError(f"FlashAttention only supports fp16 and bf16, not {query.dtype}")


def test_layers_are_checked_beside_a_kernel_that_takes_no_float64() -> None:
    AttentionInterface.register("flash_of_this_test", half_precision_attention)
    model = make_model("ministral", dtype=torch.bfloat16, attention="sdpa")
    model.config._attn_implementation = "flash_of_this_test"
    apply_mini_sequence(model, layers="model.layers")
    assert model.config._attn_implementation == "flash_of_this_test"


def test_weights_that_are_elsewhere_are_not_checked_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("granite", dtype=torch.float32, residual_multiplier=0.3).to("meta")
    apply_mini_sequence(model, layers="model.layers")
    assert "the layers' numbers are not checked: the weights are not on this device." in caplog.messages


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("arcee", "it has no mlp.gate_proj."),
        ("cohere", "it has no post_attention_layernorm."),
        ("glm", "it has no mlp.gate_proj, mlp.up_proj; also mlp.gate_up_proj.weight."),
        ("bitnet", "it has also self_attn.attn_sub_norm.weight, mlp.ffn_sub_norm.weight."),
        ("starcoder2", "also mlp.c_fc.weight, mlp.c_fc.bias"),
    ],
)
def test_layers_with_other_parts_are_refused_by_name(family: str, said: str) -> None:
    model = make_model(family, dtype=torch.float32, hidden_size=64)
    with pytest.raises(ValueError, match=r"layer 0 \(\w+\) fits no known pattern") as refusal:
        apply_mini_sequence(model, layers="model.layers")
    assert said in str(refusal.value)
    assert "Expected were self_attn.q_proj" in str(refusal.value)
    assert_untouched(model)


OTHER_NUMBERS = {
    "granite": {**WITHOUT_FACTORS, "residual_multiplier": 0.3},
    "helium": {"hidden_size": 64},  # pairs neighbours in its rotary embedding
    "smollm3": {"no_rope_layer_interval": 2},
    "olmo": {"clip_qkv": 0.3},
}
"""Models whose layers have the names of a known family and compute something else."""


@pytest.mark.parametrize("family", OTHER_NUMBERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_layers_with_other_numbers_are_refused(family: str, dtype: torch.dtype, attention: str) -> None:
    model = make_model(family, dtype=dtype, attention=attention, **OTHER_NUMBERS[family])
    with pytest.raises(ValueError, match=r"compute something else.*differ by.*%.*checkpoints='none'"):
        apply_mini_sequence(model, layers="model.layers")
    assert_untouched(model)


@pytest.mark.parametrize("family", ["helium", "smollm3", "olmo"])
def test_fresh_weights_in_bfloat16_are_refused_too(family: str) -> None:
    model = make_model(family, attention="sdpa", **OTHER_NUMBERS[family])
    fresh = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    fresh.model.embed_tokens.weight.data *= 1000  # beside which nothing shows that layers add
    with pytest.raises(ValueError, match="compute something else"):
        apply_mini_sequence(fresh, layers="model.layers")


def scale_logits(model: nn.Module) -> None:
    original = model.forward

    def with_a_factor(*args, labels: Tensor | None = None, **kwargs):
        out = original(*args, **kwargs)
        out.logits = 3.0 * out.logits
        out.loss = None if labels is None else model.loss_function(out.logits, labels, VOCAB)
        return out

    model.forward = with_a_factor


def scale_loss(model: nn.Module) -> None:
    original = model.loss_function
    model.loss_function = lambda *args, **kwargs: 1.1 * original(*args, **kwargs)


def scale_head(model: nn.Module) -> None:
    """Cut cross-entropy reads the head's weight and nothing else."""
    original = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 1.1 * original(hidden)


@pytest.mark.parametrize(
    ("change", "said"), [(scale_logits, "logits"), (scale_loss, "the loss"), (scale_head, "the loss")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpoints", ["auto", "none"])
def test_a_head_with_other_numbers_is_refused(
    change: Callable, said: str, dtype: torch.dtype, checkpoints: str
) -> None:
    model, batch = make_model("ministral", dtype=dtype, attention="sdpa"), make_batch()
    change(model)
    plain = take_step(model, batch).loss
    refusal = f"computes something else than its config says.*{said} would differ by .*%.*loss='logits'"
    with pytest.raises(ValueError, match=refusal):
        apply_mini_sequence(model, layers="model.layers", checkpoints=checkpoints)
    apply_mini_sequence(model, layers="model.layers", checkpoints=checkpoints, loss="logits")
    assert relative_error(take_step(model, batch).loss, plain) < (1e-4 if dtype == torch.float32 else 1e-2)


def test_a_last_norm_with_other_numbers_is_refused() -> None:
    model = make_model("ministral", dtype=torch.bfloat16, attention="sdpa")
    norm = model.model.norm
    norm.forward = lambda hidden: 1.01 * type(norm).forward(norm, hidden)
    with pytest.raises(ValueError, match=r"something else.*the last norm gives would differ by 0\.99%"):
        apply_mini_sequence(model, layers="model.layers")


def test_dropout_that_is_no_module_is_refused() -> None:
    model = make_model(
        "seed_oss", dtype=torch.float32, attention="sdpa", attention_dropout=0.0, residual_dropout=0.1
    )
    apply_mini_sequence(model, layers="model.layers")
    with pytest.raises(ValueError, match=r"drops out in training.*residual_dropout=0\.1"):
        model(**make_batch())


def test_layers_of_another_family_may_be_tiled_alone() -> None:
    model = make_model("granite", dtype=torch.float32, residual_multiplier=0.3)
    batch = make_batch()
    plain = take_step(model, batch)
    step = streamed_step(model, batch, layers="model.layers", checkpoints="none", tile_tokens=10)
    assert_same_step(step, plain, tolerance=1e-4)


def gpt2() -> nn.Module:
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=VOCAB)
    return AutoModelForCausalLM.from_config(config)


def test_an_unknown_family_is_refused_with_the_way_out() -> None:
    model = gpt2()
    with pytest.raises(ValueError, match=r"model_type='gpt2'.*llama, mistral.*layers='model\.layers'"):
        apply_mini_sequence(model)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no \.model\.layers"):
        apply_mini_sequence(model, layers="model.layers")
    with pytest.raises(ValueError, match=r"GPT2Block.*fits no known pattern.*no self_attn"):
        apply_mini_sequence(model, layers="transformer.h")
    assert_untouched(model)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LlamaModel has no \.model\.layers.*\.lm_head; pass the causal LM"):
        apply_mini_sequence(make_model().model)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe"])
@pytest.mark.parametrize("layers", [None, "model.layers"])
def test_experts_are_refused(family: str, layers: str | None) -> None:
    model = make_model(family, dtype=torch.float32)
    with pytest.raises(ValueError, match=rf"model_type='{family}' is a mixture of experts .*dense models"):
        apply_mini_sequence(model, layers=layers)
    assert_untouched(model)


def test_attention_that_sees_later_tokens_is_refused() -> None:
    model = make_model("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(ValueError, match="Gemma3Attention sees later tokens"):
        apply_mini_sequence(model)


def assert_untouched(model: nn.Module) -> None:
    """A refusal leaves nothing behind."""
    for module in model.modules():
        assert not {"forward", "_z3_leaf", "_mini_sequence_handle"} & set(module.__dict__)
    assert torch.isfinite(model(**make_batch()).loss)


def state_of(model: nn.Module) -> list:
    """All that a probe could leave changed beside numbers."""
    modules = [(m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    tensors = [*model.parameters(), *model.buffers()]
    memory = [(tensor.dtype, tensor.data_ptr(), tensor.stride(), tensor.grad) for tensor in tensors]
    return [modules, memory, model.config.to_dict(), torch.get_rng_state().tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_probe_leaves_the_model_as_it_was(dtype: torch.dtype) -> None:
    model, batch = make_model("ministral", dtype=dtype, attention="sdpa"), make_batch()
    model.model.layers[1].mlp.eval()
    before = take_step(model, batch)
    model.zero_grad()
    state = state_of(model)
    apply_mini_sequence(model, layers="model.layers").undo()
    assert state_of(model) == state
    after = take_step(model, batch)
    assert torch.equal(after.loss, before.loss)
    assert all(torch.equal(grad, before.grads[name]) for name, grad in after.grads.items())
