from __future__ import annotations

import errno
import gzip
import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from longseq.launch.data import rows as rows_module
from longseq.launch.data.rows import Document, Problem
from longseq.launch.data.sources import find_sources, open_source

Found = Document | Problem


def read(
    specs: str | Sequence[str], scratch: Path, *, split: str = "train", max_documents: int | None = None
) -> tuple[list[Found], list[Problem]]:
    """All rows of some sources, one at a time, and the files that could not be opened."""
    found: list[Found] = []
    problems: list[Problem] = []
    for source in find_sources(specs, split):
        opened = open_source(source, max_documents, scratch)
        problems += opened.problems
        for one in opened.rows:
            for i in range(len(one.sizes)):
                found += [row for _, row in one.reader.read(one.part(i, i + 1))]
    return found, problems


def texts(found: list[Found]) -> list[str]:
    assert all(isinstance(row, Document) for row in found), found
    return [row.row["text"] for row in found]


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def write_lines(path: Path, rows: list[Any], end: str = "\n") -> None:
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode())


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\r\n\r\n"])
def test_lines_are_rows_whatever_ends_them(here: Path, scratch: Path, end: str) -> None:
    write_lines(here / "a.jsonl", [{"text": "é"}, {"text": "b\r"}], end)
    found, _ = read("a.jsonl", scratch)
    assert texts(found) == ["é", "b\r"]
    assert [row.where for row in found] == ["a.jsonl:1", f"a.jsonl:{1 + end.count(chr(10))}"]


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_lines_are_found_across_blocks(
    here: Path, scratch: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "_SCAN_BYTES", block)
    (here / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n{"text": "b"}\n\r\n{"text": "c"}')
    found, _ = read("a.jsonl", scratch)
    assert texts(found) == ["a", "b", "c"]
    assert [row.where for row in found] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:5"]


def test_an_empty_file_has_no_rows(here: Path, scratch: Path) -> None:
    (here / "a.jsonl").touch()
    assert read("a.jsonl", scratch) == ([], [])


@pytest.mark.parametrize(
    ("row", "kind", "kept"),
    [
        ({"text": "a", "id": 1}, "text", {"text"}),
        ({"prompt": "a", "completion": "b", "text": "c"}, "completion", {"prompt", "completion"}),
        ({"messages": [], "prompt": "a", "tools": []}, "messages", {"messages", "tools"}),
        ({"input_ids": [1], "text": "a"}, "ids", {"input_ids"}),
        ({"input_ids": [1], "labels": [1]}, "ids", {"input_ids", "labels"}),
    ],
)
def test_columns_say_what_a_source_is(
    here: Path, scratch: Path, row: dict[str, Any], kind: str, kept: set[str]
) -> None:
    write_lines(here / "a.jsonl", [row])
    [found], _ = read("a.jsonl", scratch)
    assert isinstance(found, Document)
    assert found.kind == kind
    assert set(found.row) == kept


def test_bad_lines_are_named_and_the_others_read(here: Path, scratch: Path) -> None:
    lines = [b'{"text": "a"}', b"{", b'"text"', b"\xff", b'{"prompt": "a"}', b'{"text": "z"}']
    (here / "a.jsonl").write_bytes(b"\n".join(lines))
    found, _ = read("a.jsonl", scratch)
    problems = [row for row in found if isinstance(row, Problem)]
    assert [(row.where, row.reason) for row in problems] == [
        ("a.jsonl:2", "invalid JSON"),
        ("a.jsonl:3", "invalid JSON"),
        ("a.jsonl:4", "not UTF-8"),
        ("a.jsonl:5", "other columns than the first row"),
    ]
    assert texts([row for row in found if isinstance(row, Document)]) == ["a", "z"]


def test_labels_in_some_rows_alone_are_not_dropped_silently(here: Path, scratch: Path) -> None:
    write_lines(here / "a.jsonl", [{"input_ids": [1]}, {"input_ids": [1], "labels": [-100]}])
    found, _ = read("a.jsonl", scratch)
    assert isinstance(found[1], Problem)


def test_a_broken_first_line_does_not_decide(here: Path, scratch: Path) -> None:
    (here / "a.jsonl").write_bytes(b'{"text": \n{"prompt": "a", "completion": "b"}\n')
    found, _ = read("a.jsonl", scratch)
    assert isinstance(found[0], Problem)
    assert isinstance(found[1], Document)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b'{"body": "a"}\n', "columns body; it needs `messages`"), (b'[{"text": "a"}]', "jq -c")],
)
def test_a_file_of_another_form_is_one_problem(
    here: Path, scratch: Path, content: bytes, expected: str
) -> None:
    (here / "a.json").write_bytes(content)
    found, [problem] = read("a.json", scratch)
    assert found == []
    assert problem.where == "a.json"
    assert expected in problem.detail


def test_compressed_lines(here: Path, scratch: Path) -> None:
    (here / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "b"}\n'))
    (here / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-9])
    found, [problem] = read(["a.jsonl.gz", "b.jsonl.gz"], scratch)
    assert texts(found) == ["a", "b"]
    assert [row.where for row in found] == ["a.jsonl.gz:1", "a.jsonl.gz:2"]
    assert (problem.where, problem.reason) == ("b.jsonl.gz", "unreadable file")


def test_parquet(here: Path, scratch: Path) -> None:
    chats = [[{"role": "assistant", "content": "a" * 50}], [{"role": "user", "content": "b", "name": "c"}]]
    datasets.Dataset.from_dict({"messages": chats, "id": [1, 2]}).to_parquet("a.parquet")
    [source] = find_sources("a.parquet", "train")
    [rows] = open_source(source, None, scratch).rows
    assert rows.sizes[0] > rows.sizes[1] > 0
    found, _ = read("a.parquet", scratch)
    assert [row.where for row in found] == ["a.parquet row 0", "a.parquet row 1"]
    # Arrow fills `name`, which only the second message has, with a null.
    assert [row.row["messages"] for row in found] == chats


def test_what_is_no_parquet_is_one_problem(here: Path, scratch: Path) -> None:
    (here / "a.parquet").write_bytes(b"PAR1 or not")
    _, [problem] = read("a.parquet", scratch)
    assert (problem.where, problem.reason) == ("a.parquet", "unreadable file")


def test_sizes_are_those_of_the_values(here: Path, scratch: Path) -> None:
    rows = {"input_ids": [[1] * 7, [], [2] * 3], "labels": [[1] * 7, None, [2] * 3]}
    datasets.Dataset.from_dict(rows).to_parquet("a.parquet")
    [source] = find_sources("a.parquet", "train")
    assert open_source(source, None, scratch).rows[0].sizes.tolist() == [56, 0, 24]


def test_a_saved_dataset_and_its_splits(here: Path, scratch: Path) -> None:
    splits = {name: datasets.Dataset.from_dict({"text": [name, "x"]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk("saved")
    splits["test"].save_to_disk("single")
    assert texts(read("saved", scratch, split="test")[0]) == ["test", "x"]
    assert texts(read("single", scratch)[0]) == ["test", "x"]
    with pytest.raises(ValueError, match=r"data\.split='dev'.*it has test, train"):
        read("saved", scratch, split="dev")


def test_a_folder_of_tables_is_read_by_split(here: Path, scratch: Path) -> None:
    folder = here / "set"
    folder.mkdir()
    write_lines(folder / "train.jsonl", [{"text": "a"}])
    write_lines(folder / "test.jsonl", [{"text": "b"}])
    (folder / "README.md").write_text("about")
    found, _ = read("set", scratch)
    assert texts(found) == ["a"]
    assert found[0].where == "set[train] row 0"


def test_a_folder_that_mixes_is_refused(here: Path) -> None:
    write_lines(here / "a.jsonl", [{"text": "a"}])
    (here / "b.txt").write_text("b")
    with pytest.raises(ValueError, match=r"mixes \.jsonl files and others such as b\.txt"):
        find_sources(str(here), "train")


def test_a_folder_of_json_is_not_read_as_text(here: Path) -> None:
    write_lines(here / "a.json", [{"text": "a"}])
    with pytest.raises(ValueError, match=r"a\.json.*pattern"):
        find_sources(str(here), "train")


def test_a_folder_of_texts(here: Path, scratch: Path) -> None:
    (here / "sub").mkdir()
    (here / ".git").mkdir()
    (here / ".git" / "config").write_text("hidden")
    (here / "b.txt").write_bytes("é\r\nb".encode())
    (here / "a.json").write_text("{")
    (here / "sub" / "c.md").write_bytes(b"\xff\xfe")
    found, _ = read(".", scratch)
    assert [row.where for row in found] == ["a.json", "b.txt", "sub/c.md"]
    assert isinstance(found[2], Problem)
    assert texts(found[:2]) == ["{", "é\r\nb"]


def test_a_file_that_went_away_is_a_problem(here: Path, scratch: Path) -> None:
    (here / "a.txt").write_text("a")
    (here / "b.txt").write_text("b")
    [source] = find_sources(str(here), "train")
    os.remove("a.txt")
    [rows] = open_source(source, None, scratch).rows
    reasons = [row.reason for _, row in rows.reader.read(rows.part(0, 2)) if isinstance(row, Problem)]
    assert reasons == ["unreadable file"]


def test_patterns_and_lists_keep_their_order(here: Path, scratch: Path) -> None:
    for name in ("b", "a"):
        write_lines(here / f"{name}.jsonl", [{"text": name}])
    (here / "c.txt").write_text("c")
    assert texts(read("*.jsonl", scratch)[0]) == ["a", "b"]
    assert texts(read(("c.txt", "b.jsonl"), scratch)[0]) == ["c", "b"]


def test_max_documents_cuts_each_source(here: Path, scratch: Path) -> None:
    for name in ("a", "b"):
        write_lines(here / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(3)])
    assert texts(read("?.jsonl", scratch, max_documents=4)[0]) == ["a0", "a1", "a2", "b0"]
    assert texts(read(["a.jsonl", "b.jsonl"], scratch, max_documents=1)[0]) == ["a0", "b0"]
    datasets.Dataset.from_dict({"text": list("xyz")}).save_to_disk("saved")
    assert texts(read("saved", scratch, max_documents=2)[0]) == ["x", "y"]


def test_all_that_is_missing_is_told_at_once(here: Path) -> None:
    (here / "a.csv").touch()
    with pytest.raises(ValueError, match="no such file") as error:
        find_sources(["nowhere.jsonl", "./nor/here", "*.nothing", "a.csv", "what is this"], "train")
    message = str(error.value)
    for part in (
        "'nowhere.jsonl'",
        "'./nor/here'",
        "no file fits the pattern",
        ".csv files",
        "'what is this'",
    ):
        assert part in message


def test_the_standard_library_is_many_real_documents(scratch: Path) -> None:
    [source] = find_sources("stdlib", "train")
    [rows] = open_source(source, None, scratch).rows
    assert len(rows.sizes) > 300
    assert rows.sizes.min() > 0
    assert rows.names == sorted(rows.names, key=lambda name: name.split("/"))
    assert not any("site-packages" in name or "/test/" in name for name in rows.names)
    i = rows.names.index("stdlib/argparse.py")
    [(number, document)] = rows.reader.read(rows.part(i, i + 1))
    assert number == i
    assert "class ArgumentParser" in document.row["text"]
    assert source.fingerprint() == find_sources("stdlib", "train")[0].fingerprint()


def test_the_fingerprint_follows_the_data(here: Path) -> None:
    write_lines(here / "a.jsonl", [{"text": "a"}])
    stamps = set()
    for touch in (
        lambda: None,
        lambda: os.utime("a.jsonl", (1, 1)),
        lambda: write_lines(here / "a.jsonl", [1]),
    ):
        touch()
        stamps.add(find_sources("a.jsonl", "train")[0].fingerprint())
    stamps.add(find_sources("a.jsonl", "test")[0].fingerprint())
    assert len(stamps) == 4


def test_sizes_cover_the_file(here: Path, scratch: Path) -> None:
    write_lines(here / "a.jsonl", [{"text": "a" * n} for n in (1, 100, 10)])
    [source] = find_sources("a.jsonl", "train")
    [rows] = open_source(source, None, scratch).rows
    assert rows.sizes.sum() == os.path.getsize("a.jsonl") - 3
    assert np.argmax(rows.sizes) == 1


def test_text_that_is_not_utf8_in_a_table_is_one_row(here: Path, scratch: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    values = [b"a", b"caf\xe9", "caf\u00e9".encode()]
    column = pa.Array.from_buffers(pa.string(), 3, pa.array(values, pa.binary()).buffers())
    parquet.write_table(pa.table({"text": column}), "a.parquet")
    [first, problem, last], _ = read("a.parquet", scratch)
    assert texts([first, last]) == ["a", "caf\u00e9"]
    assert (problem.where, problem.reason) == ("a.parquet row 1", "not UTF-8")


def test_a_wrong_offset_in_a_saved_dataset_leads_nowhere(here: Path, scratch: Path) -> None:
    datasets.Dataset.from_dict({"text": [f"document {i}" for i in range(600)]}).save_to_disk("saved")
    [shard] = (here / "saved").glob("*.arrow")
    raw = bytearray(shard.read_bytes())
    offset = 10 * 10 + 90 * 11 + 200 * 12  # of row 300
    at = raw.index(struct.pack("<2i", offset, offset + 12))
    raw[at : at + 4] = b"\xff\xff\xff\x7f"
    shard.write_bytes(bytes(raw))
    found, _ = read("saved", scratch)
    problems = [row for row in found if not isinstance(row, Document)]
    assert len(found) == 600
    # It ends one row and begins the next.
    assert [problem.where for problem in problems] == ["saved[train] row 299", "saved[train] row 300"]
    assert {problem.reason for problem in problems} == {"unreadable row"}


@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_damaged_shard_of_a_saved_dataset_is_one_problem(here: Path, scratch: Path, harm: str) -> None:
    datasets.Dataset.from_dict({"text": list("abcd")}).save_to_disk("saved", num_shards=2)
    shard = here / "saved" / "data-00001-of-00002.arrow"
    if harm == "cut":
        shard.write_bytes(shard.read_bytes()[:-200])
    else:
        shard.unlink()
    found, [problem] = read("saved", scratch)
    assert texts(found) == ["a", "b"]
    assert (problem.where, problem.reason) == (str(Path("saved", shard.name)), "unreadable file")


def test_a_damaged_file_in_a_folder_of_tables_is_named(here: Path, scratch: Path) -> None:
    (here / "tables").mkdir()
    (here / "tables" / "a.jsonl").write_text('{"text": "a"}\n')
    (here / "tables" / "b.jsonl").write_text('{"text": "b"}\n{"text": "b\n')
    with pytest.raises(ValueError, match=r"not all of its files can be read:\n  .*b\.jsonl:2: invalid JSON"):
        read("tables", scratch)


def test_no_room_for_an_unpacked_copy_says_nothing_of_the_file(
    here: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else data.on_error=skip would leave a good file out."""
    (here / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("longseq.launch.data.sources.shutil.copyfileobj", full)
    with pytest.raises(OSError, match="No space"):
        read("a.jsonl.gz", scratch)
