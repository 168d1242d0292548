"""`longseq plan`, on any machine and for every preset, and what it says of a machine that is not here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from plan_samples import GIB, machine_with

from longseq.launch.cli import main
from longseq.launch.config import ModelConfig
from longseq.launch.config_file import list_presets, load_config
from longseq.launch.model import hf_config
from longseq.launch.planner import command, known_shapes
from longseq.launch.planner.catalogue import CARDS
from longseq.launch.planner.known_shapes import SHAPES, architecture
from longseq.launch.planner.workload import Workload

PRESETS = [name for name, _ in list_presets()]
LAYOUTS = {"llama3-8b-128k-4gpu": 4, "llama3-8b-512k-8gpu": 8}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def planned(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, dict]:
    status = main(["plan", *words, "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_planned_without_a_gpu_or_a_network(name: str, capsys: pytest.CaptureFixture) -> None:
    status, read = planned(capsys, name, "--gpu", "h200", "--host-memory", "2T")
    assert status == 0
    assert read["fits"]
    config = load_config(name)
    assert read["machine"]["num_gpus"] == LAYOUTS.get(name, 1)
    assert read["knobs"]["length"] == config.sequence.length
    for key, value in (("zero_stage", config.parallel.zero_stage), ("ulysses_degree", LAYOUTS.get(name, 1))):
        assert read["knobs"][key] == value
    noted = any("its sizes are those that its makers published" in note for note in read["notes"])
    assert noted == (config.model.name is not None)


def test_what_does_not_fit_is_status_1_and_what_makes_no_sense_2(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "tiny-cpu", "--gpu", "rtx-4090"]) == 0
    assert main(["plan", "llama3-8b-64k-1gpu", "--gpu", "rtx-4090"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out
    for words in (
        ["tiny-cpu", "--gpu", "h900"],
        ["tiny-cpu", "--host-memory", "much"],
        ["tiny-cpu", "sequence.lenght=4k"],
        ["tiny-cpu", "--num-gpus", "2"],
        ["tiny-cpu", "--plot", "memory.bmp"],
        ["tiny-cpu", "--gpu", "h200", "--calibrate"],
    ):
        assert main(["plan", *words]) == 2, words
        out, err = capsys.readouterr()
        assert (out, err.partition(": ")[0]) == ("", "longseq plan")


def test_without_a_gpu_or_a_name_a_usual_one_is_assumed_and_said(capsys: pytest.CaptureFixture) -> None:
    _, read = planned(capsys, "tiny-cpu")
    assert read["machine"]["gpu"]["name"] == "h100-80g"
    assert any("planned for h100-80g" in note for note in read["notes"])
    assert any("128 GiB of host memory" in note for note in read["notes"])
    _, read = planned(capsys, "tiny-cpu", "--gpu", "h200", "--host-memory", "100G")
    assert read["notes"] == []
    assert read["machine"]["host_bytes"] == int(85 * GIB)


def test_processes_may_be_left_to_the_plan(capsys: pytest.CaptureFixture) -> None:
    _, read = planned(
        capsys,
        "llama3-8b-128k-4gpu",
        "parallel.ulysses_degree=auto",
        "--num-gpus",
        "16",
        "--gpus-per-node",
        "4",
    )
    assert (read["machine"]["num_gpus"], read["machine"]["gpus_per_node"]) == (16, 4)
    # Eight sequences a step: two GPUs or more must share one.
    assert read["knobs"]["ulysses_degree"] >= 2
    assert f"parallel.ulysses_degree={read['knobs']['ulysses_degree']}" in read["settings"]
    free = ("parallel.num_gpus=auto", "parallel.ulysses_degree=auto")
    _, read = planned(capsys, "tiny-cpu", "train.global_batch_sequences=8", *free)
    assert read["machine"]["num_gpus"] == 8


def test_the_documentation_names_every_gpu() -> None:
    page = (Path(__file__).parents[3] / "docs" / "planning.md").read_text("utf-8")
    assert [card.key for card in CARDS if f"`{card.key}`" not in page] == []


def test_a_picture_is_drawn_beside_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    status, _ = planned(capsys, "tiny-cpu", "--plot", str(tmp_path / "new" / "memory.png"))
    assert status == 0
    assert (tmp_path / "new" / "memory.png").stat().st_size > 1000


def test_gpus_that_are_here_are_planned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(
        command, "this_machine", lambda num_gpus: machine_with(79, host_gib=800, num_gpus=num_gpus)
    )
    plan, notes = command.plan_here(load_config("tiny-cpu", ["train.global_batch_sequences=6"]))
    # The batch cannot be shared by four.
    assert plan.machine.num_gpus == 3
    assert notes == []
    more = load_config("tiny-cpu", ["parallel.num_gpus=8", "train.global_batch_sequences=8"])
    assert command.plan_here(more)[1] == ["8 GPUs are planned, of the kind of the 4 that are here."]


# Weights of each, as the hub counts those of its safetensors, in billions.
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("meta-llama/Meta-Llama-3-8B", 8.030),
        ("meta-llama/Llama-3.1-8B", 8.030),
        ("meta-llama/Llama-3.1-70B", 70.554),
        ("meta-llama/Llama-3.2-1B", 1.236),
        ("meta-llama/Llama-3.2-3B", 3.213),
        ("Qwen/Qwen3-0.6B", 0.596),
        ("Qwen/Qwen3-1.7B", 1.721),
        ("Qwen/Qwen3-4B", 4.022),
        ("Qwen/Qwen3-8B", 8.191),
        ("Qwen/Qwen3-14B", 14.768),
        ("Qwen/Qwen3-32B", 32.762),
        ("mistralai/Mistral-7B-v0.1", 7.242),
        ("mistralai/Mistral-7B-v0.3", 7.248),
    ],
)
def test_published_sizes_have_as_many_weights_as_the_hub_says(name: str, billions: float) -> None:
    config = load_config("tiny-cpu")
    # Layers are alike: from one and two of them follow all.
    counts = []
    for layers in (1, 2):
        found = hf_config(ModelConfig(config={**SHAPES[name], "num_hidden_layers": layers}))
        counts.append(Workload.from_config(config, found).numel())
    total = counts[0] + (SHAPES[name]["num_hidden_layers"] - 1) * (counts[1] - counts[0])
    assert total / 1e9 == pytest.approx(billions, abs=6e-4)


def test_a_checkpoint_that_is_here_says_its_own_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, note = architecture(ModelConfig(name="meta-llama/Llama-3.2-1B"))
    found.num_hidden_layers = 3
    monkeypatch.chdir(tmp_path)
    found.save_pretrained("meta-llama/Llama-3.2-1B")
    assert note is not None
    found, note = architecture(ModelConfig(name="meta-llama/Llama-3.2-1B"))
    assert (found.num_hidden_layers, note) == (3, None)
    shutil.rmtree("meta-llama")
    assert architecture(ModelConfig(name="meta-llama/Llama-3.2-1B"))[0].num_hidden_layers == 16


def test_published_sizes_may_not_be_overridden_and_unknown_names_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"model\.config\.hidden_size=2048 but meta-llama/Llama-3\.1-8B has 4096"
    ):
        architecture(ModelConfig(name="meta-llama/Llama-3.1-8B", config={"hidden_size": 2048}))
    with pytest.raises(ValueError, match="cannot be loaded"):
        architecture(ModelConfig(name="nobody/nothing"))
    found, _ = architecture(
        ModelConfig(name="meta-llama/Llama-3.1-8B-Instruct", config={"max_position_embeddings": 262144})
    )
    assert (found.max_position_embeddings, found.num_hidden_layers) == (262144, 32)


def test_a_hub_that_answers_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(known_shapes, "_hub_answers", lambda: True)
    monkeypatch.setattr("longseq.launch.model.hf_config", lambda config: asked.append(config.name))
    architecture(ModelConfig(name="Qwen/Qwen3-8B"))
    assert asked == ["Qwen/Qwen3-8B"]
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not known_shapes._hub_answers()
