"""Configs, workloads and machines to plan with: layers of Llama-3.1-8B's sizes, as few as a test needs."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from longseq.launch.config import RunConfig
from longseq.launch.config_file import parse_config
from longseq.launch.model import hf_config
from longseq.launch.planner.machine import Machine, named_machine
from longseq.launch.planner.workload import Workload

GIB = 2**30
SHAPE = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 2**30,
}
_KEPT: dict[str, Workload] = {}
AUTO = dict.fromkeys(("ulysses_degree", "zero_stage", "offload_optimizer", "offload_parameters"), "auto")


def plan_config(num_layers: int = 32, **sections: dict[str, Any]) -> RunConfig:
    """A config of `num_layers` layers, with values for its sections."""
    values: dict[str, Any] = {
        "model": {"config": {**SHAPE, "num_hidden_layers": num_layers}},
        "data": {"tokenizer": "bytes"},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return parse_config(values)


def work_of(config: RunConfig) -> Workload:
    """Its workload, as a plan takes it."""
    model, optimizer = config.model.model_dump_json(), config.optimizer.model_dump_json()
    key = model + optimizer + config.sequence.loss + config.train.precision
    if key not in _KEPT:
        _KEPT[key] = replace(Workload.from_config(config, hf_config(config.model)), adapts_groups=False)
    return _KEPT[key]


@cache
def machine_with(
    gpu_gib: float = 79.1, host_gib: float = 512, num_gpus: int = 1, gpus_per_node: int | None = None
) -> Machine:
    """GPUs as fast as an H100 with so much memory each, and nodes with so much for a run."""
    named = named_machine("h100-80g", num_gpus, gpus_per_node=gpus_per_node)
    gpu = replace(named.gpu, memory_bytes=int(gpu_gib * GIB))
    return replace(named, gpu=gpu, host_bytes=int(host_gib * GIB))
