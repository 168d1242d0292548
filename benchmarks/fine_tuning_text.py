"""Text out of the Python packages that are installed, and its tokenizer, for `fine_tuning.py`."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import random
import re
import site
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SUFFIXES = (".py", ".pyi", ".rst", ".md", ".txt")
MIN_FILE_CHARACTERS = 300
MAX_FILE_BYTES = 400_000  # larger ones are tables
MAX_LINE_CHARACTERS = 600
MAX_DIGITS = 0.1  # share of a file's characters; tables have more
NO_FOLDER = re.compile(r"__pycache__|lib2to3|idlelib|\.dist-info|\.egg-info|licen[cs]e", re.I)
SAMPLE_BYTES = 12_000_000  # that the tokenizer is trained on
# What a conversation is made of comes after each other as it is; the assistant's part carries the loss.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}"
    "{% endfor %}{{ eos_token }}"
)
SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>")
BOS, EOS = 0, 1  # the tokenizer's first tokens are the special ones


class Lines(NamedTuple):
    """A package's text: its lines, each with its newline, and the tokens of each."""

    texts: list[str]
    ids: list[list[int]]


def single_tokens(lines: Lines) -> Lines:
    """The same text, each token of it a line: what is planted in it may stand anywhere. It has no texts."""
    ids = [[token] for line in lines.ids for token in line]
    return Lines([""] * len(ids), ids)


def made_up_words(count: int) -> list[str]:
    """Words that no text has, such as `<bumezo>`; the same ones each time."""
    draw = random.Random(count)
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = (draw.choice("bdfgklmnprstvwz") + draw.choice("aeiou") for _ in range(3))
        found[f"<{''.join(syllables)}>"] = None
    return list(found)


def packages() -> dict[str, list[Path]]:
    """The text files of each installed package, and of the standard library, in the order of their paths."""
    library = Path(sysconfig.get_path("stdlib"))
    roots = sorted(
        {Path(root).resolve() for root in (*site.getsitepackages(), sysconfig.get_path("purelib"))}
    )
    found: dict[str, list[Path]] = {}
    for root in (*roots, library):
        for folder, below, files in os.walk(root):
            place = Path(folder).relative_to(root)
            below[:] = sorted(
                name for name in below if not NO_FOLDER.search(name) and not name.endswith("-packages")
            )
            package = "python" if root == library else place.parts[0] if place.parts else None
            if package is not None:
                paths = [Path(folder) / name for name in sorted(files) if name.endswith(SUFFIXES)]
                found.setdefault(package, []).extend(paths)
    return {package: found[package] for package in sorted(found) if found[package]}


def read(path: Path) -> str | None:
    """A file's text with Unix newlines; None where it is no text to learn from."""
    try:
        if not MIN_FILE_CHARACTERS <= path.stat().st_size <= MAX_FILE_BYTES:
            return None
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip("\n") + "\n"
    digits = sum(map(text.count, "0123456789"))
    if digits > MAX_DIGITS * len(text) or any(special in text for special in SPECIALS):
        return None
    return None if max(map(len, text.split("\n"))) > MAX_LINE_CHARACTERS else text


def read_packages(max_mb: float) -> dict[str, list[str]]:
    """Texts of each package, each text once, below headings; at most `max_mb` of them all."""
    seen: set[bytes] = set()
    found: dict[str, list[str]] = {}
    room = max_mb * 1e6
    with ThreadPoolExecutor(16) as pool:
        for package, paths in packages().items():
            root = paths[0].parent
            while package != "python" and root.name != package:
                root = root.parent
            for path, text in zip(paths, pool.map(read, paths), strict=True):
                if text is None or (digest := hashlib.sha256(text.encode()).digest()) in seen:
                    continue
                seen.add(digest)
                place = "/".join(path.parts[-4:]) if package == "python" else path.relative_to(root.parent)
                found.setdefault(package, []).append(f"# file: {place}\n{text}\n")
                room -= len(text)
                if room < 0:
                    return found
    return found


def train_tokenizer(texts: Sequence[str], vocab_size: int, words: int) -> Tokenizer:
    """A byte-level BPE of a sample of the texts, whose tokens never span two lines or two digits.

    Of its `vocab_size` tokens, `words` are made-up words.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), "merged_with_previous"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - words,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    step = max(1, math.ceil(sum(map(len, texts)) / SAMPLE_BYTES))
    tokenizer.train_from_iterator(texts[::step], trainer)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in made_up_words(words)])
    assert [tokenizer.token_to_id(special) for special in SPECIALS[:2]] == [BOS, EOS]
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """As Hugging Face's own."""
    from transformers import PreTrainedTokenizerFast

    bos, eos, pad = SPECIALS
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def split_lines(tokenizer: Tokenizer, texts: Sequence[str]) -> Lines:
    """The lines of a package and the tokens of each."""
    vocabulary = tokenizer.get_vocab()
    newline = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("\n")[0][0]
    ends = np.zeros(len(vocabulary), bool)
    ends[[token_id for token, token_id in vocabulary.items() if newline in token]] = True
    lines: list[str] = []
    line_ids: list[list[int]] = []
    for start in range(0, len(texts), 256):
        part = texts[start : start + 256]
        for text, encoding in zip(part, tokenizer.encode_batch_fast(part), strict=True):
            ids = encoding.ids
            places = (np.flatnonzero(ends[np.array(ids)]) + 1).tolist()
            lines += text.splitlines(True) if text.isascii() else re.findall("[^\n]*\n", text)
            line_ids += [ids[begin:end] for begin, end in itertools.pairwise([0, *places])]
            assert len(lines) == len(line_ids), "a line is not what ends with a newline"
    return Lines(lines, line_ids)
