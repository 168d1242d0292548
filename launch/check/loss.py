"""What of the data carries loss: counted over a sample, with what is suspicious about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..config import RunConfig
from ..data.encode import Encoded
from ..data.packing import Packing
from ..doctor.findings import Finding
from .data import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PADDING_SHARE = 0.2
"""More of it than this is worth a word: it is computed like any other token."""
TAIL_TOKENS = 4
"""Behind an end-of-turn token some templates put a newline or two."""


def loss_mask(runs: np.ndarray, length: int) -> np.ndarray:
    """Whether each token of a document carries loss, bool (length,), from its runs (see data/encode.py)."""
    mask = np.zeros(length, bool)
    for start, stop in runs.tolist():
        mask[start:stop] = True
    return mask


@dataclass(frozen=True)
class Piece:
    """A document, or what of a long one is in one sequence.

    Attributes:
        name: Where the document is found.
        tokens: Ids, (tokens,).
        trained: Whether each carries loss, bool (tokens,). The first never does: nothing comes before it.
        start: Its first token's place in the document.
        is_end: Whether the document's last token is in it.
    """

    name: str
    tokens: np.ndarray
    trained: np.ndarray
    start: int
    is_end: bool


def pieces_of(packing: Packing, sample: Sample) -> list[list[Piece]]:
    """The pieces of each sequence."""
    masks = [loss_mask(document.runs, len(document.tokens)) for document in sample.documents]
    found = []
    for sequence in range(packing.num_sequences):
        first, last = packing.sequence_offsets[sequence : sequence + 2]
        pieces = []
        for index in range(int(first), int(last)):
            document = int(packing.document[index])
            start, stop = int(packing.start[index]), int(packing.stop[index])
            tokens, trained = sample.documents[document].tokens, masks[document][start:stop].copy()
            trained[:1] = False
            pieces.append(
                Piece(sample.names[document], tokens[start:stop], trained, start, stop == len(tokens))
            )
        found.append(pieces)
    return found


def look(
    config: RunConfig,
    sample: Sample,
    packing: Packing,
    sequences: list[list[Piece]],
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[Finding]:
    """All that is suspicious, worst first."""
    yield from unusable(config, sample)
    yield from _labels(sequences)
    yield from _ends(sample, tokenizer)
    yield from _padding_inside(sample, tokenizer)
    yield from _long(config, sample)
    yield from _padding(config, sample, packing)


def unusable(config: RunConfig, sample: Sample) -> Iterator[Finding]:
    """What of the rows cannot be read or encoded."""
    if not sample.problems:
        if not sample.documents:
            yield Finding("error", "data.source holds no document.")
        return
    shown = "".join(f"\n  {problem}" for problem in sample.problems[:5])
    rows = len(sample.problems) + len(sample.documents)
    many = f"{len(sample.problems)} of the first {rows} rows or files cannot be used:{shown}"
    if config.data.on_error == "skip" and sample.documents:
        yield Finding("warning", f"{many}\nThey are left out (data.on_error=skip).")
    else:
        skip = ", or set data.on_error=skip" if sample.documents else ""
        yield Finding("error", f"{many}\nCorrect them{skip}.")


def _labels(sequences: list[list[Piece]]) -> Iterator[Finding]:
    trained = [any(piece.trained.any() for piece in pieces) for pieces in sequences]
    if not any(trained):
        yield Finding("error", "no token carries loss in any of these sequences: nothing would be learned.")
        return
    pieces = [piece for of_one in sequences for piece in of_one]
    without = [piece for piece in pieces if not piece.trained.any()]
    if without:
        yield Finding(
            "warning",
            f"{len(without)} of {len(pieces)} documents or pieces of them carry no loss at all, such as "
            f"{without[0].name} from token {without[0].start:,} on: they are computed for nothing. Where a "
            "long prompt was cut off from its answer, a longer sequence.length keeps them together.",
        )
    if not all(trained):
        count = len(trained) - sum(trained)
        yield Finding("warning", f"{count} of {len(trained)} sequences have no token that carries loss.")


def _ends(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Whether a model learns to stop."""
    eos = tokenizer.eos_token_id
    if eos is None:
        yield Finding(
            "warning",
            "the tokenizer has no end-of-text token (eos_token): the model never learns to stop, and its "
            "documents run into each other.",
        )
        return
    ends = [_trained_end(document, tokenizer) for document in sample.documents]
    seen, learned = 0, 0
    for document in sample.documents:
        is_eos = document.tokens == eos
        seen += int(is_eos.sum())
        learned += int((is_eos & loss_mask(document.runs, len(is_eos))).sum())
    name = f"{tokenizer.eos_token} (token {eos})"
    if seen and not learned:
        yield Finding(
            "warning",
            f"the end token {name} stands in the data and never carries loss: the model will not learn to "
            "stop. Most often labels were masked wherever pad_token is, and pad_token is eos_token: mask by "
            "the attention mask, or leave padding out (sequences are packed without).",
        )
        return
    lost = [sample.names[i] for i, end in enumerate(ends) if end is None]
    if len(lost) > len(ends) / 2:
        yield Finding(
            "warning",
            f"{len(lost)} of {len(ends)} documents end without a special token that carries loss, such as "
            f"{lost[0]}: the model will not learn to stop there. Put the end of the turn within the "
            "{% generation %} marks of the chat template, or the end token at the end of each row.",
        )
        return
    others = {end for end in ends if end is not None and end != eos}
    if others and not learned:
        names = ", ".join(repr(tokenizer.convert_ids_to_tokens(int(end))) for end in sorted(others))
        yield Finding(
            "warning",
            f"turns end in {names}, which is learned, and not in {name}, by which generation stops: set "
            "eos_token_id in the model's generation_config to it.",
        )


def _trained_end(document: Encoded, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that ends what is learned of a document, or None."""
    start, stop = document.runs[-1].tolist()
    special = special_ids(tokenizer)
    for token in document.tokens[max(start, stop - TAIL_TOKENS) : stop][::-1].tolist():
        if token in special:
            return token
    return None


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of tokens that are no text."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _padding_inside(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    pad = tokenizer.pad_token_id
    if pad is None or pad == tokenizer.eos_token_id:
        return
    count = sum(int((document.tokens == pad).sum()) for document in sample.documents)
    total = int(sample.lengths.sum())
    if count > 0.01 * total:
        yield Finding(
            "warning",
            f"{count / total:.0%} of the tokens are {tokenizer.pad_token}: the rows were padded when they "
            "were made. Leave that out; it is computed like text.",
        )


def _long(config: RunConfig, sample: Sample) -> Iterator[Finding]:
    length = config.sequence.length
    long = np.flatnonzero(sample.lengths > length)
    if not len(long):
        return
    longest = int(long[np.argmax(sample.lengths[long])])
    line = (
        f"{len(long)} of {len(sample.documents)} documents are longer than sequence.length={length:,}, the "
        f"longest {int(sample.lengths[longest]):,} tokens ({sample.names[longest]})"
    )
    if config.data.long_documents == "refuse":
        yield Finding("error", f"{line}; data.long_documents=refuse forbids that.")
    else:
        yield Finding("warning", f"{line}: they are split, and a piece does not see what came before it.")


def _padding(config: RunConfig, sample: Sample, packing: Packing) -> Iterator[Finding]:
    # Of a sample that stops early the last sequence is not full, which means nothing.
    if packing.capacity is None or not (sample.is_whole or packing.num_sequences > 4):
        return
    padding = 1 - packing.efficiency
    if padding > PADDING_SHARE:
        yield Finding(
            "warning",
            f"{padding:.0%} of the {packing.num_sequences} sequence(s) is padding, which is computed like "
            f"text: a shorter sequence.length than {config.sequence.length:,} would waste less.",
        )
