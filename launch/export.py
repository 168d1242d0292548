"""From a checkpoint to a folder that `from_pretrained` loads: on the CPU, in less memory than the model."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..distributed.checked_file import readable, sync_folders
from ..distributed.state_files import SavedState
from .config import RunConfig
from .config_file import load_config
from .export_weights import MAX_SHARD_BYTES, ModelShape, saved_weights, write_model
from .manifest import checksum_problems, size_problem, survey
from .run_state import read_state

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CONFIGS = ("config.json", "adapter_config.json")
"""One of them is in what was exported."""


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    adapters: str = "merge",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a checkpoint's model in Hugging Face's layout: safetensors, config and tokenizer.

    The checkpoint's checksums are compared first. Weights are read, changed and written one after the other.

    Args:
        checkpoint: A folder `RUN/checkpoints/step-*`.
        out: Folder to write; it appears whole or not at all, and what it replaces stays until then.
        dtype: "float32" or "bfloat16"; None is the precision that was trained in, and of adapters that are
            written apart their own.
        overwrite: Replace what is at `out`.
        adapters: LoRA adapters are merged into the weights they adapt ("merge"), or written alone, as peft
            loads them ("apart").
        max_shard_bytes: Of a file of weights; a tensor that is larger has one of its own.

    Returns:
        `out`.

    Raises:
        ValueError: No checkpoint there, or a damaged one; something at `out` already; weights of another
            model; a run without adapters that are to be written apart.
        WriteError: The disk is full, or will not be written; nothing is left.
    """
    read_state(checkpoint)  # refuses what is no checkpoint
    _check_place(out, overwrite)
    _check_whole(checkpoint)
    config = load_config(str(checkpoint / "config.yaml"))
    if adapters == "apart" and config.model.lora is None:
        raise ValueError(
            f"{checkpoint} has no adapters to write apart: its run had no model.lora. Use --adapters merge."
        )
    draft = out.with_name(f".{out.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        reason = error.strerror or error
        raise type(error)(f"{out} cannot be written ({reason}); name another folder.") from error
    try:
        saved = SavedState(checkpoint / "engine")
        if adapters == "apart":
            _write_adapters(draft, config, saved, DTYPES[dtype] if dtype else None)
        else:
            target = DTYPES[dtype] if dtype else _trained_dtype(config)
            _write_whole_model(draft, config, checkpoint / "hf", saved, target, max_shard_bytes)
        with _quiet():
            _tokenizer(checkpoint / "hf").save_pretrained(draft)
        _put_in_place(draft, out)
    except Exception:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return out


def _check_whole(checkpoint: Path) -> None:
    problem = size_problem(checkpoint)
    problems = checksum_problems(checkpoint) if problem is None else [problem]
    if not problems:
        return
    others = [path.name for path in survey(checkpoint.parent).good if path != checkpoint]
    way_out = f"export another one ({', '.join(others)})" if others else "bring its files back"
    raise ValueError(f"{checkpoint} is damaged: {'; '.join(problems)}. Nothing is written; {way_out}.")


def _write_whole_model(
    folder: Path, config: RunConfig, hf: Path, saved: SavedState, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    from transformers import AutoConfig, GenerationConfig

    with _quiet():
        shape = ModelShape(AutoConfig.from_pretrained(hf), dtype)
        if config.model.lora is None:
            weights = saved_weights(shape, saved)
        else:
            from .export_adapters import merged_weights

            weights = merged_weights(config.model, shape, saved)
    needed, free = sum(source.num_bytes for source in weights.values()), shutil.disk_usage(folder).free
    if needed > free:
        logger.warning(
            "the model has %s and %s has %s free: it will not fit.",
            *(readable(needed), folder.parent, readable(free)),
        )
    write_model(folder, shape, weights, max_shard_bytes)
    with _quiet():
        # As save_pretrained notes them.
        shape.model.config.architectures = [type(shape.model).__name__]
        shape.model.config.dtype = str(dtype).removeprefix("torch.")
        shape.model.config.save_pretrained(folder)
        GenerationConfig.from_pretrained(hf).save_pretrained(folder)


def _write_adapters(folder: Path, config: RunConfig, saved: SavedState, dtype: torch.dtype | None) -> None:
    with _quiet():
        from .export_adapters import write_adapters

        write_adapters(folder, config.model, saved, dtype)


def _put_in_place(draft: Path, out: Path) -> None:
    """One of the two models is there at every moment; a crash may leave the older one aside."""
    sync_folders([draft])
    older = out.with_name(f".{out.name}.older")
    if out.exists():
        if older.exists():
            shutil.rmtree(older)
        os.replace(out, older)
    os.replace(draft, out)
    sync_folders([out.parent])
    if older.exists():
        shutil.rmtree(older)


def _check_place(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not any((out / name).is_file() for name in CONFIGS):
        raise ValueError(f"{out} is there already and is no exported model; name another folder.")
    if not overwrite:
        raise ValueError(f"{out} is there already; name another folder, or allow it with --overwrite.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What transformers prints while it reads and writes goes to the debug log."""
    printed = io.StringIO()
    try:
        # Progress bars look for the standard error of the moment when they begin.
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            yield
    finally:
        logger.debug("%s", printed.getvalue())


def _trained_dtype(config: RunConfig) -> torch.dtype:
    return torch.float32 if config.train.precision == "float32" else torch.bfloat16


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
