"""Documents that cannot be trained on: places that hold none, files that are broken, rows that are wrong."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from bad_inputs import Case, Place, check, parametrized
from pyarrow import parquet
from tiny_run import Workshop

GOOD = {"text": "a document"}
WAY_OUT = "Correct them, or set data.on_error=skip"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("shop"))


def source(name: str, make: Callable[[Place], Any], *says: str) -> Case:
    """A `data.source`, as it is made, for `prepare`."""
    return Case(
        name,
        lambda place: ["prepare", place.yaml(), f"data.source={make(place)}", "data.eval_source=null"],
        says,
    )


def file(name: str, content: str | bytes, *says: str, called: str = "docs.jsonl") -> Case:
    """A file of that content as the source."""
    return source(name, lambda place: place.write(called, content), *says)


def rows(name: str, bad: Any, *says: str, good: Any = GOOD) -> Case:
    """JSON lines of which the second is bad."""
    content = "".join(
        f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in (good, bad, good)
    )
    return file(name, content, "docs.jsonl:2: ", *says, WAY_OUT)


def table(name: str, columns: dict[str, Any], *says: str) -> Case:
    """A Parquet file of those columns."""

    def make(place: Place) -> Path:
        parquet.write_table(pyarrow.table(columns), place.folder / "docs.parquet")
        return place.folder / "docs.parquet"

    return source(name, make, "docs.parquet", *says)


def chat(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


def text_folder(place: Place) -> Path:
    place.write("texts/a.md", "one")
    place.write("texts/b.txt", b"\xff\xfe\xfa")
    return place.folder / "texts"


def empty_folder(place: Place) -> Path:
    (place.folder / "empty").mkdir()
    return place.folder / "empty"


def hidden_files_alone(place: Place) -> Path:
    return place.write("hidden/.git/config", "x").parents[1]


def two_kinds_of_tables(place: Place) -> Path:
    place.write("mixed/a.jsonl", json.dumps(GOOD))
    place.write("mixed/b.parquet", b"")
    return place.folder / "mixed"


def tables_and_a_stranger(place: Place) -> Path:
    place.write("mixed/a.jsonl", json.dumps(GOOD))
    place.write("mixed/b.txt", "x")
    return place.folder / "mixed"


def folder_of_pdfs(place: Place) -> Path:
    return place.write("papers/a.pdf", b"%PDF").parent


def pattern_without_files(place: Place) -> Path:
    return place.folder / "*.jsonl"


def link_to_nothing(place: Place) -> Path:
    (place.folder / "docs.jsonl").symlink_to(place.folder / "gone.jsonl")
    return place.folder / "docs.jsonl"


def unreadable(place: Place) -> Path:
    # Reads of this file fail, for root too.
    (place.folder / "docs.jsonl").symlink_to("/proc/self/mem")
    return place.folder / "docs.jsonl"


def cut_parquet(place: Place) -> Path:
    path = place.folder / "docs.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"] * 100}), path)
    path.write_bytes(path.read_bytes()[:-20])
    return path


def parquet_with_a_damaged_middle(place: Place) -> Path:
    path = place.folder / "docs.parquet"
    parquet.write_table(pyarrow.table({"text": [f"document {i}" for i in range(100)]}), path)
    content = bytearray(path.read_bytes())
    content[20:200] = bytes(180)
    path.write_bytes(content)
    return path


def empty_parquet(place: Place) -> Path:
    parquet.write_table(
        pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), place.folder / "a.parquet"
    )
    return place.folder / "a.parquet"


def saved_dataset(place: Place) -> Path:
    import datasets

    whole = datasets.DatasetDict({"validation": datasets.Dataset.from_dict({"text": ["a"]})})
    whole.save_to_disk(place.folder / "saved")
    return place.folder / "saved"


def damaged_dataset(place: Place) -> Path:
    folder = saved_dataset(place)
    (folder / "validation" / "state.json").unlink()
    return folder


PLACES = (
    source(
        "no such file", lambda place: place.folder / "no.jsonl", "no.jsonl", "there is no such file", "check"
    ),
    source(
        "no such folder",
        lambda place: "./nowhere/at/all",
        "data.source='./nowhere/at/all'",
        "there is no such",
    ),
    source("a name the hub cannot have", lambda place: "a/b/c", "data.source='a/b/c'", "owner/name"),
    source(
        "a name of the hub without a way to it",
        lambda place: "owner/name",
        "data.source='owner/name'",
        "Check",
    ),
    source("a pattern without files", pattern_without_files, "*.jsonl", "no file fits the pattern", "check"),
    source("an empty folder", empty_folder, "empty", "the folder holds no file"),
    source("hidden files alone", hidden_files_alone, "hidden", "the folder holds no file"),
    source("two kinds of tables", two_kinds_of_tables, "mixed", "name those that are meant by patterns"),
    source(
        "a table beside a text",
        tables_and_a_stranger,
        "mixed",
        "b.txt",
        "name those that are meant by patterns",
    ),
    source("a folder of PDFs", folder_of_pdfs, "papers", "a.pdf"),
    source("a link to nothing", link_to_nothing, "docs.jsonl", "there is no such file"),
    source("a file that cannot be read", unreadable, "docs.jsonl", "unreadable file", WAY_OUT),
    source("a text that is no UTF-8", text_folder, "b.txt: not UTF-8", WAY_OUT),
    source(
        "a saved dataset without the split",
        saved_dataset,
        "data.split='train' is not in",
        "it has validation",
    ),
    source("a saved dataset with a file gone", damaged_dataset, "saved", "cannot be loaded", "Check"),
    Case(
        "two places that are not there",
        lambda place: ["prepare", place.yaml(), "data.source=[./no1.jsonl,./no2.jsonl]"],
        ("no1.jsonl", "no2.jsonl"),
    ),
    Case(
        "no documents for evaluation",
        lambda place: ["prepare", place.yaml(), "data.eval_source=./no.jsonl"],
        ("data.eval_source", "no.jsonl"),
    ),
)

FILES = (
    file("an empty file", "", "data.source holds no document that can be used", "name"),
    file("blank lines alone", "\n\n  \n\n", "docs.jsonl:3", WAY_OUT),
    file(
        "a CSV",
        "text\nhello\n",
        "docs.csv",
        ".csv files are not read; convert it to JSONL",
        called="docs.csv",
    ),
    file("an archive", b"PK\3\4", "docs.zip", ".zip files are not read; convert it", called="docs.zip"),
    file(
        "one JSON array",
        json.dumps([GOOD, GOOD]),
        "docs.json",
        "is one JSON array",
        "convert it",
        called="docs.json",
    ),
    file(
        "one JSON object over several lines",
        json.dumps(GOOD, indent=1),
        "docs.json:1: invalid JSON",
        WAY_OUT,
        called="docs.json",
    ),
    file(
        "columns that are none of ours", '{"content": "a"}\n', "has the columns content", "Rename its columns"
    ),
    file(
        "a prompt without a completion", '{"prompt": "a"}\n', "has the columns prompt", "Rename its columns"
    ),
    file("numbers instead of objects", "1\n2\n", "docs.jsonl:1: invalid JSON: a int, not an object", WAY_OUT),
    file("an object without columns", "{}\n", "has the columns (none)", "Rename its columns"),
    file("gz that is none", b"not gzip", "docs.jsonl.gz: unreadable file", WAY_OUT, called="docs.jsonl.gz"),
    file(
        "gz that is cut",
        gzip.compress(json.dumps(GOOD).encode() * 99)[:-9],
        "docs.jsonl.gz: unreadable file",
        WAY_OUT,
        called="docs.jsonl.gz",
    ),
    file(
        "gz that is damaged",
        gzip.compress(json.dumps(GOOD).encode() * 99)[:-8] + bytes(8),
        "docs.jsonl.gz: unreadable file",
        WAY_OUT,
        called="docs.jsonl.gz",
    ),
    file(
        "Parquet that is none",
        b"not parquet",
        "docs.parquet: unreadable file: not a Parquet file",
        WAY_OUT,
        called="docs.parquet",
    ),
    file(
        "an empty Parquet file",
        b"",
        "docs.parquet: unreadable file: not a Parquet file",
        WAY_OUT,
        called="docs.parquet",
    ),
    source("Parquet that is cut", cut_parquet, "docs.parquet: unreadable file: not a Parquet file", WAY_OUT),
    source(
        "Parquet with a damaged middle",
        parquet_with_a_damaged_middle,
        "docs.parquet: unreadable file",
        WAY_OUT,
    ),
    table("Parquet with other columns", {"content": ["a"]}, "has the columns content", "Rename its columns"),
    source("Parquet without rows", empty_parquet, "data.source holds no document", "name another"),
    table(
        "Parquet with a null",
        {"text": ["a", None]},
        "docs.parquet row 1: wrong type: `text` is null",
        WAY_OUT,
    ),
    table(
        "Parquet with numbers for text",
        {"text": [1, 2]},
        "row 0: wrong type: `text` is a int, not a string",
        WAY_OUT,
    ),
    table(
        "Parquet with floats for ids", {"input_ids": [[1.0, 2.5]]}, "row 0: wrong type: `input_ids`", WAY_OUT
    ),
)

ROWS = (
    rows("a line cut short", '{"text": "a', "invalid JSON", "the line begins with"),
    rows("a comma at the end", '{"text": "a",}', "invalid JSON"),
    rows("single quotes", "{'text': 'a'}", "invalid JSON"),
    rows("two objects on a line", '{"text": "a"}{"text": "b"}', "invalid JSON: Extra data"),
    rows("a list", ["a"], "invalid JSON: a list, not an object"),
    rows("brackets without end", "[" * 100_000, "invalid JSON"),
    file(
        "bytes that are no UTF-8",
        b'{"text": "a"}\n{"text": "\xff"}\n',
        "docs.jsonl:2: not UTF-8",
        "at byte 10",
        WAY_OUT,
    ),
    rows("half a surrogate pair", '{"text": "\\ud800"}', "not Unicode: half a surrogate pair"),
    rows("other columns", {"prompt": "a", "completion": "b"}, "other columns than the first row", "has text"),
    rows("no column of ours", {"body": "a"}, "other columns than the first row: found none that is used"),
    rows("null for text", {"text": None}, "wrong type: `text` is null, not a string"),
    rows("a number for text", {"text": 3}, "wrong type: `text` is a int, not a string"),
    rows("a list for text", {"text": ["a"]}, "wrong type: `text` is a list, not a string", "join"),
    rows("an empty text", {"text": ""}, "empty document: `text` is empty"),
    rows("spaces alone", {"text": " \n"}, "empty document: `text` is empty"),
    rows(
        "an empty completion",
        {"prompt": "a", "completion": ""},
        "empty document: `completion` is empty",
        good={"prompt": "a", "completion": "b"},
    ),
    rows(
        "null for a prompt",
        {"prompt": None, "completion": "b"},
        "`prompt` is null, not a string",
        good={"prompt": "a", "completion": "b"},
    ),
    *(
        rows(
            name,
            bad,
            *says,
            good=chat({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}),
        )
        for name, bad, says in (
            ("messages that are text", {"messages": "hello"}, ("`messages` is a str, not a list",)),
            ("messages that are null", {"messages": None}, ("`messages` is null, not a list",)),
            ("no messages", chat(), ("empty document: `messages` is empty",)),
            ("a message that is text", chat("hello"), ("message 0 (from 0) is not an object with a `role`",)),
            ("a message without a role", chat({"content": "a"}), ("message 0 (from 0) is not an object",)),
            ("a role that is a number", chat({"role": 1, "content": "a"}), ("message 0 (from 0) is not",)),
            (
                "nobody answers",
                chat({"role": "user", "content": "a"}),
                ("no message has the role `assistant`",),
            ),
            ("another name for the assistant", chat({"role": "gpt", "content": "a"}), ("(roles: gpt)",)),
            (
                "other names for the keys",
                chat({"from": "gpt", "value": "a"}),
                ("is not an object with a `role`",),
            ),
            ("an answer without content", chat({"role": "assistant"}), ("chat template",)),
            ("content that is null", chat({"role": "assistant", "content": None}), ("chat template",)),
            ("content that is a number", chat({"role": "assistant", "content": 3}), ("chat template",)),
        )
    ),
    *(
        rows(name, bad, *says, good={"input_ids": [1, 2, 3]})
        for name, bad, says in (
            (
                "an id past the vocabulary",
                {"input_ids": [1, 259]},
                ("token 1 is 259, the tokenizer has ids 0 to 258",),
            ),
            ("a negative id", {"input_ids": [-1, 2]}, ("token 0 is -1, the tokenizer has ids 0 to 258",)),
            (
                "an id past 64 bits",
                {"input_ids": [1 << 70]},
                ("`input_ids` is not a flat list of whole numbers",),
            ),
            (
                "ids that are floats",
                {"input_ids": [1.5]},
                ("`input_ids` is not a flat list of whole numbers",),
            ),
            ("ids that are text", {"input_ids": "1 2"}, ("`input_ids` is not a flat list of whole numbers",)),
            ("ids in a list of lists", {"input_ids": [[1], [2]]}, ("`input_ids` is not a flat list",)),
            ("ids of uneven lists", {"input_ids": [[1], [2, 3]]}, ("`input_ids` is not a flat list",)),
            ("ids with a null", {"input_ids": [1, None]}, ("`input_ids` is not a flat list",)),
            ("truths for ids", {"input_ids": [True, False]}, ("`input_ids` is not a flat list",)),
            ("no ids", {"input_ids": []}, ("empty document: `input_ids` is empty",)),
        )
    ),
    *(
        rows(name, {"input_ids": [1, 2], "labels": labels}, *says, good={"input_ids": [1], "labels": [1]})
        for name, labels, says in (
            ("labels shifted already", [2, -100], ("label 0 is 2, its input id 1", "-100")),
            ("too few labels", [1], ("1 labels for 2 input_ids",)),
            ("all labels masked", [-100, -100], ("no token carries loss",)),
            ("labels that are null", None, ("`labels` is not a flat list of whole numbers",)),
        )
    ),
)


def train(name: str, overrides: tuple[str, ...], *says: str) -> Case:
    """Documents that are good, and a run they do not fit."""
    return Case(name, lambda place: ["train", place.yaml(), *overrides], says)


RUNS = (
    train(
        "a document too long to be refused",
        ("sequence.length=8", "data.long_documents=refuse"),
        "sequence.length=8",
        "docs.jsonl:",
        "set data.long_documents=split",
    ),
    train(
        "a folder for the cache that is a file",
        ("data.cache_dir=/dev/null",),
        "data.cache_dir",
        "name another place",
    ),
    train(
        "a cache on a disk without room",
        ("data.cache_dir=/proc/cache",),
        "data.cache_dir",
        "name another place",
    ),
)


@parametrized((*PLACES, *FILES, *ROWS, *RUNS))
def test_bad_documents_get_a_way_out(
    case: Case, shop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(case, Place(tmp_path, shop, {}), capsys)
