import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from longseq.launch import config_docs
from longseq.launch.config import RunConfig
from longseq.launch.config_docs import BEGIN, END, with_key_tables
from longseq.launch.config_errors import ConfigError, describe, schema_keys, section_of, suggest
from longseq.launch.config_file import check_world, list_presets, load_config, parse_config, schema_json
from longseq.launch.config_rules import RULES, ParallelPlan

DOC = Path(__file__).parents[2] / "docs" / "configuration.md"
ONE_BATCH = {"global_batch_sequences": 1}
LLAMA = {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8}


def run(**sections):
    """The values of a small valid run, with keys put over them: `run(train={"steps": 3})`."""
    values = {"model": {"config": dict(LLAMA)}, "data": {"tokenizer": "bytes"}}
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys}
    return values


def errors_of(values):
    with pytest.raises(ConfigError) as caught:
        parse_config(values)
    return caught.value.errors


def test_every_key_is_explained():
    unexplained = [
        key for key, field in schema_keys().items() if not (field.description or section_of(field))
    ]
    assert not unexplained


def test_rules_name_keys_that_exist():
    assert {key for rule in RULES for key in rule.keys} <= set(schema_keys())


def test_sections_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        parse_config(run()).train.steps = 3


@pytest.mark.parametrize(
    ("section", "key", "value", "line"),
    [
        ("sequence", "length", "12x", "sequence.length='12x' must be a whole number of tokens (1 or above; "),
        (
            "sequence",
            "tile_tokens",
            "12x",
            "sequence.tile_tokens='12x' must be a whole number of tokens (1 or",
        ),
        ("sequence", "tile_tokens", "aut", "or auto; did you mean auto?"),
        ("sequence", "length", True, "sequence.length=true must be"),
        ("optimizer", "lr", True, "optimizer.lr=true must be a number (above 0)."),
        ("optimizer", "lr", 0, "optimizer.lr=0 must be a number (above 0)."),
        ("optimizer", "lr", float("inf"), "optimizer.lr=inf must be"),
        (
            "optimizer",
            "betas",
            [0.9, 1.5],
            "optimizer.betas=[0.9, 1.5] must be a list of 2, each a number (0 or",
        ),
        ("optimizer", "betas", 0.9, "optimizer.betas=0.9 must be a list of 2"),
        ("optimizer", "clip_norm", -1, "optimizer.clip_norm=-1 must be a number (above 0) or null."),
        ("train", "steps", 0, "train.steps=0 must be a whole number (1 or above; 2k is 2,000) or null."),
        ("train", "epochs", True, "train.epochs=true must be"),
        ("parallel", "zero_stage", True, "parallel.zero_stage=true must be 0, 1, 2, 3 or auto"),
        ("schedule", "name", "cosin", "must be cosine, linear or constant; did you mean cosine?"),
        ("sequence", "checkpoints", False, "YAML reads yes, no, on and off as true and false"),
        ("log", "run_dir", 2026, "log.run_dir=2026 must be text; put it in quotes."),
        ("log", "run_dir", "", "log.run_dir='' must be text; it is empty."),
        ("data", "source", [], "data.source=[] must be text or a list of text; it is empty."),
        ("data", "pack", "maybe", "data.pack='maybe' must be true or false."),
        ("model", "lora", True, "model.lora=true must be a section with the keys rank, alpha"),
        ("model", "config", None, "model.config=null must be a section of keys."),
    ],
)
def test_a_wrong_value_gets_one_line_with_key_value_and_rule(section, key, value, line):
    errors = errors_of(run(**{section: {key: value}}))
    assert len(errors) == 1
    assert line in errors[0]
    assert errors[0].startswith(f"{section}.{key}=")


def test_a_long_value_does_not_flood_the_line():
    (error,) = errors_of(run(train={"steps": ["x" * 1000]}))
    assert len(error) < 200


@pytest.mark.parametrize(
    ("unknown", "meant"),
    [
        ("sequence.lenght", "sequence.length"),
        ("lr", "optimizer.lr"),
        ("train.lr", "optimizer.lr"),
        ("train.learning_rate", "optimizer.lr"),
        ("modle", "model"),
        ("model.rank", "model.lora.rank"),
        ("train.warmup_steps", "schedule.warmup_steps"),
        ("trainer.eval_every", "train.eval_every"),
        ("ulyses_degree", "parallel.ulysses_degree"),
        ("train.gradient_accumulation_steps", "train.global_batch_sequences"),
    ],
)
def test_an_unknown_key_gets_the_one_that_was_meant(unknown, meant):
    assert meant in suggest(unknown)


def test_unknown_keys_are_errors_with_advice():
    values = run(sequence={"lenght": "64k"}, train={"foo": 1})
    values["optimizer.lr"] = 1e-4
    values["lr"] = 2
    values[3] = 4
    errors = errors_of(values)
    assert "sequence.lenght='64k' is an unknown key; did you mean sequence.length?" in errors
    assert "lr=2 is an unknown key; did you mean optimizer.lr?" in errors
    assert any(line.startswith("train.foo=1 is an unknown key; train has steps, epochs,") for line in errors)
    assert any("has a dot in its key; write it as a section, `optimizer:`" in line for line in errors)
    assert any(line.startswith("3=4 is an unknown key; a config has model, data") for line in errors)
    assert len(errors) == 5


def test_field_errors_and_cross_field_errors_come_together():
    errors = errors_of(
        run(parallel={"num_gpus": 4, "ulysses_degree": 3}, train={"steps": "x"}, schedule={"warmup_steps": 7})
    )
    assert [line.partition("=")[0] for line in errors] == [
        "train.steps",
        "sequence.length",
        "parallel.ulysses_degree",
    ]


@pytest.mark.parametrize("slip", [{"lenght": "1k"}, {"length": "12x"}])
def test_a_rule_is_silent_about_a_key_whose_value_is_not_known(slip):
    # The default length of 4096 would break max_position_embeddings=2048; nobody asked for 4096.
    values = run(sequence=slip)
    values["model"]["config"]["max_position_embeddings"] = 2048
    assert len(errors_of(values)) == 1


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            run(parallel={"num_gpus": 6, "ulysses_degree": 4}),
            "parallel.ulysses_degree=4 does not divide parallel.num_gpus=6; use 1, 2, 3 or 6.",
        ),
        (
            run(parallel={"ulysses_degree": 64}, sequence={"length": "4k"}),
            "parallel.ulysses_degree=64 is above model.config.num_attention_heads=32: each process attends "
            "with one query head at least; use 32 or less.",
        ),
        (
            run(parallel={"num_gpus": 8, "ulysses_degree": 2}, train={"global_batch_sequences": 6}),
            "train.global_batch_sequences=6 must be a multiple of 4, train.micro_batch_sequences=1 x 4 "
            "data-parallel groups (parallel.num_gpus=8 / parallel.ulysses_degree=2); use 4 or 8.",
        ),
        (
            run(train={"global_batch_sequences": 1, "micro_batch_sequences": 2}),
            "train.global_batch_sequences=1 must be a multiple of 2, train.micro_batch_sequences=2; use 2.",
        ),
        (
            run(parallel={"offload_optimizer": "cpu"}),
            "parallel.offload_optimizer='cpu' needs parallel.zero_stage 1",
        ),
        (
            run(parallel={"offload_parameters": "cpu", "zero_stage": 2}),
            "parallel.offload_parameters='cpu' needs parallel.zero_stage 3, got 2; set "
            "parallel.zero_stage=3.",
        ),
        (run(sequence={"length": 1}), "sequence.length=1 leaves no token to predict"),
        (run(sequence={"length": 15}, parallel={"ulysses_degree": 8}), "use 16 or more."),
        (
            run(train={"steps": 10}, schedule={"warmup_steps": 10}),
            "must be below train.steps=10; use 9 or less",
        ),
        (run(schedule={"name": "constant", "final_ratio": 0.1}), "schedule.final_ratio=0.1 has no effect"),
        (
            run(train={"eval_every": 5}, data={"eval_fraction": 0}),
            "train.eval_every=5 has nothing to evaluate on",
        ),
        (run(model={"config": {}}), "model.name=null and model.config={} leave no model"),
        (run(model={"config": {"hidden_size": 8}}), "model.config.model_type=null must be named"),
        (run(data={"tokenizer": None}), "data.tokenizer=null takes the model's own tokenizer"),
        (
            run(model={"config": {**LLAMA, "vocab_size": "4k"}}),
            "model.config.vocab_size='4k' must be a whole",
        ),
        (
            run(model={"config": {**LLAMA, "num_key_value_heads": 5}}),
            "must divide model.config.num_attention_heads",
        ),
        (
            run(model={"config": {**LLAMA, "max_position_embeddings": 2048}}),
            "sequence.length=4096 is above model.config.max_position_embeddings=2048",
        ),
        (
            run(sequence={"loss": "logits", "loss_memory_mib": 100}),
            "has no effect with sequence.loss='logits'",
        ),
        (
            run(sequence={"checkpoints": "none", "head_groups": 2}),
            "sequence.head_groups=2 has no effect with sequence.checkpoints=none, which streams no layer; "
            "set it to auto",
        ),
        (
            run(sequence={"checkpoints": "none", "save_attention": "all"}),
            "sequence.save_attention=all has no effect with sequence.checkpoints=none",
        ),
        (
            run(sequence={"checkpoint_every": 2}),
            "sequence.checkpoint_every=2 says how many layers' inputs are kept but not where, and "
            "sequence.checkpoints=auto chooses both; set sequence.checkpoints=gpu or host",
        ),
        (
            run(optimizer={"apollo": {"rank": 8, "alpha": 2}}),
            "optimizer.apollo.rank and optimizer.apollo.alpha have no effect with optimizer.name='adamw'; "
            "remove them, or set optimizer.name=apollo or apollo-mini.",
        ),
        (
            run(
                optimizer={"name": "apollo", "apollo": {"embeddings": "factored"}}, parallel={"zero_stage": 2}
            ),
            "optimizer.apollo.embeddings='factored' takes means of whole rows and columns, which "
            "parallel.zero_stage=2 cuts; use adamw_8bit or low_rank.",
        ),
        (
            run(optimizer={"weights": "bf16"}),
            "optimizer.weights='bf16' does not go with optimizer.name='adamw': it needs "
            "optimizer.name=apollo or apollo-mini, train.precision=bf16 and parallel.zero_stage=0;",
        ),
        (
            run(
                optimizer={"name": "apollo", "weights": "bf16"},
                train={"precision": "float32"},
                parallel={"zero_stage": 1},
            ),
            "does not go with train.precision='float32' or parallel.zero_stage=1: it needs",
        ),
        (
            run(
                model={"name": "org/model", "lora": {}}, optimizer={"name": "apollo-mini", "weights": "bf16"}
            ),
            "optimizer.weights='bf16' has no effect with model.lora, whose adapters are float32; remove it.",
        ),
        (
            run(optimizer={"in_backward": True}, train={"global_batch_sequences": 4}),
            "optimizer.in_backward=true updates a weight at each micro-batch, so a step has one: set "
            "train.global_batch_sequences=1 (train.micro_batch_sequences)",
        ),
        (
            run(optimizer={"in_backward": True}, train=ONE_BATCH, parallel={"zero_stage": 1}),
            "before other processes' gradients of it are added: it needs parallel.num_gpus=1 and "
            "parallel.zero_stage=0",
        ),
        (
            run(
                optimizer={"in_backward": True},
                train=ONE_BATCH,
                parallel={"ulysses_degree": 2, "num_gpus": "auto"},
            ),
            "optimizer.in_backward=true updates a weight before other processes' gradients",
        ),
        (
            run(optimizer={"in_backward": True}, train={**ONE_BATCH, "on_nonfinite": "skip"}),
            "optimizer.in_backward=true weights are updated before that is known; set "
            "train.on_nonfinite=stop",
        ),
    ],
)
def test_keys_that_disagree_are_one_error_with_a_way_out(values, line):
    errors = errors_of(values)
    assert len(errors) == 1, errors
    assert line in errors[0]


def test_weights_that_are_updated_in_backward_are_of_one_process():
    told = "optimizer.in_backward=true updates a weight before other processes' gradients"
    values = run(optimizer={"in_backward": True}, train={"global_batch_sequences": 2})
    assert any(line.startswith(told) for line in errors_of({**values, "parallel": {"num_gpus": 2}}))
    alone = parse_config(run(optimizer={"in_backward": True}, train=ONE_BATCH, parallel={"num_gpus": "auto"}))
    assert check_world(alone, 1).accumulation_steps == 1
    with pytest.raises(ConfigError, match=told):
        check_world(alone, 2)


@pytest.mark.parametrize(
    "values",
    [
        run(),
        run(parallel={"num_gpus": "auto", "ulysses_degree": 4}),
        run(parallel={"num_gpus": 8, "ulysses_degree": 4}, train={"global_batch_sequences": 2}),
        run(schedule={"name": "constant"}),
        run(schedule={"name": "constant", "final_ratio": 1}),
        run(train={"eval_every": 5}, data={"eval_fraction": 0, "eval_source": "x.jsonl"}),
        run(parallel={"offload_optimizer": "cpu", "zero_stage": 1}),
        run(sequence={"length": 16}, parallel={"ulysses_degree": 8}),
        run(sequence={"length": 4095}, parallel={"ulysses_degree": 15}),
        run(sequence={"checkpoints": "host", "checkpoint_every": 2, "head_groups": 4}),
        run(model={"config": {**LLAMA, "num_key_value_heads": None}}),
        run(optimizer={"apollo": {}}),
        run(optimizer={"name": "apollo-mini", "apollo": {"embeddings": "factored"}}),
        run(optimizer={"name": "apollo", "apollo": {"embeddings": "low_rank"}}, parallel={"zero_stage": 3}),
        run(optimizer={"name": "apollo-mini", "weights": "bf16", "in_backward": True}, train=ONE_BATCH),
        run(optimizer={"in_backward": True}, train={"global_batch_sequences": 3, "micro_batch_sequences": 3}),
        {"model": {"name": "org/model"}},
    ],
)
def test_valid_runs_are_not_refused(values):
    parse_config(values)


def test_check_world_says_how_processes_share_the_work():
    config = parse_config(
        run(parallel={"ulysses_degree": 2}, train={"global_batch_sequences": 12, "micro_batch_sequences": 2})
    )
    assert check_world(config, 4) == ParallelPlan(
        num_gpus=4, ulysses_degree=2, data_degree=2, accumulation_steps=3
    )
    assert check_world(config, 2).accumulation_steps == 6


def test_check_world_refuses_what_only_the_number_of_processes_shows():
    config = parse_config(run(parallel={"ulysses_degree": 4}, train={"global_batch_sequences": 1}))
    with pytest.raises(
        ConfigError, match=r"degree=4 does not divide the 6 processes of this run; use 1, 2, 3 or 6\."
    ):
        check_world(config, 6)
    with pytest.raises(
        ConfigError, match=r"must be a multiple of 2, .* x 2 data-parallel groups .*; use 2\."
    ):
        check_world(config, 8)


def test_check_world_refuses_another_number_than_the_one_asked_for():
    config = parse_config(run(parallel={"num_gpus": 4}, train={"global_batch_sequences": 4}))
    with pytest.raises(ConfigError, match="num_gpus=4 but 2 processes were started"):
        check_world(config, 2)


def test_check_world_refuses_a_config_that_was_never_checked():
    with pytest.raises(ConfigError, match="leave no model"):
        check_world(RunConfig(), 1)


def test_every_key_can_be_described():
    for key, field in schema_keys().items():
        text = describe(field.annotation, field.metadata)
        assert text, key
        assert "typing" not in text
        assert "()" not in text


def test_the_json_schema_takes_what_people_write():
    sections = json.loads(schema_json())["$defs"]
    length = sections["SequenceConfig"]["properties"]["length"]["anyOf"]
    assert [branch["type"] for branch in length] == ["integer", "string", "string"]
    assert length[-1]["const"] == "max"
    assert sections["OptimizerConfig"]["properties"]["lr"]["exclusiveMinimum"] == 0
    assert sections["SequenceConfig"]["additionalProperties"] is False


def test_reading_a_config_imports_nothing_heavy():
    code = (
        "import sys, longseq.launch.config_file as f; f.load_config('tiny-cpu');"
        "print([m for m in ('torch', 'transformers', 'deepspeed', 'numpy', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_documentations_tables_are_those_of_the_schema():
    page = DOC.read_text("utf-8")
    assert page == with_key_tables(page), (
        "write the tables anew: python -m longseq.launch.config_docs docs/configuration.md"
    )
    shown = re.findall(r"^\| `([a-z_]+\.[a-z_.]+)` \|", page, re.MULTILINE)
    # A section that is always there is its keys.
    assert shown == [
        key
        for key, field in schema_keys().items()
        if "." in key and not (section_of(field) and field.default_factory)
    ]


def test_the_tables_are_written_between_their_markers(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert config_docs.main([str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "| `train.steps` | `null` |" in text
    assert "\nold\n" not in text
    page.write_text("a page of something else\n")
    assert config_docs.main([str(page)]) == 2
    assert END in capsys.readouterr().err
    assert page.read_text() == "a page of something else\n"


def test_the_documentation_lists_every_preset():
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (.*) \|$", DOC.read_text("utf-8"), re.MULTILINE)
    assert [row for row in rows if row[0] in dict(list_presets())] == list_presets()


def test_the_documentation_shows_the_errors_that_come():
    command, shown = re.search(
        r"\$ longseq train (tiny-cpu sequence.lenght.*)\n((?:.+\n)+?)```", DOC.read_text("utf-8")
    ).groups()
    preset, *overrides = command.split()
    with pytest.raises(ConfigError) as caught:
        load_config(preset, overrides)
    assert str(caught.value) == shown.strip()


def test_packed_sequences_fill_their_shards():
    values = run(sequence={"length": 1001}, parallel={"num_gpus": 2, "ulysses_degree": 2})
    assert list(errors_of(values)) == [
        "sequence.length=1001 is no multiple of parallel.ulysses_degree=2, so every packed sequence would be "
        "padded; use 1000, or data.pack=false."
    ]
    parse_config({**values, "data": {**values["data"], "pack": False}})
