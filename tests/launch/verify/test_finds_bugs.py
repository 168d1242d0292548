"""`longseq verify` finds every bug that long-sequence libraries have had, and nothing where there is none.

A bug (tests/planted_bugs.py) is put into the code that trains; `verify` must then end with exit status 1 and
name the technique. Each is tried on the part of the check that is to find it, with a small config.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

import planted_bugs as bugs
import pytest
import torch

from longseq.launch import model
from longseq.launch.verify import processes, run
from longseq.launch.verify.combined import adapters, on_one_process, on_several_processes
from longseq.launch.verify.command import verify
from longseq.launch.verify.few_bits import in_bf16
from longseq.launch.verify.forwards import mlp_forwards
from longseq.launch.verify.optimizers import optimizer_steps
from longseq.launch.verify.techniques import (
    accumulation,
    lm_head,
    packed_documents,
    rebuilt_layers,
    streamed_layers,
    tiled_mlps,
)

HEAD, STREAMED = "LM head (cut cross-entropy)", "streamed layers"
STREAM = ["sequence.checkpoints=gpu"]


class Bug(NamedTuple):
    """What is planted, what should find it, and on which config."""

    plant: bugs.Plant
    part: Callable
    technique: str
    overrides: tuple[str, ...] = ()


TIED = ("model.config.tie_word_embeddings=true",)
UNTIED = ("model.config.tie_word_embeddings=false",)
ON_TWO = ("parallel.ulysses_degree=2",)

BUGS = {
    "head gradient twice": Bug(
        bugs.with_wrong_weight_gradient(lambda grad, _: 2 * grad), lm_head, HEAD, UNTIED
    ),
    "head gradient compounds": Bug(
        bugs.with_wrong_weight_gradient(bugs.compounding), accumulation, "gradient accumulation", UNTIED
    ),
    "head gradient hidden by clipping": Bug(
        bugs.with_wrong_weight_gradient(lambda grad, _: 2 * grad),
        on_one_process,
        "all together, 1 process",
        ("optimizer.clip_norm=1e-6",),
    ),
    "tied embeddings lose the head's half": Bug(
        bugs.with_wrong_weight_gradient(lambda grad, _: torch.zeros_like(grad)), lm_head, HEAD, TIED
    ),
    "upstream scales the hidden states alone": Bug(bugs.plant_unscaled_weight_gradient, lm_head, HEAD),
    "tail of a sequence lost": Bug(bugs.plant_lost_tail, lm_head, HEAD),
    "mean of no label": Bug(bugs.plant_mean_of_nothing, lm_head, HEAD),
    "mean of tiles' means": Bug(bugs.plant_mean_of_tiles, lm_head, HEAD),
    "last chunk wins": Bug(bugs.plant_last_chunk_wins, lm_head, HEAD),
    "softcap lost": Bug(bugs.without_option("softcap"), lm_head, HEAD, ("model.config.model_type=gemma2",)),
    "token count ignored": Bug(bugs.plant_ignored_token_count, lm_head, HEAD),
    "token count ignored in accumulation": Bug(
        bugs.plant_ignored_token_count, accumulation, "gradient accumulation"
    ),
    "mean of micro-batches' means": Bug(bugs.plant_mean_of_means, accumulation, "gradient accumulation"),
    "crash below a tile": Bug(bugs.plant_crash_below_a_tile, tiled_mlps, "mini-sequence MLPs"),
    "optimizer steps once a tile": Bug(
        bugs.plant_backward_a_tile,
        optimizer_steps,
        "updates in backward",
        ("optimizer.in_backward=true", "sequence.checkpoints=none"),
    ),
    "three MLP forwards": Bug(bugs.plant_third_forward, mlp_forwards, "MLP forwards a step", tuple(STREAM)),
    "weight gradients summed in bf16": Bug(
        bugs.plant_narrow_sums, in_bf16, "bf16 sums over tiles", (*STREAM, "train.precision=bf16")
    ),
    "sliding window lost": Bug(
        bugs.plant_lost_window, streamed_layers, STREAMED, (*STREAM, "model.config.model_type=mistral")
    ),
    "rebuilt input of another layer": Bug(
        bugs.plant_rebuilt_input_of_another_layer, rebuilt_layers, STREAMED
    ),
    "documents see each other": Bug(bugs.plant_documents_that_meet, packed_documents, "packed documents"),
}
BUGS_OF_ADAPTERS = {
    "frozen weight gets a gradient": Bug(bugs.plant_thawed_base, on_one_process, "all together, 1 process"),
    "adapters lose theirs": Bug(bugs.plant_lost_adapters, adapters, "LoRA adapters", tuple(STREAM)),
}

BUGS_OF_RANKS = {
    "label lost at a shard's border": Bug(
        bugs.plant_label_lost_at_the_border, on_several_processes, "Ulysses, 2 processes", ON_TWO
    ),
    "mean of ranks' means": Bug(
        bugs.plant_count_of_this_rank, on_several_processes, "Ulysses, 2 processes", ON_TWO
    ),
    "evaluation of one shard": Bug(
        bugs.plant_evaluation_of_one_shard, on_several_processes, "Ulysses, 2 processes", ON_TWO
    ),
    "exchange without a gradient": Bug(
        bugs.plant_dead_collective, on_several_processes, "Ulysses, 2 processes", ON_TWO
    ),
    "key/value head of two ranks": Bug(
        bugs.plant_kv_gradient_of_one_rank,
        on_several_processes,
        "Ulysses, 2 processes",
        (*ON_TWO, *STREAM, "model.config.num_key_value_heads=1"),
    ),
    "key/value head that a group's ranks share": Bug(
        bugs.plant_kv_gradient_of_one_rank,
        on_several_processes,
        "Ulysses by 2 head groups, 2 processes",
        ON_TWO,
    ),
    "reducer's divisor": Bug(
        bugs.plant_unknown_divisor,
        on_several_processes,
        "ZeRO 2, 2 processes",
        ("parallel.zero_stage=2", "optimizer.clip_norm=1e-6"),
    ),
}


def verdict(capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[int, dict[str, dict]]:
    """Exit status of `verify`, and its rows by technique."""
    status = verify("tiny-cpu", list(overrides), as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] == (status == 0)
    return status, {row["technique"]: row for row in found["techniques"]}


def check_found(
    bug: Bug, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *overrides: str
) -> None:
    monkeypatch.setattr(run, "PARTS", (bug.part,))
    bug.plant(monkeypatch)
    status, rows = verdict(capsys, *bug.overrides, *overrides)
    assert status == 1
    assert not rows[bug.technique]["ok"], rows[bug.technique]


@pytest.mark.parametrize("name", BUGS)
def test_finds(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    check_found(BUGS[name], monkeypatch, capsys)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that adapters can be put on."""
    from longseq.launch.config_file import load_config

    folder = tmp_path_factory.mktemp("base")
    config = load_config("tiny-cpu", ["model.config.hidden_size=32", "model.config.intermediate_size=48"])
    base = model.build_base_model(config.model, torch.device("cpu"), torch.float32)
    base.save_pretrained(folder)
    return f"model.name={folder}"


SHAPE = ("model.config={}", "model.lora={rank: 4}")


@pytest.mark.parametrize("name", BUGS_OF_ADAPTERS)
def test_finds_in_adapters(
    name: str, checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_found(BUGS_OF_ADAPTERS[name], monkeypatch, capsys, *SHAPE, checkpoint)


# Slow: each starts two processes, and one of them DeepSpeed.
@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS_OF_RANKS)
def test_finds_between_ranks(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Forked from here, ranks have the bug too.
    monkeypatch.setattr(processes, "START_METHOD", "fork")
    check_found(BUGS_OF_RANKS[name], monkeypatch, capsys)


FAMILIES: dict[str, str] = {
    "llama": "rope_parameters: {rope_type: llama3, rope_theta: 5e5, factor: 8.0, low_freq_factor: 1.0, "
    "high_freq_factor: 4.0, original_max_position_embeddings: 8192}",
    "mistral": "sliding_window: 4096",
    "qwen2": "use_sliding_window: true, sliding_window: 4096, max_window_layers: 1",
    "qwen3": "head_dim: 16",
    "phi3": "tie_word_embeddings: true",
    "gemma2": "head_dim: 16, query_pre_attn_scalar: 24",
    "gemma3_text": "head_dim: 16",
    "olmo2": "rms_norm_eps: 1e-5",
}
"""Of each, fields of its own."""


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_gives_a_false_alarm(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    shape = "hidden_size: 32, num_attention_heads: 4, num_key_value_heads: 2, num_hidden_layers: 8"
    fields = f"model.config={{model_type: {family}, {shape}, vocab_size: 264, {FAMILIES[family]}}}"
    status, rows = verdict(capsys, fields, *STREAM, "train.precision=bf16", "sequence.head_groups=auto")
    assert status == 0, [row for row in rows.values() if not row["ok"]]
    assert {HEAD, STREAMED, "bf16 sums over tiles", "all together, 1 process"} <= rows.keys()


def test_adapters_give_no_false_alarm(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = verdict(capsys, *SHAPE, checkpoint, *STREAM)
    assert status == 0, [row for row in rows.values() if not row["ok"]]


# Slow: two processes each, with DeepSpeed.
@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        (*ON_TWO, "parallel.zero_stage=3", *STREAM, "optimizer.name=apollo"),
        ("parallel.num_gpus=2", "train.global_batch_sequences=2", "sequence.loss=mini_sequence"),
    ],
    ids=["ZeRO 3 and Ulysses with apollo", "data parallel with tiles"],
)
def test_ranks_give_no_false_alarm(
    overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "START_METHOD", "fork")
    monkeypatch.setattr(run, "PARTS", (on_several_processes,))
    status, rows = verdict(capsys, *overrides)
    assert status == 0, [row for row in rows.values() if not row["ok"]]
