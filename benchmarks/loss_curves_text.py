"""The text of `loss_curves.py`: the Python sources that this machine has, as tokens.

A document is a .py file of the standard library or of an installed package. It loses every paragraph that an
earlier one had, so that neither copies nor licences come twice, nor in both parts; a package gives at most
`MAX_CHARACTERS`. One document in forty, by its hash, is held out, and the order is that of the hashes. A
byte-level BPE is trained on a sample of the training part.
"""

from __future__ import annotations

import hashlib
import io
import json
import sysconfig
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optimizer_corpus import encode, train_tokenizer, write

VOCAB_SIZE = 32000
HELDOUT_ONE_IN = 40
MIN_CHARACTERS = 400
MAX_FILE_BYTES = 400_000  # larger files are tables
MAX_CHARACTERS = 30_000_000  # of one package
MIN_PARAGRAPH = 50  # characters; shorter ones ("return self") may come again
CHARACTERS_A_TOKEN = 4.0  # that are read: sources have fewer, and a part is held out
SAMPLE_CHARACTERS = 24_000_000  # the tokenizer's


@dataclass(frozen=True)
class Text:
    """Tokens (uint16) of both parts, and where they are from."""

    train: np.ndarray
    heldout: np.ndarray
    facts: dict[str, Any]


def source_folders() -> list[Path]:
    """Of the standard library, of the packages that are installed, and of torch, wherever that is."""
    paths = sysconfig.get_paths()
    folders = [Path(paths[name]) for name in ("stdlib", "purelib", "platlib")]
    return list(dict.fromkeys([*folders, Path(torch.__file__).parents[1]]))


def files_below(folders: Iterable[Path]) -> list[tuple[str, Path]]:
    """Package and path of each .py file, once; the standard library's modules are packages too."""
    found: dict[Path, str] = {}
    for folder in folders:
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).parts
            installed = parts[0] in ("site-packages", "dist-packages")  # below the standard library's folder
            found.setdefault(path, parts[1] if installed and len(parts) > 1 else parts[0])
    return sorted((package, path) for path, package in found.items())


def documents(files: Iterable[tuple[str, Path]], max_characters: float) -> Iterator[tuple[str, str]]:
    """Hash and text of documents, in the order of the hashes, up to so many characters.

    The order is of the files' own texts, so that what is taken is a sample of all packages.
    """
    whole: dict[str, tuple[str, str]] = {}
    for package, path in files:
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                continue
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # no text, or gone
        if len(text) >= MIN_CHARACTERS:
            whole[hashlib.blake2b(text.encode(), digest_size=16).hexdigest()] = (package, text)
    taken: Counter[str] = Counter()
    seen: set[int] = set()
    total = 0
    for key, (package, text) in sorted(whole.items()):
        text = fresh(text, seen)
        if len(text) < MIN_CHARACTERS or taken[package] + len(text) > MAX_CHARACTERS:
            continue
        taken[package] += len(text)
        total += len(text)
        yield key, text
        if total >= max_characters:
            return


def fresh(text: str, seen: set[int]) -> str:
    """The text without the paragraphs that were there before."""
    kept = []
    for paragraph in text.split("\n\n"):
        if len(paragraph) >= MIN_PARAGRAPH:
            key = hash(paragraph)
            if key in seen:
                continue
            seen.add(key)
        kept.append(paragraph)
    return "\n\n".join(kept).strip("\n")


def make(
    num_tokens: int,
    vocab_size: int = VOCAB_SIZE,
    folders: Iterable[Path] | None = None,
    sample_characters: int = SAMPLE_CHARACTERS,
) -> Text:
    """Read, train the tokenizer, encode: at least so many tokens where there is so much text.

    Raises:
        SystemExit: One of the parts has no document.
    """
    started = time.perf_counter()
    folders = source_folders() if folders is None else list(folders)
    parts: dict[str, list[str]] = {"train": [], "heldout": []}
    for key, text in documents(files_below(folders), CHARACTERS_A_TOKEN * num_tokens):
        parts["train" if int(key, 16) % HELDOUT_ONE_IN else "heldout"].append(text)
    if not all(parts.values()):
        raise SystemExit(
            f"no text: {', '.join(map(str, folders))} give {len(parts['train'])} documents to train on and "
            f"{len(parts['heldout'])} to hold out; both need one."
        )
    characters = {name: sum(map(len, texts)) for name, texts in parts.items()}
    say(started, f"{characters['train']:,} characters of {len(parts['train']):,} documents")
    sample, taken = [], 0
    for text in parts["train"]:
        sample.append(text)
        taken += len(text)
        if taken >= sample_characters:
            break
    tokenizer = train_tokenizer(sample, vocab_size)
    say(started, f"a tokenizer of {tokenizer.get_vocab_size():,} words")
    tokens = {name: encode(tokenizer, texts) for name, texts in parts.items()}
    say(started, f"{len(tokens['train']):,} tokens to train on, {len(tokens['heldout']):,} held out")
    facts: dict[str, Any] = {"vocab_size": tokenizer.get_vocab_size()}
    for name in parts:
        facts[name] = {
            "documents": len(parts[name]),
            "characters": characters[name],
            "tokens": len(tokens[name]),
            "sha256": hashlib.sha256(tokens[name].tobytes()).hexdigest(),
        }
    return Text(tokens["train"], tokens["heldout"], facts)


def say(started: float, text: str) -> None:
    """A line of progress."""
    print(f"[{time.perf_counter() - started:5.1f} s] {text}", flush=True)


def load_or_make(path: Path | None, num_tokens: int, vocab_size: int) -> Text:
    """The text that lies in a file; made, and put there, where none does."""
    if path is not None and path.exists():
        with np.load(path) as kept:
            return Text(kept["train"], kept["heldout"], json.loads(str(kept["facts"])))
    text = make(num_tokens, vocab_size)
    if path is not None:
        packed = io.BytesIO()
        np.savez(packed, train=text.train, heldout=text.heldout, facts=np.array(json.dumps(text.facts)))
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, packed.getvalue())
    return text
