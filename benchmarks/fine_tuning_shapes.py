"""Sizes of `fine_tuning.py`: of its text, its model, and its two stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

CODE_WORDS = 4  # of the codes that are probed
LAST_STEPS = 20  # whose mean loss counts
PLANNED_GPU = "h100-80g"  # on a machine without one


class Kind(NamedTuple):
    """Documents that are alike.

    Attributes:
        documents: So many of them in turn, before those of the next kind.
        tokens: Of each, bos and eos included.
        notes: Of each.
        words: Of a note's code.
        asks: How often each note is asked.
        far: Half of the distances are spread evenly by their square roots: every other of these is over a
            quarter of the document. The others, and all without it, are by their logarithms: most are near.
    """

    documents: int
    tokens: int
    notes: int
    words: int
    asks: int
    far: bool = False


class BaseRun(NamedTuple):
    """A run of the base model, on documents of its own: from random weights, or from the run before it.

    Attributes:
        name: Of its stage and its files.
        kinds: Of its documents.
        tokens: Of these, about; more steps than they fill see them again.
        steps: At most.
        whole_lines: Notes stand between lines of the text. Elsewhere they may stand anywhere in it: lines
            would leave few different distances, which a model learns in the place of looking.
        answers_alone: Loss is that of the codes that answer. With that of text, looking is learned later.
        enough: Mean loss of `LAST_STEPS` steps with which the run ends before its last one.
    """

    name: str
    kinds: tuple[Kind, ...]
    tokens: int
    steps: int
    whole_lines: bool = False
    answers_alone: bool = False
    enough: float = 0.0


@dataclass(frozen=True)
class Shape:
    """Lengths and distances are in tokens.

    Attributes:
        vocab_size: Of the tokenizer; `words` of these tokens are words of the notes alone.
        initializer_range: Of the weights. Where it is much below `1 / sqrt(hidden_size)`, copying comes
            late.
        max_text_mb: Of the installed packages' text, in the order of their names.
        base: The base model's runs, easy ones first. One long note that fills its document teaches to copy,
            though from nearly one distance; several short ones teach to look for the word, and are not
            learned from random weights in as many steps, neither alone nor among others. Longer documents
            come last, and are quick: who looks in 256 tokens looks in thousands after a few dozen steps.
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
    base: tuple[BaseRun, ...]
    base_batch: int
    base_lr: float
    base_warmup: int
    long_length: int
    long_notes: int
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
        """The last stage's documents: their notes are asked once, and of the probes' length.

        An answer that came before would say the same as the note, and be nearer.
        """
        return Kind(1, self.long_length, self.long_notes, CODE_WORDS, asks=1, far=True)


LOOK = (
    Kind(2, 128, notes=3, words=CODE_WORDS, asks=2),
    Kind(1, 256, notes=4, words=CODE_WORDS, asks=3),
)
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
        base=(
            BaseRun("copy", (Kind(1, 128, notes=1, words=36, asks=2),), tokens=8_000_000, steps=300),
            BaseRun("look", LOOK, tokens=16_000_000, steps=4000, answers_alone=True, enough=0.3),
            BaseRun(
                "short",
                (
                    Kind(16, 256, notes=4, words=CODE_WORDS, asks=3),
                    Kind(4, 1024, notes=16, words=CODE_WORDS, asks=3),
                    Kind(1, 4096, notes=64, words=CODE_WORDS, asks=3),
                ),
                tokens=20_000_000,
                steps=600,
                whole_lines=True,
            ),
        ),
        base_batch=8,
        base_lr=6e-4,
        base_warmup=50,
        long_length=131072,
        long_notes=400,
        long_steps=240,
        long_lr=3e-4,
        long_warmup=4,
        train_documents=240,
        heldout_documents=16,
        distances=(256, 1024, 3840, 16384, 65536, 122880),
        asks_a_distance=4,
        buckets=(4096, 16384, 65536, 131072),
        rope_theta=1e6,
        eval_every=60,
        checkpoint_every=10,
        kill_after=3,
        precision="bf16",
    ),
    "small": Shape(
        vocab_size=4096,
        max_text_mb=60,
        hidden_size=192,
        layers=3,
        heads=3,
        head_dim=64,
        intermediate_size=512,
        initializer_range=0.072,
        words=512,
        short_length=1024,
        base=(
            BaseRun("copy", (Kind(1, 128, notes=1, words=34, asks=2),), tokens=1_600_000, steps=300),
            BaseRun("look", LOOK, tokens=5_000_000, steps=1200, answers_alone=True, enough=0.3),
            BaseRun(
                "short",
                (
                    Kind(8, 256, notes=4, words=CODE_WORDS, asks=3),
                    Kind(4, 1024, notes=16, words=CODE_WORDS, asks=3),
                ),
                tokens=2_000_000,
                steps=250,
                whole_lines=True,
            ),
        ),
        base_batch=4,
        base_lr=2e-3,
        base_warmup=50,
        long_length=16384,
        long_notes=100,
        long_steps=180,
        long_lr=1e-3,
        long_warmup=4,
        train_documents=180,
        heldout_documents=12,
        distances=(128, 512, 960, 3840, 7680, 15360),
        asks_a_distance=4,
        buckets=(1024, 4096, 16384),
        rope_theta=1e6,
        eval_every=60,
        checkpoint_every=10,
        kill_after=3,
        precision="float32",
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
        base=(
            BaseRun("copy", (Kind(1, 128, notes=1, words=30, asks=2),), tokens=20_000, steps=4),
            BaseRun("look", LOOK, tokens=20_000, steps=4, answers_alone=True),
            BaseRun(
                "short",
                (
                    Kind(2, 128, notes=2, words=CODE_WORDS, asks=2),
                    Kind(1, 256, notes=4, words=CODE_WORDS, asks=1),
                ),
                tokens=40_000,
                steps=8,
                whole_lines=True,
            ),
        ),
        base_batch=2,
        base_lr=1e-3,
        base_warmup=2,
        long_length=1024,
        long_notes=8,
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
BASE = tuple(run.name for run in SHAPES["full"].base)
"""The base model's stages, of all shapes."""
