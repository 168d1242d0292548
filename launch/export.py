"""From a checkpoint to a folder that `AutoModelForCausalLM.from_pretrained` loads; on the CPU, offline."""

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
from torch import nn

from ..distributed.state_files import SavedState
from .checkpoint import read_state, share
from .config import RunConfig
from .config_file import load_config

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export_checkpoint(
    checkpoint: Path, out: Path, *, dtype: str | None = None, overwrite: bool = False
) -> Path:
    """Write a checkpoint's model in Hugging Face's layout: safetensors, config and tokenizer.

    Adapters are merged into the weights they adapt.

    Args:
        checkpoint: A folder `RUN/checkpoints/step-*`.
        out: Folder to write; it appears whole or not at all.
        dtype: "float32" or "bfloat16"; None is the precision that was trained in.
        overwrite: Replace what is at `out`.

    Returns:
        `out`.

    Raises:
        ValueError: No checkpoint there, something at `out` already, or weights of another model.
    """
    read_state(checkpoint)  # refuses what is no checkpoint
    _check_place(out, overwrite)
    config = load_config(str(checkpoint / "config.yaml"))
    target = DTYPES[dtype] if dtype else _trained_dtype(config)
    saved = SavedState(checkpoint / "engine")
    with _quiet():
        model = _model(config, checkpoint / "hf", saved, target)
    model.generation_config = _generation_config(checkpoint / "hf")
    draft = out.with_name(f".{out.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.parent.mkdir(parents=True, exist_ok=True)
    with _quiet():
        model.save_pretrained(draft)
    _tokenizer(checkpoint / "hf").save_pretrained(draft)
    share(draft)
    _put_in_place(draft, out)
    return out


def _put_in_place(draft: Path, out: Path) -> None:
    """One of the two models is there at every moment; a crash may leave the older one aside."""
    older = out.with_name(f".{out.name}.older")
    if out.exists():
        if older.exists():
            shutil.rmtree(older)
        os.replace(out, older)
    os.replace(draft, out)
    if older.exists():
        shutil.rmtree(older)


def _check_place(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "config.json").is_file():
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


def _model(config: RunConfig, hf_folder: Path, saved: SavedState, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    if config.model.lora is not None:
        return _merged_adapters(config, saved).to(dtype)
    architecture = AutoConfig.from_pretrained(hf_folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
    # Each is read in the dtype that it is written in: the float32 model is nowhere whole.
    _, unexpected = model.load_state_dict(dict(saved.weights(dtype)), strict=False, assign=True)
    model.tie_weights()
    still_empty = [name for name, param in model.named_parameters() if param.is_meta]
    if still_empty or unexpected:
        raise ValueError(
            f"the weights are of another model: missing {still_empty[:3]}, unexpected {list(unexpected)[:3]}."
        )
    return model


def _merged_adapters(config: RunConfig, saved: SavedState) -> nn.Module:
    from .model import add_adapters, build_base_model

    model = add_adapters(build_base_model(config.model, torch.device("cpu"), torch.float32), config.model)
    weights = dict(saved.weights())
    _, unexpected = model.load_state_dict(weights, strict=False)
    trainable = {name for name, param in model.named_parameters() if param.requires_grad}
    missing = sorted(trainable - set(weights))
    if missing or unexpected:
        raise ValueError(
            f"the adapters are of another model: missing {missing[:3]}, unexpected {list(unexpected)[:3]}."
        )
    return model.merge_and_unload()


def _generation_config(folder: Path) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(folder)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
