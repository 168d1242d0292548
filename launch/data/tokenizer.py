"""Tokenizers: the embedded byte-level one, and Hugging Face's."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"

# Role names, and the one special token that ends an assistant's turn; the generation marks say which
# part of it is learned.
BYTE_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message['role'] + ': ' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that needs no file: token `b` is byte `b` of the UTF-8 text, then bos, eos and pad.

    Any text comes back from its tokens unchanged, and any bytes are tokens, valid UTF-8 or not.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    # Without merges there is nothing that splitting into words could keep apart.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (BOS, EOS, PAD)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = BYTE_CHAT_TEMPLATE
    return wrapped


def _byte_characters() -> list[str]:
    """The printable characters by which `tokenizers` writes the 256 bytes, in the order of the bytes.

    GPT-2's map: bytes that Latin-1 prints stand for themselves, the others follow from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer by its name.

    Args:
        name: `bytes` for `byte_tokenizer`, else a Hugging Face name or a folder.

    Raises:
        ValueError: There is none of that name, or it needs code from its repository to be run.
    """
    if name == "bytes":
        return byte_tokenizer()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"data.tokenizer={name!r} cannot be loaded: {_first_line(error)} Give a folder with a "
            "tokenizer.json, the name of a Hugging Face repository that you can reach, or `bytes`."
        ) from error
    if tokenizer.is_fast:
        # A saved limit would cut long documents without a word.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(". ") + "."


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of all that decides which tokens a document becomes."""
    if tokenizer.is_fast:
        core = tokenizer.backend_tokenizer.to_str()
    else:
        core = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    specials = [tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)]
    described = json.dumps([core, tokenizer.chat_template, specials], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest token id; a model needs an embedding of at least so many rows."""
    # Some vocabularies have gaps, so that their number of tokens is too small.
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills the end of a sequence; it is never learned, so that any token would do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
