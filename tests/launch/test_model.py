from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from longseq.distributed.groups import ProcessGroups
from longseq.launch.config import ModelConfig, RunConfig
from longseq.launch.config_file import parse_config
from longseq.launch.data.tokenizer import byte_tokenizer
from longseq.launch.model import add_adapters, build_base_model, build_model, check_vocabulary, hf_config

CPU = torch.device("cpu")
SHAPE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 8192,
}


def random_model(**fields: Any) -> ModelConfig:
    return ModelConfig(config={**SHAPE, **fields})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    build_base_model(random_model(), CPU, torch.float32).save_pretrained(folder)
    return folder


def run_config(**sequence: Any) -> RunConfig:
    return parse_config({"model": {"config": SHAPE}, "data": {"tokenizer": "bytes"}, "sequence": sequence})


def test_fields_define_a_random_model() -> None:
    config = hf_config(random_model(num_attention_heads=8))
    assert config.model_type == "llama"
    assert config.head_dim == 4  # derived from the fields given, not from the family's defaults
    assert hf_config(random_model(head_dim=16)).head_dim == 16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"hiden_size": 8, "rope_thta": 1},
            r"LlamaConfig does not know: hiden_size \(did you mean hidden_size\?\), rope",
        ),
        ({"model_type": "lama"}, r"model_type=lama \(did you mean llama\?\) is no family"),
        ({"model_type": None}, r"no model_type"),
    ],
)
def test_what_no_model_can_be_made_of_is_named(fields: dict[str, Any], message: str) -> None:
    given = {name: value for name, value in {**SHAPE, **fields}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        hf_config(ModelConfig(config=given))


def test_a_checkpoint_keeps_its_shape(saved: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"hidden_size=64 but {saved} has 32.*cannot be overridden"
    ) as refused:
        hf_config(ModelConfig(name=str(saved), config={"hidden_size": 64, "vocab_size": 999}))
    assert "vocab_size=999" in str(refused.value)
    with pytest.raises(ValueError, match="model_type='qwen3'"):
        hf_config(ModelConfig(name=str(saved), config={"model_type": "qwen3"}))
    kept = {**SHAPE, "max_position_embeddings": 65536, "rms_norm_eps": 0.25}
    config = hf_config(ModelConfig(name=str(saved), config=kept))
    assert (config.max_position_embeddings, config.rms_norm_eps, config.hidden_size) == (65536, 0.25, 32)
    with pytest.raises(ValueError, match=r"did you mean rms_norm_eps\?"):
        hf_config(ModelConfig(name=str(saved), config={"rms_norm_epss": 1}))


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.name='/no/model' cannot be loaded"):
        hf_config(ModelConfig(name="/no/model"))
    with pytest.raises(ValueError, match=r"cannot be loaded.*Give a folder with a config\.json"):
        hf_config(ModelConfig(name=str(tmp_path)))


def test_weights_come_from_the_seed_or_the_checkpoint(saved: Path) -> None:
    def weight(config: ModelConfig, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return build_base_model(config, CPU, torch.float32).lm_head.weight.detach()

    assert torch.equal(weight(random_model(), 3), weight(random_model(), 3))
    assert not torch.equal(weight(random_model(), 3), weight(random_model(), 4))
    assert torch.equal(weight(ModelConfig(name=str(saved)), 4), weight(random_model(), 3))


def test_adapters_alone_are_trained(saved: Path) -> None:
    config = ModelConfig(
        name=str(saved), lora={"rank": 3, "alpha": 6, "target_modules": ["q_proj", "up_proj"]}
    )
    model = add_adapters(build_base_model(config, CPU, torch.float32), config)
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    assert len(trained) == 2 * 2 * 2
    assert {name.split(".")[-4] for name in trained} == {"q_proj", "up_proj"}
    assert {min(param.shape) for param in trained.values()} == {3}
    scales = {m.scaling["default"] for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)}
    assert scales == {2.0}


def test_adapters_need_a_checkpoint() -> None:
    config = random_model()
    config = config.model_copy(update={"lora": ModelConfig(lora={}).lora})
    with pytest.raises(ValueError, match=r"model\.lora .* model\.name=null"):
        add_adapters(build_base_model(config, CPU, torch.float32), config)


@pytest.mark.parametrize(
    ("sequence", "streams"),
    [
        ({"length": 8192}, True),
        ({"length": 8191}, False),
        ({"length": 8192, "checkpoints": "none"}, False),
        ({"length": 64, "checkpoints": "gpu"}, True),
        ({"length": 64, "checkpoints": "host", "checkpoint_every": 2, "save_attention": "auto"}, True),
    ],
)
def test_layers_are_streamed_from_8192_tokens_or_as_told(
    sequence: dict[str, Any], streams: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="longseq"):
        model = build_model(run_config(**sequence), ProcessGroups(), CPU, torch.float32)
    assert all("forward" in layer.__dict__ for layer in model.model.layers) == streams
    assert ("sequence.checkpoints:" in caplog.text) == ("checkpoints" not in sequence)
    assert model.training


def test_a_vocabulary_that_is_too_small_is_refused() -> None:
    model = build_base_model(random_model(vocab_size=258), CPU, torch.float32)
    with pytest.raises(ValueError, match=r"tokenizer has 259 tokens and the model embeds 258.*vocab_size"):
        check_vocabulary(model, byte_tokenizer())
    check_vocabulary(build_base_model(random_model(vocab_size=259), CPU, torch.float32), byte_tokenizer())
