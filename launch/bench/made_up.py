"""What a bench runs on in the place of data and a checkpoint: documents of one phrase, random weights."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..config import ModelConfig, RunConfig
from ..data.cache import build_once

PHRASE = "the quick brown fox jumps over a lazy dog "


def documents(config: RunConfig, folder: Path, document_tokens: int | None = None) -> Path:
    """A file of documents that fill the sequences of a step, one each unless they are shorter.

    Args:
        config: Whose batch and length are filled; of the tokenizer `bytes`.
        folder: Gets a folder with the file, which is made once.
        document_tokens: Of a document, its bos and eos among them.
    """
    length, sequences = config.sequence.length, config.train.global_batch_sequences
    assert isinstance(length, int), length
    each = document_tokens or length
    count = sequences * (length // each)

    def write(made: Path) -> None:
        text = (PHRASE * (1 + each // len(PHRASE)))[: each - 2]
        line = json.dumps({"text": text}) + "\n"
        with (made / "documents.jsonl").open("w") as file:
            for _ in range(count):
                file.write(line)

    return _made(folder / f"{count}-of-{each}", "documents.jsonl", write)


def shape_folder(fields: dict[str, Any], folder: Path) -> Path:
    """A checkpoint's folder that has the model's sizes alone, for what reads these before there are weights.

    Args:
        fields: As `model.config` has them.
        folder: Gets it.
    """
    from ..model import hf_config

    def write(made: Path) -> None:
        hf_config(ModelConfig(config=fields)).save_pretrained(made)

    return _made(folder / f"shape-{digest(fields)}", "config.json", write).parent


def random_checkpoint(fields: dict[str, Any], folder: Path, device: torch.device) -> Path:
    """A checkpoint of random weights, which is made once: adapters need one.

    Args:
        fields: The model's sizes, as `model.config` has them.
        folder: The checkpoint's own.
        device: Where weights are drawn.
    """

    def write(made: Path) -> None:
        from ..model import build_base_model

        model = build_base_model(ModelConfig(config=fields), device, torch.bfloat16)
        model.save_pretrained(made)
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    return _made(folder, "config.json", write).parent


def digest(fields: dict[str, Any]) -> str:
    """A short name for a shape."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def _made(folder: Path, name: str, write: Callable[[Path], None]) -> Path:
    build_once(folder, lambda path: (path / name).exists(), write)
    return folder / name
