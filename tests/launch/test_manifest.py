"""Damage of every kind is found and named, and the run goes on from the newest checkpoint that has none."""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_run import forget_manifest
from torch import nn

from longseq.distributed import ProcessGroups, checked_file
from longseq.distributed.checked_file import BytesFile, chunk_problem, record_of, write_file
from longseq.distributed.engine import LocalEngine
from longseq.launch import checkpoint_folder, manifest
from longseq.launch.checkpoint import Checkpoints, RunState, newest_checkpoint
from longseq.launch.checkpoint_folder import make_draft
from longseq.launch.config_file import parse_config
from longseq.launch.manifest import checksum_problems, read_manifest, size_problem, survey
from longseq.launch.resume import choose_checkpoint


def engine(step: int) -> LocalEngine:
    torch.manual_seed(step)
    model = nn.Linear(5, 3)
    made = LocalEngine(model, torch.optim.AdamW(model.parameters()), ProcessGroups())
    made.backward(model(torch.ones(1, 5)).sum())
    made.step(0.1)
    return made


def write_model_files(folder: Path) -> None:
    (folder / "config.yaml").write_text("model: {}\n")
    (folder / "hf").mkdir()
    (folder / "hf" / "tokenizer.json").write_text("{}")


def save(run: Path, *steps: int, keep: int = 9) -> None:
    checkpoints = Checkpoints(run, ProcessGroups(), keep)
    for step in steps:
        checkpoints.save(engine(step), RunState(step=step), write_model_files)


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.name != "latest")


def choose(run: Path, resume: str = "auto") -> Path | None:
    config = parse_config(
        {
            "model": {"config": {"model_type": "llama"}},
            "data": {"tokenizer": "bytes"},
            "checkpoint": {"resume": resume},
            "log": {"run_dir": str(run)},
        }
    )
    return choose_checkpoint(config, Checkpoints(run, ProcessGroups(), keep=2), ProcessGroups())


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 1, 2 and 3."""
    run = tmp_path_factory.mktemp("three")
    save(run, 1, 2, 3)
    return run


@pytest.fixture
def run(three: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(three, tmp_path / "run"))


FILES = (
    "engine/model.safetensors",
    "engine/optimizer.safetensors",
    "rng/rank-00000.pt",
    "hf/tokenizer.json",
    "config.yaml",
    "state.json",
    "manifest.json",
)


def test_the_manifest_lists_every_file(three: Path) -> None:
    there = {path.relative_to(folder(three, 3)) for path in folder(three, 3).rglob("*") if path.is_file()}
    assert {path.as_posix() for path in there} == set(FILES)
    files = read_manifest(folder(three, 3))
    assert files is not None
    assert {*files, "manifest.json"} == set(FILES)
    for name, record in files.items():
        assert record == record_of(folder(three, 3) / name)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def delete(path: Path) -> None:
    path.unlink()


def flip_the_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, empty, delete, flip_the_last_bit])
def test_damage_is_named_and_passed_over(
    run: Path, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(folder(run, 3) / name)
    with pytest.raises(ValueError, match=f"{re.escape(name)}|no checkpoint"):  # by name it is refused
        choose(run, str(folder(run, 3)))
    with caplog.at_level(logging.WARNING, logger="longseq"):
        assert choose(run) == folder(run, 2)
    [said] = caplog.messages
    assert f"{folder(run, 3)} is passed over" in said
    assert name in said
    assert f"goes on from {folder(run, 2)}. It is now called step-00000003.damaged." in said
    # Nothing is deleted, and once it is renamed nothing more is said.
    assert names(run) == ["step-00000001", "step-00000002", "step-00000003.damaged"]
    caplog.clear()
    assert choose(run) == folder(run, 2)
    assert [said for said in caplog.messages if ".damaged" in said] == []


def test_the_newest_may_be_two_before(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    truncate(folder(run, 3) / FILES[0])
    flip_the_last_bit(folder(run, 2) / FILES[1])
    assert choose(run) == folder(run, 1)
    assert names(run) == ["step-00000001", "step-00000002.damaged", "step-00000003.damaged"]
    # Their steps come again, and may be damaged again.
    save(run, 2, 3)
    empty(folder(run, 3) / FILES[0])
    assert choose(run) == folder(run, 2)
    assert names(run)[2:] == ["step-00000002.damaged", "step-00000003.damaged", "step-00000003.damaged-2"]


def test_where_all_are_damaged_nothing_is_begun_anew(run: Path) -> None:
    for step in (1, 2, 3):
        flip_the_last_bit(folder(run, step) / "engine" / "model.safetensors")
    before = names(run)
    with pytest.raises(ValueError, match=r"none that can be gone on from:(.*\n)*.*move them away") as refused:
        choose(run)
    assert str(refused.value).count("engine/model.safetensors has other bytes") == 3
    assert names(run) == before


def test_a_named_checkpoint_that_is_damaged_is_refused_with_a_way_out(run: Path, tmp_path: Path) -> None:
    flip_the_last_bit(folder(run, 3) / "engine" / "model.safetensors")
    with pytest.raises(ValueError, match=r"step-00000003 is damaged: engine/model.*checkpoint\.resume=auto"):
        choose(run, str(folder(run, 3)))
    assert "step-00000003" in names(run)
    # Of the sizes alone one knows that there is no later one: the run goes on from the one before.
    truncate(folder(run, 3) / "engine" / "model.safetensors")
    assert choose(run, str(folder(run, 2))) == folder(run, 2)
    assert names(run)[-1] == "step-00000003.damaged"


def test_never_refuses_damaged_ones_too(run: Path) -> None:
    for step in (1, 2, 3):
        truncate(folder(run, step) / "state.json")
    with pytest.raises(ValueError, match=r"resume=never but .*step-0000000. is there"):
        choose(run, "never")


def test_a_half_written_one_is_named(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "checkpoints" / ".step-00000004.partial" / "engine").mkdir(parents=True)
    with caplog.at_level(logging.WARNING, logger="longseq"):
        assert choose(run) == folder(run, 3)
    assert "step-00000004.partial is passed over: its writing was cut off" in caplog.text
    (run / "first" / "checkpoints" / ".step-00000001.partial").mkdir(parents=True)
    assert choose(run / "first") is None
    assert "the run starts anew" in caplog.text


def test_a_lost_newest_is_missed(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(folder(run, 3))
    with caplog.at_level(logging.WARNING, logger="longseq"):
        assert choose(run) == folder(run, 2)
    assert re.search(r"step-00000003 is passed over: it is not there, and .*latest names it", caplog.text)
    for nonsense in (b"", b"step-zebra\n", b"\xff\xfe"):
        caplog.clear()
        (run / "checkpoints" / "latest").write_bytes(nonsense)
        assert choose(run) == folder(run, 2)
        assert "latest is passed over" in caplog.text


def test_old_ones_go_once_the_new_one_is_whole_and_only_whole_ones_count(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4)
    truncate(folder(tmp_path, 3) / "engine" / "model.safetensors")
    delete(folder(tmp_path, 4) / "rng" / "rank-00000.pt")
    save(tmp_path, 5, keep=2)
    # The damaged ones are no checkpoints, and not this run's to delete: somebody may want to see why.
    assert names(tmp_path) == [f"step-0000000{step}" for step in (2, 3, 4, 5)]
    save(tmp_path, 6, keep=1)
    assert [path.name for path in survey(tmp_path / "checkpoints").good] == ["step-00000006"]


def test_a_leftover_that_cannot_be_deleted_stops_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On NFS, a file that somebody still reads stays, and its folder with it."""
    left, draft = tmp_path / ".step-00000001.removed", tmp_path / ".step-00000002.partial"
    left.mkdir()

    def busy(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(checkpoint_folder.shutil, "rmtree", busy)
    make_draft(draft)
    assert (draft / "engine").is_dir()
    assert f"{left} could not be deleted" in caplog.text
    with pytest.raises(OSError, match=r"partial"):
        make_draft(draft)


def test_one_that_was_being_replaced_is_as_good_as_any(run: Path) -> None:
    folder(run, 3).rename(run / "checkpoints" / "step-00000003.older")
    assert choose(run) == run / "checkpoints" / "step-00000003.older"
    assert newest_checkpoint(run).name == "step-00000003.older"
    save(run, 3)
    assert names(run) == ["step-00000001", "step-00000002", "step-00000003"]


def test_early_checkpoints_are_taken_for_what_they_seem(run: Path) -> None:
    forget_manifest(folder(run, 3))
    assert read_manifest(folder(run, 3)) is None
    assert choose(run) == folder(run, 3)
    (folder(run, 3) / "state.json").write_text("[]")
    assert size_problem(folder(run, 3)) == "state.json cannot be read (it is no JSON object)"


def test_a_manifest_of_another_version_is_not_guessed_at(run: Path) -> None:
    path = folder(run, 3) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    assert size_problem(folder(run, 3)) == "manifest.json is of another version of longseq"


def test_damage_of_the_manifest_is_not_taken_for_that_of_a_file(run: Path) -> None:
    path = folder(run, 3) / "manifest.json"
    text = path.read_text()
    path.write_text(re.sub(r'"bytes": (\d+)', lambda found: f'"bytes": {int(found[1]) + 1}', text, count=1))
    assert size_problem(folder(run, 3)) == "manifest.json has other bytes than were written"


def test_a_large_file_is_shared_chunk_by_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (checked_file, manifest):
        monkeypatch.setattr(module, "CHUNK_BYTES", 10)
    for num_bytes in (0, 9, 10, 11, 30, 35):
        data = bytes(range(num_bytes))
        record = write_file(tmp_path / "a", BytesFile("a", data))
        assert record == record_of(tmp_path / "a")
        assert (record.num_bytes, len(record.checksums)) == (num_bytes, -(-num_bytes // 10))
    manifest.write_manifest(tmp_path, {"a": record})
    flipped = bytearray(data)
    flipped[22] ^= 64
    (tmp_path / "a").write_bytes(flipped)
    assert [index for index in range(4) if chunk_problem(tmp_path / "a", record, index)] == [2]
    found = [checksum_problems(tmp_path, part=part, parts=3) for part in range(3)]
    assert found == [[], [], ["a has other bytes than were written (checksum of bytes 20 to 29)"]]
