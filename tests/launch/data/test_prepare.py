from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizer_samples import merging_tokenizer

from longseq.launch.config import DataConfig
from longseq.launch.data import prepare as module
from longseq.launch.data import token_store, tokenise
from longseq.launch.data.prepare import PreparedData, prepare
from longseq.launch.data.token_store import TokenStore
from longseq.launch.data.tokenise import plan_tasks
from longseq.launch.data.tokenizer import byte_tokenizer


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    path = tmp_path / "rows.jsonl"
    write(path, [{"text": f"document {i} " + "x" * (7 * i % 50)} for i in range(40)])
    return DataConfig(source=str(path), cache_dir=str(tmp_path / "cache"), eval_fraction=0.1)


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def decoded(store: TokenStore) -> list[str]:
    tokenizer = byte_tokenizer()
    return [tokenizer.decode(store.tokens(i).tolist(), skip_special_tokens=True) for i in range(len(store))]


def folders(data: DataConfig) -> list[str]:
    return sorted(path.name for path in Path(data.cache_dir, "tokens").iterdir() if path.is_dir())


def test_every_document_is_on_one_side_with_its_name(data: DataConfig) -> None:
    prepared = prepare(data, "bytes")
    assert (len(prepared.train), len(prepared.heldout)) == (36, 4)
    rows = [json.loads(line)["text"] for line in Path(data.source).read_text().splitlines()]
    names = {}
    for store in (prepared.train, prepared.heldout):
        for i, text in enumerate(decoded(store)):
            names[store.name(i)] = text
    assert names == {f"{data.source}:{i + 1}": text for i, text in enumerate(rows)}
    assert prepared.train.lengths.sum() + prepared.heldout.lengths.sum() == prepared.report.num_tokens


def test_the_second_time_it_is_found_again(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(data, "bytes")
    monkeypatch.setattr(module, "tokenise", lambda *_, **__: pytest.fail("tokenised again"))
    second = prepare(data, "bytes")
    assert (first.report.reused, second.report.reused) == (False, True)
    np.testing.assert_array_equal(first.train.chosen, second.train.chosen)
    assert decoded(first.heldout) == decoded(second.heldout)
    # What is held out is chosen among the documents that are there.
    assert len(prepare(data.model_copy(update={"eval_fraction": 0.5}), "bytes").heldout) == 20


def test_whatever_changes_the_tokens_makes_them_anew(data: DataConfig) -> None:
    prepare(data, "bytes")
    prepare(data, merging_tokenizer())
    prepare(data.model_copy(update={"max_documents": 5}), "bytes")
    with Path(data.source).open("a") as file:
        file.write('{"text": "more"}\n')
    assert len(prepare(data, "bytes").train.meta["sources"]) == 1
    assert len(folders(data)) == 4


def test_masks_and_slices_come_back(data: DataConfig, tmp_path: Path) -> None:
    write(tmp_path / "ids.jsonl", [{"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, 2, 3, -100, -100, 6]}])
    store = prepare(data.model_copy(update={"source": str(tmp_path / "ids.jsonl")}), "bytes").train
    mask = np.array([0, 1, 1, 0, 0, 1], bool)
    for start in range(7):
        for stop in range(start, 7):
            np.testing.assert_array_equal(store.loss_mask(0, start, stop), mask[start:stop])
            np.testing.assert_array_equal(store.tokens(0, start, stop), np.arange(1, 7)[start:stop])
    assert store.loss_lengths.tolist() == [3]
    with pytest.raises(IndexError):
        store.tokens(0, 0, 7)


def test_tasks_and_shards_of_any_size_hold_the_same(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "p" * (i % 7), "completion": f"{i} " + "c" * (11 * i % 31)} for i in range(30)]
    write(tmp_path / "rows.jsonl", rows)
    expected = prepare(data, "bytes").train
    monkeypatch.setattr(token_store, "SHARD_BYTES", 500)
    monkeypatch.setattr(tokenise, "plan_tasks", lambda sources: plan_tasks(sources, task_bytes=100))
    store = prepare(data.model_copy(update={"cache_dir": data.cache_dir + "2"}), "bytes").train
    assert len(store.meta["shard_tokens"]) > 2
    assert decoded(store) == decoded(expected)
    for i in range(len(store)):
        assert store.name(i) == expected.name(i)
        np.testing.assert_array_equal(store.loss_mask(i), expected.loss_mask(i))
    np.testing.assert_array_equal(store.loss_lengths, expected.loss_lengths)


def test_a_store_travels_to_workers_without_its_data(data: DataConfig) -> None:
    store = prepare(data, "bytes").train
    texts = decoded(store)
    assert decoded(pickle.loads(pickle.dumps(store))) == texts
    assert "_shards" in vars(store)
    assert "_shards" not in vars(pickle.loads(pickle.dumps(store)))


def test_an_evaluation_source_of_its_own(data: DataConfig, tmp_path: Path) -> None:
    write(tmp_path / "eval.jsonl", [{"text": "held"}])
    prepared = prepare(data.model_copy(update={"eval_source": str(tmp_path / "eval.jsonl")}), "bytes")
    assert len(prepared.train) == 40
    assert decoded(prepared.heldout) == ["held"]
    assert prepared.eval_report.num_documents == 1


def test_one_document_is_trained_on(data: DataConfig) -> None:
    prepared = prepare(data.model_copy(update={"max_documents": 1}), "bytes")
    assert len(prepared.train) == 1
    assert prepared.heldout is None


BAD = [{"text": "good"}, {"text": ""}, {"other": 1}, {"text": 5}, {"text": "fine"}]


def test_problems_are_raised_together(data: DataConfig, tmp_path: Path) -> None:
    write(tmp_path / "bad.jsonl", BAD)
    sources = (str(tmp_path / "bad.jsonl"), str(tmp_path / "rows.jsonl"))
    with pytest.raises(ValueError, match=r"data\.source: 3 rows or files.*all rows were read") as error:
        prepare(data.model_copy(update={"source": sources}), "bytes")
    message = str(error.value)
    for line, reason in ((2, "empty document"), (3, "other columns"), (4, "wrong type")):
        assert f"bad.jsonl:{line}: {reason}" in message
    assert "data.on_error=skip" in message
    assert folders(data) == []


def test_only_the_first_problems_are_listed(data: DataConfig, tmp_path: Path) -> None:
    write(tmp_path / "bad.jsonl", [{"text": "good"}] + [{"text": ""}] * 500)
    with pytest.raises(ValueError, match="the rest was not read") as error:
        prepare(data.model_copy(update={"source": str(tmp_path / "bad.jsonl")}), "bytes")
    assert str(error.value).count("empty document") == module.MAX_PROBLEMS


def test_skipped_rows_are_counted_each_time(data: DataConfig, tmp_path: Path) -> None:
    write(tmp_path / "bad.jsonl", BAD)
    (tmp_path / "none.jsonl").write_text('{"body": "x"}\n')
    sources = (str(tmp_path / "bad.jsonl"), str(tmp_path / "none.jsonl"))
    skipping = data.model_copy(update={"source": sources, "on_error": "skip"})
    for _ in range(2):
        report = prepare(skipping, "bytes").report
        assert report.num_documents == 2
        assert report.skipped == {
            "no usable columns": 1,
            "empty document": 1,
            "other columns than the first row": 1,
            "wrong type": 1,
        }
        assert "1 empty document" in report.text()
        assert "none.jsonl" in report.text()
    with pytest.raises(ValueError, match="4 rows or files"):
        prepare(skipping.model_copy(update={"on_error": "raise"}), "bytes")


def test_nothing_left_is_an_error_even_when_skipping(data: DataConfig, tmp_path: Path) -> None:
    write(tmp_path / "bad.jsonl", [{"text": ""}])
    skipping = data.model_copy(update={"source": str(tmp_path / "bad.jsonl"), "on_error": "skip"})
    with pytest.raises(ValueError, match=r"no document that can be used[\s\S]*bad\.jsonl:1: empty document"):
        prepare(skipping, "bytes")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="no document that can be used"):
        prepare(data.model_copy(update={"source": str(tmp_path / "empty.jsonl")}), "bytes")


def test_an_interrupted_run_leaves_nothing_half_made(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "plot_lengths", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(data, "bytes")
    assert folders(data) == []
    assert len(prepare(data, "bytes").train) == 36


def test_a_cut_shard_is_made_anew(data: DataConfig) -> None:
    prepared = prepare(data, "bytes")
    texts = decoded(prepared.train)
    shard = prepared.train.path / "shard-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"damaged.*delete"):
        TokenStore.open(prepared.train.path)
    again = prepare(data, "bytes")
    assert not again.report.reused
    assert decoded(again.train) == texts


def test_data_that_changes_meanwhile_is_refused(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.tokenise

    def changing(*args: Any, **options: Any) -> Any:
        with Path(data.source).open("a") as file:
            file.write('{"text": "more"}\n')
        return real(*args, **options)

    monkeypatch.setattr(module, "tokenise", changing)
    with pytest.raises(ValueError, match="changed while it was read"):
        prepare(data, "bytes")
    assert folders(data) == []


def test_a_cache_that_cannot_be_written_is_named(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data\.cache_dir or \$LONGSEQ_CACHE"):
        prepare(data.model_copy(update={"cache_dir": str(tmp_path / "file")}), "bytes")


def test_processes_that_start_at_once_agree(data: DataConfig) -> None:
    script = f"""
from longseq.launch.config import DataConfig
from longseq.launch.data.prepare import prepare
prepared = prepare(DataConfig.model_validate_json({data.model_dump_json()!r}), "bytes")
print(prepared.report.reused, prepared.train.lengths.tolist())
"""
    running = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    outputs = [process.communicate(timeout=60)[0].split(" ", 1) for process in running]
    assert sorted(reused for reused, _ in outputs) == ["False", "True", "True"]
    assert len({lengths for _, lengths in outputs}) == 1
    assert len(folders(data)) == 1


def test_what_is_shown(data: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    prepared: PreparedData = prepare(data, "bytes", progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "40 documents" in shown.err
    assert str(prepared.report.folder) in shown.err
    assert (prepared.report.folder / "lengths.png").exists()
    prepare(data, "bytes")
    assert capsys.readouterr().err == ""
