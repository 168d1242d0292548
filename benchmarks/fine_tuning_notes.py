"""Notes that are planted in the documents of `fine_tuning.py`, and asked for later in them.

A note is the line `# note: code of NAME=49302817`; one line behind it, `# asked: code of NAME=49302817`, asks
and answers it. Names are words of one token, codes are random digits: nothing but looking back tells a code.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fine_tuning_text import Lines
from tokenizers import Tokenizer

NOTE = "# note: code of{name}={code}\n"
ASK = "# asked: code of{name}={code}\n"
CODE_DIGITS = 8
HELDOUT_NAMES = 4  # one word in so many


@dataclass
class Ask:
    """A note of a document and where it is asked; positions are of the code's first digit, bos being 0."""

    name: str
    code: str
    note_at: int = -1
    ask_at: int = -1

    @property
    def distance(self) -> int:
        """Tokens from the code of the note to that of the answer."""
        return self.ask_at - self.note_at


@dataclass
class Document:
    """Text with what is planted in it; `used` lines of the package went into it."""

    lines: list[str]
    tokens: int  # with bos and eos
    asks: list[Ask] = field(default_factory=list)
    used: int = 0

    @property
    def text(self) -> str:
        return "".join(self.lines)


class Notes:
    """Draws notes, and says how long their lines are."""

    def __init__(self, tokenizer: Tokenizer, names: Sequence[str], seed: str) -> None:
        self.names, self.draw = names, random.Random(seed)
        self.note_tokens, self.note_code = self._size(tokenizer, NOTE, names[0])
        self.ask_tokens, self.ask_code = self._size(tokenizer, ASK, names[0])

    @staticmethod
    def _size(tokenizer: Tokenizer, kind: str, name: str) -> tuple[int, int]:
        tokens = tokenizer.encode(kind.format(name=name, code="0" * CODE_DIGITS)).tokens
        return len(tokens), tokens.index("0")

    def asks(self, count: int) -> list[Ask]:
        """So many notes with different names."""
        names = self.draw.sample(self.names, count)
        return [Ask(name, f"{self.draw.randrange(10**CODE_DIGITS):0{CODE_DIGITS}}") for name in names]

    def places(self, count: int, tokens: int) -> list[tuple[int, int]]:
        """Where notes and their questions are wished: distances of every size, none more than another."""
        found = []
        for _ in range(count):
            nearest = self.note_tokens + self.ask_tokens
            distance = round(math.exp(self.draw.uniform(math.log(nearest), math.log(tokens - nearest))))
            note_at = self.draw.randrange(max(1, tokens - distance - self.ask_tokens))
            found.append((note_at, note_at + distance))
        return found


def find_names(tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """Words of one token, with the space before them: names to train on, and others to be tested on."""
    words = sorted(
        token.replace("Ġ", " ") for token in tokenizer.get_vocab() if re.fullmatch("Ġ[a-z]{4,10}", token)
    )
    # A token of the vocabulary that its own spelling is not cut into would be two.
    words = [word for word in words if len(tokenizer.encode(word).ids) == 1]
    heldout = [hashlib.sha256(word.encode()).digest()[0] % HELDOUT_NAMES == 0 for word in words]
    return (
        [word for word, out in zip(words, heldout, strict=True) if not out],
        [word for word, out in zip(words, heldout, strict=True) if out],
    )


def plant(
    lines: Lines,
    start: int,
    tokens: int,
    asks: Sequence[Ask],
    places: Sequence[tuple[int, int]],
    notes: Notes,
) -> Document:
    """A document of `tokens`, out of the lines from `start` on, with notes near the wished places.

    A planted line comes before the first line that would end behind its place. The document is filled up with
    empty lines, of a token each, where the next line has no room; where there is none it is shorter.
    """
    events: list[tuple[int, int, Ask]] = []  # place, 0 for a note and 1 for its question
    for ask, (note_at, ask_at) in zip(asks, places, strict=True):
        events += [(note_at, 0, ask), (ask_at, 1, ask)]
    events.sort(key=lambda event: event[:2], reverse=True)
    sizes = (notes.note_tokens, notes.ask_tokens)
    owed = sum(sizes[kind] for _, kind, _ in events)
    found = Document([], 1, list(asks))
    end = tokens - 1  # eos
    line = start
    while True:
        is_last = line == len(lines.tokens) or found.tokens + lines.tokens[line] + owed > end
        while events and (is_last or events[-1][0] < found.tokens + lines.tokens[line]):
            _, kind, ask = events.pop()
            found.lines.append((ASK if kind else NOTE).format(name=ask.name, code=ask.code))
            if kind:
                ask.ask_at = found.tokens + notes.ask_code
            else:
                ask.note_at = found.tokens + notes.note_code
            found.tokens += sizes[kind]
            owed -= sizes[kind]
        if is_last:
            break
        found.lines.append(lines.texts[line])
        found.tokens += lines.tokens[line]
        line += 1
    if line < len(lines.tokens):
        found.lines.append("\n" * (end - found.tokens))
        found.tokens = end
    found.tokens += 1
    found.used = line - start
    return found


def documents(lines: Lines, lengths: Sequence[int], tokens_a_note: int, notes: Notes) -> Iterator[Document]:
    """The whole package in documents of these lengths in turn; what is too short for one is left out."""
    line, left = 0, sum(lines.tokens)
    for length in itertools.cycle(lengths):
        if left < length:
            return
        count = length // tokens_a_note
        document = plant(lines, line, length, notes.asks(count), notes.places(count, length), notes)
        # A line that has no room even in an empty document is left out.
        taken = document.used or 1
        left -= sum(lines.tokens[line : line + taken])
        line += taken
        if document.used:
            yield document
