"""Tokens on a disk that fails: what is read is what was written, or nobody trains on it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import Workshop, assert_equal_runs, at_step, train_here

from longseq.launch.config import DataConfig
from longseq.launch.data import shards, token_store, tokenise
from longseq.launch.data.prepare import prepare
from longseq.launch.data.shards import DamagedTokensError
from longseq.launch.data.token_store import TokenStore
from longseq.launch.data.tokenise import plan_tasks
from longseq.launch.exit_status import is_crash, status_of


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Documents over many blocks, and some shards."""
    for module in (shards, token_store):
        monkeypatch.setattr(module, "BLOCK_BYTES", 70)
    monkeypatch.setattr(token_store, "SHARD_BYTES", 1000)
    monkeypatch.setattr(tokenise, "plan_tasks", lambda sources: plan_tasks(sources, task_bytes=300))
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"document {i} " + "x" * (7 * i % 50)} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(source=str(path), cache_dir=str(tmp_path / "cache"), eval_fraction=0)


ONE_STORE = ("data.eval_source=null", "data.eval_fraction=0")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def truth(shop: Workshop) -> Path:
    return shop.run("truth", *ONE_STORE)


def tokens(store: TokenStore) -> list[list[int]]:
    return [store.tokens(i).tolist() for i in range(len(store))]


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(bytes(raw))


def test_any_stretch_is_read_right(data: DataConfig) -> None:
    store = prepare(data, "bytes").train
    assert len(store.meta["shard_tokens"]) > 2
    whole = tokens(store)
    for i in (0, 3, 39):
        for start in range(0, len(whole[i]), 3):
            fresh = TokenStore.open(store.path)  # with no block seen yet
            for stop in (start, start + 1, len(whole[i])):
                assert fresh.tokens(i, start, stop).tolist() == whole[i][start:stop]


def test_a_bit_that_flipped_is_seen_when_it_is_read_and_the_shard_made_anew(
    data: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    store = prepare(data, "bytes").train
    right = tokens(store)
    size = (store.path / "shard-00000.bin").stat().st_size
    for at in (0, 69, 70, size - 1):
        path = store.path / "shard-00000.bin"
        flip(path, at)
        fresh = prepare(data, "bytes")
        assert fresh.report.reused
        said = r"shard-00000\.bin: bytes .* written.*the same command"
        with pytest.raises(DamagedTokensError, match=said) as told:
            tokens(fresh.train)
        assert is_crash(status_of(told.value))  # so that --max-restarts goes on
        caplog.clear()
        again = prepare(data, "bytes")
        assert not again.report.reused
        assert "shard-00000.bin: bytes " in caplog.text
        assert "is made anew from data.source" in caplog.text
        assert tokens(again.train) == right


def test_tokens_that_another_run_made_anew_are_not_called_damaged(data: DataConfig) -> None:
    """They may lie in another order; two runs would else make them anew in turn, for ever."""
    store = prepare(data, "bytes").train
    store.tokens(0, 0, 1)
    (store.path / "damaged").write_text("seen by another run")
    assert not prepare(data, "bytes").report.reused
    flip(store.path / "shard-00001.bin", 0)  # as where documents lie in another order
    with pytest.raises(DamagedTokensError, match=r"shard-00001\.bin"):
        tokens(store)
    assert not (store.path / "damaged").exists()


@pytest.mark.parametrize("name", ["documents.npy", "runs.npy", "blocks.npy", "meta.json"])
def test_a_damaged_table_is_made_anew(data: DataConfig, name: str, caplog: pytest.LogCaptureFixture) -> None:
    store = prepare(data, "bytes").train
    right, path = tokens(store), store.path / name
    flip(path, path.stat().st_size - 1 if name != "meta.json" else 0)
    again = prepare(data, "bytes")
    assert not again.report.reused
    assert str(store.path) in caplog.text
    assert tokens(again.train) == right


def test_tokens_that_cannot_be_made_anew_say_both(data: DataConfig) -> None:
    store = prepare(data, "bytes").train
    (store.path / "shard-00000.bin").unlink()
    raw = Path(data.source).stat()
    Path(data.source).write_bytes(b"\xff" * raw.st_size)
    os.utime(data.source, ns=(raw.st_atime_ns, raw.st_mtime_ns))  # as if it were the same
    said = r"shard-00000\.bin[\s\S]*It could not be made anew: data\.source: [\s\S]*UTF-8"
    with pytest.raises(ValueError, match=said):
        prepare(data, "bytes")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: path.unlink(), "it cannot be read: No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), r"it has 100 bytes, and had \d"),
        (lambda path: shutil.rmtree(path.parent), "it cannot be read: No such file"),
    ],
)
def test_a_shard_that_goes_while_a_run_trains(
    shop: Workshop, truth: Path, harm: Callable[[Path], object], said: str
) -> None:
    """It stops with the shard's name; the same command makes it anew and ends as if nothing had been."""
    name = f"run-{len(list(shop.folder.iterdir()))}"
    cache = shop.folder / f"cache-{name}"
    config = shop.config(name, f"data.cache_dir={cache}", "checkpoint.every=1", *ONE_STORE)

    def strike() -> None:
        [shard] = cache.rglob("shard-*.bin")
        harm(shard)

    with at_step(1, strike), pytest.raises(DamagedTokensError, match=rf"shard-00000\.bin: {said}"):
        train_here(config)
    assert train_here(config).step == 4
    assert_equal_runs(shop.folder / name, truth)
