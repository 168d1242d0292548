"""Checkpoints that cannot be gone on from or exported: damage of each file, another run's, no such place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_inputs import Case, Place, check, digests, parametrized
from tiny_run import Workshop, losses

from longseq.launch.cli import main

LAST = "run/checkpoints/step-00000002"


@pytest.fixture(scope="module")
def place_of_all(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workshop, dict[str, Path]]:
    """Good documents and configs, and a run of two steps with a checkpoint of each."""
    shop = Workshop(tmp_path_factory.mktemp("shop"))
    run = shop.run("trained", "train.steps=2", "checkpoint.every=1")
    longer = shop.run("longer", "train.steps=3")
    return shop, {"trained": run, "longer": longer}


Damage = Callable[[Path], Any]


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 0x40
    path.write_bytes(content)


def missing(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def copied(place: Place) -> Path:
    """A run of its own that a case may damage; returns its newest checkpoint."""
    if not (place.folder / "run").exists():
        shutil.copytree(place.runs["trained"], place.folder / "run")
    return place.folder / LAST


def resume(name: str, damage: Damage, *says: str, overrides: tuple[str, ...] = ()) -> Case:
    """Going on from the newest checkpoint by its name, after something was done to it."""

    def make(place: Place) -> list[str | Path]:
        newest = copied(place)
        damage(newest)
        given = [override.format(run=place.folder / "run") for override in overrides]
        return ["train", place.yaml(), "train.steps=4", f"checkpoint.resume={newest}", *given]

    return Case(name, make, says)


def again(name: str, damage: Damage, *says: str, overrides: tuple[str, ...] = ()) -> Case:
    """The same command again (checkpoint.resume=auto), after something was done to the run."""

    def make(place: Place) -> list[str | Path]:
        newest = copied(place)
        damage(newest.parents[1])
        return ["train", place.yaml(), "train.steps=4", *overrides]

    return Case(name, make, says)


def export(name: str, damage: Damage, *says: str, options: tuple[str, ...] = ()) -> Case:
    """Exporting the newest checkpoint, after something was done to it."""

    def make(place: Place) -> list[str | Path]:
        newest = copied(place)
        damage(newest)
        return ["export", newest, place.folder / "out", *options]

    return Case(name, make, says)


FILES = {
    "state": "state.json",
    "config": "config.yaml",
    "weights": "engine/model.safetensors",
    "optimizer's states": "engine/optimizer.safetensors",
    "random state": "rng/rank-00000.pt",
    "manifest": "manifest.json",
}

DAMAGED = tuple(
    resume(
        f"{what} {damage.__name__}",
        lambda newest, file=file, damage=damage: damage(newest / file),
        "step-00000002",
    )
    for what, file in FILES.items()
    for damage in (truncated, emptied, flipped, missing, a_folder, a_link_to_itself)
)


def edit(file: str, **changes: Any) -> Damage:
    """Sets keys of a JSON file of a checkpoint."""

    def damage(newest: Path) -> None:
        path = newest / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def every_checkpoint(damage: Damage) -> Damage:
    return lambda run: [damage(folder) for folder in (run / "checkpoints").glob("step-*")]


def mixed(newest: Path) -> None:
    """The weights of the checkpoint before."""
    shutil.copy(newest.with_name("step-00000001") / "engine" / "model.safetensors", newest / "engine")


def a_second_file(newest: Path) -> None:
    shutil.copy(newest / "engine" / "model.safetensors", newest / "engine" / "model-2.safetensors")


def nothing(folder: Path) -> None:
    pass


WALKS = (
    again(
        "another model",
        nothing,
        "model.config",
        "the checkpoint has",
        overrides=("model.config.num_hidden_layers=1",),
    ),
    again(
        "another seed",
        nothing,
        "train.seed=7 but the checkpoint has 0",
        "Set them back",
        overrides=("train.seed=7",),
    ),
    again(
        "another length",
        nothing,
        "sequence.length=64 but the checkpoint has 128",
        "Set them back",
        overrides=("sequence.length=64",),
    ),
    again(
        "another batch",
        nothing,
        "train.global_batch_sequences=4 but the checkpoint has 2",
        overrides=("train.global_batch_sequences=4",),
    ),
    again(
        "another precision",
        nothing,
        "train.precision='bf16' but the checkpoint has 'float32'",
        overrides=("train.precision=bf16",),
    ),
    again(
        "another optimizer",
        nothing,
        "optimizer",
        overrides=("optimizer.name=apollo", "optimizer.apollo.rank=4"),
    ),
    again(
        "never",
        nothing,
        "checkpoint.resume=never but",
        "step-00000002",
        "set another log.run_dir",
        overrides=("checkpoint.resume=never",),
    ),
    again(
        "every checkpoint without weights",
        every_checkpoint(lambda folder: missing(folder / "engine" / "model.safetensors")),
        "checkpoints",
    ),
    again(
        "every checkpoint with its state emptied",
        every_checkpoint(lambda folder: emptied(folder / "state.json")),
        "checkpoints",
    ),
    again(
        "checkpoints that are a file",
        lambda run: (shutil.rmtree(run / "checkpoints"), (run / "checkpoints").write_text("")),
        "checkpoints",
    ),
    again(
        "metrics that are no JSON",
        lambda run: (run / "metrics.jsonl").write_text("{\n{\n"),
        "metrics.jsonl:1",
    ),
    again(
        "a run's folder that is a file",
        lambda run: (shutil.rmtree(run), run.write_text("mine")),
        "log.run_dir",
        "run",
    ),
    Case(
        "a place that cannot be written",
        lambda place: ["train", place.yaml(), "log.run_dir=/proc/run"],
        ("log.run_dir", "/proc/run"),
    ),
    Case(
        "a run's folder below a file",
        lambda place: ["train", place.yaml(), "log.run_dir=/dev/null/run"],
        ("log.run_dir", "/dev/null"),
    ),
    Case(
        "other documents under the same name",
        lambda place: (
            copied(place),
            shutil.copy(place.shop.folder / "held_out.jsonl", place.folder / "docs.jsonl"),
            ["train", place.yaml(), "train.steps=4", f"data.source={place.folder / 'docs.jsonl'}"],
        )[-1],
        ("data.source", "Set them back"),
    ),
    resume("weights of the checkpoint before", mixed, "step-00000002"),
    resume("a file too many", a_second_file, "step-00000002"),
    resume("a state of another version", edit("state.json", words=3), "state.json cannot be read", "words"),
    resume(
        "a state that is a list",
        lambda newest: (newest / "state.json").write_text("[]"),
        "state.json cannot be read",
    ),
    resume("a state with words for numbers", edit("state.json", step="two"), "state.json"),
    resume("a state of negative numbers", edit("state.json", sequences_seen=-3), "state.json"),
    resume(
        "an older checkpoint of a run that went on",
        nothing,
        "but the run has gone on to",
        "set checkpoint.resume=auto",
        overrides=("checkpoint.resume={run}/checkpoints/step-00000001",),
    ),
    resume(
        "no checkpoint there",
        nothing,
        "is no checkpoint",
        "give a folder such as",
        overrides=("checkpoint.resume=/tmp",),
    ),
    resume(
        "no such folder to resume from",
        nothing,
        "no/such is no checkpoint",
        "give a folder",
        overrides=("checkpoint.resume=no/such",),
    ),
    resume("a slip in auto", nothing, "checkpoint.resume", "atuo", overrides=("checkpoint.resume=atuo",)),
    resume("a file to resume from", nothing, "is no checkpoint", overrides=("checkpoint.resume=/dev/null",)),
)


def exports_to(name: str, out: Callable[[Path], Any], *says: str, options: tuple[str, ...] = ()) -> Case:
    """Exporting a good checkpoint to a place that cannot take it."""
    return Case(name, lambda place: ["export", copied(place), out(place.folder), *options], says)


def note(folder: Path) -> Path:
    (folder / "notes.txt").write_text("mine")
    return folder / "notes.txt"


def full_folder(folder: Path) -> Path:
    (folder / "papers").mkdir()
    (folder / "papers" / "draft.txt").write_text("mine")
    return folder / "papers"


def exported_before(folder: Path) -> Path:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    return folder / "model"


EXPORTS = (
    *(
        export(
            f"export with {what} {damage.__name__}",
            lambda newest, file=file, damage=damage: damage(newest / file),
            *says,
        )
        for what, file, damage, says in (
            ("state", "state.json", missing, ("is no checkpoint", "give a folder")),
            ("config", "config.yaml", missing, ("step-00000002",)),
            ("config", "config.yaml", emptied, ("step-00000002",)),
            ("weights", "engine/model.safetensors", missing, ("step-00000002",)),
            ("weights", "engine/model.safetensors", truncated, ("step-00000002",)),
            ("weights", "engine/model.safetensors", emptied, ("step-00000002",)),
            ("weights", "engine/model.safetensors", flipped, ("step-00000002",)),
            ("model's config", "hf/config.json", missing, ("step-00000002",)),
            ("model's config", "hf/config.json", truncated, ("step-00000002",)),
            ("tokenizer", "hf/tokenizer.json", missing, ("step-00000002",)),
            ("tokenizer", "hf/tokenizer.json", truncated, ("step-00000002",)),
            ("generation config", "hf/generation_config.json", truncated, ("step-00000002",)),
        )
    ),
    Case(
        "export of no run",
        lambda place: ["export", place.folder / "no", place.folder / "out"],
        ("no is no checkpoint", "give a folder"),
    ),
    Case(
        "export of a file",
        lambda place: ["export", note(place.folder), place.folder / "out"],
        ("notes.txt is no checkpoint", "give a folder"),
    ),
    exports_to("export over a file", note, "notes.txt", "name another folder"),
    exports_to("export into a folder of other things", full_folder, "papers", "name another folder"),
    exports_to(
        "export into such a folder by force",
        full_folder,
        "papers",
        "name another folder",
        options=("--overwrite",),
    ),
    exports_to("export over a model", exported_before, "model is there already", "--overwrite"),
    exports_to(
        "export below a file", lambda folder: note(folder) / "out", "notes.txt", "name another folder"
    ),
    exports_to(
        "export where nobody may write", lambda folder: "/proc/out", "/proc/out", "name another folder"
    ),
    exports_to(
        "export onto the checkpoint itself",
        lambda folder: folder / LAST,
        "step-00000002",
        "name another folder",
    ),
    exports_to(
        "export of no such precision",
        lambda folder: folder / "out",
        "--dtype",
        "float16",
        options=("--dtype", "float16"),
    ),
)


@parametrized((*DAMAGED, *WALKS, *EXPORTS))
def test_a_bad_checkpoint_gets_a_way_out(
    case: Case,
    place_of_all: tuple[Workshop, dict[str, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check(case, Place(tmp_path, *place_of_all), capsys)
    assert not (tmp_path / "out").exists()


def torn_latest(run: Path) -> None:
    (run / "checkpoints" / "latest").write_bytes(b"step-0000")


def latest_of_bytes(run: Path) -> None:
    (run / "checkpoints" / "latest").write_bytes(b"\xff\xfe")


def latest_of_nothing(run: Path) -> None:
    (run / "checkpoints" / "latest").write_text("step-00000777\n")


def no_latest(run: Path) -> None:
    (run / "checkpoints" / "latest").unlink()


def newest(damage: Damage, file: str) -> Damage:
    return lambda run: damage(run / "checkpoints" / "step-00000002" / file)


PASSED_OVER = {
    **{
        f"{what} {damage.__name__}": (newest(damage, file), "step-00000002", 1)
        for what, file in FILES.items()
        for damage in (truncated, flipped, missing)
    },
    "latest torn": (torn_latest, "", 2),
    "latest of bytes": (latest_of_bytes, "latest", 2),
    "latest of nothing": (latest_of_nothing, "step-00000777", 2),
    "no latest": (no_latest, "", 2),
}


@pytest.mark.parametrize("name", PASSED_OVER)
def test_a_run_goes_on_from_the_newest_good_checkpoint_and_says_what_it_passed_over(
    name: str,
    place_of_all: tuple[Workshop, dict[str, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage, named, step = PASSED_OVER[name]
    place = Place(tmp_path, *place_of_all)
    run = copied(place).parents[1]
    damage(run)
    yaml = str(place.yaml())
    before = digests(run / "checkpoints" / "step-00000002")
    assert main(["train", yaml, "train.steps=3"]) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert f"resumed from {run}/checkpoints/step-0000000{step}" in said
    assert named in said
    assert losses(run) == losses(place.runs["longer"])
    # Whoever wants to know what became of it finds it as it was.
    kept = [path for path in (run / "checkpoints").glob("step-00000002*") if digests(path) == before]
    assert kept, sorted(path.name for path in (run / "checkpoints").iterdir())
