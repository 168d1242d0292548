import pickle

import pytest

from longseq.launch.config_file import ConfigError, dump_config, load_config

VALID = """\
model:
  config: {model_type: llama, rope_theta: 5e5}
data:
  tokenizer: bytes
"""


@pytest.fixture
def write(tmp_path):
    def write_text(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_text


def error_of(*args):
    with pytest.raises(ConfigError) as caught:
        load_config(*args)
    return caught.value


def test_numbers_are_read_as_people_write_them(write):
    text = (
        VALID
        + "optimizer: {lr: 2e-5}\nsequence: {length: 64k}\ntrain: {steps: 2k}\nlog: {run_dir: 2026-10-01}\n"
    )
    config = load_config(write(text))
    assert config.optimizer.lr == 2e-5
    assert config.sequence.length == 65536
    assert config.train.steps == 2000
    assert config.log.run_dir == "2026-10-01"
    # No field's type turns text into a number here; only the reader can.
    assert config.model.config["rope_theta"] == 5e5


def test_a_section_without_lines_is_its_defaults(write):
    assert load_config(write(VALID + "train:\n  # steps: 3\n")).train.steps is None


def test_overrides_are_yaml_and_the_later_one_counts(write):
    config = load_config(
        write(VALID),
        [
            "sequence.length=128k",
            "optimizer.betas=[0.9,0.99]",
            "model.config.num_hidden_layers=2",
            "model.name=null",
            "optimizer.weight_decay=0.5",
            "optimizer.lr=1",
            "optimizer.lr=3e-4",
            "data.source=[a.jsonl, b=c.jsonl]",
        ],
    )
    assert config.sequence.length == 131072
    assert config.optimizer.betas == (0.9, 0.99)
    assert config.model.config == {"model_type": "llama", "rope_theta": 5e5, "num_hidden_layers": 2}
    assert config.model.name is None
    assert config.optimizer.weight_decay == 0.5
    assert config.optimizer.lr == 3e-4
    assert config.data.source == ("a.jsonl", "b=c.jsonl")


def test_overrides_are_merged_before_the_one_check(write):
    path = write(VALID + "train: {global_batch_sequences: 3, micro_batch_sequences: 2}\n")
    assert load_config(path, ["train.global_batch_sequences=4"]).train.global_batch_sequences == 4


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("steps", "override 'steps' has no `=`; write key=value"),
        ("=3", "override '=3' has an empty key"),
        ("train..steps=3", "override 'train..steps=3' has an empty key"),
        ("--train.steps=3", "starts with a dash; write train.steps=3."),
        ("model.name=", "has no value (an unset shell variable?); write model.name=null for nothing."),
        ("optimizer.betas=[1", "override 'optimizer.betas=[1':1:"),
        ("data.tokenizer.x=3", "goes into data.tokenizer='bytes', which is no section."),
        ("lr=1e-4", "lr=0.0001 is an unknown key; did you mean optimizer.lr?"),
        ("optimizer={lr: 1, lr: 2}", "lr stands on line 1 already; keep one."),
    ],
)
def test_a_wrong_override_is_named(write, override, line):
    (error,) = error_of(write(VALID), [override]).errors
    assert line in error


def test_wrong_overrides_and_wrong_values_come_together(write):
    error = error_of(write(VALID + "train: {steps: x}\n"), ["foo", "sequence.length=12x"])
    assert len(error.errors) == 3
    lines = str(error).splitlines()
    assert lines[0].endswith("run.yaml: 3 errors")
    assert lines[1:] == [f"  {line}" for line in error.errors]


def test_epochs_typed_over_a_number_of_steps_are_not_dropped_silently(write):
    path = write(VALID + "train: {steps: 10}\n")
    assert "add train.steps=null" in str(error_of(path, ["train.epochs=3"]))
    assert load_config(path, ["train.epochs=3", "train.steps=null"]).train.epochs == 3


def test_a_key_that_stands_twice_is_refused_with_its_line(write):
    path = write("train:\n  steps: 3\n  seed: 1\n  steps: 4\ntrain:\n  seed: 2\n")
    assert error_of(path).errors == (
        f"{path}:4: train.steps stands on line 2 already; keep one.",
        f"{path}:5: train stands on line 1 already; keep one.",
    )


@pytest.mark.parametrize(
    ("text", "position", "advice"),
    [
        ("train:\n\tsteps: 3\n", "2:1", "indent with spaces"),
        ("train:\n  steps: 3\n seed: 1\n", "3:2", "check the indentation"),
        ("train: {steps: 3\n", "2:1", "check the indentation"),
        ("a: !!python/object:os.system x\n", "1:4", "could not determine a constructor"),
    ],
)
def test_broken_yaml_is_one_line_with_its_position(write, text, position, advice):
    path = write(text)
    (error,) = error_of(path).errors
    assert error.startswith(f"{path}:{position}: not valid YAML: ")
    assert advice in error
    assert "\n" not in error


@pytest.mark.parametrize("text", ["train: {seed: \x00}\n", "train: {seed: !!int x}\n"])
def test_yaml_errors_without_a_position_are_clean_too(write, text):
    assert "not valid YAML" in str(error_of(write(text)))


def test_a_file_that_is_no_mapping_is_refused(write):
    assert "a config is sections" in str(error_of(write("- 1\n- 2\n")))


def test_an_empty_file_says_what_it_lacks(write):
    assert "leave no model" in str(error_of(write("# nothing yet\n")))


def test_a_name_that_does_not_exist_gets_advice(write, tmp_path):
    path = write(VALID, "config.yaml")
    assert "did you mean tiny-cpu? use one of " in str(error_of("tiny-cp"))
    assert f"did you mean {path}?" in str(error_of(str(tmp_path / "confg.yaml")))
    assert f"is a folder; did you mean {path}?" in str(error_of(str(tmp_path)))
    assert "nor does its folder" in str(error_of(str(tmp_path / "no" / "x.yaml")))


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"a: \xff\xfe\n")
    assert "is not UTF-8 text" in str(error_of(str(path)))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["schedule.name=constant"],
        ["schedule.name=constant", "schedule.final_ratio=1"],
        ["train.steps=7", "optimizer.lr=1e-22", "optimizer.clip_norm=null", "model.lora={}", "model.name=x"],
        ['model.config.odd={0: "2e-5", 1: "2026-10-01", 2: [null, "no", {a: .inf}], 3: "1:30"}'],
        ["data.source=[a.jsonl, 'ü # b.jsonl']", "log.run_dir='2026'", "model.name=' x '"],
    ],
)
def test_a_dumped_config_loads_back_equal(write, overrides):
    config = load_config(write(VALID), overrides)
    text = dump_config(config)
    again = load_config(write(text, "dumped.yaml"))
    assert again == config
    assert dump_config(again) == text


def test_an_error_survives_the_way_to_another_process():
    error = ConfigError(["a", "b"], "x.yaml")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "x.yaml: 2 errors\n  a\n  b"
