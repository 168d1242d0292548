"""`longseq check`: what of the data carries loss is shown as it is, and what would go wrong is said."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizer_samples import CHATML, MARKED, merging_tokenizer

from longseq.launch.check import data as check_data
from longseq.launch.check.command import check
from longseq.launch.check.data import read_sample
from longseq.launch.check.loss import look, pieces_of
from longseq.launch.check.view import draw_sequence, printable
from longseq.launch.config import DataConfig
from longseq.launch.config_file import load_config
from longseq.launch.data.encode import IGNORED_LABEL
from longseq.launch.data.packing import pack_documents
from longseq.launch.data.tokenizer import byte_tokenizer

TINY = """
model: {config: {model_type: llama, hidden_size: 32, intermediate_size: 56, num_hidden_layers: 2,
  num_attention_heads: 4, num_key_value_heads: 2, vocab_size: 500, max_position_embeddings: 512}}
data: {tokenizer: bytes}
sequence: {length: 256}
train: {steps: 4}
"""
CHAT = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "the answer is 42"},
    {"role": "user", "content": "good"},
    {"role": "assistant", "content": "yes"},
]


class Data:
    """Files of rows, and what is said of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tiny.yaml").write_text(TINY)

    def rows(self, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
        """A file of them."""
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def notices(self, rows: list[dict[str, Any]], tokenizer: Any = None, *overrides: str) -> dict[str, str]:
        """Text of each notice by its verdict (one of a kind)."""
        source = self.rows(rows)
        config = load_config(str(self.folder / "tiny.yaml"), [f"data.source={source}", *overrides])
        tokenizer = tokenizer or byte_tokenizer()
        sample = read_sample(config.data, tokenizer, config.sequence.length)
        packing = pack_documents(sample.lengths, config.sequence.length)
        found = list(look(config, sample, packing, pieces_of(packing, sample), tokenizer))
        return {notice.verdict: notice.text for notice in reversed(found)}


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path)


def drawn(rows: list[dict[str, Any]], data: Data, tokenizer: Any, length: int = 256) -> str:
    """The first sequence as it is printed without colours."""
    sample = read_sample(DataConfig(source=data.rows(rows)), tokenizer, length)
    packing = pack_documents(sample.lengths, length)
    [pieces, *_] = pieces_of(packing, sample)
    padding = length - sum(len(piece.tokens) for piece in pieces)
    return "\n".join(block.plain for block in draw_sequence(pieces, padding, tokenizer, coloured=False))


# --- what is shown


def test_brackets_stand_around_what_the_assistant_says_and_its_end(data: Data) -> None:
    text = drawn([{"messages": CHAT}], data, byte_tokenizer())
    assert "What is it?\nassistant: ⟦the answer is 42<|eos|>⟧\nuser: good\nassistant: ⟦yes<|eos|>⟧\n" in text
    assert f"document 1 of 1: {data.folder}/rows.jsonl:1" in text
    assert "tokens of padding, without loss" in text


def test_the_first_token_is_not_learned_and_documents_have_borders(data: Data) -> None:
    tokenizer = byte_tokenizer()
    text = drawn([{"text": "abc"}, {"text": "défg"}, {"prompt": "q", "completion": "a"}], data, tokenizer)
    assert "<|bos|>⟦abc<|eos|>⟧" in text
    assert "<|bos|>⟦défg<|eos|>⟧" in text
    assert text.count("── document") == 2  # a row of other columns is a problem


def test_a_long_document_is_shown_at_its_ends_and_where_loss_begins(data: Data) -> None:
    row = {"prompt": "p" * 900, "completion": "c" * 900}
    text = drawn([row], data, byte_tokenizer(), length=4096)
    assert text.count("tokens…]") == 2
    assert "pppp⟦cccc" in text
    assert text.count("p") < 120
    assert text.rstrip().splitlines()[-2].endswith("c<|eos|>⟧")


def test_data_cannot_command_the_terminal(data: Data) -> None:
    text = drawn([{"text": "a\x1b[2Jb\r\u202ec"}], data, byte_tokenizer())
    assert "\x1b" not in text
    assert "\\x1b[2Jb\\x0d\\x202ec" in text
    assert printable("tab\tline\né中") == "tab\tline\né中"


def test_on_a_terminal_there_are_colours_and_no_brackets(data: Data) -> None:
    tokenizer = byte_tokenizer()
    sample = read_sample(DataConfig(source=data.rows([{"messages": CHAT}])), tokenizer, 256)
    [pieces] = pieces_of(pack_documents(sample.lengths, 256), sample)
    _, block = draw_sequence(pieces, 0, tokenizer, coloured=True)
    assert "⟦" not in block.plain
    learned = "".join(
        block.plain[span.start : span.end] for span in block.spans if "green" in str(span.style)
    )
    assert learned == "the answer is 42<|eos|>yes<|eos|>"


# --- what is suspicious


def test_good_data_is_not_suspicious(data: Data) -> None:
    for tokenizer in (byte_tokenizer(), merging_tokenizer(chat_template=MARKED)):
        assert data.notices([{"messages": CHAT}] * 40, tokenizer) == {}
    assert data.notices([{"text": "abcdefghij" * 2}] * 40) == {}


def masked(text: str, *labels: int) -> dict[str, Any]:
    """A row of bytes, all learned but what `labels` replaces at the end."""
    ids = [*text.encode(), 257]
    return {"input_ids": ids, "labels": [*ids[: len(ids) - len(labels)], *labels]}


def test_an_end_that_is_masked_as_padding_is_told(data: Data) -> None:
    said = data.notices([masked("some text here", IGNORED_LABEL)] * 30)["warning"]
    assert "the end token <|eos|> (token 257) stands in the data and never carries loss" in said
    assert "pad_token is eos_token" in said
    assert data.notices([masked("some text here")] * 30) == {}


def test_a_turn_whose_end_is_not_learned_is_told(data: Data) -> None:
    # The mark ends before the end of the turn, and that is not the tokenizer's eos.
    tokenizer = merging_tokenizer(chat_template=MARKED)
    tokenizer.eos_token = "<|im_start|>"
    said = data.notices([{"messages": CHAT}] * 9, tokenizer)["warning"]
    assert "will not learn to stop" in said or "never carries loss" in said
    tokenizer = merging_tokenizer(chat_template=CHATML)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    said = data.notices([{"messages": CHAT}] * 9, tokenizer)["warning"]
    assert "turns end in '<|im_end|>', which is learned, and not in <|endoftext|>" in said


def test_documents_without_an_end_are_told(data: Data) -> None:
    ids = [*b"no end here"]
    said = data.notices([{"input_ids": ids}] * 30)["warning"]
    assert "30 of 30 documents end without a special token" in said
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    said = data.notices([{"text": "abc" * 9}] * 30, tokenizer)["warning"]
    assert "no end-of-text token" in said


def test_no_label_at_all_is_an_error(data: Data) -> None:
    # Only the first token of each is learned, and nothing comes before that.
    ids = [*b"abcdef"]
    row = {"input_ids": ids, "labels": [ids[0], *[IGNORED_LABEL] * 5]}
    assert "nothing would be learned" in data.notices([row] * 3)["error"]


def test_pieces_without_loss_are_told(data: Data) -> None:
    said = data.notices([{"prompt": "p" * 600, "completion": "c" * 20}] * 4)["warning"]
    assert "8 of 12 documents or pieces of them carry no loss at all" in said
    assert "rows.jsonl:1 from token 0 on" in said


def test_long_documents_are_told_and_refused(data: Data) -> None:
    rows = [{"text": "x" * 40}] * 20 + [{"text": "y" * 700}]
    said = data.notices(rows)["warning"]
    assert "1 of 21 documents are longer than sequence.length=256, the longest 702 tokens" in said
    assert "rows.jsonl:21" in said
    refused = data.notices(rows, None, "data.long_documents=refuse")["error"]
    assert "data.long_documents=refuse forbids that" in refused


def test_padding_is_told_where_all_was_read(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "z" * 150}] * 3
    assert "41% of the 3 sequence(s) is padding" in data.notices(rows)["warning"]
    monkeypatch.setattr(check_data, "ROWS", 2)
    assert data.notices(rows) == {}  # of a sample's last sequence nothing is known


def test_padding_inside_of_rows_is_told(data: Data) -> None:
    pad = byte_tokenizer().pad_token_id
    ids = [*b"some text", 257, *[pad] * 5]
    row = {"input_ids": ids, "labels": [*ids[:10], *[IGNORED_LABEL] * 5]}
    assert "33% of the tokens are <|pad|>" in data.notices([row] * 30)["warning"]


def test_rows_that_cannot_be_used_are_errors_unless_they_are_skipped(data: Data) -> None:
    rows = [{"text": "good " * 40}, {"text": 3}, {"text": ""}]
    said = data.notices(rows)["error"]
    assert "2 of the first 3 rows or files cannot be used" in said
    assert "rows.jsonl:2: wrong type" in said
    assert "left out" in data.notices(rows, None, "data.on_error=skip")["warning"]


# --- what is read


def test_only_the_first_rows_of_a_source_are_read(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_data, "ROWS", 4)
    path = Path(data.rows([{"text": f"document {i}"} for i in range(9)]))
    with path.open("a") as file:
        file.write("this line is never read")
    packed = data.folder / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for source in (path, packed):
        sample = read_sample(DataConfig(source=str(source)), byte_tokenizer(), 256)
        assert [name.rpartition(":")[2] for name in sample.names] == ["1", "2", "3", "4"]
        assert not sample.problems
        assert not sample.is_whole
        assert sample.names[0].startswith(str(source))
    few = read_sample(DataConfig(source=str(path), max_documents=2), byte_tokenizer(), 256)
    assert len(few.documents) == 2
    assert few.is_whole
    both = read_sample(DataConfig(source=(str(path), str(packed))), byte_tokenizer(), 256)
    assert len(both.documents) == 8


def test_a_source_is_left_once_it_fills_a_sequence(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_data, "LEAST_TOKENS", 10)
    source = data.rows([{"text": "x" * 98}] * 50)
    sample = read_sample(DataConfig(source=source), byte_tokenizer(), 256)
    assert len(sample.documents) == 3
    assert not sample.is_whole


def test_every_form_of_source_is_read(data: Data) -> None:
    import datasets

    rows = [{"text": f"document {i}"} for i in range(9)]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(data.folder / "rows.parquet")
    table.save_to_disk(str(data.folder / "saved"))
    (data.folder / "folder").mkdir()
    data.rows(rows, "folder/part.jsonl")
    (data.folder / "texts").mkdir()
    for i in range(9):
        (data.folder / "texts" / f"{i}.txt").write_text(f"document {i}")
    for form in ("rows.parquet", "saved", "folder", "texts"):
        sample = read_sample(DataConfig(source=str(data.folder / form)), byte_tokenizer(), 256)
        assert len(sample.documents) == 9, form
        assert sample.is_whole, form
        text = byte_tokenizer().decode(sample.documents[0].tokens, skip_special_tokens=True)
        assert text == "document 0", form


# --- the command


@pytest.fixture
def fitting(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A plan by another's hand."""
    plan = SimpleNamespace(fits=True, knobs=SimpleNamespace(length=512))
    monkeypatch.setattr("longseq.launch.planner.command.plan_here", lambda config: (plan, ["for an h100"]))
    monkeypatch.setattr("longseq.launch.planner.report.print_plan", lambda plan, notes: print("plan", notes))
    return plan


def test_the_exit_status_says_whether_the_run_is_worth_starting(
    data: Data, fitting: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    config, good = str(data.folder / "tiny.yaml"), data.rows([{"messages": CHAT}] * 40)
    assert check(config, [f"data.source={good}"]) == 0
    printed = capsys.readouterr().out
    assert "data: nothing suspicious\nplan ['for an h100']" in printed
    assert "loss: " in printed
    fitting.fits = False
    assert check(config, [f"data.source={good}"]) == 1
    fitting.fits = True
    bad = data.rows([{"text": 3}], "bad.jsonl")
    assert check(config, [f"data.source={bad}"]) == 1
    assert "error: 1 of the first 1 rows" in capsys.readouterr().out


def test_max_takes_the_length_of_the_plan(
    data: Data, fitting: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    source = data.rows([{"text": "x" * 700}] * 9)
    config = str(data.folder / "tiny.yaml")
    assert check(config, [f"data.source={source}", "sequence.length=max"]) == 0
    assert "sequence.length=512, the longest 702" in capsys.readouterr().out
    fitting.knobs.length = 1024
    # A run would be refused.
    assert check(config, [f"data.source={source}", "sequence.length=max"]) == 1
    assert "error: sequence.length=1,024 is above the 512 positions" in capsys.readouterr().out


def test_all_that_is_wrong_is_said_at_once(data: Data, fitting: SimpleNamespace) -> None:
    folder = data.folder / "tokenizer"
    merging_tokenizer().save_pretrained(folder)
    words = [
        f"data.source={data.folder}/none.jsonl",
        f"data.tokenizer={folder}",
        "model.config.vocab_size=99",
    ]
    with pytest.raises(ValueError, match="no such file") as found:
        check(str(data.folder / "tiny.yaml"), words)
    assert "the model embeds 99" in str(found.value)
    words = [f"data.source={data.folder}/none.jsonl", "model.config.model_type=lama"]
    with pytest.raises(ValueError, match="did you mean llama") as found:
        check(str(data.folder / "tiny.yaml"), words)
    assert "no such file" in str(found.value)


def test_data_is_looked_for_without_a_tokenizer_too(data: Data, fitting: SimpleNamespace) -> None:
    (data.folder / "empty").mkdir()
    words = [f"data.source={data.folder}/none.jsonl", f"data.tokenizer={data.folder}/empty"]
    with pytest.raises(ValueError, match="no such file") as found:
        check(str(data.folder / "tiny.yaml"), words)
    assert "the folder has no tokenizer.json" in str(found.value)


def test_the_real_plan_is_shown(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    source = data.rows([{"text": "x" * 90}] * 40)
    assert check(str(data.folder / "tiny.yaml"), [f"data.source={source}"]) == 0
    printed = capsys.readouterr().out
    assert "fits" in printed
