"""A person's own DeepSpeed JSON: what contradicts the run comes all at once, with the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longseq.launch.config_file import ConfigError, check_world, dump_config, parse_config
from longseq.launch.config_yaml import read_yaml
from longseq.launch.deepspeed_json import unknown_keys

HUGGING_FACE = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "offload_param": "auto",
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
}


def values(deepspeed_config: Any, **parallel: Any) -> dict[str, Any]:
    return {
        "model": {"config": {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}},
        "data": {"tokenizer": "bytes"},
        "parallel": {"zero_stage": 3, "deepspeed_config": deepspeed_config, **parallel},
        "train": {"global_batch_sequences": 8, "micro_batch_sequences": 2, "precision": "bf16"},
        "optimizer": {"clip_norm": 1.0},
    }


def errors_of(deepspeed_config: Any, **parallel: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as refused:
        parse_config(values(deepspeed_config, **parallel))
    return refused.value.errors


def test_what_hugging_face_s_trainer_takes_is_taken(tmp_path: Path) -> None:
    config = parse_config(values(HUGGING_FACE))
    assert config.parallel.deepspeed_config == HUGGING_FACE
    data, errors = read_yaml(dump_config(config), "written")
    assert not errors
    assert parse_config(data) == config
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(HUGGING_FACE))
    assert parse_config(values(str(file))).parallel.deepspeed_config == str(file)
    assert unknown_keys(HUGGING_FACE) == []


@pytest.mark.parametrize(
    ("user", "line"),
    [
        (
            {"zero_optimization": {"stage": 2}},
            "zero_optimization.stage=2 contradicts parallel.zero_stage=3; remove the former, or set "
            "parallel.zero_stage to 2.",
        ),
        ({"train_batch_size": 16}, "train_batch_size=16 contradicts train.global_batch_sequences=8;"),
        ({"train_micro_batch_size_per_gpu": 1}, "per_gpu=1 contradicts train.micro_batch_sequences=2;"),
        ({"gradient_clipping": 0.5}, "gradient_clipping=0.5 contradicts optimizer.clip_norm=1.0;"),
        ({"gradient_clipping": 0}, "or set optimizer.clip_norm to null."),
        ({"bf16": {"enabled": False}}, 'bf16.enabled=false contradicts train.precision="bf16"; remove the'),
        ({"fp16": {"enabled": True}}, "fp16.enabled=true is not taken: float16 overflows"),
        (
            {"bf16": {"check_grad_overflow": False}},
            "check_grad_overflow=false is not taken: a gradient of NaN",
        ),
        ({"bfloat16": {"check_grad_overflow": False}}, "bfloat16.check_grad_overflow=false is not taken"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled=true is not taken"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            'offload_optimizer.device="cpu" contradicts parallel.offload_optimizer="none"; remove the '
            'former, or set parallel.offload_optimizer to "cpu".',
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}}},
            "or set parallel.offload_parameters to none or cpu (nvme is not offered).",
        ),
        ({"zero_optimization": {"cpu_offload": True}}, "older word for offload_optimizer"),
        ({"optimizer": {"type": "AdamW"}}, 'optimizer={"type": "AdamW"} is not taken: the optimizer is'),
        ({"scheduler": {"type": "WarmupLR"}}, "remove the section and set schedule.*."),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size=2 is not taken: told of it, DeepSpeed"),
        ({"gradient_allreduce_op": "sum"}, "the loss is scaled for a mean"),
        ({"zero_allow_untested_optimizer": False}, "zero_allow_untested_optimizer=false is not taken"),
        ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer=true is not taken"),
        ({"communication_data_type": "fp16"}, "use bf16 or fp32."),
        ({"data_types": {"param_dtype": "fp32"}}, "param_dtype=\"fp32\" contradicts train.precision='bf16'"),
        ({"zero_optimization": True}, "zero_optimization=true must be an object"),
    ],
)
def test_each_contradiction_names_both_keys_and_the_way_out(user: dict[str, Any], line: str) -> None:
    (error,) = errors_of(user)
    assert error.startswith("parallel.deepspeed_config: ")
    assert line in error


def test_all_contradictions_come_at_once() -> None:
    user = {"optimizer": {}, "scheduler": {"type": "WarmupLR"}, "train_batch_size": 1, "bf16": {"enabled": 0}}
    assert len(errors_of(user)) == 3  # an empty section asks for nothing


def test_accumulation_is_compared_where_the_number_of_processes_is_known() -> None:
    config = parse_config(values({"gradient_accumulation_steps": 2}))
    assert check_world(config, 2).accumulation_steps == 2
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps=2 contradicts the 4 that train\.gl"):
        check_world(config, 1)
    (error,) = errors_of({"gradient_accumulation_steps": 2}, num_gpus=1)
    assert "change one of the latter" in error


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for text, said in (
        ('{"bf16": {}} // mine', "is no JSON: .*comments are not JSON"),
        ('{"bf16": {}, "bf16": {}}', "is no JSON: it has 'bf16' twice"),
        ("[1]", r"holds \[1\]; a DeepSpeed configuration is a JSON object"),
        (None, "cannot be read: No such file or directory; check the path"),
    ):
        file = tmp_path / "ds.json"
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        with pytest.raises(ConfigError, match=rf"parallel\.deepspeed_config=.*ds\.json' {said}"):
            parse_config(values(str(file)))


def test_without_zero_it_would_do_nothing() -> None:
    (error,) = errors_of({}, zero_stage=0)
    assert "needs parallel.zero_stage 1, 2 or 3, got 0" in error


def test_keys_that_deepspeed_would_ignore_are_warned_of() -> None:
    (line, other) = unknown_keys({"zero_optimisation": {}, "gradient_clipping": 1, "mine": 2})
    assert "did you mean zero_optimization?" in line
    assert other.endswith("DeepSpeed ignores mine=2.")
