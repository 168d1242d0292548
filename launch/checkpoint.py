"""Checkpoints of a run: whole or not there, and bit for bit what they were saved from.

    run_dir/checkpoints/step-00000040/
        state.json    step, cursor of the data, layout; written last
        config.yaml   the run's config
        hf/           the model's Hugging Face config and tokenizer
        engine/       weights and optimizer state, in safetensors that every layout reads
        rng/          random state of each rank

A checkpoint is written under another name and renamed, so that a folder called `step-*` is complete.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..distributed.engine import Engine
from ..distributed.groups import ProcessGroups

logger = logging.getLogger(__name__)

CHECKPOINTS_DIR = "checkpoints"
STATE_FILE = "state.json"


@dataclass(frozen=True)
class RunState:
    """Where a run is, and over what it is spread. The data's cursor is the number of sequences taken."""

    step: int = 0
    sequences_seen: int = 0
    tokens_seen: int = 0
    world_size: int = 1
    ulysses_degree: int = 1
    zero_stage: int = 0
    data_digest: str = ""

    def after_step(self, sequences: int, tokens: int) -> RunState:
        """The state one optimizer step later."""
        return replace(
            self,
            step=self.step + 1,
            sequences_seen=self.sequences_seen + sequences,
            tokens_seen=self.tokens_seen + tokens,
        )


class Checkpoints:
    """The checkpoints of one run, written and read by all its ranks (on a file system that they share)."""

    def __init__(self, run_dir: Path, groups: ProcessGroups, keep: int) -> None:
        self._folder = run_dir / CHECKPOINTS_DIR
        self._groups = groups
        self._keep = keep

    def newest(self) -> Path | None:
        """The complete checkpoint of the highest step, if there is one."""
        complete = self._complete()
        return complete[-1] if complete else None

    def save(self, engine: Engine, state: RunState, write_model_files: Callable[[Path], None]) -> Path:
        """Write a checkpoint; every rank calls it. What is there of the same step is replaced.

        Args:
            engine: Its weights and optimizer states are written.
            state: Where the run is.
            write_model_files: Writes config and tokenizer into a folder; called on the main rank.
        """
        final = self._folder / f"step-{state.step:08d}"
        draft = self._folder / f".step-{state.step:08d}.partial"
        if self._groups.is_main:
            shutil.rmtree(draft, ignore_errors=True)
            (draft / "rng").mkdir(parents=True)
        self._groups.barrier()
        engine.save(draft / "engine")
        state = self._with_layout(state, engine)
        torch.save(_rng_state(), draft / "rng" / f"rank-{self._groups.rank:05d}.pt")
        self._groups.barrier()
        if self._groups.is_main:
            write_model_files(draft)
            (draft / STATE_FILE).write_text(json.dumps(asdict(state), indent=2))
            share(draft)
            _reach_the_disk(draft)
            if final.exists():
                shutil.rmtree(final)
            os.replace(draft, final)
            self._drop_old()
        self._groups.barrier()
        return final

    def load(self, folder: Path, engine: Engine) -> RunState:
        """Bring engine and random state back to a checkpoint; every rank calls it.

        Another number of processes, Ulysses degree or ZeRO stage than the checkpoint's is no hindrance; it is
        said.

        Raises:
            ValueError: The folder is no checkpoint, one of another model, or one that cannot be read.
        """
        state = read_state(folder)
        here = self._with_layout(state, engine)
        if here != state:
            logger.info(
                "%s was written on %s; the run goes on with %s", folder, _layout(state), _layout(here)
            )
        try:
            engine.load(folder / "engine")
        except torch.OutOfMemoryError:
            raise
        except (OSError, EOFError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{folder} cannot be read ({str(error).splitlines()[0]}); move it away to go on from the one "
                "before it."
            ) from error
        rng_file = folder / "rng" / f"rank-{self._groups.rank:05d}.pt"
        if rng_file.exists():
            _restore_rng(torch.load(rng_file, weights_only=True))
        else:
            logger.warning(
                "%s has no random state for rank %d; it goes on with its own.", folder, self._groups.rank
            )
        return state

    def _with_layout(self, state: RunState, engine: Engine) -> RunState:
        return replace(
            state,
            world_size=self._groups.world_size,
            ulysses_degree=self._groups.sp_size,
            zero_stage=engine.zero_stage,
        )

    def _complete(self) -> list[Path]:
        return _complete(self._folder)

    def _drop_old(self) -> None:
        for path in self._complete()[: -self._keep]:
            shutil.rmtree(path)
        for path in self._folder.glob(".step-*.partial"):
            shutil.rmtree(path)


def newest_checkpoint(folder: Path) -> Path:
    """The folder itself if it is a checkpoint, else the newest checkpoint of the run it is.

    Raises:
        ValueError: It is neither.
    """
    complete = _complete(folder / CHECKPOINTS_DIR)
    return complete[-1] if complete and not (folder / STATE_FILE).is_file() else folder


def _layout(state: RunState) -> str:
    processes = "1 process" if state.world_size == 1 else f"{state.world_size} processes"
    return f"{processes}, ulysses_degree {state.ulysses_degree}, zero_stage {state.zero_stage}"


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / STATE_FILE).is_file())


def read_state(folder: Path) -> RunState:
    """The state of a checkpoint.

    Raises:
        ValueError: The folder is no checkpoint, or another version's.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} is no checkpoint (it has no {STATE_FILE}); give a folder such as "
            f"RUN/{CHECKPOINTS_DIR}/step-00000100."
        )
    try:
        return RunState(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error


def _reach_the_disk(folder: Path) -> None:
    """A name that is there before its contents are would, after a power cut, be a checkpoint of nothing."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def share(folder: Path) -> None:
    """Give files the permissions that new files have here; safetensors makes them its owner's alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o666 & ~umask)


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_rng(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
