"""The folder of a run's checkpoints: at every moment, whatever is cut off, the newest whole one is in it.

latest                     names the newest
step-00000040              a checkpoint
step-00000040.older        one that is just being replaced by another of its step; as good as any
step-00000050.damaged      one that was found damaged, and set aside
.step-00000060.partial     one that is being written
.step-00000020.removed     one that is being deleted
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from ..distributed.checked_file import BytesFile, FileRecord, sync_folders, write_file
from .manifest import LATEST, STATE_FILE, size_problem, step_of, survey, write_manifest
from .run_state import RunState

logger = logging.getLogger(__name__)

CHECKPOINTS_DIR = "checkpoints"


def newest_checkpoint(folder: Path) -> Path:
    """The folder itself if it is a checkpoint, else the newest checkpoint of the run it is.

    What is newer and cannot be used is said.
    """
    if (folder / STATE_FILE).is_file():
        return folder
    found = survey(folder / CHECKPOINTS_DIR)
    if found.newest is None:
        return folder
    for path, reason in found.passed_over:
        if step_of(path) > step_of(found.newest):
            logger.warning("%s is passed over: %s.", path, reason)
    return found.newest


def make_draft(draft: Path) -> None:
    """An empty folder to write a checkpoint into; what earlier runs did not finish goes."""
    if draft.parent.is_dir():
        for path in [*draft.parent.glob(".step-*.partial"), *draft.parent.glob(".step-*.removed")]:
            try:
                shutil.rmtree(path)
            except OSError as error:  # on NFS, of a file that somebody still reads
                if path == draft:
                    raise
                logger.warning("%s could not be deleted: %s.", path, error)
    for folder in ("engine", "rng"):
        (draft / folder).mkdir(parents=True)


def put_in_place(draft: Path, final: Path, state: RunState, records: Mapping[str, FileRecord]) -> None:
    """Complete a draft and give it its name. Until then, what is there of its step stays a checkpoint.

    Raises:
        OSError: It could not be completed; nothing has changed.
        ValueError: A file of it is not there, or not of the size that was written.
    """
    state_record = write_file(draft / STATE_FILE, BytesFile(STATE_FILE, state.as_json().encode()))
    write_manifest(draft, {**records, STATE_FILE: state_record})
    problem = size_problem(draft)
    if problem is not None:
        raise ValueError(f"what was written is not there: {problem}")
    sync_folders([draft, *(path for path in draft.rglob("*") if path.is_dir())])
    if final.exists():
        _make_way(final)
    os.replace(draft, final)
    sync_folders([final.parent])
    try:
        write_file(final.parent / LATEST, BytesFile(LATEST, f"{final.name}\n".encode()))
        sync_folders([final.parent])
    except OSError as error:
        logger.warning("%s is complete, but %s", final, error)


def _make_way(final: Path) -> None:
    """Two renames cannot be one: between them the older checkpoint is found under its other name."""
    if size_problem(final) is not None:
        set_aside(final)
        return
    older = _older(final)
    if older.exists():
        remove(older)
    os.replace(final, older)


def _older(final: Path) -> Path:
    return final.with_name(f"{final.name}.older")


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that nothing takes it for one; its new name."""
    number, aside = 1, path.with_name(f"{path.name}.damaged")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    os.replace(path, aside)
    return aside


def drop_old(final: Path, keep: int) -> None:
    """Delete all but the newest `keep` whole checkpoints, now that `final` is one of them.

    Only whole ones count. Those that are not are left alone: somebody may want to see why.
    """
    older = _older(final)
    whole = [path for path in survey(final.parent).good if path != older]
    old = [path for path in whole[:-keep] if path != final]
    for path in [older, *old]:
        try:
            if path.exists():
                remove(path)
        except OSError as error:
            logger.warning("%s could not be deleted: %s.", path, error)


def remove(path: Path) -> None:
    """Delete a checkpoint. A deletion that is cut off leaves nothing that looks like one."""
    going = path.with_name(f".{path.name}.removed")
    shutil.rmtree(going, ignore_errors=True)
    os.replace(path, going)
    shutil.rmtree(going)
