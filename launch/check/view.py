"""A sequence as a person reads it: its text, with what carries loss and where documents begin."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from .loss import Piece, special_ids

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

DOCUMENTS = 4
"""Of a sequence that are shown."""
HEAD_TOKENS, EDGE_TOKENS, TAIL_TOKENS = 48, 12, 24
"""Of a document: at its beginning, on both sides of a place where loss begins or ends, and at its end."""
MAX_EDGES = 8
OPEN, CLOSE = "⟦", "⟧"
"""Around what carries loss, where there are no colours."""
LEARNED, GIVEN, SPECIAL = "green", "dim", "bold magenta"


def draw_sequence(
    pieces: list[Piece], padding: int, tokenizer: PreTrainedTokenizerBase, *, coloured: bool
) -> Iterator[Text]:
    """The beginning of a sequence, a block for each document.

    Args:
        pieces: Its documents.
        padding: Tokens behind them.
        tokenizer: Of the run.
        coloured: Whether what carries loss is green, or stands in brackets.
    """
    from rich.text import Text

    for index, piece in enumerate(pieces[:DOCUMENTS]):
        share = piece.trained.mean()
        of_a_piece = "" if piece.start == 0 and piece.is_end else f" (from token {piece.start:,} of it on)"
        yield Text(
            f"── document {index + 1} of {len(pieces)}: {piece.name}{of_a_piece}, {len(piece.tokens):,} "
            f"tokens, {share:.0%} carry loss",
            style="bold",
        )
        yield _draw_piece(piece, tokenizer, coloured=coloured)
    hidden = len(pieces) - DOCUMENTS
    if hidden > 0:
        yield Text(f"── {hidden} more documents", style="bold")
    if padding:
        yield Text(f"── {padding:,} tokens of padding, without loss", style="bold")


def _draw_piece(piece: Piece, tokenizer: PreTrainedTokenizerBase, *, coloured: bool) -> Text:
    from rich.text import Text

    special = special_ids(tokenizer)
    is_special = np.isin(piece.tokens, list(special))
    drawn = Text()
    is_open, end = False, 0
    for start, stop in _windows(piece.trained):
        if start > end:
            is_open = _mark(drawn, is_open, False, coloured)
            drawn.append(f" […{start - end:,} tokens…] ", style="italic")
        for first, last in _stretches(piece.trained, is_special, start, stop):
            trained = bool(piece.trained[first])
            is_open = _mark(drawn, is_open, trained, coloured)
            text = tokenizer.decode(
                piece.tokens[first:last].tolist(),
                skip_special_tokens=False,
                clean_up_tokenization_spaces=False,
            )
            style = LEARNED if trained else GIVEN
            if is_special[first]:
                style = f"{style} {SPECIAL}" if not trained else f"bold reverse {LEARNED}"
            drawn.append(printable(text), style=style if coloured else "")
        end = stop
    _mark(drawn, is_open, False, coloured)
    return drawn


def _mark(drawn: Text, is_open: bool, trained: bool, coloured: bool) -> bool:
    """Open or close a bracket where loss begins or ends; whether one is open now."""
    if trained != is_open and not coloured:
        drawn.append(OPEN if trained else CLOSE)
    return trained


def _stretches(trained: np.ndarray, special: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Neighbouring tokens that are drawn alike."""
    change = (trained[start + 1 : stop] != trained[start : stop - 1]) | (
        special[start + 1 : stop] != special[start : stop - 1]
    )
    bounds = [start, *(np.flatnonzero(change) + start + 1).tolist(), stop]
    yield from pairwise(bounds)


def _windows(trained: np.ndarray) -> list[tuple[int, int]]:
    """Which tokens of a document are shown: its ends, and where loss begins or ends; in order, apart."""
    length = len(trained)
    edges = (np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist()
    wanted = [(0, HEAD_TOKENS), *((at - EDGE_TOKENS, at + EDGE_TOKENS) for at in edges[:MAX_EDGES])]
    wanted += [(length - TAIL_TOKENS, length)]
    windows: list[tuple[int, int]] = []
    for start, stop in sorted((max(0, start), min(stop, length)) for start, stop in wanted):
        # A gap that is not longer than what would be said in its place is shown.
        if windows and start <= windows[-1][1] + EDGE_TOKENS:
            windows[-1] = windows[-1][0], max(windows[-1][1], stop)
        else:
            windows.append((start, stop))
    return windows


def printable(text: str) -> str:
    """Text without control characters, by which data could command the terminal."""
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf")
        else f"\\x{ord(character):02x}"
        for character in text
    )
