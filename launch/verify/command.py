"""`longseq verify`: are the numbers of this config those of plain PyTorch, before a GPU is paid for."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..config import RunConfig
    from .bench import Bench
    from .report import Findings


def verify(config_source: str, overrides: Sequence[str], *, as_json: bool) -> int:
    """Compare a small clone of a config's model, run as the config says, with plain PyTorch in float64.

    Args:
        config_source: A preset or a YAML file.
        overrides: `key=value` each.
        as_json: Print JSON instead of a table.

    Returns:
        Exit status: 0 when every gradient is right, 1 when one is not.

    Raises:
        ValueError: The config is wrong, or its model is not to be had.
    """
    from ..config_file import load_config

    config = load_config(config_source, overrides)
    findings = examine(config)
    from . import report

    print(report.as_json(findings) if as_json else report.as_text(findings))
    return 0 if findings.is_right else 1


def examine(config: RunConfig) -> Findings:
    """Run every case of a config.

    Raises:
        ValueError: Its model is not to be had, or cannot be trained as it says.
    """
    started = time.perf_counter()
    import torch

    if not torch.cuda.is_available():
        # accelerate imports DeepSpeed whether it is used or not, and that complains of a missing GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from ...distributed.groups import ProcessGroups
    from ...mst.families import FAMILIES
    from ..planner.known_shapes import architecture as find_architecture
    from . import processes
    from .bench import Bench, Layout, trained_model

    architecture, said = find_architecture(config.model)
    if architecture.model_type not in FAMILIES:
        raise ValueError(
            f"model_type={architecture.model_type!r} is no family that mini-sequences know; there are "
            f"{', '.join(FAMILIES)}."
        )
    layout = Layout.of(config)
    if layout.processes > 1:
        processes.prepare(architecture.model_type)
    from .report import Findings
    from .run import all_rows, one_thread, quiet

    with tempfile.TemporaryDirectory() as folder, quiet(), one_thread():
        bench = Bench.make(config, architecture, Path(folder))
        # What cannot be built is the config's own fault, and no finding.
        trained_model(bench.clone_config, ProcessGroups(), torch.float64)
        rows = list(all_rows(bench))
    notes = ([f"note: {said}"] if said else []) + notes_of(bench)
    return Findings(describe(bench), rows, notes, time.perf_counter() - started)


def describe(bench: Bench) -> str:
    """What was compared, in a sentence."""
    small = bench.architecture
    kinds = [f"{small.num_attention_heads} query and {small.num_key_value_heads} key/value heads"]
    if getattr(small, "sliding_window", None):
        kinds.append("sliding windows")
    if getattr(small, "tie_word_embeddings", False):
        kinds.append("tied embeddings")
    if bench.config.model.lora is not None:
        kinds.append("LoRA")
    return (
        f"A {small.model_type} of {small.num_hidden_layers} layers, {', '.join(kinds)}, run as the config "
        "says, beside transformers in float64:\nloss, input gradient and every weight's gradient."
    )


def notes_of(bench: Bench) -> list[str]:
    """What is not verified here, or otherwise than the run will do it."""
    parallel, optimizer, layout = bench.config.parallel, bench.config.optimizer, bench.layout
    notes = []
    if parallel.ulysses_degree not in ("auto", layout.degree):
        notes.append(
            f"note: parallel.ulysses_degree={parallel.ulysses_degree} was tried with {layout.degree} "
            "processes and as many fewer heads."
        )
    if "auto" in (parallel.ulysses_degree, parallel.zero_stage):
        notes.append(
            f"note: auto was tried as ulysses_degree={layout.degree} and zero_stage={layout.zero_stage}."
        )
    if "cpu" in (parallel.offload_optimizer, parallel.offload_parameters):
        notes.append("note: offloading was left out: everything is on the CPU here.")
    if optimizer.name != "adamw":
        notes.append(
            f"note: {optimizer.name} approximates AdamW; that it takes the same step in every layout is all "
            "that is compared."
        )
    lora = bench.config.model.lora
    if lora is not None and lora.dropout:
        notes.append("note: model.lora.dropout was left out.")
    if optimizer.weights == "bf16":
        notes.append("note: stochastic rounding of weights was left out.")
    return notes
