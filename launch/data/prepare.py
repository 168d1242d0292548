"""`data` to tokens on disk: found again when nothing changed, built when something did."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..config import DataConfig
from .cache import build_once, cache_root
from .encode import Encoder
from .holdout import held_out
from .lengths import describe_lengths, plot_lengths
from .rows import Problem
from .sources import OpenedSource, Source, find_sources, open_source
from .token_store import FORMAT, StoreWriter, TokenStore
from .tokenise import tokenise
from .tokenizer import load_tokenizer, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MAX_PROBLEMS = 20
# One slip in a week's worth of text should not take the week to be told.
_SEARCH_ON_S = 60.0


@dataclass(frozen=True)
class PrepareReport:
    """What a source became.

    Attributes:
        folder: Where its tokens are.
        reused: Whether they had been there before.
        num_documents: Documents with tokens.
        num_tokens: Their tokens, bos and eos included.
        num_loss_tokens: Those of them that carry loss.
        skipped: Rows and files that were left out, counted by reason.
        examples: Some of these, with file and row.
        histogram: A table of document lengths.
    """

    folder: Path
    reused: bool
    num_documents: int
    num_tokens: int
    num_loss_tokens: int
    skipped: dict[str, int]
    examples: list[str]
    histogram: str

    def text(self) -> str:
        """The report as a person reads it."""
        lines = [
            self.histogram,
            f"{self.num_loss_tokens / self.num_tokens:.1%} of the tokens carry loss; "
            f"{'reused' if self.reused else 'built'} {self.folder}",
        ]
        if self.skipped:
            counts = ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.items())
            lines.append(f"skipped: {counts}; for example")
            lines += [f"  {example}" for example in self.examples[:3]]
        return "\n".join(lines)


@dataclass(frozen=True)
class PreparedData:
    """Tokens for training and evaluation.

    Attributes:
        train: Documents to train on.
        heldout: Documents to evaluate on; None if there are none.
        report: On `data.source`, held-out documents included.
        eval_report: On `data.eval_source`, if there is one.
    """

    train: TokenStore
    heldout: TokenStore | None
    report: PrepareReport
    eval_report: PrepareReport | None = None


def prepare(
    data: DataConfig, tokenizer: str | PreTrainedTokenizerBase, *, progress: bool = False
) -> PreparedData:
    """Tokenises `data`, unless that has been done.

    Any number of processes may call it at once; one of them works, the others wait for it.

    Args:
        data: What to read.
        tokenizer: A tokenizer or its name (`bytes`, or a Hugging Face name or folder).
        progress: Show progress and the report on standard error.

    Raises:
        ValueError: A source is not there, or (with `on_error: raise`) rows of it cannot be used, or none
            can; names up to `MAX_PROBLEMS` of them.
    """
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer)
    if data.eval_source is not None:
        _found("data.eval_source", data.eval_source, data.split)  # before hours of data.source
    store, report = _prepare_store("data.source", data.source, data, tokenizer, progress)
    if data.eval_source is not None:
        heldout, eval_report = _prepare_store("data.eval_source", data.eval_source, data, tokenizer, progress)
        return PreparedData(store, heldout, report, eval_report)
    chosen = held_out(store.digests, data.eval_fraction)
    heldout = store.select(np.flatnonzero(chosen)) if chosen.any() else None
    return PreparedData(store.select(np.flatnonzero(~chosen)), heldout, report)


def _found(key: str, specs: str | Sequence[str], split: str) -> list[Source]:
    try:
        return find_sources(specs, split)
    except ValueError as error:
        raise ValueError(str(error).replace("data.source=", f"{key}=")) from error


def _prepare_store(
    key: str,
    specs: str | Sequence[str],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    progress: bool,
) -> tuple[TokenStore, PrepareReport]:
    sources = _found(key, specs, data.split)
    fingerprints = [source.fingerprint() for source in sources]
    settings = {
        "format": FORMAT,
        "sources": fingerprints,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "max_documents": data.max_documents,
        "on_error": data.on_error,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    folder = cache_root(data.cache_dir) / "tokens" / digest[:24]
    builder = _Builder(key, sources, fingerprints, data, tokenizer, progress)
    damage = _damage(folder)
    if damage is not None:
        logger.warning("%s It is made anew from %s.", damage, key)
    try:
        built = build_once(folder, lambda path: path.exists() and _damage(path) is None, builder.build)
    except (ValueError, RuntimeError) as error:
        if damage is None:
            raise
        raise ValueError(f"{damage} It could not be made anew: {error}") from error
    except OSError as error:
        raise ValueError(
            f"{key} cannot be tokenised into {folder.parent}: {error}. If there is no room or no right to "
            "write, name another place with data.cache_dir or $LONGSEQ_CACHE."
        ) from error
    store = TokenStore.open(folder)
    report = _report(store, reused=not built)
    if progress:
        print(f"{key}: {', '.join(source.spec for source in sources)}", file=sys.stderr)
        print(report.text(), file=sys.stderr, flush=True)
    return store, report


def _damage(folder: Path) -> str | None:
    """What is wrong with the tokens in a folder, if they are there."""
    if not folder.exists():
        return None
    try:
        TokenStore.open(folder)
    except ValueError as error:
        return str(error)
    return None


def _report(store: TokenStore, *, reused: bool) -> PrepareReport:
    return PrepareReport(
        folder=store.path,
        reused=reused,
        num_documents=len(store),
        num_tokens=int(store.lengths.sum()),
        num_loss_tokens=int(store.loss_lengths.sum()),
        skipped=store.meta["skipped"],
        examples=store.meta["examples"],
        histogram=describe_lengths(store.lengths),
    )


@dataclass
class _Builder:
    """Fills a folder with the tokens of some sources."""

    key: str
    sources: list[Source]
    fingerprints: list[str]
    data: DataConfig
    tokenizer: PreTrainedTokenizerBase
    progress: bool
    problems: _Problems = field(init=False)

    def build(self, folder: Path) -> None:
        self.problems = _Problems(self.key, self.data.on_error == "skip")
        scratch = folder / "scratch"
        scratch.mkdir()
        started = time.monotonic()
        opened = [open_source(source, self.data.max_documents, scratch) for source in self.sources]
        self._write(folder, opened, started)
        shutil.rmtree(scratch)
        if self.fingerprints != [source.fingerprint() for source in self.sources]:
            raise ValueError(f"{self.key} changed while it was read; start again once it is complete.")
        store = TokenStore.open(folder)
        plot_lengths(store.lengths, folder / "lengths.png")

    def _write(self, folder: Path, opened: list[OpenedSource], started: float) -> None:
        for one in opened:
            self.problems.add(one.problems)
        rows = [rows for one in opened for rows in one.rows]
        writer = StoreWriter(folder, Encoder(self.tokenizer).dtype)
        results = tokenise(rows, self.tokenizer, num_workers=self.data.num_workers, progress=self.progress)
        num_documents = 0
        for result in results:
            self.problems.add(result.problems)
            writer.add(result.task.source, result.batch)
            num_documents += len(result.batch.rows)
        self.problems.finish()
        if not num_documents:
            raise ValueError(
                f"{self.key} holds no document that can be used; name another source."
                f"{self.problems.listing()}"
            )
        writer.finish(
            {
                "sources": [{"style": one.style, "names": one.names} for one in rows],
                "skipped": dict(self.problems.counts.most_common()),
                "examples": self.problems.examples,
                "seconds": round(time.monotonic() - started, 3),
            }
        )


class _Problems:
    """Counts what cannot be used, and raises once enough of it is known if it must not be skipped."""

    def __init__(self, key: str, skip: bool) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: list[str] = []
        self._key, self._skip = key, skip
        self._first_at: float | None = None

    def add(self, problems: Iterable[Problem]) -> None:
        for problem in problems:
            self.counts[problem.reason] += 1
            if len(self.examples) < MAX_PROBLEMS:
                self.examples.append(str(problem))
            if self._first_at is None:
                self._first_at = time.monotonic()
        late = self._first_at is not None and time.monotonic() - self._first_at > _SEARCH_ON_S
        if late or len(self.examples) >= MAX_PROBLEMS:
            self._raise("there may be more; the rest was not read")

    def finish(self) -> None:
        """Raises what was found, everything having been read."""
        if self.counts:
            self._raise("all rows were read")

    def listing(self) -> str:
        """The examples, a line each."""
        return "".join(f"\n  {example}" for example in self.examples)

    def _raise(self, extent: str) -> None:
        if self._skip:
            return
        total = self.counts.total()
        raise ValueError(
            f"{self._key}: {total:,} {'row or file' if total == 1 else 'rows or files'} cannot be used "
            f"({extent}):"
            f"{self.listing()}\nCorrect them, or set data.on_error=skip: they are then left out and counted."
        )
