"""The first rows of each source, for a look at the data before all of it is read."""

from __future__ import annotations

import gzip
import itertools
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import DataConfig
from ..data.arrow_rows import ArrowRows
from ..data.encode import Encoded, Encoder
from ..data.rows import Document, JsonLines, Kind, Problem, Rows
from ..data.sources import LINE_SUFFIXES, Source, find_sources, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 256
"""Of each source, at most."""
LEAST_TOKENS = 65536
"""Of each source, where there are as many: a sequence may be short."""
MAX_PROBLEMS = 20


@dataclass
class Sample:
    """Documents that were read, and what was wrong with others.

    Attributes:
        documents: As tokens.
        names: Where each is found.
        kinds: What each is.
        problems: Rows and files that cannot be used.
        is_whole: Whether there are no others.
    """

    documents: list[Encoded] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    is_whole: bool = True

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 (documents,)."""
        return np.array([len(document.tokens) for document in self.documents], np.int64)


def read_sample(data: DataConfig, tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> Sample:
    """The first documents of each source: as many as fill a sequence, `ROWS` at most.

    Args:
        data: Its sources.
        tokenizer: Of the run.
        num_tokens: Of a sequence.

    Raises:
        ValueError: A source is not there or cannot be read at all.
    """
    sample, encoder = Sample(), Encoder(tokenizer)
    enough = max(num_tokens, LEAST_TOKENS)
    for source in find_sources(data.source, data.split):
        limit = min(ROWS, data.max_documents or ROWS)
        taken, count = 0, 0
        with tempfile.TemporaryDirectory(prefix="longseq-check-") as scratch:
            # One row more than is used: whether there is more.
            for read in itertools.islice(_first_rows(source, limit + 1, Path(scratch)), limit + 1):
                if count >= limit or taken >= enough or len(sample.problems) >= MAX_PROBLEMS:
                    sample.is_whole = sample.is_whole and count == data.max_documents
                    break
                count += 1
                taken += _take(read, encoder, sample)
    return sample


def _take(read: Document | Problem, encoder: Encoder, sample: Sample) -> int:
    """Encode a row into the sample; its tokens."""
    outcome = encoder.encode(read) if isinstance(read, Document) else read
    if isinstance(outcome, Problem):
        sample.problems.append(outcome)
        return 0
    sample.documents.append(outcome)
    sample.names.append(read.where)
    sample.kinds.append(read.kind)
    return len(outcome.tokens)


def _first_rows(source: Source, count: int, scratch: Path) -> Iterator[Document | Problem]:
    if source.form in ("hub", "folder"):
        yield from _read(_streamed(source, count), count)
        return
    if source.form != "files":
        opened = open_source(source, count, scratch)
        yield from opened.problems
        for rows in opened.rows:
            yield from _read(rows, count)
        return
    for path in source.paths:
        yield from _of_file(source, path, count, scratch)


def _of_file(source: Source, path: Path, count: int, scratch: Path) -> Iterator[Document | Problem]:
    """The first rows of one file, of which no more is read than these."""
    name = path.name.lower()
    try:
        if name.endswith(LINE_SUFFIXES):
            rows: Rows = JsonLines(_head(path, count, scratch), str(path), count)
        elif name.endswith(".parquet"):
            rows = _head_of_parquet(path, count)
        else:
            one = Source(source.spec, "files", (path,), source.split)
            [rows] = open_source(one, count, scratch).rows
    except ValueError as error:
        yield Problem(str(path), "no usable columns", str(error))
        return
    except (OSError, EOFError, zlib.error) as error:
        yield Problem(str(path), "unreadable file", str(error))
        return
    yield from _read(rows, count)


def _read(rows: Rows, count: int) -> Iterator[Document | Problem]:
    for number in range(min(count, len(rows.sizes))):
        for _, read in rows.reader.read(rows.part(number, number + 1)):
            yield read


def _head(path: Path, count: int, scratch: Path) -> Path:
    """A file of the first lines; blank ones are no rows, so that a few more are taken."""
    head = scratch / f"{len(list(scratch.iterdir()))}.jsonl"
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file, head.open("wb") as out:
        rows = 0
        for line in file:
            out.write(line)
            rows += bool(line.strip())
            if rows >= count:
                break
    return head


def _head_of_parquet(path: Path, count: int) -> Rows:
    import datasets
    import pyarrow
    from pyarrow import parquet

    try:
        batches, rows = [], 0
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=count):
            batches.append(batch)
            rows += len(batch)
            if rows >= count:
                break
        schema = parquet.read_schema(path)
    except pyarrow.ArrowException as error:
        raise OSError(f"not a Parquet file that can be read: {error}") from error
    table = pyarrow.Table.from_batches(batches, schema=schema)
    return ArrowRows(datasets.Dataset(table), str(path), count)


def _streamed(source: Source, count: int) -> Rows:
    """The first rows of a Hugging Face dataset, without downloading the others."""
    import datasets

    name, _, config = source.spec.partition(":") if source.form == "hub" else (source.spec, "", "")
    if source.form == "folder":
        name = str(Path(name).expanduser())
    try:
        stream = datasets.load_dataset(name, config or None, split=source.split, streaming=True)
        rows: list[dict[str, Any]] = list(stream.take(count))
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"data.source={source.spec!r} cannot be loaded by `datasets`: {error} Check the name, data.split "
            "and your connection."
        ) from error
    return ArrowRows(datasets.Dataset.from_list(rows), f"{source.spec}[{source.split}]", count)
