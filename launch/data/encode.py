"""Documents to tokens, and which of them carry loss."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from .chat import ChatError, ChatRenderer, Span
from .rows import Document, Problem
from .tokenizer import vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100


@dataclass(frozen=True, slots=True)
class Encoded:
    """A document as tokens.

    Attributes:
        tokens: Token ids, (tokens,).
        runs: Stretches [start, stop) that carry loss, in order and apart, int64 (runs, 2).
        digest: 64 bits of a hash of the tokens: equal documents have equal digests.
    """

    tokens: np.ndarray
    runs: np.ndarray
    digest: int


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """Documents of one source, end to end.

    Attributes:
        rows: Each document's row number, int64 (documents,).
        lengths: Tokens of each, int64 (documents,).
        digests: Hash of each, uint64 (documents,).
        tokens: All their tokens, (sum of lengths,).
        runs: All their runs, counted from each document's start, int64 (sum of num_runs, 2).
        num_runs: Runs of each, int64 (documents,).
    """

    rows: np.ndarray
    lengths: np.ndarray
    digests: np.ndarray
    tokens: np.ndarray
    runs: np.ndarray
    num_runs: np.ndarray

    @classmethod
    def join(cls, rows: list[int], documents: list[Encoded], dtype: np.dtype) -> EncodedBatch:
        """Lays documents end to end."""
        return cls(
            rows=np.array(rows, np.int64),
            lengths=np.array([len(document.tokens) for document in documents], np.int64),
            digests=np.array([document.digest for document in documents], np.uint64),
            tokens=np.concatenate([np.empty(0, dtype), *(document.tokens for document in documents)]),
            runs=np.concatenate([np.empty((0, 2), np.int64), *(document.runs for document in documents)]),
            num_runs=np.array([len(document.runs) for document in documents], np.int64),
        )


class Encoder:
    """Turns documents into tokens with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocabulary_size(tokenizer)
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._chat: ChatRenderer | None = None
        self.dtype = np.dtype(np.uint16 if self._vocab_size <= 1 << 16 else np.uint32)

    def encode(self, document: Document) -> Encoded | Problem:
        """The document's tokens, or what is wrong with it.

        Raises:
            ValueError: The tokenizer cannot serve the document's kind at all.
        """
        try:
            return self._finish(*getattr(self, f"_encode_{document.kind}")(document.row))
        except _UnusableRow as error:
            return Problem(document.where, error.reason, error.detail)

    def _finish(self, ids: np.ndarray, mask: np.ndarray) -> Encoded:
        if not mask.any():
            raise _UnusableRow("no token carries loss", "nothing in it is to be learned")
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            at = int(np.flatnonzero((ids < 0) | (ids >= self._vocab_size))[0])
            raise _UnusableRow(
                "token id outside the vocabulary",
                f"token {at} is {int(ids[at])}, the tokenizer has ids 0 to {self._vocab_size - 1}; was it "
                "made with another tokenizer?",
            )
        tokens = ids.astype(self.dtype)
        digest = blake2b(tokens.tobytes(), digest_size=8).digest()
        return Encoded(tokens, _runs(mask), int.from_bytes(digest, "little"))

    def _encode_text(self, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        text = _string(row, "text")
        if not text.strip():
            raise _UnusableRow("empty document", "`text` is empty")
        ids, _ = self._with_ends(self._ids(text))
        return ids, np.ones(len(ids), bool)

    def _encode_completion(self, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        prompt, completion = _string(row, "prompt"), _string(row, "completion")
        if not completion.strip():
            raise _UnusableRow("empty document", "`completion` is empty")
        # Together, because two halves tokenised apart are not what a tokenizer makes of the whole.
        ids, mask = self._ids_in_spans(prompt + completion, [(len(prompt), len(prompt) + len(completion))])
        ids, lead = self._with_ends(ids)
        whole = np.ones(len(ids), bool)  # the eos at the end is learned too
        whole[:lead] = False
        whole[lead : lead + len(mask)] = mask
        return ids, whole

    def _encode_messages(self, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        messages, tools = row["messages"], row.get("tools")
        _check_messages(messages)
        if self._chat is None:
            self._chat = ChatRenderer(self._tokenizer)
        try:
            text, spans = self._chat.render(messages, tools)
        except ChatError as error:
            raise _UnusableRow("chat template", str(error)) from error
        return self._ids_in_spans(text, spans)

    def _encode_ids(self, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        ids = _integers(row, "input_ids")
        if not len(ids):
            raise _UnusableRow("empty document", "`input_ids` is empty")
        if "labels" not in row:
            return ids, np.ones(len(ids), bool)
        labels = _integers(row, "labels")
        if len(labels) != len(ids):
            raise _UnusableRow("wrong labels", f"{len(labels)} labels for {len(ids)} input_ids")
        mask = labels != IGNORED_LABEL
        wrong = np.flatnonzero(mask & (labels != ids))
        if len(wrong):
            at = int(wrong[0])
            raise _UnusableRow(
                "wrong labels",
                f"label {at} is {int(labels[at])}, its input id {int(ids[at])}; a label is its own token's "
                f"id (not the next one's) or {IGNORED_LABEL}",
            )
        return ids, mask

    def _ids(self, text: str) -> np.ndarray:
        _check_unicode(text)
        if self._tokenizer.is_fast:
            # encode_batch_fast leaves out the offsets, which take most of the time.
            [encoding] = self._tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)
            return np.array(encoding.ids, np.int64)
        return np.array(self._tokenizer.encode(text, add_special_tokens=False), np.int64)

    def _ids_in_spans(self, text: str, spans: list[Span]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, and for each whether any character of it lies in a span."""
        _check_unicode(text)
        if not self._tokenizer.is_fast:
            raise ValueError(
                f"{type(self._tokenizer).__name__} does not tell which characters a token stands for, which "
                "`messages` and `prompt`/`completion` need; take a fast tokenizer (with a tokenizer.json)."
            )
        encoding = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        starts, stops = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        in_span = np.zeros(len(text) + 1, bool)  # the character before each place
        for first, last in spans:
            in_span[first + 1 : last + 1] = True
        before = in_span.cumsum(dtype=np.int32)  # characters of spans up to each place
        return np.array(encoding.ids, np.int64), before[stops] > before[starts]

    def _with_ends(self, ids: np.ndarray) -> tuple[np.ndarray, int]:
        """Puts bos and eos around, where the tokenizer has them and the text has not; counts the bos."""
        first = [self._bos] if self._bos is not None and ids[:1] != [self._bos] else []
        last = [self._eos] if self._eos is not None and ids[-1:] != [self._eos] else []
        return np.concatenate([first, ids, last]).astype(np.int64), len(first)


class _UnusableRow(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def _runs(mask: np.ndarray) -> np.ndarray:
    if mask.all():
        return np.array([[0, len(mask)]], np.int64)
    edges = np.flatnonzero(mask[1:] != mask[:-1]) + 1
    bounds = [*([0] if mask[0] else []), *edges.tolist(), *([len(mask)] if mask[-1] else [])]
    return np.array(bounds, np.int64).reshape(-1, 2)


def _string(row: dict[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        hint = "; join a conversation into `messages`" if isinstance(value, list) else ""
        raise _UnusableRow("wrong type", f"`{column}` is {_type_name(value)}, not a string{hint}")
    return value


def _integers(row: dict[str, Any], column: str) -> np.ndarray:
    value = row[column]
    if isinstance(value, list):
        try:
            array = np.array(value)
        except (ValueError, OverflowError):
            array = np.array(["ragged"])
        if array.ndim == 1 and (array.dtype.kind in "iu" or not len(array)):
            return array.astype(np.int64)
    raise _UnusableRow("wrong type", f"`{column}` is not a flat list of whole numbers")


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list):
        raise _UnusableRow("wrong type", f"`messages` is {_type_name(messages)}, not a list")
    if not messages:
        raise _UnusableRow("empty document", "`messages` is empty")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _UnusableRow("wrong type", f"message {i} (from 0) is not an object with a `role`")
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(sorted({message["role"] for message in messages}))
        raise _UnusableRow("no token carries loss", f"no message has the role `assistant` (roles: {roles})")


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _UnusableRow(
            "not Unicode", f"half a surrogate pair ({text[error.start]!a}) at character {error.start}"
        ) from error


def _type_name(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
