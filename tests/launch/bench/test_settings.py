"""The config of a bench: any length, no data and no download."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from longseq.distributed import ProcessGroups
from longseq.launch.bench.made_up import documents, shape_folder
from longseq.launch.bench.settings import read_config, refuse_documents, settle
from longseq.launch.config_errors import ConfigError
from longseq.launch.config_file import check_world
from longseq.launch.model import hf_config

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSEQ_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_model_gets_the_positions_that_the_length_asks_for() -> None:
    def positions(*overrides: str) -> int:
        config, _ = read_config("tiny-cpu", overrides)
        return config.model.config["max_position_embeddings"]

    assert positions("sequence.length=1k") == 8192
    assert positions("sequence.length=2000001") == 2000001
    assert positions("sequence.length=64k", "model.config.max_position_embeddings=131072") == 131072
    with pytest.raises(ConfigError, match=r"sequence\.lenght"):
        read_config("tiny-cpu", ["sequence.lenght=64k", "sequence.length=64k"])


def test_the_longest_that_fits_is_not_held_back_by_the_models_positions() -> None:
    config, _ = read_config("tiny-cpu", ["sequence.length=max"])
    assert config.model.config["max_position_embeddings"] == 2**30
    found = config.model_copy(update={"sequence": config.sequence.model_copy(update={"length": 4096})})
    settled = settle(found, ProcessGroups(), CPU)
    assert settled.model.config["max_position_embeddings"] == 4096


def test_a_model_that_cannot_be_downloaded_has_its_published_sizes() -> None:
    config, notes = read_config(
        "llama3-8b-64k-1gpu", ["model.name=meta-llama/Meta-Llama-3-8B", "sequence.length=256k"]
    )
    assert config.model.name is None
    found = hf_config(config.model)
    assert (found.hidden_size, found.num_hidden_layers, found.vocab_size) == (4096, 32, 128256)
    assert found.max_position_embeddings == 262144
    assert any("its makers published" in note for note in notes)


def test_data_is_one_document_a_sequence(tmp_path: Path) -> None:
    config, _ = read_config("tiny-cpu", ["sequence.length=1001", "train.global_batch_sequences=3"])
    settled = settle(config, ProcessGroups(), CPU)
    check_world(settled, 1)
    lines = Path(settled.data.source).read_text().splitlines()
    # With bos and eos.
    assert [len(json.loads(line)["text"]) + 2 for line in lines] == [1001] * 3
    assert not settled.data.pack
    assert settled.log.run_dir.startswith(str(tmp_path))
    packed = documents(config, tmp_path / "packed", 100)
    assert len(packed.read_text().splitlines()) == 30


def test_adapters_get_a_checkpoint_of_random_weights(tmp_path: Path) -> None:
    name = shape_folder(read_config("tiny-cpu", [])[0].model.config, tmp_path / "elsewhere")
    words = [f"model.name={name}", "model.config={}", "model.lora.rank=4", "sequence.length=16k"]
    config, _ = read_config("tiny-cpu", words)
    check_world(config, 1)
    assert hf_config(config.model).max_position_embeddings == 16384
    settled = settle(config, ProcessGroups(), CPU)
    assert (Path(settled.model.name) / "model.safetensors").exists()
    assert hf_config(settled.model).hidden_size == 256


def test_documents_that_do_not_fill_a_sequence_are_refused() -> None:
    with pytest.raises(ValueError, match="--document-tokens 7 must be 4 or more and divide"):
        refuse_documents(100, 7)
    with pytest.raises(ValueError, match=r"sequence\.length=3 is too short"):
        refuse_documents(3, None)
