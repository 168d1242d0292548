"""Notes that are planted in the documents of `fine_tuning.py`, and asked for later in them.

A note is the line `# note:<name><word><word>...`, and `# asked:<name><word><word>...` behind it asks and
answers it. Names and words are made-up words of one token each, drawn anew for each document and different
from each other within it: nothing but looking back tells a code, and the token before says where to look.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fine_tuning_shapes import Kind
from fine_tuning_text import BOS, EOS, Lines, made_up_words
from tokenizers import Tokenizer

NOTE = "# note:"
ASK = "# asked:"


@dataclass
class Ask:
    """A note of a document and where it is asked; positions are of the code's first word, bos being 0."""

    name: str
    code: list[str]
    note_at: int = -1
    asked_at: list[int] = field(default_factory=list)

    @property
    def answer(self) -> str:
        """The code as it is written."""
        return "".join(self.code)

    def line(self, head: str) -> str:
        """The note, or its question and answer."""
        return f"{head}{self.name}{self.answer}\n"

    @property
    def distances(self) -> list[int]:
        """Tokens from the code of the note to that of each answer."""
        return [at - self.note_at for at in self.asked_at]


@dataclass
class Document:
    """Text with what is planted in it; `used` lines of the package went into it."""

    lines: list[str]
    ids: list[int]  # with bos and eos
    asks: list[Ask] = field(default_factory=list)
    used: int = 0

    @property
    def text(self) -> str:
        return "".join(self.lines)

    @property
    def messages(self) -> list[dict[str, str]]:
        """As a conversation: the codes that answer are the assistant's, all else is the user's."""
        codes = {ask.line(ASK): ask.answer for ask in self.asks}
        turns: list[dict[str, str]] = []
        said: list[str] = []
        for line in self.lines:
            if (code := codes.get(line)) is None:
                said.append(line)
                continue
            question = "".join([*said, line.removesuffix(f"{code}\n")])
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": code}]
            said = ["\n"]
        return [*turns, {"role": "user", "content": "".join(said)}]

    @property
    def answers(self) -> list[int]:
        """The tokens of the codes that answer, -100 elsewhere."""
        labels = [-100] * len(self.ids)
        for ask in self.asks:
            for begin in ask.asked_at:
                end = begin + len(ask.code)
                labels[begin:end] = self.ids[begin:end]
        return labels


class Notes:
    """Draws notes, and writes their lines."""

    def __init__(self, tokenizer: Tokenizer, words: int, seed: str) -> None:
        self.draw = random.Random(seed)
        self.ids = {word: tokenizer.token_to_id(word) for word in made_up_words(words)}
        self.words = list(self.ids)
        self.heads = {head: tokenizer.encode(head).ids for head in (NOTE, ASK)}
        (self.newline,) = tokenizer.encode("\n").ids

    def asks(self, notes: int, words: int) -> list[Ask]:
        """So many notes, no word of which is in another."""
        drawn = self.draw.sample(self.words, notes * (words + 1))
        return [Ask(name, [drawn.pop() for _ in range(words)]) for name in drawn[:notes]]

    def line(self, head: str, ask: Ask) -> tuple[str, list[int]]:
        """A note's line or that of its question: text and tokens."""
        ids = [*self.heads[head], self.ids[ask.name], *map(self.ids.__getitem__, ask.code), self.newline]
        return ask.line(head), ids

    def size(self, head: str, words: int) -> int:
        """Tokens of a line."""
        return self.code_at(head) + words + 1

    def code_at(self, head: str) -> int:
        """Tokens of a line before the code."""
        return len(self.heads[head]) + 1

    def places(self, kind: Kind) -> list[list[int]]:
        """Where each note and its questions are wished."""
        return self.places_of_one(kind) if kind.notes == 1 else self.places_of_some(kind)

    def places_of_one(self, kind: Kind) -> list[list[int]]:
        """Gaps of every size between them: a note that fills most of a document cannot be at any distance."""
        note, ask = self.size(NOTE, kind.words), self.size(ASK, kind.words)
        room = kind.tokens - 2 - note - kind.asks * ask
        cuts = sorted(self.draw.randint(0, room) for _ in range(1 + kind.asks))
        return [[1 + cut + (number and note + (number - 1) * ask) for number, cut in enumerate(cuts)]]

    def places_of_some(self, kind: Kind) -> list[list[int]]:
        """At distances of every size."""
        note, ask = self.size(NOTE, kind.words), self.size(ASK, kind.words)
        farthest = kind.tokens - note - kind.asks * ask
        found = []
        for _ in range(kind.notes):
            distances = sorted(self.distance(note, farthest, kind.far) for _ in range(kind.asks))
            note_at = self.draw.uniform(0, max(1, kind.tokens - distances[-1] - ask))
            found.append([round(note_at + distance) for distance in (0, *distances)])
        return found

    def distance(self, nearest: int, farthest: int, far: bool) -> float:
        """One between them; see `Kind.far`."""
        if far and self.draw.random() < 0.5:
            return self.draw.uniform(math.sqrt(nearest), math.sqrt(farthest)) ** 2
        return math.exp(self.draw.uniform(math.log(nearest), math.log(farthest)))


def plant(
    lines: Lines,
    start: int,
    tokens: int,
    asks: Sequence[Ask],
    places: Sequence[Sequence[int]],
    notes: Notes,
) -> Document:
    """A document of `tokens`, out of the lines from `start` on, with notes near the wished places.

    A planted line comes before the first line that would end behind its place. The document is filled up with
    empty lines, of a token each, where the next line has no room; where there is none it is shorter.
    """
    events: list[tuple[int, int, Ask]] = []  # place, 0 for a note and 1 for its question
    for ask, (note_at, *asked_at) in zip(asks, places, strict=True):
        events += [(note_at, 0, ask), *((at, 1, ask) for at in asked_at)]
    events.sort(key=lambda event: event[:2], reverse=True)
    heads = (NOTE, ASK)
    owed = sum(notes.size(heads[kind], len(ask.code)) for _, kind, ask in events)
    found = Document([], [BOS], list(asks))
    end = tokens - 1  # eos
    line = start
    while True:
        is_last = line == len(lines.ids) or len(found.ids) + len(lines.ids[line]) + owed > end
        while events and (is_last or events[-1][0] < len(found.ids) + len(lines.ids[line])):
            _, kind, ask = events.pop()
            code_at = len(found.ids) + notes.code_at(heads[kind])
            if kind:
                ask.asked_at.append(code_at)
            else:
                ask.note_at = code_at
            text, ids = notes.line(heads[kind], ask)
            found.lines.append(text)
            found.ids += ids
            owed -= len(ids)
        if is_last:
            break
        found.lines.append(lines.texts[line])
        found.ids += lines.ids[line]
        line += 1
    if line < len(lines.ids):
        found.lines.append("\n" * (end - len(found.ids)))
        found.ids += [notes.newline] * (end - len(found.ids))
    found.ids.append(EOS)
    found.used = line - start
    return found


def documents(lines: Lines, kinds: Sequence[Kind], notes: Notes) -> Iterator[Document]:
    """The whole package in documents of these kinds in turn; what is too short for one is left out."""
    line, left = 0, sum(map(len, lines.ids))
    for kind in itertools.cycle([one for one in kinds for _ in range(one.documents)]):
        if left < kind.tokens:
            return
        asks = notes.asks(kind.notes, kind.words)
        document = plant(lines, line, kind.tokens, asks, notes.places(kind), notes)
        # A line that has no room even in an empty document is left out.
        taken = document.used or 1
        left -= sum(map(len, lines.ids[line : line + taken]))
        line += taken
        if document.used:
            yield document
