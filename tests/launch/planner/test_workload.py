"""Sizes of a run's work are those of the model that would be built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from longseq.apollo import Apollo
from longseq.launch.config import RunConfig
from longseq.launch.config_file import parse_config
from longseq.launch.model import add_adapters, build_base_model, hf_config
from longseq.launch.optimizer import build_optimizer
from longseq.launch.planner import workload
from longseq.launch.planner.workload import Workload

FIELDS = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 96,
}
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "phi3": {"pad_token_id": 0},
    "olmo2": {"eos_token_id": 1},
}


def config_of(family: str = "llama", fields: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    model = {"config": {"model_type": family, **FIELDS, **FAMILIES[family], **(fields or {})}}
    return parse_config({"model": model, "data": {"tokenizer": "bytes"}, **sections})


def built(config: RunConfig) -> torch.nn.Module:
    model = build_base_model(config.model, torch.device("cpu"), torch.float32)
    return add_adapters(model, config.model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_there_with_its_kind(family: str, tied: bool) -> None:
    config = config_of(family, {"tie_word_embeddings": tied})
    work, model = Workload.from_config(config), built(config)
    assert {one.name: one.shape for one in work.weights} == {
        name: tuple(param.shape) for name, param in model.named_parameters()
    }
    assert work.trained_numel == work.numel() == sum(param.numel() for param in model.parameters())
    assert work.tied is tied
    assert work.numel("embedding") == 96 * 64
    assert work.numel("head") == (0 if tied else 96 * 64)
    kinds = ("projections", "output", "gate_up", "down", "norm")
    of_layers = [sum(work.numel(kind, layer=layer) for kind in kinds) for layer in range(2)]
    assert of_layers == [work.numel(layer=layer) for layer in range(2)]
    width = work.layer.heads.width
    assert work.numel("projections", layer=0) >= 64 * 16 * width
    assert work.numel("output", layer=1) == 64 * 8 * width
    assert work.numel("gate_up", layer=0) == 2 * 64 * 160
    assert work.numel("down", layer=0) == 64 * 160


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    built(config_of()).save_pretrained(folder)
    return folder


def test_adapters_alone_are_trained(checkpoint: Path) -> None:
    lora = {"rank": 4, "target_modules": ["q_proj", "down_proj"]}
    config = parse_config(
        {
            "model": {"name": str(checkpoint), "lora": lora},
            "data": {"tokenizer": "bytes"},
            "sequence": {"head_groups": "auto"},
        }
    )
    work, model = Workload.from_config(config), built(config)
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    assert {one.name for one in work.weights if one.trained} == set(trained)
    assert work.trained_numel == work.numel("adapter") == sum(one.numel() for one in trained.values())
    assert work.numel("adapter", layer=1, trained=True) == 4 * (64 + 64 + 160 + 64)
    assert work.numel("projections", trained=True) == 0
    assert work.frozen_numel == work.numel() - work.trained_numel
    assert work.state_bytes == 8 * work.trained_numel


@pytest.mark.parametrize(
    ("sections", "zero_stage", "weights", "adapters"),
    [
        ({}, 0, 4, 4),
        ({}, 1, 2, 2),
        ({"optimizer": {"name": "apollo", "weights": "bf16"}}, 0, 2, 4),
        ({"train": {"precision": "float32"}}, 0, 4, 4),
        ({"train": {"precision": "float32"}}, 3, 4, 4),
    ],
)
def test_weights_are_as_wide_as_the_engine_keeps_them(
    sections: dict[str, Any], zero_stage: int, weights: int, adapters: int
) -> None:
    work = Workload.from_config(config_of(**sections))
    assert (work.weight_bytes(zero_stage), work.adapter_bytes(zero_stage)) == (weights, adapters)
    assert work.whole_bytes(zero_stage) == weights * work.numel()


def test_frozen_weights_are_bf16_and_adapters_float32_until_deepspeed_casts_them(checkpoint: Path) -> None:
    values = {"model": {"name": str(checkpoint), "lora": {"rank": 4}}, "data": {"tokenizer": "bytes"}}
    work = Workload.from_config(parse_config(values))
    assert (work.weight_bytes(0), work.adapter_bytes(0), work.adapter_bytes(2)) == (2, 4, 2)
    assert work.whole_bytes(0) == 2 * work.frozen_numel + 4 * work.trained_numel


@pytest.mark.parametrize("embeddings", ["adamw", "low_rank", "factored", "adamw_8bit"])
@pytest.mark.parametrize("name", ["apollo", "apollo-mini"])
def test_states_of_apollo_are_those_that_a_step_makes(name: str, embeddings: str) -> None:
    optimizer_section = {"name": name, "apollo": {"rank": 4, "embeddings": embeddings}}
    config = config_of(optimizer=optimizer_section)
    model = built(config)
    optimizer = build_optimizer(model, config.optimizer)
    assert isinstance(optimizer, Apollo)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    made = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert Workload.from_config(config).state_bytes == made


KERNELS = {
    "cudnn": ("llama", {}, {"data": {"tokenizer": "bytes", "pack": False}}),
    "flash": ("llama", {}, {}),
    "flash, of windows": (
        "mistral",
        {"sliding_window": 32},
        {"data": {"tokenizer": "bytes", "pack": False}},
    ),
    "blockwise": ("llama", {}, {"train": {"precision": "float32"}}),
}


@pytest.mark.parametrize("case", KERNELS)
def test_the_kernel_is_the_one_that_auto_takes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, fields, sections = KERNELS[case]
    for module in (workload.flash_attention_3, workload.flash_attention_4):
        monkeypatch.setattr(module, "INSTALLED", False)
    config = config_of(family, fields, **sections)
    assert Workload.from_config(config).layer.kernel == case.partition(",")[0]
    if case != "blockwise":
        monkeypatch.setattr(workload.flash_attention_4, "INSTALLED", True)
        assert Workload.from_config(config).layer.kernel == "fa4"


def test_no_memory_is_taken_and_no_weight_is_drawn() -> None:
    """A model that no machine holds is planned all the same."""
    config = config_of(fields={"hidden_size": 2**16, "intermediate_size": 2**18, "head_dim": 2**13})
    state = torch.get_rng_state()
    work = Workload.from_config(config, hf_config(config.model))
    assert work.numel() > 2**36
    assert torch.equal(torch.get_rng_state(), state)
