"""What is exported weight by weight is, bit for bit, what transformers and peft write of the whole model."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import Workshop, environment
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from longseq.distributed.checked_file import WriteError, record_of, write_file
from longseq.distributed.state_files import WEIGHT, Piece, persistent_buffers, piece_file
from longseq.launch import export_adapters
from longseq.launch.checkpoint_folder import put_in_place
from longseq.launch.config import LoraConfig, ModelConfig
from longseq.launch.config_file import dump_config
from longseq.launch.data.tokenizer import load_tokenizer
from longseq.launch.export import export_checkpoint
from longseq.launch.model import add_adapters
from longseq.launch.run_state import RunState
from longseq.mst.families import FAMILIES

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model_of(family: str, seed: int = 0, **fields: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **fields}))
    for param in model.parameters():  # norms too: their ones would hide a mistake
        nn.init.normal_(param)
    return model


def cut_in_three(name: str, param: Tensor) -> list[Piece]:
    """As ZeRO does on three ranks."""
    flat, numel = param.detach().reshape(-1), param.numel()
    bounds = [0, numel // 3, 2 * numel // 3, numel]
    return [
        Piece(name, tuple(param.shape), start, {WEIGHT: flat[start:stop]}) for start, stop in pairwise(bounds)
    ]


class Checkpoint:
    """Checkpoints of models that no run has trained."""

    def __init__(self, folder: Path) -> None:
        self._shop = Workshop(folder)

    def write(self, folder: Path, model: nn.Module, config: ModelConfig | None = None) -> Path:
        run = self._shop.config("run")
        if config is not None:
            run = run.model_copy(update={"model": config})
        trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        pieces = [cut_in_three(name, param) for name, param in trained]
        final, folder = folder, folder.with_name(f".{folder.name}.partial")
        (folder / "engine").mkdir(parents=True)
        for rank in range(3):
            name, mine = f"rank-{rank:05d}.safetensors", [of_ranks[rank] for of_ranks in pieces]
            buffers = persistent_buffers(model) if rank == 0 else None
            write_file(folder / "engine" / name, piece_file(name, mine, num_files=3, buffers=buffers))
        (folder / "config.yaml").write_text(dump_config(run))
        model.config.save_pretrained(folder / "hf")
        model.generation_config.save_pretrained(folder / "hf")
        load_tokenizer("bytes").save_pretrained(folder / "hf")
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        records = {name: record_of(path) for name, path in files.items()}
        put_in_place(folder, final, RunState(step=1), records)
        return final


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tmp_path_factory.mktemp("shop"))


def assert_same_files(ours: Path, theirs: Path) -> None:
    """The same tensors, bit for bit, and the same JSON beside them.

    Which of several files a tensor is in is the writer's choice: transformers sorts them by name, or not.
    """
    mine, wanted = (tensors_in(folder) for folder in (ours, theirs))
    assert mine.keys() == wanted.keys()
    for name in wanted:
        assert mine[name].dtype == wanted[name].dtype
        assert torch.equal(mine[name], wanted[name]), name
    for file in theirs.glob("*.json"):
        tree, other = (json.loads((folder / file.name).read_text()) for folder in (ours, theirs))
        if file.name.endswith(".index.json"):
            for name, where in tree["weight_map"].items():
                assert name in load_file(ours / where)
            tree, other = ({**one, "weight_map": sorted(one["weight_map"])} for one in (tree, other))
        assert tree == other, file.name


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_written_as_save_pretrained_writes_it(
    checkpoint: Checkpoint, tmp_path: Path, family: str
) -> None:
    for tied, dtype in ((False, "float32"), (True, "bfloat16")):
        model = model_of(family, tie_word_embeddings=tied)
        saved = checkpoint.write(tmp_path / f"checkpoint-{dtype}", model)
        ours = export_checkpoint(saved, tmp_path / f"ours-{dtype}", dtype=dtype, max_shard_bytes=40_000)
        theirs = tmp_path / f"theirs-{dtype}"
        model.to(getattr(torch, dtype)).save_pretrained(theirs, max_shard_size=40_000)
        assert len(list(theirs.glob("model-*-of-*.safetensors"))) >= 2
        assert_same_files(ours, theirs)
        loaded, info = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
        assert not any(info.values())
        wanted = model.state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in loaded.state_dict().items())


def test_one_file_needs_no_index(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = model_of("llama")
    ours = export_checkpoint(checkpoint.write(tmp_path / "checkpoint", model), tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    assert_same_files(ours, tmp_path / "theirs")
    assert (ours / "model.safetensors").is_file()


def test_a_model_that_is_kept_otherwise_than_it_is_written_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import core_model_loading

    saved = checkpoint.write(tmp_path / "checkpoint", model_of("llama"))
    monkeypatch.setattr(
        core_model_loading,
        "revert_weight_conversion",
        lambda model, state: {**state, "lm_head.weight": state["lm_head.weight"].clone()},
    )
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM otherwise than it keeps them"):
        export_checkpoint(saved, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_full_disk_leaves_the_older_export(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saved = checkpoint.write(tmp_path / "checkpoint", model_of("llama"))
    out = export_checkpoint(saved, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    write, written = os.write, 0

    def full(descriptor: int, data: memoryview) -> int:
        nonlocal written
        written += len(data)
        if written > 50_000:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("longseq.launch.export.shutil.disk_usage", lambda path: usage)
    with (
        caplog.at_level(logging.WARNING, logger="longseq"),
        pytest.raises(
            WriteError, match=r"model-0000\d-of-0000\d\.safetensors \(.* cannot be written: No space"
        ),
    ):
        export_checkpoint(saved, out, overwrite=True, max_shard_bytes=40_000)
    assert "1,000 bytes free: it will not fit" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "latest", "model"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


Adapted = tuple[Path, ModelConfig, Any]
LORA = LoraConfig(rank=4, alpha=7.0, target_modules=("q_proj", "o_proj", "down_proj"))


@pytest.fixture(scope="module")
def adapted(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoint
) -> tuple[Path, ModelConfig, Any]:
    """A checkpoint of adapters, its model's config, and peft's model of it."""
    folder = tmp_path_factory.mktemp("adapted")
    model_of("qwen2", tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(
        folder / "base", max_shard_size=20_000
    )
    config = ModelConfig(name=str(folder / "base"), config={}, lora=LORA)
    model: Any = add_adapters(
        AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), config
    )
    for name, param in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(param, std=0.1)
    return checkpoint.write(folder / "checkpoint", model, config), config, model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_adapters_are_as_peft_merges_them(adapted: Adapted, tmp_path: Path, dtype: str) -> None:
    checkpoint, config, _ = adapted
    ours = export_checkpoint(checkpoint, tmp_path / "ours", dtype=dtype, max_shard_bytes=40_000)
    peft = add_adapters(AutoModelForCausalLM.from_pretrained(config.name, dtype=torch.float32), config)
    peft.load_state_dict(adapted[2].state_dict())
    peft.merge_and_unload().to(getattr(torch, dtype)).save_pretrained(
        tmp_path / "theirs", max_shard_size=40_000
    )
    assert_same_files(ours, tmp_path / "theirs")


def test_adapters_apart_are_as_peft_writes_and_loads_them(adapted: Adapted, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoTokenizer

    checkpoint, config, model = adapted
    ours = export_checkpoint(checkpoint, tmp_path / "ours", adapters="apart")
    model.save_pretrained(tmp_path / "theirs")
    for folder in (ours, tmp_path / "theirs"):  # a set, which JSON lists in any order
        file = folder / "adapter_config.json"
        tree = json.loads(file.read_text())
        file.write_text(json.dumps({**tree, "target_modules": sorted(tree["target_modules"])}))
    assert_same_files(ours, tmp_path / "theirs")
    base = AutoModelForCausalLM.from_pretrained(config.name, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, ours)
    ids = torch.arange(8)[None]
    assert torch.equal(loaded.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert AutoTokenizer.from_pretrained(ours).vocab_size
    # It may be replaced like a whole model, and be of another dtype.
    export_checkpoint(checkpoint, ours, adapters="apart", dtype="bfloat16", overwrite=True)
    assert {tensor.dtype for tensor in load_file(ours / "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }


def test_adapters_are_merged_into_pickled_weights_too(
    adapted: Adapted, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    saved, config, model = adapted
    wanted = export_checkpoint(saved, tmp_path / "wanted")
    assert config.name is not None
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((Path(config.name) / "config.json").read_bytes())
    state = AutoModelForCausalLM.from_pretrained(config.name).state_dict()
    torch.save(state, base / "pytorch_model.bin")
    pickled = checkpoint.write(tmp_path / "saved", model, config.model_copy(update={"name": str(base)}))
    ours = export_checkpoint(pickled, tmp_path / "ours")
    assert_same_files(ours, wanted)
    torch.save(state, base / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read piece by piece .*--adapters"):
        export_checkpoint(pickled, tmp_path / "none")
    (base / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"neither safetensors nor pytorch_model\.bin.*--adapters apart"):
        export_checkpoint(pickled, tmp_path / "none")


def test_adapters_of_another_model_are_refused(
    adapted: Adapted, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    _, config, model = adapted
    wrong = {
        "rank": ({"rank": 5}, r"layers\.0\.self_attn\.q_proj have shapes .* with model\.lora\.rank=5"),
        "more": ({"target_modules": ("q_proj", "o_proj", "down_proj", "up_proj")}, r"missing .*mlp\.up_proj"),
        "fewer": ({"target_modules": ("q_proj", "o_proj")}, r"unexpected .*mlp\.down_proj"),
    }
    for name, (fields, message) in wrong.items():
        other = config.model_copy(update={"lora": LORA.model_copy(update=fields)})
        with pytest.raises(ValueError, match=message):
            export_checkpoint(checkpoint.write(tmp_path / name, model, other), tmp_path / "model")
    bigger = tmp_path / "bigger"
    model_of("qwen2", tie_word_embeddings=True, vocab_size=261).save_pretrained(bigger)
    other = config.model_copy(update={"name": str(bigger)})
    with pytest.raises(ValueError, match=r"embed_tokens\.weight has shape \(261, 32\) there, and \(260"):
        export_checkpoint(checkpoint.write(tmp_path / "shape", model, other), tmp_path / "model")


def test_without_adapters_there_is_nothing_to_write_apart(checkpoint: Checkpoint, tmp_path: Path) -> None:
    saved = checkpoint.write(tmp_path / "checkpoint", model_of("llama"))
    with pytest.raises(ValueError, match=r"had no model\.lora\. Use --adapters merge"):
        export_checkpoint(saved, tmp_path / "model", adapters="apart")


def test_names_of_another_making_are_refused(
    adapted: Adapted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = export_adapters._base_weights

    def without_prefix(name: str) -> dict[str, Any]:
        return {key.removeprefix("model."): source for key, source in base(name).items()}

    monkeypatch.setattr(export_adapters, "_base_weights", without_prefix)
    with pytest.raises(ValueError, match=r"missing \['model\.embed_tokens.* unexpected \['embed_tokens"):
        export_checkpoint(adapted[0], tmp_path / "model")


MEASURED = r"""
import re, sys
from pathlib import Path
from longseq.launch.export import export_checkpoint

def peak():
    # Not getrusage, in which a process begins with what the one was that started it.
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

small, large, out = map(Path, sys.argv[1:])
export_checkpoint(small, out / "a")  # what is imported on the way
before = peak()
export_checkpoint(large, out / "b", max_shard_bytes=100 * 10**6)
print(peak() - before)
"""


@pytest.mark.slow
def test_a_model_is_exported_in_a_fraction_of_its_memory(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Slow: 300 MB are written, read for their checksums, read and written again, by a process of its own."""
    small = checkpoint.write(tmp_path / "small", model_of("llama"))
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6}
    with torch.device("meta"):
        model = model_of("llama", **sizes, num_attention_heads=16, num_key_value_heads=16)
    model.to_empty(device="cpu")
    for param in model.parameters():
        nn.init.ones_(param)
    large = checkpoint.write(tmp_path / "large", model)
    num_bytes = sum(param.nbytes for param in model.parameters())
    del model
    assert num_bytes > 300 * 10**6
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(small), str(large), str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    # Some tensors, as the allocator gives their memory back or not; the largest has 12 MB.
    assert int(done.stdout) < 0.3 * num_bytes
