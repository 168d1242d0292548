"""The config of a bench: a run's own, on made-up data, without a download, at any length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...distributed.groups import ProcessGroups
from ..config import RunConfig
from ..config_changes import with_values
from ..config_errors import ConfigError
from ..config_file import load_config
from ..data.cache import cache_root
from ..model import hf_config
from ..planner.known_shapes import architecture
from .made_up import digest, documents, random_checkpoint, shape_folder

POSITIONS_KEY = "max_position_embeddings"
MANY_POSITIONS = 2**30
"""Of a model until it is known how long its sequences are."""
DROPPED = ("architectures", "transformers_version", "_name_or_path", "dtype", "torch_dtype")
"""Fields of a checkpoint's config that say nothing of a model's shape."""

IN_A_BENCH: dict[str, object] = {
    "data.eval_source": None,
    "data.eval_fraction": 0.0,
    "data.tokenizer": "bytes",
    "data.long_documents": "split",
    "data.max_documents": None,
    "data.num_workers": 1,
    "train.steps": 2**20,
    "train.eval_every": None,
    "schedule.name": "constant",
    "schedule.warmup_steps": 0,
    "checkpoint.resume": "never",
}
"""What every config is given: data of a bench's own, and steps without an end."""


def read_config(name: str, overrides: Sequence[str], *, packs: bool = False) -> tuple[RunConfig, list[str]]:
    """A preset or file as it is benched; and what to say of that.

    Args:
        name: Of the preset or file.
        overrides: `key=value` each.
        packs: Whether documents share a sequence.

    Raises:
        ConfigError: What is wrong with it, but for a model that has too few positions for the length.
        ValueError: The model's sizes cannot be had.
    """
    overrides = [*overrides, f"data.pack={'true' if packs else 'false'}"]
    try:
        config = load_config(name, overrides)
    except ConfigError:
        config = load_config(name, [*overrides, f"model.config.{POSITIONS_KEY}={MANY_POSITIONS}"])
    found, note = architecture(config.model)
    notes = [note] if note else []
    fields = dict(config.model.config) if config.model.name is None else fields_of(found)
    positions = getattr(found, POSITIONS_KEY, None)
    if isinstance(positions, int):
        fields[POSITIONS_KEY] = positions
    model: dict[str, object] = {"model.name": None, "model.config": fields}
    if config.model.lora is not None:  # which only a checkpoint's model can have
        model = {
            "model.name": str(shape_folder(fields, bench_folder(config))),
            "model.config": {key: value for key, value in fields.items() if key == POSITIONS_KEY},
        }
    values = {
        **IN_A_BENCH,
        **model,
        "log.run_dir": str(bench_folder(config) / "run"),
    }
    return _of_length(with_values(config, values)), notes


def settle(
    config: RunConfig, groups: ProcessGroups, device: torch.device, document_tokens: int | None = None
) -> RunConfig:
    """The config whose length is a number by now, with its data made; every rank calls it.

    Args:
        config: From `read_config`, once processes have joined.
        groups: This rank's process groups.
        device: Where random weights are drawn, should they have to be read from a checkpoint.
        document_tokens: Of each document where they share a sequence.

    Raises:
        ValueError: Documents that do not fill a sequence, or too short a sequence.
    """
    config = _of_length(config)
    length = config.sequence.length
    assert isinstance(length, int), length
    refuse_documents(length, document_tokens)
    folder = bench_folder(config)
    source = _made_once(groups, "a bench's documents", partial(documents, config, folder, document_tokens))
    values: dict[str, object] = {"data.source": str(source)}
    if config.model.lora is not None:
        fields = fields_of(hf_config(config.model))
        make = partial(random_checkpoint, fields, folder / f"weights-{digest(fields)}", device)
        values["model.name"] = str(_made_once(groups, "a bench's weights", make))
    return with_values(config, values)


def bench_folder(config: RunConfig) -> Path:
    """Where made-up data, and snapshots of memory that was not enough, are kept."""
    return cache_root(config.data.cache_dir) / "bench"


def fields_of(found: Any) -> dict[str, Any]:
    """What `model.config` says for a model of a Hugging Face config."""
    fields = {key: value for key, value in found.to_diff_dict().items() if key not in DROPPED}
    return {**fields, "model_type": found.model_type}


def refuse_documents(length: int, document_tokens: int | None) -> None:
    """Refuse documents that do not fill sequences.

    Raises:
        ValueError: Which number does not go.
    """
    if length < 4:
        raise ValueError(f"sequence.length={length} is too short for a document; a bench needs 4 tokens.")
    if document_tokens is not None and (document_tokens < 4 or length % document_tokens):
        raise ValueError(
            f"--document-tokens {document_tokens} must be 4 or more and divide sequence.length={length}."
        )


def _made_once(groups: ProcessGroups, name: str, make: Callable[[], Path]) -> Path:
    """What one rank makes, and the others find, or make on nodes that do not share the folder."""
    groups.main_first(make, name)
    return make()


def _of_length(config: RunConfig) -> RunConfig:
    """With as many positions as the length asks for; where that is yet to be found, with many."""
    length, fields = config.sequence.length, dict(config.model.config)
    own = fields.get(POSITIONS_KEY)
    if own is None:
        return config
    if length == "max":
        fields[POSITIONS_KEY] = max(own, MANY_POSITIONS)
    elif own < length or own >= MANY_POSITIONS:
        fields[POSITIONS_KEY] = length
    return with_values(config, {"model.config": fields})
