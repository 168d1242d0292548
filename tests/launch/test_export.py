from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import Workshop, environment, forget_manifest, held_out_loss, records, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from longseq.launch import export as export_module
from longseq.launch.checkpoint import newest_checkpoint
from longseq.launch.export import export_checkpoint


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def tied(shop: Workshop) -> Path:
    return shop.run("tied", "checkpoint.export_at_end=true")


@pytest.fixture(scope="module")
def lora(shop: Workshop, tied: Path) -> Path:
    base = (f"model.name={tied / 'model'}", "model.config={}", "data.tokenizer=null")
    return shop.run(
        "lora", *base, "model.lora.rank=4", "model.lora.dropout=0.2", "checkpoint.export_at_end=true"
    )


def assert_loads_with_the_runs_loss(shop: Workshop, run: Path) -> None:
    """transformers alone, on each document by itself, finds the loss of the run's last evaluation."""
    loss, count = held_out_loss(run / "model", shop.folder / "held_out.jsonl")
    last = records(run, "eval")[-1]
    assert count == last["eval_tokens"]
    # Both sum some 400 losses of float32: each is right to a few units in the 7th digit.
    assert loss == pytest.approx(last["eval_loss"], rel=1e-6)


def test_the_exported_model_has_the_runs_loss(shop: Workshop, tied: Path) -> None:
    assert_loads_with_the_runs_loss(shop, tied)


def test_untied_and_of_other_families(shop: Workshop) -> None:
    for name, settings in {
        "untied": ["model.config.tie_word_embeddings=false"],
        "qwen3": ["model.config.model_type=qwen3", "model.config.head_dim=16"],
    }.items():
        assert_loads_with_the_runs_loss(shop, shop.run(name, *settings, "checkpoint.export_at_end=true"))


def test_merged_adapters_have_the_runs_loss(shop: Workshop, lora: Path, tied: Path) -> None:
    assert_loads_with_the_runs_loss(shop, lora)
    merged, base = (load_file(run / "model" / "model.safetensors") for run in (lora, tied))
    assert merged.keys() == base.keys()
    changed = {name.split(".")[-2] for name in base if not torch.equal(merged[name], base[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_checkpoint_of_adapters_holds_the_adapters_alone(lora: Path) -> None:
    names = weights(lora)
    assert names
    assert [name for name in names if "lora_" not in name] == []


def test_dtype_is_the_one_trained_in_or_asked_for(shop: Workshop, tied: Path, tmp_path: Path) -> None:
    def dtypes(folder: Path) -> set[torch.dtype]:
        return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}

    assert dtypes(tied / "model") == {torch.float32}
    half = export_checkpoint(newest_checkpoint(tied), tmp_path / "half", dtype="bfloat16")
    assert dtypes(half) == {torch.bfloat16}
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    mixed = shop.run("bf16", "train.precision=bf16", "train.steps=1", "checkpoint.export_at_end=true")
    assert dtypes(mixed / "model") == {torch.bfloat16}


def test_the_exported_config_is_ready_for_generation(tied: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tied / "model")
    assert model.config.use_cache is True
    ids = model.generate(torch.tensor([[65, 66]]), max_new_tokens=4, do_sample=False)
    assert ids.shape[1] > 2


def test_what_is_there_is_not_overwritten_unasked(tied: Path, tmp_path: Path) -> None:
    checkpoint = newest_checkpoint(tied)
    out = export_checkpoint(checkpoint, tmp_path / "new" / "model")
    (out / "mine.txt").write_text("notes")
    with pytest.raises(ValueError, match=r"is there already.*--overwrite"):
        export_checkpoint(checkpoint, out)
    assert (out / "mine.txt").is_file()
    export_checkpoint(checkpoint, out, overwrite=True)
    assert not (out / "mine.txt").exists()
    # A slip of the finger must not delete somebody's folder.
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("")
    for place in (tmp_path / "home", tmp_path / "home" / "thesis.tex"):
        with pytest.raises(ValueError, match="no exported model"):
            export_checkpoint(checkpoint, place, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").is_file()


def test_an_export_that_fails_leaves_nothing(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_tokenizer(folder: Path) -> None:
        raise OSError("disk is full")

    monkeypatch.setattr(export_module, "_tokenizer", no_tokenizer)
    with pytest.raises(OSError, match="disk is full"):
        export_checkpoint(newest_checkpoint(tied), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_crash_while_a_model_is_replaced_leaves_the_older_one(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model"
    shutil.copytree(tied / "model", out)
    (out / "mine.txt").write_text("notes")

    def crash_at_the_new_one(source: Path, target: Path) -> None:
        if target == out:
            raise KeyboardInterrupt
        source.rename(target)

    with monkeypatch.context() as patched:
        patched.setattr(export_module.os, "replace", crash_at_the_new_one)
        with pytest.raises(KeyboardInterrupt):
            export_checkpoint(newest_checkpoint(tied), out, overwrite=True)
    assert [path.read_text() for path in tmp_path.rglob("mine.txt")] == ["notes"]
    export_checkpoint(newest_checkpoint(tied), out, overwrite=True)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(("layers", "message"), [(1, r"unexpected .*layers\.1"), (3, r"missing .*layers\.2")])
def test_weights_of_another_model_are_refused(
    shop: Workshop, tmp_path: Path, layers: int, message: str
) -> None:
    checkpoint = newest_checkpoint(shop.run(f"layers{layers}", "train.steps=1"))
    forget_manifest(checkpoint)
    config = json.loads((checkpoint / "hf" / "config.json").read_text())
    (checkpoint / "hf" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    with pytest.raises(ValueError, match=message):
        export_checkpoint(checkpoint, tmp_path / "model")


def test_what_the_libraries_print_stays_out_of_sight(
    tied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export_checkpoint(newest_checkpoint(tied), tmp_path / "model")
    assert capfd.readouterr() == ("", "")


def test_an_exported_model_generates_with_a_cache_and_stops_at_its_own_eos(tied: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tied / "model")
    tokenizer = AutoTokenizer.from_pretrained(tied / "model")
    made = model.generate(
        torch.tensor([[65, 66]]), max_new_tokens=2, do_sample=False, return_dict_in_generate=True
    )
    assert made.past_key_values is not None
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id


def test_weights_are_read_without_deepspeed(tied: Path) -> None:
    code = (
        "import sys; from pathlib import Path;"
        "from longseq.distributed.state_files import SavedState;"
        "assert dict(SavedState(Path(sys.argv[1])).weights()); assert 'deepspeed' not in sys.modules"
    )
    folder = newest_checkpoint(tied) / "engine"
    subprocess.run([sys.executable, "-c", code, str(folder)], env=environment(), check=True)


def test_a_checkpoint_that_has_lost_a_file_is_refused(tied: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-00000004"
    shutil.copytree(newest_checkpoint(tied), checkpoint)
    (checkpoint / "engine" / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"damaged: engine/model\.safetensors is missing.* Nothing is written"
    ):
        export_checkpoint(checkpoint, tmp_path / "model")
    forget_manifest(checkpoint)
    with pytest.raises(ValueError, match=r"holds no weight model\..* 2 files and 1 are there"):
        export_checkpoint(checkpoint, tmp_path / "model")
