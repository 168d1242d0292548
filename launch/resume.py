"""Which checkpoint a run goes on from, and whether it may."""

from __future__ import annotations

import logging
from pathlib import Path

from ..distributed.groups import ProcessGroups
from .checkpoint import Checkpoints, RunState, newest_checkpoint, read_state
from .config import RunConfig
from .config_file import load_config
from .nodes import require_same

logger = logging.getLogger(__name__)

WALK_KEYS = (
    "model.name",
    "model.config",
    "model.lora",
    "data.source",
    "data.split",
    "data.tokenizer",
    "data.pack",
    "data.long_documents",
    "data.max_documents",
    "data.eval_source",
    "data.eval_fraction",
    "sequence.length",
    "train.global_batch_sequences",
    "train.seed",
    "train.precision",
)
"""Keys that say what the model is and which sequences its next step sees: with others the cursor is void."""


def choose_checkpoint(config: RunConfig, checkpoints: Checkpoints, groups: ProcessGroups) -> Path | None:
    """The checkpoint to go on from, as `checkpoint.resume` says; None starts anew. Every rank calls it.

    Raises:
        ValueError: Nodes that do not see the same checkpoints, a folder that is no checkpoint, `never` where
            there is one, or a checkpoint where the run has a newer one: its later steps would be mixed with
            those to come.
    """
    resume = config.checkpoint.resume
    newest = checkpoints.newest()
    folder = None if resume in ("auto", "never") else newest_checkpoint(Path(resume))
    # Before anything is refused, which all ranks must do alike. By name: nodes may mount it elsewhere.
    require_same(
        {
            "the newest checkpoint in log.run_dir": str(newest and newest.name),
            "the checkpoint of checkpoint.resume": str(folder and folder.name),
        },
        groups,
        "the nodes do not see the same files of the shared folder; wait until they do, and start again",
    )
    if folder is None:
        if resume == "never" and newest is not None:
            raise ValueError(
                f"checkpoint.resume=never but {newest} is there and would be overwritten; set another "
                "log.run_dir, or move it away."
            )
        return newest
    read_state(folder)
    if newest is not None and newest.resolve() != folder.resolve():
        raise ValueError(
            f"checkpoint.resume={resume} but the run has gone on to {newest}; set checkpoint.resume=auto to "
            "go on from that, or another log.run_dir to branch off."
        )
    return folder


def check_same_walk(config: RunConfig, folder: Path) -> None:
    """Refuse to go on with another model or other data than the checkpoint's run had.

    Raises:
        ValueError: Each key that differs, with both values.
    """
    saved_file = folder / "config.yaml"
    saved = load_config(str(saved_file))
    wrong = [
        f"{key}={_value(config, key)!r} but the checkpoint has {_value(saved, key)!r}"
        for key in WALK_KEYS
        if _value(config, key) != _value(saved, key)
    ]
    if wrong:
        raise ValueError(
            f"cannot go on from {folder}:\n  "
            + "\n  ".join(wrong)
            + "\nSet them back, or train into another log.run_dir."
        )


def check_same_data(state: RunState, data_digest: str, folder: Path) -> None:
    """Refuse to go on in documents that are not those of the checkpoint's run.

    Raises:
        ValueError: They differ.
    """
    if state.data_digest != data_digest:
        raise ValueError(
            f"the documents are not those that {folder} was trained on: its place in the data means nothing "
            "here, and what was held out may be trained on. Bring the data back, or train into another "
            "log.run_dir."
        )


def _value(config: RunConfig, key: str):
    section, name = key.split(".")
    return getattr(getattr(config, section), name)
