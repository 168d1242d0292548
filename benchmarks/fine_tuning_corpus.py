"""The text of `fine_tuning.py`: long documents out of the Python packages that are installed, with notes.

python benchmarks/fine_tuning_corpus.py --work DIR [--shape tiny]

A document is a run of a package's files (source and documentation) in the order of their paths, each below
a heading with its path. Copies of a file count once; whole packages are held out. The same text is cut into
short documents for the base model, of several kinds, and into long ones for its fine-tuning; they fill
sequences to the token. The short ones are written as tokens, which are read at once; the long ones as
conversations, in which the user shows the text and asks, and the assistant answers with the code that was
noted, and every third as text.

All of them have notes that are asked for later in the same document (`fine_tuning_notes.py`). The text of the
probes is that of the held-out documents with other notes. The tokenizer never joins two lines, so that a
document's tokens are those of its lines, and distances are exact.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from fine_tuning_notes import ASK, NOTE, Document, Notes, documents, plant
from fine_tuning_shapes import CODE_WORDS, SHAPES, BaseRun, Kind, Shape
from fine_tuning_text import (
    BOS,
    Lines,
    read_packages,
    save_tokenizer,
    single_tokens,
    split_lines,
    train_tokenizer,
)
from tokenizers import Tokenizer

PART_CHARACTERS = 3_000_000  # of a package that one process cuts at once
MORE = 3  # times the documents that a part's share would be: not all parts may be needed
# One of so many long documents is text: what is trained on answers alone forgets how text goes on.
TEXT_EVERY = 3
IN_PROCESS_CHARACTERS = 30_000_000  # less is not worth starting processes
TAIL_TOKENS_AN_ASK = 40  # of a probe's end, where its notes are asked
Row = dict[str, Any]


class Part(NamedTuple):
    """Files of a package, and what a process needs to make documents of them."""

    name: str
    texts: list[str]
    shape: Shape
    tokenizer_json: str
    documents: dict[str, int]  # of each base run, at most


class Written(NamedTuple):
    """A document as a row of JSON, which goes faster from one process to another than its lines do."""

    line: str
    tokens: int
    distances: list[int]

    @classmethod
    def of(cls, document: Document, base: BaseRun | None = None) -> Written:
        """As a conversation, or as a run of the base model reads it: as tokens."""
        distances = [distance for ask in document.asks for distance in ask.distances]
        row: Row = {"messages": document.messages} if base is None else {"input_ids": document.ids}
        if base is not None and base.answers_alone:
            row["labels"] = document.answers
        return cls(as_line(row), len(document.ids), distances)

    def as_text(self) -> Written:
        """A conversation as the text that it is."""
        messages = json.loads(self.line)["messages"]
        return self._replace(line=as_line({"text": "".join(message["content"] for message in messages)}))


def as_line(row: Row) -> str:
    return json.dumps(row, separators=(",", ":")) + "\n"


class Cut(NamedTuple):
    """The documents of a part."""

    tokens: int
    base: dict[str, list[Written]]
    long: list[Written]


def choose_heldout(
    texts: dict[str, list[str]], tokenizer: Tokenizer, length: int, wanted: int
) -> dict[str, Lines]:
    """Packages, by the hash of their names, that make `wanted` whole documents; large ones are trained on."""
    characters = {name: sum(map(len, some)) for name, some in texts.items()}
    most = max(10 * length, sum(characters.values()) // 25)
    chosen: dict[str, Lines] = {}
    have = 0
    for name in sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if have >= wanted:
            return chosen
        if not 2 * length <= characters[name] <= most:
            continue
        lines = split_lines(tokenizer, texts[name])
        # A document takes no more of the text than its length.
        if whole := sum(map(len, lines.ids)) // length:
            chosen[name] = lines
            have += whole
    if have < wanted:
        raise SystemExit(
            f"the installed packages make {have} held-out documents of {length:,} tokens, {wanted} are "
            "needed; install more packages, or choose another --shape."
        )
    return chosen


def parts_of(
    name: str, texts: Sequence[str], shape: Shape, tokenizer: Tokenizer, characters_in_all: int
) -> Iterator[Part]:
    """A package in parts that take a process some seconds."""
    as_json = tokenizer.to_str()

    def part(some: list[str], number: int, characters: int) -> Part:
        share = MORE * characters / characters_in_all
        most = {run.name: math.ceil(share * run.tokens / run.kinds[0].tokens) for run in shape.base}
        return Part(f"{name}-{number}", some, shape, as_json, most)

    some: list[str] = []
    number = characters = 0
    for text in texts:
        some.append(text)
        characters += len(text)
        if characters > PART_CHARACTERS:
            yield part(some, number, characters)
            number, some, characters = number + 1, [], 0
    yield part(some, number, characters)


def cut(part: Part) -> Cut:
    """Documents of all runs out of a part."""
    tokenizer, shape = Tokenizer.from_str(part.tokenizer_json), part.shape
    lines = split_lines(tokenizer, part.texts)

    def made(name: str, text: Lines, kinds: Sequence[Kind]) -> Iterator[Document]:
        return documents(text, kinds, Notes(tokenizer, shape.words, f"{part.name} {name}"))

    base: dict[str, list[Written]] = {}
    for run in shape.base:
        found = made(run.name, lines if run.whole_lines else single_tokens(lines), run.kinds)
        some = itertools.islice(found, part.documents[run.name])
        base[run.name] = [Written.of(document, run) for document in some]
    long = [Written.of(document) for document in made("long", lines, (shape.long_kind,))]
    return Cut(sum(map(len, lines.ids)), base, long)


def cut_all(parts: Sequence[Part]) -> Iterator[Cut]:
    """Each part, on all cores if there is much to do."""
    if sum(len(text) for part in parts for text in part.texts) < IN_PROCESS_CHARACTERS:
        yield from map(cut, parts)
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of the processes: each has one core
    workers = min(16, len(os.sched_getaffinity(0)), len(parts))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(cut, parts)
    del os.environ["TOKENIZERS_PARALLELISM"]


class Writer:
    """Documents as JSONL, and their number and sizes."""

    def __init__(self, path: Path) -> None:
        self.path, self.draft = path, path.with_name(f".{path.name}.partial")
        self.tokens: list[int] = []
        self.total = 0  # of the tokens
        self.distances: list[int] = []
        self._file = self.draft.open("w")

    def add(self, some: Iterable[Written], most_tokens: float = math.inf) -> None:
        """More of them, until there are so many tokens in all."""
        for document in some:
            if self.total >= most_tokens:
                return
            self._file.write(document.line)
            self.tokens.append(document.tokens)
            self.total += document.tokens
            self.distances += document.distances

    def end(self) -> Row:
        """Put the file in its place; what is in it."""
        self._file.close()
        os.replace(self.draft, self.path)
        return {
            "documents": len(self.tokens),
            "tokens": self.total,
            "shortest_tokens": min(self.tokens),
            "longest_tokens": max(self.tokens),
            "notes": len(self.distances),
            "longest_distance_tokens": max(self.distances),
        }


def by_content(some: Iterable[Written]) -> list[Written]:
    """In the order of their hashes, which mixes the packages."""
    return sorted(some, key=lambda document: hashlib.sha256(document.line.encode()).digest())


def write_training(parts: Sequence[Part], work: Path, shape: Shape) -> Row:
    """The files of the long documents and of each base run: as much as is wanted, of all packages."""
    base = {run.name: Writer(work / f"{run.name}.jsonl") for run in shape.base}
    long, long_text = Writer(work / "long.jsonl"), Writer(work / "long-text.jsonl")
    longs, tokens = [], 0
    for found in cut_all(sorted(parts, key=lambda part: hashlib.sha256(part.name.encode()).digest())):
        for run in shape.base:
            base[run.name].add(found.base[run.name], run.tokens)
        longs += found.long
        tokens += found.tokens
        is_enough = all(base[run.name].total >= run.tokens for run in shape.base)
        if is_enough and len(longs) >= shape.train_documents:
            break
    chosen = by_content(longs)[: shape.train_documents]
    long_text.add(document.as_text() for document in chosen[TEXT_EVERY - 1 :: TEXT_EVERY])
    del chosen[TEXT_EVERY - 1 :: TEXT_EVERY]
    long.add(chosen)
    writers = {**base, "long": long, "long-text": long_text}
    ended = {name: writer.end() for name, writer in writers.items()}
    return {"train_tokens": tokens, **ended}


def write_heldout(shape: Shape, work: Path, tokenizer: Tokenizer, heldout: dict[str, Lines]) -> Row:
    """`heldout.jsonl`, and `probes.jsonl`: documents that ask at their end what they noted before it.

    A row of the probes has the tokens `ids` of the document, `control` without its notes, and `asks`: for
    each the wished and the exact distance, and how many tokens from the end its code begins, `from_end` in
    the document and `control_from_end` in the control, which lacks notes behind it, too.
    """
    whole, rows = [], []
    for name, lines in heldout.items():
        notes = Notes(tokenizer, shape.words, f"{name} held out")
        whole += map(Written.of, documents(lines, (shape.long_kind,), notes))
        notes, start = Notes(tokenizer, shape.words, f"{name} probe"), 0
        while len(rows) < shape.heldout_documents and sum(map(len, lines.ids[start:])) > shape.long_length:
            used, row = probe(shape, tokenizer, lines, start, notes)
            rows.append(row)
            start += used
    writer = Writer(work / "heldout.jsonl")
    writer.add(by_content(whole)[: shape.heldout_documents])
    draft = work / ".probes.jsonl.partial"
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(draft, work / "probes.jsonl")
    probes = {"documents": len(rows), "asks": sum(len(row["asks"]) for row in rows)}
    return {"heldout_packages": list(heldout), "heldout": writer.end(), "probes": probes}


def probe(
    shape: Shape, tokenizer: Tokenizer, lines: Lines, start: int, notes: Notes
) -> tuple[int, dict[str, Any]]:
    """A document of the probe out of the lines from `start` on: how many it took, and its row."""
    wished = [distance for distance in shape.distances for _ in range(shape.asks_a_distance)]
    notes.draw.shuffle(wished)
    first = shape.long_length - 2 * notes.size(ASK, CODE_WORDS) - len(wished) * TAIL_TOKENS_AN_ASK
    # The code stands further back in the line that asks than in the note.
    shift = notes.code_at(ASK) - notes.code_at(NOTE)
    asked_at = [first + place * TAIL_TOKENS_AN_ASK for place in range(len(wished))]
    places = [(at - distance + shift, at) for at, distance in zip(asked_at, wished, strict=True)]
    asks = notes.asks(len(wished), CODE_WORDS)
    document = plant(lines, start, shape.long_length, asks, places, notes)
    noted = {notes.line(NOTE, ask)[0] for ask in asks}
    control = "".join(line for line in document.lines if line not in noted)
    encodings = tokenizer.encode_batch_fast([document.text, control])  # each on a core
    ids, others = ([BOS, *encoding.ids] for encoding in encodings)
    assert ids == document.ids[:-1], "the tokens of a document are not those of its lines"
    found = [
        {
            "name": ask.name,
            "code": ask.code,
            "wished_tokens": distance,
            "distance_tokens": ask.distances[0],
            "from_end": len(ids) - ask.asked_at[0],
            "control_from_end": len(ids)
            - ask.asked_at[0]
            - sum(other.note_at > ask.asked_at[0] for other in asks) * notes.size(NOTE, CODE_WORDS),
        }
        for ask, distance in zip(asks, wished, strict=True)
    ]
    return document.used, {"ids": ids, "control": others, "asks": found}


def build(shape: Shape, work: Path) -> Row:
    """Tokenizer, documents of both stages, held-out documents and probes, as files in `work`; their facts."""
    started = time.perf_counter()
    work.mkdir(parents=True, exist_ok=True)
    texts = read_packages(shape.max_text_mb)
    characters = sum(len(text) for some in texts.values() for text in some)
    say = lambda what: print(f"{what}: {time.perf_counter() - started:.0f} s", flush=True)  # noqa: E731
    say(f"{len(texts)} packages, {characters / 1e6:.0f} MB of text")
    everything = [text for some in texts.values() for text in some]
    tokenizer = train_tokenizer(everything, shape.vocab_size, shape.words)
    save_tokenizer(tokenizer, work / "tokenizer")
    say("tokenizer")
    heldout = choose_heldout(texts, tokenizer, shape.long_length, shape.heldout_documents)
    facts = write_heldout(shape, work, tokenizer, heldout)
    say("held-out documents")
    parts = [
        part
        for name, some in texts.items()
        if name not in heldout
        for part in parts_of(name, some, shape, tokenizer, characters)
    ]
    facts = {
        "packages": len(texts),
        "characters": characters,
        "vocab_size": tokenizer.get_vocab_size(),
        "made_up_words": shape.words,
        **write_training(parts, work, shape),
        **facts,
        "seconds": time.perf_counter() - started,
    }
    say("documents")
    draft = work / ".corpus.json.partial"
    draft.write_text(json.dumps(facts, indent=2))
    os.replace(draft, work / "corpus.json")
    return facts


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--work", type=Path, required=True, help="folder for the files")
    options.add_argument("--shape", choices=tuple(SHAPES), default="full")
    args = options.parse_args(arguments)
    facts = build(SHAPES[args.shape], args.work)
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
