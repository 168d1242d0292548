"""Checkpoints of a run: whole or not there, and bit for bit what they were saved from.

    run_dir/checkpoints/latest    the name of the newest
    run_dir/checkpoints/step-00000040/
        manifest.json   size and checksums of every other file; written last
        state.json      step, cursor of the data, layout
        config.yaml     the run's config
        hf/             the model's Hugging Face config and tokenizer
        engine/         weights and optimizer state, in safetensors that every layout reads
        rng/            random state of each rank

A checkpoint is written under another name, seen to be whole, and renamed.
"""

from __future__ import annotations

import errno
import io
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..distributed.checked_file import BytesFile, FileRecord, Writable, readable, record_of
from ..distributed.engine import Engine
from ..distributed.groups import ProcessGroups
from ..mst.pinned_slab import Blocks
from ..mst.placement import local_world_size
from .background import FileWriter, HostCopies
from .checkpoint_folder import CHECKPOINTS_DIR, drop_old, make_draft, newest_checkpoint, put_in_place
from .exit_status import DISK_FULL, is_disk_full
from .manifest import MANIFEST, checksum_problems, read_manifest, survey
from .run_state import AWAY, RunState, random_state, read_state, restore_random_state

__all__ = ["CHECKPOINTS_DIR", "Checkpoints", "RunState", "SaveError", "newest_checkpoint", "read_state"]

logger = logging.getLogger(__name__)


class SaveError(RuntimeError):
    """A checkpoint could not be saved; those before it are as they were. Every rank raises it alike.

    Attributes:
        exit_status: That of a process which ends by it, where there was no room on the disk.
    """

    exit_status: int | None = None


@dataclass(frozen=True)
class _Problem:
    """What went wrong on a rank, as the others hear it."""

    words: str
    is_disk_full: bool = False

    @classmethod
    def of(cls, error: Exception) -> _Problem:
        known = isinstance(error, OSError | ValueError)
        # Tokenizers are written by Rust, whose errors have no number but in their words.
        full = is_disk_full(error) or f"os error {errno.ENOSPC}" in str(error)
        return cls(str(error) if known else repr(error), full)


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    state: RunState
    draft: Path
    writer: FileWriter
    records: dict[str, FileRecord] = field(default_factory=dict)
    """Of what the main rank writes beside its files of the engine."""
    problem: _Problem | None = None


class Checkpoints:
    """The checkpoints of one run, written and read by all its ranks (on a file system that they share).

    Args:
        run_dir: The run's folder.
        groups: This rank's process groups.
        keep: How many are kept.
        background: Whether `save` may leave the writing to a thread.
    """

    def __init__(self, run_dir: Path, groups: ProcessGroups, keep: int, *, background: bool = False) -> None:
        self.folder = run_dir / CHECKPOINTS_DIR
        self._groups = groups
        self._keep = keep
        self._copies = HostCopies() if background else None
        self._pending: _Pending | None = None
        self._num_commits = 0

    def newest(self) -> Path | None:
        """The checkpoint of the highest step whose files are all there and of the right size."""
        return survey(self.folder).newest

    def checksum_problems(self, folder: Path) -> list[str]:
        """Read all of a checkpoint and compare its checksums; every rank calls it, and reads its part.

        Returns:
            What is wrong, one line a file, the same on every rank.
        """

        def my_part() -> list[str]:
            part, parts = self._groups.rank, self._groups.world_size
            try:
                return checksum_problems(folder, part=part, parts=parts, processes_here=local_world_size())
            except ValueError as error:
                return [str(error)]

        mine = self._groups.each_in_its_time(my_part, f"verifying {folder.name}")
        return list(dict.fromkeys(problem for part in self._groups.gathered(mine) for problem in part))

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint waits for `commit`; the same on every rank."""
        return self._pending is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes."""
        return self._pending is not None and self._pending.writer.is_writing

    def save(
        self,
        engine: Engine,
        state: RunState,
        write_model_files: Callable[[Path], None],
        *,
        wait: bool = True,
    ) -> None:
        """Write a checkpoint; every rank calls it. What is there of the same step is replaced.

        What is written is the state at this moment. One that is still being written is completed first.

        Args:
            engine: Its weights and optimizer states are written.
            state: Where the run is.
            write_model_files: Writes config and tokenizer into a folder; called on the main rank.
            wait: Return when the checkpoint is complete. Otherwise, if this object may write in the
                background and every rank has room for a copy, it is so after a `commit`.

        Raises:
            SaveError: On every rank; a checkpoint that is written in the background raises at `commit`.
        """
        self._complete_earlier()
        draft, problem, files = self.folder / f".step-{state.step:08d}.partial", None, []
        try:
            if self._groups.is_main:
                make_draft(draft)
            files = self._files(engine)
        except (OSError, ValueError) as error:
            problem = _Problem.of(error)
        copies, unnamed = None if wait else self._copies, [file for _, file in files]
        has_room = copies is not None and copies.has_room(unnamed)
        num_bytes = sum(file.num_bytes for file in unnamed)
        # Where one rank has to write at once all wait for it, at the store: the next step's collectives, in
        # which they would wait else, give up before a slow disk is done.
        in_background = self._agree_to_begin(state.step, draft, problem, num_bytes, has_room)
        copied = copies.take(unnamed) if copies and in_background else None
        in_background = in_background and all(self._groups.gathered(copied is not None))
        self._pending = _Pending(self._with_layout(state, engine), draft, self._write(draft, files, copied))
        if self._groups.is_main:
            self._write_model_files(self._pending, write_model_files)
        if not in_background:
            self.commit()

    def _complete_earlier(self) -> None:
        try:
            self.commit()
        except SaveError as error:
            # The one that is to come is newer: it is worth more than to know of this one.
            if self._groups.is_main:
                logger.warning("%s", error)

    def _files(self, engine: Engine) -> list[tuple[str, Writable]]:
        written = io.BytesIO()
        torch.save(random_state(), written)
        random = BytesFile(f"rank-{self._groups.rank:05d}.pt", written.getvalue())
        return [*(("engine", file) for file in engine.state_files()), ("rng", random)]

    def _agree_to_begin(
        self, step: int, draft: Path, problem: _Problem | None, num_bytes: int, has_room: bool
    ) -> bool:
        """All ranks wait until the draft's folder is there; whether all have room for copies of theirs."""
        everyone = self._groups.gathered((problem, num_bytes, has_room))
        self._raise_if_any(step, draft, [problem for problem, *_ in everyone])
        needed = sum(size for _, size, _ in everyone)
        if self._groups.is_main and needed > (free := shutil.disk_usage(self.folder).free):
            logger.warning(
                "the checkpoint of step %d needs %s and %s has %s free: it will not fit. Free some, or set a "
                "lower checkpoint.keep.",
                *(step, readable(needed), self.folder, readable(free)),
            )
        return all(room for *_, room in everyone)

    @staticmethod
    def _write(
        draft: Path, files: list[tuple[str, Writable]], copied: tuple[list[Writable], Blocks | None] | None
    ) -> FileWriter:
        if copied is None:
            writer = FileWriter(draft, files)
            writer.write()
            return writer
        copies, memory = copied
        named = [(folder, copy) for (folder, _), copy in zip(files, copies, strict=True)]
        writer = FileWriter(draft, named, memory)
        writer.start()
        return writer

    @staticmethod
    def _write_model_files(pending: _Pending, write: Callable[[Path], None]) -> None:
        draft = pending.draft
        try:
            write(draft)
            for path in draft.rglob("*"):
                name = path.relative_to(draft)
                if name.parts[0] not in ("engine", "rng") and path.is_file():
                    pending.records[name.as_posix()] = record_of(path)
        except Exception as error:  # of several libraries; the other ranks are told at the commit
            pending.problem = _Problem.of(error)

    def commit(self) -> Path | None:
        """Complete the checkpoint that `save` began; every rank calls it, best once no rank writes.

        It waits for the writing. Where none was begun nothing is done.

        Returns:
            The checkpoint; None where none was begun.

        Raises:
            SaveError: On every rank, if any could not write its part.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        # At the store, for a disk may be slower than a collective has patience.
        self._num_commits += 1
        self._groups.each_in_its_time(pending.writer.wait, f"writing checkpoint {self._num_commits}")
        problem, error = pending.problem, pending.writer.error
        if problem is None and error is not None:
            problem = _Problem.of(error)
        everyone = self._groups.gathered((problem, {**pending.records, **pending.writer.records}))
        step = pending.state.step
        self._raise_if_any(step, pending.draft, [problem for problem, _ in everyone])
        final = self.folder / f"step-{step:08d}"
        if self._groups.is_main:
            records = {name: record for _, part in everyone for name, record in part.items()}
            try:
                put_in_place(pending.draft, final, pending.state, records)
                drop_old(final, self._keep)
            except (OSError, ValueError) as error:
                problem = _Problem.of(error)
        self._raise_if_any(step, pending.draft, self._groups.gathered(problem))
        return final

    def abandon(self) -> None:
        """Stop this rank's thread and forget what it wrote; for a run that is to end at once."""
        if self._pending is not None:
            self._pending.writer.stop()
        self._pending = None

    def load(self, folder: Path, engine: Engine) -> RunState:
        """Bring engine and random state back to a checkpoint; every rank calls it.

        Another number of processes, Ulysses degree or ZeRO stage than the checkpoint's is no hindrance; it is
        said.

        Raises:
            ValueError: The folder is no checkpoint, one of another model, or one that cannot be read.
        """
        state = read_state(folder)
        if read_manifest(folder) is None:
            logger.info(
                "%s has no %s: an earlier version wrote it, and only what is read of it was looked at.",
                *(folder, MANIFEST),
            )
        here = self._with_layout(state, engine)
        if here != state:
            logger.info("%s was written on %s; the run goes on with %s", folder, state.layout, here.layout)
        try:
            engine.load(folder / "engine")
        except OSError as error:
            raise ValueError(f"{folder} cannot be read ({error}); {AWAY}") from error
        random_file = folder / "rng" / f"rank-{self._groups.rank:05d}.pt"
        if random_file.exists():
            restore_random_state(_load(random_file))
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

    def _raise_if_any(self, step: int, draft: Path, problems: Sequence[_Problem | None]) -> None:
        """Raise on every rank what went wrong on one."""
        wrong = [(rank, problem) for rank, problem in enumerate(problems) if problem is not None]
        if not wrong:
            return
        if self._groups.is_main:
            shutil.rmtree(draft, ignore_errors=True)
        rank, problem = wrong[0]
        where = f" on rank {rank}" if self._groups.world_size > 1 else ""
        newest = self.newest()
        left = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint yet"
        failure = SaveError(f"the checkpoint of step {step} was not saved{where}: {problem.words}; {left}.")
        if any(problem.is_disk_full for _, problem in wrong):
            failure.exit_status = DISK_FULL
        raise failure


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:  # of many kinds, by what is wrong with the file
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"{path} cannot be read ({reason}); {AWAY}") from error
