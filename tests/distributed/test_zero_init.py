"""Models that are born sharded: the same numbers as whole ones, and never two whole weights at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo import run_cases
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longseq.launch.config import ModelConfig

# Processes are started that make engines of DeepSpeed.
pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
}
FIELDS = {"phi3": {"pad_token_id": 3}, "gemma3_text": {"head_dim": 8}}
RANDOM = {
    f"{family}, {dtype}{', tied' if tie else ''}": {"family": family, "dtype": dtype, "tie": tie}
    for family, dtype, tie in [
        ("llama", "float32", False),
        ("llama", "bfloat16", False),
        ("llama", "float32", True),
        *((family, "float32", False) for family in ("qwen2", "qwen3", "mistral", "phi3", "olmo2")),
        ("gemma3_text", "float32", True),
    ]
}
LOADED = {
    f"{'in parts' if parts else 'one file'}, {'tied' if tie else 'untied'}, {dtype}": {
        "parts": parts,
        "tie": tie,
        "dtype": dtype,
    }
    for parts, tie, dtype in [
        (False, False, "float32"),
        (True, False, "bfloat16"),
        (True, True, "float32"),
    ]
}
REFUSED = {
    "missing": r"it lacks model.layers.0.mlp.up_proj.weight, model.norm.weight",
    "unexpected": r"the model has no model.layers.0.mlp.extra.weight",
    "shape": r"model.norm.weight is (33,) and the model's (32,)",
    "pickles": r"no safetensors.*pytorch_model.bin.*save_pretrained, or set parallel.zero_stage=2",
    "lost part": r"has no model-00002-of-00002.safetensors, which its model.safetensors.index.json names",
}


def config_of(family: str, tie: bool = False) -> ModelConfig:
    fields = {"model_type": family, **SHAPE, **FIELDS.get(family, {}), "tie_word_embeddings": tie}
    return ModelConfig(config=fields)


def deepspeed_config(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    from longseq.distributed.zero import init_deepspeed_communication
    from longseq.distributed.zero_config import ZeroOptions

    init_deepspeed_communication()
    return ZeroOptions(3, bf16=dtype == torch.bfloat16).deepspeed_config(dist.get_world_size())


@contextmanager
def most_whole_bytes() -> Iterator[dict[str, int]]:
    """The most bytes of weights that were whole at once, seen whenever a weight is given away."""
    from deepspeed.runtime.zero import partition_parameters

    seen, known, original = {"most": 0}, {}, partition_parameters.Init._partition_param

    def watching(self: Any, param: Tensor, *args: Any, **kwargs: Any) -> None:
        known[id(param)] = param
        seen["most"] = max(seen["most"], sum(one.data.nbytes for one in known.values()))
        original(self, param, *args, **kwargs)

    partition_parameters.Init._partition_param = watching
    try:
        yield seen
    finally:
        partition_parameters.Init._partition_param = original


def differences(whole: nn.Module, sharded: nn.Module) -> list[str]:
    """Names of weights and buffers that are not bit for bit those of the whole model."""
    import deepspeed

    names = [name for name, _ in whole.named_parameters()]
    assert names == [name for name, _ in sharded.named_parameters()]
    assert all(param.numel() == 0 for param in sharded.parameters())
    with deepspeed.zero.GatheredParameters(list(sharded.parameters())):
        pairs = [
            *zip(names, whole.parameters(), sharded.parameters(), strict=True),
            *((name, one, sharded.get_buffer(name)) for name, one in whole.named_buffers()),
        ]
        return [name for name, a, b in pairs if a.dtype != b.dtype or not torch.equal(a, b)]


def random_case(family: str, dtype: str, tie: bool) -> dict:
    from longseq.launch.model import build_base_model

    kind = getattr(torch, dtype)
    torch.manual_seed(5)
    whole = build_base_model(config_of(family, tie), CPU, kind)
    next_draw = torch.rand(1).item()
    torch.manual_seed(5)
    with most_whole_bytes() as seen:
        sharded = build_base_model(config_of(family, tie), CPU, kind, deepspeed_config(kind))
    return {
        "next draws": [next_draw, torch.rand(1).item()],
        "differ": differences(whole, sharded),
        "decayed": [decayed(model) for model in (whole, sharded)],
        "most": seen["most"],
        "largest": max(param.nbytes for param in whole.parameters()),
    }


def decayed(model: nn.Module) -> list[str]:
    """Names of the weights that decay."""
    from longseq.launch.config import OptimizerConfig
    from longseq.launch.optimizer import build_optimizer

    groups = build_optimizer(model, OptimizerConfig(weight_decay=0.1)).param_groups
    which = {id(param) for group in groups if group["weight_decay"] for param in group["params"]}
    return [name for name, param in model.named_parameters() if id(param) in which]


def loaded_case(folder: str, dtype: str) -> dict:
    """What is read of a checkpoint, how, and what it becomes."""
    import safetensors

    from longseq.launch.model import build_base_model

    kind, config = getattr(torch, dtype), ModelConfig(name=folder)
    whole = build_base_model(config, CPU, kind)
    read, original = [], safetensors.safe_open

    class Watched:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = original(*args, **kwargs)

        def __enter__(self) -> Watched:
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.__exit__(*args)

        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            return self.file.get_tensor(name)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    safetensors.safe_open = Watched
    try:
        with most_whole_bytes() as seen:
            sharded = build_base_model(config, CPU, kind, deepspeed_config(kind))
    finally:
        safetensors.safe_open = original
    return {
        "differ": differences(whole, sharded),
        "read": read,
        "weights": len(list(whole.parameters())),
        "most": seen["most"],
        "largest": max(param.nbytes for param in whole.parameters()),
        "temperatures": [model.generation_config.temperature for model in (whole, sharded)],
    }


def refused_case(folder: str) -> str:
    from longseq.launch.model import build_base_model

    with pytest.raises(ValueError, match=folder) as refused:
        build_base_model(ModelConfig(name=folder), CPU, torch.float32, deepspeed_config())
    return str(refused.value)


def saved(folder: Path, parts: bool = False, tie: bool = False) -> Path:
    """A checkpoint of bfloat16 weights and a generation config of its own."""
    from longseq.launch.model import build_base_model

    torch.manual_seed(3)
    model = build_base_model(config_of("llama", tie), CPU, torch.bfloat16)
    model.generation_config.update(do_sample=True, temperature=0.25)
    model.save_pretrained(folder, max_shard_size="30KB" if parts else "1GB")
    assert len(list(folder.glob("*.safetensors"))) == (2 if parts else 1)
    return folder


def spoiled(folder: Path, how: str) -> Path:
    saved(folder, parts=how == "lost part")
    file = folder / "model.safetensors"
    if how == "lost part":
        (folder / "model-00002-of-00002.safetensors").unlink()
        return folder
    weights = load_file(file)
    if how == "pickles":
        file.unlink()
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    if how == "missing":
        del weights["model.layers.0.mlp.up_proj.weight"], weights["model.norm.weight"]
    elif how == "unexpected":
        weights["model.layers.0.mlp.extra.weight"] = torch.zeros(2)
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)  # as old Llamas have it
    else:
        weights["model.norm.weight"] = torch.zeros(33)
    save_file(weights, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    root = tmp_path_factory.mktemp("checkpoints")
    cases: dict[str, Any] = {name: (random_case, case) for name, case in RANDOM.items()}
    for index, (name, case) in enumerate(LOADED.items()):
        folder = saved(root / str(index), case["parts"], case["tie"])
        cases[name] = (loaded_case, {"folder": str(folder), "dtype": case["dtype"]})
    for how in REFUSED:
        cases[how] = (refused_case, {"folder": str(spoiled(root / how.replace(" ", "-"), how))})
    return run_cases(2, cases)


@pytest.mark.parametrize("name", RANDOM)
def test_random_weights_are_those_of_a_whole_model(outcomes: dict[str, list], name: str) -> None:
    for rank in outcomes[name]:
        assert rank["differ"] == []
        first, second = rank["next draws"]
        assert first == second


@pytest.mark.parametrize("name", RANDOM)
def test_matrices_alone_decay(outcomes: dict[str, list], name: str) -> None:
    for rank in outcomes[name]:
        whole, sharded = rank["decayed"]
        assert whole == sharded
        assert whole


@pytest.mark.parametrize("name", LOADED)
def test_loaded_weights_are_those_that_transformers_loads(outcomes: dict[str, list], name: str) -> None:
    for rank in outcomes[name]:
        assert rank["differ"] == []
        assert rank["temperatures"] == [0.25, 0.25]


@pytest.mark.parametrize("name", [*RANDOM, *LOADED])
def test_no_rank_holds_more_than_one_whole_weight(outcomes: dict[str, list], name: str) -> None:
    for rank in outcomes[name]:
        assert 0 < rank["most"] <= rank["largest"]


@pytest.mark.parametrize("name", LOADED)
def test_one_rank_reads_each_weight_once(outcomes: dict[str, list], name: str) -> None:
    first, second = outcomes[name]
    assert len(first["read"]) == len(set(first["read"])) == first["weights"]
    assert second["read"] == []


@pytest.mark.parametrize("how", REFUSED)
def test_a_checkpoint_that_does_not_fit_is_refused_on_every_rank(outcomes: dict[str, list], how: str) -> None:
    import re

    for message in outcomes[how]:
        assert re.search(REFUSED[how].replace("(", r"\(").replace(")", r"\)"), message), message
        assert "inv_freq" not in message
