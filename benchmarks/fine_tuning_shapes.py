"""Sizes of `fine_tuning.py`: of its text, its model, and its two stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

CODE_WORDS = 4  # of the codes that are probed


class Kind(NamedTuple):
    """Documents that are alike.

    Attributes:
        documents: So many of them in turn, before those of the next kind.
        tokens: Of each, bos and eos included.
        notes: Of each.
        words: Of a note's code.
        asks: How often each note is asked.
    """

    documents: int
    tokens: int
    notes: int
    words: int
    asks: int


@dataclass(frozen=True)
class Shape:
    """Lengths and distances are in tokens.

    Attributes:
        vocab_size: Of the tokenizer; `words` of these tokens are words of the notes alone.
        initializer_range: Of the weights. Where it is much below `1 / sqrt(hidden_size)`, copying comes
            late.
        max_text_mb: Of the installed packages' text, in the order of their names.
        copy_kinds: The first run's documents. Copying is learned on them: they are short and little else than
            notes that are asked. Where notes are many, and few tokens can be copied, it comes late; one long
            note four times over is learned first, but can be found by its place in the line alone.
        copy_tokens: Of these documents, about; more steps than they fill see them again.
        short_kinds: The documents of the run that goes on from it, beside the first run's. It learns text,
            and copying in it.
        train_documents: Long ones, at most.
        heldout_documents: Of which the loss is told; each is a text of the probe, too.
        distances: From a note's code to where it is asked.
        asks_a_distance: In each of the probe's documents.
        buckets: Where the ranges of positions end whose loss is told.
        rope_theta: Of all stages; with 1e4 a base model's loss is far off beyond the lengths it has seen.
        checkpoint_every: Steps of the second stage; it is killed `kill_after` its first checkpoint.
    """

    vocab_size: int
    max_text_mb: float
    hidden_size: int
    layers: int
    heads: int
    head_dim: int
    intermediate_size: int
    initializer_range: float
    words: int
    short_length: int
    copy_kinds: tuple[Kind, ...]
    copy_tokens: int
    copy_steps: int
    short_kinds: tuple[Kind, ...]
    short_tokens: int
    short_batch: int
    short_steps: int
    short_lr: float
    short_warmup: int
    long_length: int
    long_notes: int
    long_asks: int
    long_steps: int
    long_lr: float
    long_warmup: int
    train_documents: int
    heldout_documents: int
    distances: tuple[int, ...]
    asks_a_distance: int
    buckets: tuple[int, ...]
    rope_theta: float
    eval_every: int
    checkpoint_every: int
    kill_after: int
    precision: str

    @property
    def long_kind(self) -> Kind:
        """The last stage's documents: their codes are of the probes' length."""
        return Kind(1, self.long_length, self.long_notes, CODE_WORDS, self.long_asks)


SHAPES = {
    "full": Shape(
        vocab_size=16384,
        max_text_mb=160,
        hidden_size=768,
        layers=4,
        heads=6,
        head_dim=128,
        intermediate_size=2048,
        initializer_range=0.036,
        words=2048,
        short_length=4096,
        copy_kinds=(
            Kind(1, 96, notes=1, words=12, asks=3),
            Kind(1, 128, notes=3, words=CODE_WORDS, asks=2),
        ),
        copy_tokens=10_000_000,
        copy_steps=300,
        short_kinds=(
            Kind(16, 256, notes=4, words=CODE_WORDS, asks=2),
            Kind(4, 1024, notes=16, words=CODE_WORDS, asks=3),
            Kind(1, 4096, notes=64, words=CODE_WORDS, asks=3),
        ),
        short_tokens=40_000_000,
        short_batch=8,
        short_steps=2600,
        short_lr=2e-3,
        short_warmup=100,
        long_length=131072,
        long_notes=384,
        long_asks=8,
        long_steps=120,
        long_lr=6e-4,
        long_warmup=4,
        train_documents=60,
        heldout_documents=16,
        distances=(256, 1024, 3840, 16384, 65536, 122880),
        asks_a_distance=4,
        buckets=(4096, 16384, 65536, 131072),
        rope_theta=1e6,
        eval_every=25,
        checkpoint_every=10,
        kill_after=3,
        precision="bf16",
    ),
    "tiny": Shape(
        vocab_size=1024,
        max_text_mb=4,
        hidden_size=64,
        layers=2,
        heads=2,
        head_dim=32,
        intermediate_size=128,
        initializer_range=0.08,
        words=128,
        short_length=256,
        copy_kinds=(
            Kind(1, 96, notes=1, words=12, asks=3),
            Kind(1, 96, notes=2, words=CODE_WORDS, asks=1),
        ),
        copy_tokens=20_000,
        copy_steps=4,
        short_kinds=(
            Kind(2, 128, notes=2, words=CODE_WORDS, asks=2),
            Kind(1, 256, notes=4, words=CODE_WORDS, asks=1),
        ),
        short_tokens=40_000,
        short_batch=2,
        short_steps=8,
        short_lr=1e-3,
        short_warmup=2,
        long_length=1024,
        long_notes=4,
        long_asks=2,
        long_steps=8,
        long_lr=4e-4,
        long_warmup=2,
        train_documents=12,
        heldout_documents=2,
        distances=(48, 128, 240, 768),
        asks_a_distance=1,
        buckets=(256, 1024),
        rope_theta=1e6,
        eval_every=4,
        checkpoint_every=2,
        kill_after=1,
        precision="float32",
    ),
}
