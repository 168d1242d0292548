"""Which checkpoint a run goes on from, and whether it may."""

from __future__ import annotations

import logging
from pathlib import Path

from ..distributed.groups import ProcessGroups
from .checkpoint import Checkpoints, RunState, newest_checkpoint, read_state
from .checkpoint_folder import set_aside
from .config import RunConfig
from .config_file import load_config
from .manifest import LATEST, Survey, size_problem, step_of, survey
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

    Its checksums have been compared. Newer ones that are damaged, or were cut off, are named and passed over;
    the damaged ones are renamed, for their steps are to come again.

    Raises:
        ValueError: Nodes that do not see the same checkpoints, a folder that is no checkpoint or is damaged,
            none that is not damaged, `never` where there is one, or a checkpoint where the run has a newer
            one: its later steps would be mixed with those to come.
    """
    resume = config.checkpoint.resume
    found = survey(checkpoints.folder)
    named = None if resume in ("auto", "never") else newest_checkpoint(Path(resume))
    # Before anything is refused, which all ranks must do alike. By name: nodes may mount it elsewhere.
    require_same(
        {
            "the newest checkpoint in log.run_dir": str(found.newest and found.newest.name),
            "the checkpoint of checkpoint.resume": str(named and named.name),
            "the list of checkpoints in log.run_dir": ", ".join(path.name for path in found.good),
        },
        groups,
        "the nodes do not see the same files of the shared folder; wait until they do, and start again",
    )
    if resume == "never":
        _refuse_to_overwrite(found)
        return None
    if named is None:
        chosen, problems = _newest_sound(found, checkpoints)
    else:
        chosen, problems = _named_sound(named, resume, found, checkpoints), dict(found.passed_over)
    groups.barrier()  # nobody still looks at what is renamed
    if groups.is_main:
        _pass_over(chosen, problems)
    groups.barrier()
    return chosen


def _refuse_to_overwrite(found: Survey) -> None:
    there = found.newest or next((path for path, _ in found.passed_over if _is_damaged(path)), None)
    if there is not None:
        raise ValueError(
            f"checkpoint.resume=never but {there} is there and would be overwritten; set another "
            "log.run_dir, or move it away."
        )


def _newest_sound(found: Survey, checkpoints: Checkpoints) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint whose checksums are right, and what is wrong with others."""
    problems = dict(found.passed_over)
    for path in reversed(found.good):
        wrong = checkpoints.checksum_problems(path)
        if not wrong:
            return path, problems
        problems[path] = "; ".join(wrong)
    if any(map(_is_damaged, problems)):
        lines = "".join(f"\n  {path}: {problem}" for path, problem in problems.items())
        raise ValueError(
            f"log.run_dir has checkpoints and none that can be gone on from:{lines}\nBring their files back, "
            "or move them away to start anew, or set another log.run_dir."
        )
    return None, problems


def _named_sound(folder: Path, resume: str, found: Survey, checkpoints: Checkpoints) -> Path:
    problem = size_problem(folder)
    if problem is not None:
        try:
            read_state(folder)  # says it better of what is no checkpoint
        except ValueError as error:
            raise ValueError(f"checkpoint.resume={resume}: {error}") from error
        raise _damaged(folder, resume, problem)
    if found.newest is not None and found.newest.resolve() != folder.resolve():
        raise ValueError(
            f"checkpoint.resume={resume} but the run has gone on to {found.newest}; set "
            "checkpoint.resume=auto to go on from that, or another log.run_dir to branch off."
        )
    problems = checkpoints.checksum_problems(folder)
    if problems:
        raise _damaged(folder, resume, "; ".join(problems))
    return folder


def _damaged(folder: Path, resume: str, problem: str) -> ValueError:
    return ValueError(
        f"checkpoint.resume={resume}: {folder} is damaged: {problem}. Bring its files back, or name another "
        "one (checkpoint.resume=auto takes the newest of log.run_dir that is whole)."
    )


def _is_damaged(path: Path) -> bool:
    """Whether what is no checkpoint has the name and place of one."""
    return path.name.startswith("step-") and path.is_dir()


def _pass_over(chosen: Path | None, problems: dict[Path, str]) -> None:
    """Say what is not gone on from, and set aside what would be mixed with steps to come."""
    step = -1 if chosen is None else step_of(chosen)
    instead = "the run starts anew" if chosen is None else f"the run goes on from {chosen}"
    for path, problem in problems.items():
        if path.name != LATEST and step_of(path) < step:
            continue
        renamed = ""
        if _is_damaged(path) and step_of(path) >= step:
            renamed = f" It is now called {set_aside(path).name}."
        logger.warning("%s is passed over: %s; %s.%s", path, problem, instead, renamed)


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
