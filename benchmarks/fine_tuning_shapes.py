"""Sizes of `fine_tuning.py`: of its text, its model, and its two stages."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Lengths and distances are in tokens.

    Attributes:
        max_text_mb: Of the installed packages' text, in the order of their names.
        short_lengths: Of the first stage's documents, in turn. The shortest have one note: copying is learned
            on them first.
        tokens_a_note: A document has a note for so many tokens, in each stage.
        train_documents: Long ones, at most.
        heldout_documents: Of which the loss is told; each is a text of the probe, too.
        distances: From a note's code to where it is asked.
        asks_a_distance: In each of the probe's documents.
        buckets: Where the ranges of positions end whose loss is told.
        rope_theta: In the first stage, and in the second.
        checkpoint_every: Steps of the second stage; it is killed `kill_after` its first checkpoint.
    """

    vocab_size: int
    max_text_mb: float
    hidden_size: int
    layers: int
    heads: int
    head_dim: int
    intermediate_size: int
    short_length: int
    short_lengths: tuple[int, ...]
    short_tokens_a_note: int
    short_batch: int
    short_steps: int
    short_lr: float
    short_warmup: int
    long_length: int
    long_tokens_a_note: int
    long_steps: int
    long_lr: float
    long_warmup: int
    train_documents: int
    heldout_documents: int
    distances: tuple[int, ...]
    asks_a_distance: int
    buckets: tuple[int, ...]
    rope_theta: tuple[float, float]
    eval_every: int
    checkpoint_every: int
    kill_after: int
    precision: str


SHAPES = {
    "full": Shape(
        vocab_size=16384,
        max_text_mb=400,
        hidden_size=768,
        layers=6,
        heads=6,
        head_dim=128,
        intermediate_size=2048,
        short_length=4096,
        short_lengths=(4096, *(128,) * 8, *(256,) * 4, 512, 512, 1024, 2048),
        short_tokens_a_note=96,
        short_batch=8,
        short_steps=3000,
        short_lr=1e-3,
        short_warmup=100,
        long_length=131072,
        long_tokens_a_note=512,
        long_steps=50,
        long_lr=4e-4,
        long_warmup=4,
        train_documents=120,
        heldout_documents=16,
        distances=(1024, 3840, 16384, 65536, 122880),
        asks_a_distance=4,
        buckets=(4096, 16384, 65536, 131072),
        rope_theta=(5e5, 1.6e7),
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
        short_length=256,
        short_lengths=(256, 128),
        short_tokens_a_note=64,
        short_batch=2,
        short_steps=8,
        short_lr=1e-3,
        short_warmup=2,
        long_length=1024,
        long_tokens_a_note=256,
        long_steps=8,
        long_lr=4e-4,
        long_warmup=2,
        train_documents=12,
        heldout_documents=2,
        distances=(128, 240, 768),
        asks_a_distance=1,
        buckets=(256, 1024),
        rope_theta=(1e4, 1e5),
        eval_every=4,
        checkpoint_every=2,
        kill_after=1,
        precision="float32",
    ),
}
