from __future__ import annotations

from pathlib import Path

import pytest
from tokenizer_samples import CHATML, THINKING, merging_tokenizer

from longseq.launch.data.tokenizer import (
    byte_tokenizer,
    load_tokenizer,
    padding_id,
    tokenizer_fingerprint,
    vocabulary_size,
)


@pytest.mark.parametrize(
    "text", ["", "plain", "a\r\nb\tc\0", "héllo 日本 🙂 \u0301", "x" * 5000, " two  spaces "]
)
def test_bytes_are_tokens_and_come_back(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text


def test_every_byte_has_a_token_that_decodes() -> None:
    tokenizer = byte_tokenizer()
    assert vocabulary_size(tokenizer) == 259
    assert sorted({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == [256, 257, 258]
    assert tokenizer.decode(list("é".encode())) == "é"
    # A byte that is no UTF-8 on its own is shown as such and breaks nothing.
    assert tokenizer.decode([65, 0xFF, 66]) == "A\N{REPLACEMENT CHARACTER}B"


def test_bytes_survive_saving(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.encode("é\n", add_special_tokens=False) == list("é\n".encode())
    assert loaded.chat_template == byte_tokenizer().chat_template
    assert padding_id(loaded) == 258


def test_a_saved_truncation_does_not_cut_documents(tmp_path: Path) -> None:
    tokenizer = merging_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.backend_tokenizer.truncation is None


def test_an_unknown_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.tokenizer='.*nowhere'.*`bytes`"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_the_fingerprint_follows_what_changes_the_tokens() -> None:
    assert tokenizer_fingerprint(byte_tokenizer()) == tokenizer_fingerprint(byte_tokenizer())
    prints = {
        tokenizer_fingerprint(tokenizer)
        for tokenizer in (
            byte_tokenizer(),
            merging_tokenizer(),
            merging_tokenizer(chat_template=THINKING),
            merging_tokenizer(bos=None, chat_template=CHATML),
        )
    }
    assert len(prints) == 4


def test_padding_needs_no_padding_token() -> None:
    tokenizer = merging_tokenizer()
    assert tokenizer.pad_token_id is None
    assert padding_id(tokenizer) == tokenizer.eos_token_id
