"""Models and tokenizers that cannot be trained: no such folder, broken files, shapes that differ."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_inputs import Case, Place, check, parametrized
from safetensors.torch import load_file, save_file
from tiny_run import Workshop


@pytest.fixture(scope="module")
def place_of_all(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workshop, dict[str, Path]]:
    """Good documents and configs, and a small pretrained model with its tokenizer."""
    shop = Workshop(tmp_path_factory.mktemp("shop"))
    run = shop.run("pretrained", "train.steps=1", "checkpoint.export_at_end=true")
    return shop, {"pretrained": run / "model"}


def model(
    name: str, damage: Callable[[Path], Any], *says: str, overrides: tuple[str, ...] = (), status: int = 2
) -> Case:
    """A copy of the pretrained model with something done to it."""

    def make(place: Place) -> list[str | Path]:
        folder = place.folder / "model"
        shutil.copytree(place.runs["pretrained"], folder)
        damage(folder)
        given = (f"model.name={folder}", "model.config={}", *overrides)
        return ["train", place.yaml(), *given]

    return Case(name, make, says, status)


def tokenizer(name: str, damage: Callable[[Path], Any], *says: str, overrides: tuple[str, ...] = ()) -> Case:
    """A copy of the tokenizer with something done to it, for a model with random weights."""

    def make(place: Place) -> list[str | Path]:
        folder = place.folder / "tokenizer"
        shutil.copytree(place.runs["pretrained"], folder)
        damage(folder)
        return ["train", place.yaml(), f"data.tokenizer={folder}", *overrides]

    return Case(name, make, says)


def fields(name: str, override: str | tuple[str, ...], *says: str) -> Case:
    """Fields of `model.config` for a model with random weights."""
    overrides = (override,) if isinstance(override, str) else override
    return Case(name, lambda place: ["train", place.yaml(), *overrides], says)


def edit(file: str, **changes: Any) -> Callable[[Path], None]:
    """Sets keys of a JSON file; None removes one."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        content.update(changes)
        (folder / file).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return damage


def write(file: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(
        content.encode() if isinstance(content, str) else content
    )


def remove(*files: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / file).unlink() for file in files]


def cut(file: str, share: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * share)])

    return damage


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return damage


def pickles_alone(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def a_shard_gone(folder: Path) -> None:
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def emptied(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def larger_vocabulary(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] += [
        {**content["added_tokens"][-1], "id": 259 + i, "content": f"<|extra{i}|>"} for i in range(9)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def without_template(folder: Path) -> None:
    for file in folder.glob("chat_template*"):
        file.unlink()
    edit("tokenizer_config.json", chat_template=None)(folder)


def with_template(text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        without_template(folder)
        (folder / "chat_template.jinja").write_text(text)

    return damage


def chats(name: str, damage: Callable[[Path], None], *says: str) -> Case:
    """A tokenizer whose template has to render conversations."""
    case = tokenizer(name, damage, *says)

    def make(place: Place) -> list[str | Path]:
        row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        file = place.write("chats.jsonl", json.dumps(row) + "\n")
        return [*case.make(place), f"data.source={file}", "data.eval_source=null"]

    return Case(name, make, says)


NAME = "model.name="
MODELS = (
    fields(
        "no such folder",
        ("model.name=./nowhere", "model.config={}"),
        "model.name='./nowhere'",
        "Give a folder",
    ),
    fields(
        "a hub that cannot be reached",
        ("model.name=owner/name", "model.config={}"),
        "model.name='owner/name'",
        "Give a folder",
    ),
    fields(
        "a name with spaces",
        ("model.name='my model'", "model.config={}"),
        "model.name='my model'",
        "Give a folder",
    ),
    model("an empty folder", emptied, NAME, "Give a folder with a config.json"),
    model("no config", remove("config.json"), NAME, "Give a folder with a config.json"),
    model("a config that is no JSON", write("config.json", "{"), NAME, "config.json", "Give a folder"),
    model("an empty config", write("config.json", ""), NAME, "Give a folder"),
    model("a config that is a list", write("config.json", "[]"), NAME, "Give a folder"),
    model(
        "a config of no type", edit("config.json", model_type=None, architectures=None), NAME, "Give a folder"
    ),
    model(
        "a config of an unknown type", edit("config.json", model_type="lama9"), NAME, "lama9", "Give a folder"
    ),
    model("another family", edit("config.json", model_type="gpt2"), "model_type='gpt2'", "llama"),
    model(
        "code to be run",
        edit("config.json", model_type="own", auto_map={"AutoConfig": "own.Config"}),
        NAME,
        "Give a folder",
    ),
    model("no weights", remove("model.safetensors"), NAME, "safetensors"),
    model("pickles alone", pickles_alone, NAME, "safetensors"),
    model("weights that are cut", cut("model.safetensors", 0.5), NAME, "model.safetensors"),
    model("weights without their header", cut("model.safetensors", 0.001), NAME, "model.safetensors"),
    model("weights that are empty", write("model.safetensors", b""), NAME, "model.safetensors"),
    model(
        "weights that are text",
        write("model.safetensors", "version https://git-lfs.github.com/spec/v1\n" * 3),
        NAME,
        "model.safetensors",
    ),
    model("a shard that is gone", a_shard_gone, NAME, "model-00001-of-00002.safetensors"),
    model(
        "an index that is no JSON",
        lambda folder: (a_shard_gone(folder), write("model.safetensors.index.json", "{")(folder)),
        NAME,
        "index",
    ),
    model("weights of another width", edit("config.json", hidden_size=64), NAME, "shape"),
    model("weights of more layers", edit("config.json", num_hidden_layers=1), NAME, "model.layers.1"),
    model("weights of fewer layers", edit("config.json", num_hidden_layers=3), NAME, "model.layers.2"),
    model("weights with one gone", weights(lambda t: t.pop("model.norm.weight")), NAME, "model.norm.weight"),
    model(
        "weights with one of another shape",
        weights(lambda t: t.update({"model.norm.weight": torch.ones(3)})),
        NAME,
        "model.norm.weight",
    ),
    model(
        "weights that are NaN",
        weights(lambda t: t["model.norm.weight"].fill_(torch.nan)),
        "step 1: loss is nan",
        status=1,
    ),
    model(
        "another shape asked for",
        lambda folder: None,
        "model.config.hidden_size=64 but",
        "cannot be overridden",
        overrides=("model.config.hidden_size=64",),
    ),
    model(
        "adapters on no layer",
        lambda folder: None,
        "model.lora.target_modules",
        "nope",
        overrides=("model.lora.target_modules=[nope]",),
    ),
    model(
        "a length past its positions",
        lambda folder: None,
        "sequence.length=512",
        "max_position_embeddings=256",
        overrides=("sequence.length=512",),
    ),
    fields("a family there is not", "model.config.model_type=lama", "did you mean llama?"),
    fields(
        "a family mini-sequences do not know", "model.config={model_type: bert}", "model_type='bert'", "llama"
    ),
    fields("an unknown field", "model.config.hiden_size=32", "hiden_size (did you mean hidden_size?)"),
    fields("heads that do not divide the width", ("model.config.hidden_size=30",), "model.config", "30"),
    fields("an activation there is not", "model.config.hidden_act=nope", "model.config", "nope"),
    fields("a field of the wrong type", "model.config.rms_norm_eps=tiny", "model.config", "rms_norm_eps"),
    fields(
        "a vocabulary too small",
        "model.config.vocab_size=99",
        "the tokenizer has 259 tokens and the model embeds 99; choose",
    ),
)

TOKENIZERS = (
    fields(
        "no such tokenizer",
        "data.tokenizer=./nowhere",
        "data.tokenizer='./nowhere' cannot be loaded",
        "Give a folder",
    ),
    fields(
        "a tokenizer of a hub that cannot be reached",
        "data.tokenizer=owner/name",
        "data.tokenizer='owner/name'",
        "Give a folder",
    ),
    tokenizer(
        "an empty tokenizer's folder", emptied, "data.tokenizer=", "Give a folder with a tokenizer.json"
    ),
    tokenizer(
        "a tokenizer that is no JSON", write("tokenizer.json", "{"), "data.tokenizer=", "Give a folder"
    ),
    tokenizer("a tokenizer that is empty", write("tokenizer.json", ""), "data.tokenizer=", "Give a folder"),
    tokenizer("a tokenizer that is cut", cut("tokenizer.json", 0.5), "data.tokenizer=", "Give a folder"),
    tokenizer(
        "a tokenizer of another shape",
        write("tokenizer.json", '{"version": "1.0"}'),
        "data.tokenizer=",
        "Give a folder",
    ),
    tokenizer(
        "a tokenizer's settings that are no JSON",
        write("tokenizer_config.json", "{"),
        "data.tokenizer=",
        "Give a folder",
    ),
    tokenizer(
        "a tokenizer of more words",
        larger_vocabulary,
        "the tokenizer has 268 tokens and the model embeds 260; choose",
    ),
    chats(
        "conversations without a template",
        without_template,
        "The tokenizer has no chat template",
        "take the tokenizer",
    ),
    chats(
        "a template with an error",
        with_template("{% for message in messages %}"),
        "chats.jsonl:1: chat template",
        "on_error=skip",
    ),
    chats(
        "a template that refuses",
        with_template("{{ raise_exception('no system prompt') }}"),
        "chats.jsonl:1: chat template",
        "no system prompt",
    ),
    chats(
        "a template that hides the answer",
        with_template("{{ messages | length }}"),
        "chats.jsonl:1: chat template",
        "mark the assistant's part",
    ),
)


@parametrized((*MODELS, *TOKENIZERS))
def test_a_bad_model_or_tokenizer_gets_a_way_out(
    case: Case,
    place_of_all: tuple[Workshop, dict[str, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check(case, Place(tmp_path, *place_of_all), capsys)
