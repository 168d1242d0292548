import re
import shlex

import pytest

from longseq.launch.config_file import (
    ConfigError,
    check_world,
    dump_config,
    list_presets,
    load_config,
    show_preset,
)

PRESETS = [name for name, _ in list_presets()]


def test_presets_are_listed_short_ones_first():
    assert PRESETS == [
        "llama3-8b-64k-1gpu",
        "llama3-8b-128k-4gpu",
        "llama3-8b-512k-8gpu",
        "llama3-8b-lora-128k-1gpu",
        "llama3-8b-mini-1gpu",
        "tiny-cpu",
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_valid_and_what_its_name_says(name, tmp_path):
    config = load_config(name)
    gpus = re.search(r"-(\d+)gpu$", name)
    length = re.search(r"-(\d+)k-", name)
    processes = int(gpus[1]) if gpus else 1
    # A preset for a CPU may leave the number open, but must run as one process.
    assert config.parallel.num_gpus == processes or (not gpus and config.parallel.num_gpus == "auto")
    assert check_world(config, processes).num_gpus == processes
    assert length is None or config.sequence.length == int(length[1]) * 1024
    assert (config.model.lora is not None) == ("-lora-" in name)
    assert config.log.run_dir == f"runs/{name}"
    dumped = tmp_path / "config.yaml"
    dumped.write_text(dump_config(config), encoding="utf-8")
    assert load_config(str(dumped)) == config


@pytest.mark.parametrize(("name", "description"), list_presets())
def test_a_preset_opens_with_what_it_is_and_for_which_machine(name, description):
    assert show_preset(name).startswith(f"# {description}\n")
    assert re.search(r": .*(GPU|CPU)", description)
    assert len(description) < 100


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_leaves_its_length_of_training_to_the_command_line(name):
    # `train.epochs` in a preset would be beside `train.steps` without effect, and could not be taken back.
    assert "epochs:" not in show_preset(name)
    assert load_config(name, ["train.steps=30"]).train.steps == 30
    assert load_config(name, ["train.epochs=2", "train.steps=null"]).train.epochs == 2
    assert load_config(name, ["schedule.name=constant"]).schedule.name == "constant"


@pytest.mark.parametrize("name", PRESETS)
def test_the_tokens_of_a_step_are_what_the_comment_says(name):
    config, text = load_config(name), show_preset(name)
    tokens = config.train.global_batch_sequences * config.sequence.length
    assert f"{tokens:,} tokens a step" in text or "tokens a step" not in text


@pytest.mark.parametrize("name", PRESETS)
def test_overrides_that_a_preset_names_can_be_made(name):
    comments = "\n".join(line for line in show_preset(name).splitlines() if line.startswith("#"))
    for overrides in re.findall(r"`?((?:[a-z_]+\.[a-z_]+=[\w.]+ ?)+)", comments):
        load_config(name, [override.rstrip(".") for override in shlex.split(overrides)])


def test_an_unknown_preset_gets_the_nearest_one():
    with pytest.raises(ConfigError, match=r"did you mean llama3-8b-512k-8gpu\? use one of .*tiny-cpu"):
        show_preset("llama3-8b-512-8gpus")


def test_the_rope_of_the_512k_preset_stretches_the_slowest_rotation_fourfold():
    config = load_config("llama3-8b-512k-8gpu").model.config
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    base = config["rope_parameters"]["rope_theta"]
    slowest = 1 - 2 / head_dim
    assert (base / 500_000) ** slowest == pytest.approx(4, rel=1e-4)
    assert config["max_position_embeddings"] == 4 * 131072
