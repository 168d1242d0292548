"""The clone has all of the model but its size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from longseq.launch.config_file import list_presets, load_config
from longseq.launch.verify.bench import Bench, Layout
from longseq.launch.verify.clone import Heads, architecture_of, heads_for, small_config, small_model

SIZES = {
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "vocab_size",
    "head_dim",
    "sliding_window",
    "layer_types",
    "rope_parameters",
    "max_window_layers",
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 8, "attention_bias": True, "hidden_act": "gelu", "rms_norm_eps": 1e-3},
    "mistral": {"sliding_window": 4096, "tie_word_embeddings": True},
    "qwen2": {"num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584},
    "gemma2": {"query_pre_attn_scalar": 144, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
}


@pytest.mark.parametrize("family", MODELS)
def test_every_field_but_sizes_stays(family: str) -> None:
    model = AutoConfig.for_model(family, **MODELS[family])
    small = small_config(model)
    ignored = SIZES | {"pad_token_id", "bos_token_id", "eos_token_id", "_name_or_path", "architectures"}
    kept = {name: value for name, value in model.to_dict().items() if name not in ignored}
    assert {name: small.to_dict()[name] for name in kept} == kept
    assert bool(small.to_dict().get("sliding_window")) == bool(model.to_dict().get("sliding_window"))
    assert set(small.to_dict().get("layer_types") or ()) == set(model.to_dict().get("layer_types") or ())


def test_rotations_of_a_long_context_fit_the_narrow_heads() -> None:
    factors = {"short_factor": [1.0 + i for i in range(36)], "long_factor": [2.0] * 36}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, **factors}
    model = AutoConfig.for_model(
        "phi3",
        rope_parameters={**rope, "original_max_position_embeddings": 4096},
        max_position_embeddings=131072,
    )
    small = small_config(model)
    width = small.hidden_size // small.num_attention_heads
    assert len(small.rope_parameters["short_factor"]) == int(0.75 * width) // 2
    small_model(small, "cpu", torch.float64)(input_ids=torch.arange(7)[None])


@pytest.mark.parametrize(
    ("heads", "degree", "ranks", "wanted"),
    [
        (Heads(32, 8), 8, 2, Heads(8, 2)),
        (Heads(28, 4), 8, 2, Heads(7, 1)),
        (Heads(32, 8), 4, 4, Heads(32, 8)),
        (Heads(64, 8), 16, 2, Heads(8, 1)),
    ],
)
def test_fewer_ranks_share_as_many_heads_each(heads: Heads, degree: int, ranks: int, wanted: Heads) -> None:
    assert heads_for(heads, degree, ranks) == wanted


def test_no_weight_is_without_effect() -> None:
    model = small_model(small_config(AutoConfig.for_model("qwen2")), "cpu", torch.float64)
    for name, param in model.named_parameters():
        assert param.std() > 0.01, name
        assert torch.equal(param.bfloat16().double(), param), name


AUTO = ["parallel.ulysses_degree=auto"]


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ([], Layout(1, 1, 0)),
        (["parallel.ulysses_degree=3", "sequence.length=3k"], Layout(3, 3, 0)),
        (["parallel.ulysses_degree=8", "model.config.num_attention_heads=8"], Layout(2, 2, 0)),
        (["parallel.zero_stage=1"], Layout(2, 1, 1)),
        (
            ["parallel.num_gpus=1", *AUTO, "parallel.zero_stage=auto"],
            Layout(2, 1, 3),
        ),
        (
            ["parallel.num_gpus=4", *AUTO, "train.global_batch_sequences=4"],
            Layout(2, 2, 0),
        ),
    ],
)
def test_processes_of_a_config(overrides: list[str], wanted: Layout) -> None:
    assert Layout.of(load_config("tiny-cpu", overrides)) == wanted


@pytest.mark.parametrize("preset", [name for name, _ in list_presets()])
def test_every_preset_has_a_clone_without_a_network(preset: str, tmp_path) -> None:
    config = load_config(preset)
    bench = Bench.make(config, architecture_of(config.model), tmp_path)
    assert bench.streams == (preset != "tiny-cpu")
    assert bench.clone_config.sequence.loss == config.sequence.loss
    assert bench.clone_config.parallel == config.parallel
