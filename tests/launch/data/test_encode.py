from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from tokenizer_samples import CHATML, MARKED, THINKING, merging_tokenizer

from longseq.launch.data.encode import Encoded, Encoder
from longseq.launch.data.rows import Document, Kind, Problem
from longseq.launch.data.tokenizer import byte_tokenizer


def encode(tokenizer: Any, kind: Kind, **row: Any) -> Encoded | Problem:
    return Encoder(tokenizer).encode(Document(kind, row, "rows.jsonl:7"))


def learned(tokenizer: Any, encoded: Encoded | Problem) -> str:
    assert isinstance(encoded, Encoded), encoded
    return "|".join(tokenizer.decode(encoded.tokens[start:stop].tolist()) for start, stop in encoded.runs)


def problem(tokenizer: Any, kind: Kind, **row: Any) -> str:
    found = encode(tokenizer, kind, **row)
    assert isinstance(found, Problem), found
    return str(found)


def test_text_is_learned_whole_between_bos_and_eos() -> None:
    encoded = encode(byte_tokenizer(), "text", text="hé")
    assert encoded.tokens.tolist() == [256, 104, 195, 169, 257]
    assert encoded.tokens.dtype == np.uint16
    assert encoded.runs.tolist() == [[0, 5]]


def test_bos_and_eos_that_the_text_has_are_not_doubled() -> None:
    encoded = encode(byte_tokenizer(), "text", text="<|bos|>a<|eos|>")
    assert encoded.tokens.tolist() == [256, 97, 257]


def test_a_tokenizer_without_bos_adds_none() -> None:
    tokenizer = merging_tokenizer(bos=None)
    encoded = encode(tokenizer, "text", text="yes")
    assert tokenizer.decode(encoded.tokens.tolist()) == "yes<|im_end|>"


def test_a_completion_is_learned_and_its_prompt_is_not() -> None:
    tokenizer = byte_tokenizer()
    encoded = encode(tokenizer, "completion", prompt="é? ", completion="nö")
    assert tokenizer.decode(encoded.tokens.tolist()) == "<|bos|>é? nö<|eos|>"
    assert learned(tokenizer, encoded) == "nö<|eos|>"


def test_a_completion_that_merges_with_the_prompts_space_is_still_learned() -> None:
    tokenizer = merging_tokenizer()
    encoded = encode(tokenizer, "completion", prompt="the answer is ", completion="yes")
    assert learned(tokenizer, encoded) == " yes<|im_end|>"


def test_a_prompt_may_be_empty_or_bring_its_own_bos() -> None:
    tokenizer = merging_tokenizer()
    assert learned(tokenizer, encode(tokenizer, "completion", prompt="", completion="yes")) == "yes<|im_end|>"
    encoded = encode(tokenizer, "completion", prompt="<s>the", completion=" answer")
    assert tokenizer.decode(encoded.tokens.tolist()) == "<s>the answer<|im_end|>"
    assert learned(tokenizer, encoded) == " answer<|im_end|>"


CHAT = [
    {"role": "system", "content": "be good"},
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "yés"},
    {"role": "user", "content": "yés"},
    {"role": "assistant", "content": "no"},
]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "yés<|im_end|>\n|no<|im_end|>\n"),
        (MARKED, "yés<|im_end|>|no<|im_end|>"),
        (THINKING, "yés<|im_end|>\n|<think>\n\n</think>\n\nno<|im_end|>\n"),
    ],
)
def test_only_the_assistants_turns_are_learned(template: str, expected: str) -> None:
    tokenizer = merging_tokenizer(chat_template=template)
    encoded = encode(tokenizer, "messages", messages=CHAT)
    assert learned(tokenizer, encoded) == expected
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=True)["input_ids"]
    assert encoded.tokens.tolist() == rendered


def test_the_byte_tokenizer_chats() -> None:
    tokenizer = byte_tokenizer()
    encoded = encode(tokenizer, "messages", messages=CHAT)
    assert learned(tokenizer, encoded) == "yés<|eos|>|no<|eos|>"


def test_thoughts_of_earlier_turns_are_dropped_and_their_answers_learned() -> None:
    tokenizer = merging_tokenizer(chat_template=THINKING)
    chat = [*CHAT[:2], {"role": "assistant", "content": "<think>hm</think>\n\nyes"}, *CHAT[3:]]
    encoded = encode(tokenizer, "messages", messages=chat)
    assert learned(tokenizer, encoded).startswith("yes<|im_end|>\n|")


def test_a_template_that_rewrites_what_came_before_is_refused() -> None:
    rewriting = "{{ messages | length }}" + CHATML
    said = problem(merging_tokenizer(chat_template=rewriting), "messages", messages=CHAT)
    assert said.startswith("rows.jsonl:7: chat template: ")
    assert "{% generation %}" in said


def test_a_template_that_refuses_a_chat_is_quoted() -> None:
    strict = "{{ raise_exception('roles must alternate') }}"
    assert "roles must alternate" in problem(
        merging_tokenizer(chat_template=strict), "messages", messages=CHAT
    )


def test_a_tokenizer_without_a_template_cannot_take_messages() -> None:
    with pytest.raises(ValueError, match=r"no chat template.*data\.tokenizer"):
        encode(merging_tokenizer(chat_template=None), "messages", messages=CHAT)


def test_ids_are_taken_as_they_are() -> None:
    encoded = encode(byte_tokenizer(), "ids", input_ids=[5, 6, 7])
    assert encoded.tokens.tolist() == [5, 6, 7]
    assert encoded.runs.tolist() == [[0, 3]]


def test_labels_say_what_is_learned() -> None:
    encoded = encode(byte_tokenizer(), "ids", input_ids=[5, 6, 7, 8, 9], labels=[-100, 6, -100, 8, 9])
    assert encoded.runs.tolist() == [[1, 2], [3, 5]]


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("text", {"text": " \n"}, "empty document"),
        ("text", {"text": None}, "wrong type: `text` is null"),
        ("text", {"text": "a\ud800b"}, "not Unicode.*character 1"),
        ("completion", {"prompt": "a", "completion": ""}, "empty document"),
        ("completion", {"prompt": [{"role": "user"}], "completion": "b"}, "wrong type.*`messages`"),
        ("messages", {"messages": []}, "empty document"),
        ("messages", {"messages": "hello"}, "wrong type: `messages` is a str"),
        ("messages", {"messages": [{"content": "a"}]}, "wrong type: message 0"),
        ("messages", {"messages": CHAT[:2]}, r"no token carries loss.*system, user"),
        ("messages", {"messages": [{"role": "assistant", "content": None}]}, "chat template"),
        ("ids", {"input_ids": []}, "empty document"),
        ("ids", {"input_ids": [1, 259]}, "token id outside the vocabulary: token 1 is 259.*0 to 258"),
        ("ids", {"input_ids": [-1]}, "token id outside the vocabulary"),
        ("ids", {"input_ids": [1.5]}, "wrong type"),
        ("ids", {"input_ids": [[1], [2, 3]]}, "wrong type"),
        ("ids", {"input_ids": [1 << 70]}, "wrong type"),
        ("ids", {"input_ids": [1, 2], "labels": [1]}, "wrong labels: 1 labels for 2"),
        ("ids", {"input_ids": [1, 2], "labels": [2, -100]}, "wrong labels: label 0 is 2"),
        ("ids", {"input_ids": [1, 2], "labels": [-100, -100]}, "no token carries loss"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(kind: Kind, row: dict[str, Any], expected: str) -> None:
    found = encode(byte_tokenizer(), kind, **row)
    assert isinstance(found, Problem)
    assert found.where == "rows.jsonl:7"
    assert re.search(expected, str(found))


def test_equal_documents_have_equal_digests() -> None:
    one, same, other = (encode(byte_tokenizer(), "text", text=text) for text in ("a", "a", "b"))
    assert one.digest == same.digest != other.digest
