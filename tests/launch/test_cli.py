from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tiny_run import Workshop, held_out_loss, losses, records

from longseq import __version__
from longseq.launch.cli import main
from longseq.launch.doctor import EXAMINED


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def run(shop: Workshop) -> Path:
    return shop.run("run", "checkpoint.every=2", "checkpoint.keep=9")


@pytest.fixture(autouse=True)
def _alone_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    """What a command printed, its errors if it is to fail."""
    assert main(words) == status
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return err if status else out


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in ((["--version"], f"longseq {__version__}\n"), (["--help"], "usage: longseq")):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith(expected)


def test_help_names_every_command_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["config"]):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        assert "==SUPPRESS==" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    commands = [
        line.split()[0] for line in printed.splitlines() if line.startswith("    ") and line[4] != " "
    ]
    usual = ["doctor", "check", "plan", "verify", "prepare", "train", "plot", "export", "config"]
    assert [command for command in commands if command in usual] == usual


def test_options_and_overrides_come_in_any_order(capsys: pytest.CaptureFixture[str]) -> None:
    # Each of the three is heard: all of their errors come.
    words = ("train", "tiny-cpu", "optimizer.lr=fast", "--num-gpus", "3", "train.steps=none")
    error = said(capsys, *words, "parallel.ulysses_degree=2", status=2)
    assert all(key in error for key in ("optimizer.lr", "train.steps", "parallel.num_gpus=3"))
    for wrong in (("--steps", "3"), ("steps",)):
        with pytest.raises(SystemExit):
            main(["train", "tiny-cpu", "--num-gpus", "1", *wrong])


def test_presets_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    names = [line.split()[0] for line in said(capsys, "config", "list").splitlines()]
    assert "tiny-cpu" in names
    for name in names:
        assert "train" in yaml.safe_load(said(capsys, "config", "show", name))
    wrong = said(capsys, "config", "show", "tiny-cpux", status=2)
    assert "did you mean tiny-cpu?" in wrong


def test_the_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(said(capsys, "config", "schema"))
    assert {"model", "data", "train"} <= set(schema["properties"])


def test_errors_are_told_in_lines_that_begin_with_the_command(
    shop: Workshop, run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    good = str(shop.yaml("errors"))
    cases = {
        ("train", "nowhere.yaml"): "nowhere.yaml does not exist",
        ("train", good, "train.stepz=3"): "train.stepz=3 is an unknown key; did you mean train.steps",
        ("train", good, "--num-gpus", "3"): "train.global_batch_sequences=2",
        ("train", good, f"data.source={tmp_path}/no.jsonl"): "there is no such file",
        ("train", good, "model.config.model_type=lama"): "did you mean llama?",
        ("train", good, "model.config.vocab_size=99"): "the tokenizer has 259 tokens and the model embeds 99",
        ("prepare", good, f"data.source={tmp_path}/no.jsonl"): "there is no such file",
        ("export", str(tmp_path), str(tmp_path / "out")): "is no checkpoint",
        ("export", str(run), good): "is no exported model",
        ("plot", str(tmp_path / "nothing")): "no such file",
    }
    for words, message in cases.items():
        error = said(capsys, *words, status=2)
        told = [line for line in error.splitlines() if line.startswith(f"longseq {words[0]}: ")]
        assert len(told) == 1, error
        assert message in error


def test_a_traceback_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        main(["--traceback", "train", "nowhere.yaml"])


def test_train_prepare_plot_and_export(
    shop: Workshop, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The way of a new user, each command by itself."""
    config = str(shop.yaml("by_hand"))
    assert main(["prepare", config]) == 0
    assert "documents" in capsys.readouterr().err
    printed = said(capsys, "train", config, "train.steps=3", "checkpoint.every=1")
    folder = shop.folder / "by_hand"
    assert printed.count("step 3/3") == 1
    assert len(losses(folder)) == 3
    image = tmp_path / "curve.png"
    assert said(capsys, "plot", str(folder), "--out", str(image)).strip() == str(image)
    assert image.read_bytes().startswith(b"\x89PNG")
    out = tmp_path / "model"
    assert said(capsys, "export", str(folder), str(out)).strip() == str(out)
    loss, _ = held_out_loss(out, shop.folder / "held_out.jsonl")
    assert loss == pytest.approx(records(folder, "eval")[-1]["eval_loss"], rel=1e-6)


def test_export_takes_the_newest_or_the_one_that_is_named(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said(capsys, "export", str(run), str(tmp_path / "newest"))
    said(capsys, "export", str(run / "checkpoints" / "step-00000002"), str(tmp_path / "second"))
    for out, step in (("newest", 4), ("second", 2)):
        ours = load_file(tmp_path / out / "model.safetensors")["model.norm.weight"]
        saved = run / "checkpoints" / f"step-0000000{step}" / "engine" / "model.safetensors"
        assert (ours == load_file(saved)["model.norm.weight"]).all()
    assert "--overwrite" in said(capsys, "export", str(run), str(tmp_path / "newest"), status=2)
    said(capsys, "export", str(run), str(tmp_path / "newest"), "--overwrite", "--dtype", "bfloat16")


def test_a_run_that_stops_itself_ends_with_1(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(shop.yaml("wild"))
    assert main(["train", config, "optimizer.lr=1e30", "optimizer.clip_norm=null"]) == 1
    out, err = capsys.readouterr()
    [error] = [line for line in out.splitlines() if line.startswith("ERROR")]
    assert "step 2: " in error
    assert "no checkpoint yet" in error
    assert "Traceback" not in out + err


def test_an_interrupted_run_ends_with_130(
    shop: Workshop, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(config: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("longseq.launch.worker.run_worker", interrupted)
    assert "interrupted" in said(capsys, "train", str(shop.yaml("interrupted")), status=130)


def test_words_for_a_launcher_that_is_not_started_are_an_error(
    shop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml_file = str(shop.yaml("no_launcher"))
    assert "behind -- is for" in said(capsys, "train", yaml_file, "--", "--no_ssh", status=2)
    with pytest.raises(SystemExit):
        main(["prepare", yaml_file, "--", "--no_ssh"])


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list:
    """What the commands handed on, instead of doing it."""
    heard: list = []
    names = (
        "check.command.check",
        "verify.command.verify",
        "restarts.supervise",
        "doctor.doctor",
        "doctor.examine",
    )
    for name in names:

        def stand_in(*args: object, name: str = name, **kwargs: object) -> int:
            heard.append((name, args, kwargs))
            return 0

        monkeypatch.setattr(f"longseq.launch.{name}", stand_in)
    return heard


def test_check_and_verify_are_given_config_and_overrides(told: list) -> None:
    assert main(["check", "tiny-cpu", "train.steps=3"]) == 0
    assert main(["verify", "tiny-cpu", "--json", "train.steps=3"]) == 0
    assert told == [
        ("check.command.check", ("tiny-cpu", ["train.steps=3"]), {}),
        ("verify.command.verify", ("tiny-cpu", ["train.steps=3"]), {"as_json": True}),
    ]


def test_a_doctor_looks_at_the_machine_alone_or_with_a_config(
    told: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(EXAMINED, "")
    assert main(["doctor"]) == 0
    assert told == [("doctor.doctor", (), {})]
    told.clear()
    assert main(["doctor", "--num-gpus", "1", "tiny-cpu", "train.steps=30"]) == 0
    assert [name for name, *_ in told] == ["doctor.doctor", "doctor.examine"]
    for _, [config], _ in told:
        assert config.train.steps == 30
        assert config.parallel.num_gpus == 1
    assert "need a CONFIG" in said(capsys, "doctor", "--num-gpus", "2", status=2)


def test_several_processes_are_started_to_be_compared(told: list, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple] = []

    def launch(config: str, overrides: list[str], **how: object) -> int:
        started.append((config, overrides, how["command"], how["num_gpus"], os.environ[EXAMINED]))
        return 7

    monkeypatch.setenv(EXAMINED, "")
    monkeypatch.setattr("longseq.launch.launcher.launch", launch)
    assert main(["doctor", "tiny-cpu", "parallel.ulysses_degree=2"]) == 7
    assert [name for name, *_ in told] == ["doctor.doctor"]
    assert started == [("tiny-cpu", ["parallel.ulysses_degree=2"], "doctor", 2, "1")]


def test_processes_are_not_compared_on_a_machine_with_errors(
    told: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("longseq.launch.doctor.doctor", lambda config: 1)
    assert main(["doctor", "tiny-cpu"]) == 1
    assert not told
    assert "once these errors are gone" in capsys.readouterr().out


def test_processes_of_a_launcher_look_at_their_machines_themselves(
    told: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert main(["doctor", "tiny-cpu"]) == 0
    assert [name for name, *_ in told] == ["doctor.examine"]


def test_a_supervised_run_is_the_same_command_without_the_supervisor(
    shop: Workshop, told: list, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(shop.yaml("supervised"))
    words = ["--traceback", "train", config, "train.steps=3", "--num-gpus", "1", "--max-restarts", "4"]
    assert main([*words, "--", "--no_ssh"]) == 0
    rebuilt = ["--traceback", "train", config, "train.steps=3", "--num-gpus", "1", "--", "--no_ssh"]
    assert told == [("restarts.supervise", (rebuilt, shop.folder / "supervised", 4), {})]
    assert "must be 0 or more" in said(capsys, "train", config, "--max-restarts", "-1", status=2)
    assert "train.steps='x'" in said(
        capsys, "train", config, "--max-restarts", "1", "train.steps=x", status=2
    )


def test_a_full_disk_has_a_status_of_its_own(
    shop: Workshop, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("longseq.launch.data.prepare.prepare", full)
    assert "No space left" in said(capsys, "prepare", str(shop.yaml("full")), status=4)


def test_adapters_are_exported_as_asked(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def export(checkpoint: Path, out: Path, *, dtype: str | None, overwrite: bool, adapters: str) -> Path:
        asked.append(adapters)
        return out

    monkeypatch.setattr("longseq.launch.export.export_checkpoint", export)
    main(["export", str(run), str(tmp_path / "out")])
    main(["export", str(run), str(tmp_path / "out"), "--adapters", "apart"])
    assert asked == ["merge", "apart"]


def test_a_hostfile_that_is_not_there_is_an_error(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("train", str(shop.yaml("no_hostfile")), "--hostfile", "nowhere.txt")
    assert "--hostfile nowhere.txt: no such file" in said(capsys, *words, status=2)
