"""From a preset or a YAML file, with `key=value` overrides, to one checked `RunConfig`, and back to text.

Everything that is wrong is raised at once, as one `ConfigError`. Nothing here touches a GPU, the network or
a process group, nor imports what does.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from .. import configs
from .config import RunConfig
from .config_errors import ConfigError, explain, shown
from .config_rules import ParallelPlan, broken_rules, check_count, check_world
from .config_yaml import read_yaml, write_yaml

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

__all__ = [
    "ConfigError",
    "ParallelPlan",
    "check_count",
    "check_world",
    "dump_config",
    "list_presets",
    "load_config",
    "parse_config",
    "schema_json",
    "show_preset",
]


def load_config(preset_or_path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a preset or a YAML file, put overrides over it, and check the whole once.

    Args:
        preset_or_path: Name of a preset (`list_presets`) or path of a YAML file.
        overrides: `dotted.key=value` each, the value in YAML: `sequence.length=128k`,
            `optimizer.betas=[0.9, 0.99]`, `model.name=null`. Of two for one key the later counts.

    Raises:
        ConfigError: All that is wrong, one line each.
    """
    source, text = _read(preset_or_path)
    data, errors = read_yaml(text, source)
    if errors:
        raise ConfigError(errors)
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(
            [f"{source} holds {shown(data)}; a config is sections of `key: value` lines, so write these."]
        )
    errors = _apply_overrides(data, overrides)
    return _checked(data, source, errors)


def parse_config(data: Mapping[str, Any], source: str | None = None) -> RunConfig:
    """Check nested values, such as a YAML file's, and make a config of them.

    Args:
        data: Sections, each with its keys.
        source: What the values were read from, for the error.

    Raises:
        ConfigError: All that is wrong, one line each.
    """
    return _checked(data, source, [])


def dump_config(config: RunConfig) -> str:
    """Write a config with every key as YAML that `load_config` reads back to an equal config."""
    data = config.model_dump()
    schedule = config.schedule
    if schedule.name == "constant" and "final_ratio" not in schedule.model_fields_set:
        # Nobody asked for it and it does nothing; written down it would read as if somebody had.
        del data["schedule"]["final_ratio"]
    return write_yaml(data)


def schema_json() -> str:
    """The JSON schema of a config file, by which editors complete and check it."""
    return json.dumps(RunConfig.model_json_schema(), indent=2)


def list_presets() -> list[tuple[str, str]]:
    """Name and one-line description of each preset that is shipped."""
    texts = {name: path.read_text("utf-8") for name, path in _presets().items()}
    return [(name, text.partition("\n")[0].lstrip("# ")) for name, text in texts.items()]


def show_preset(name: str) -> str:
    """The YAML of a preset as it is shipped, comments and all.

    Raises:
        ConfigError: There is no such preset.
    """
    presets = _presets()
    if name not in presets:
        raise ConfigError([_no_such_preset(name)])
    return presets[name].read_text("utf-8")


def _presets() -> dict[str, Traversable]:
    files = [path for path in resources.files(configs).iterdir() if path.name.endswith(".yaml")]
    return {path.name.removesuffix(".yaml"): path for path in sorted(files, key=_by_number)}


def _by_number(path: Traversable) -> list[str | int]:
    # So that 64k comes before 128k.
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _no_such_preset(name: str) -> str:
    presets = list(_presets())
    near = get_close_matches(name, presets, n=1, cutoff=0.5)
    guess = f"did you mean {near[0]}? " if near else ""
    return f"{name} is neither a preset nor a YAML file; {guess}use one of {', '.join(presets)}."


def _read(preset_or_path: str) -> tuple[str, str]:
    """Name of the source for errors, and its text."""
    if preset_or_path in _presets():
        return preset_or_path, show_preset(preset_or_path)
    if not preset_or_path.strip():
        raise ConfigError(["the config's name is empty (an unset shell variable?); name a preset or a file."])
    path = Path(preset_or_path).expanduser()
    if path.is_dir():
        inner = path / "config.yaml"
        way_out = f"did you mean {inner}?" if inner.is_file() else "name a YAML file or a preset."
        raise ConfigError([f"{preset_or_path} is a folder; {way_out}"])
    looks_like_a_path = path.suffix in (".yaml", ".yml") or len(path.parts) > 1
    if not path.is_file():
        if looks_like_a_path:
            raise ConfigError([_no_such_file(preset_or_path, path)])
        raise ConfigError([_no_such_preset(preset_or_path)])
    try:
        return preset_or_path, path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError([f"{preset_or_path} is not UTF-8 text ({error}); save it as UTF-8."]) from error
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError([f"{preset_or_path} cannot be read ({reason}); check the file."]) from error


def _no_such_file(given: str, path: Path) -> str:
    if not path.parent.is_dir():
        return f"{given} does not exist, nor does its folder; check the path."
    near = get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=1)
    if near:
        return f"{given} does not exist; did you mean {path.parent / near[0]}?"
    return f"{given} does not exist; check the path, or name a preset: {', '.join(_presets())}."


def _checked(data: Mapping[str, Any], source: str | None, errors: list[str]) -> RunConfig:
    """Validate and raise all errors at once: those handed in, each key's own, and what keys demand of
    each other as far as their values are known."""
    # A section whose lines are all commented out is null in YAML.
    tidy = {
        key: {} if value is None and key in RunConfig.model_fields else value for key, value in data.items()
    }
    errors, doubtful = list(errors), []
    try:
        config = RunConfig.model_validate(tidy)
    except ValidationError as error:
        complaints = explain(error, tidy)
        errors += [complaint.message for complaint in complaints]
        doubtful = [key for complaint in complaints for key in complaint.doubtful]
        config = RunConfig.model_validate(_without(tidy, [complaint.path for complaint in complaints]))
    errors += broken_rules(config, doubtful=doubtful)
    if errors:
        raise ConfigError(errors, source)
    return config


def _without(data: Mapping[str, Any], paths: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    kept = copy.deepcopy(dict(data))
    for path in paths:
        section = kept
        for key in path[:-1]:
            section = section[key]
        del section[path[-1]]
    return kept


def _apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Put overrides into `data`; the lines of those that cannot be."""
    errors, given = [], []
    for override in overrides:
        key, equals, text = (part.strip() for part in override.partition("="))
        complaint = _malformed(override, key, equals, text)
        if complaint is None:
            value, yaml_errors = read_yaml(text, f"override {override!r}")
            complaint = yaml_errors[0] if yaml_errors else _set_dotted(data, key, value)
        if complaint is not None:
            errors.append(complaint)
        given.append(key)
    if "train.epochs" in given and (steps := (data.get("train") or {}).get("steps")) is not None:
        # A preset's steps would otherwise win without a word over what was just typed.
        errors.append(
            f"train.epochs was overridden, but train.steps={shown(steps)} decides; add train.steps=null."
        )
    return errors


def _malformed(override: str, key: str, equals: str, text: str) -> str | None:
    if key.startswith("-"):
        return f"override {override!r} starts with a dash; write {override.strip().lstrip('-')}."
    if not equals:
        return f"override {override!r} has no `=`; write key=value, such as sequence.length=64k."
    if not all(part.strip() for part in key.split(".")):
        return f"override {override!r} has an empty key; write key=value, such as sequence.length=64k."
    if not text:
        # Read as null, an unset $MODEL would train random weights.
        return f"override {override!r} has no value (an unset shell variable?); write {key}=null for nothing."
    return None


def _set_dotted(data: dict[str, Any], key: str, value: Any) -> str | None:
    *sections, leaf = key.split(".")
    for depth, name in enumerate(sections, start=1):
        if data.get(name) is None:
            data[name] = {}
        data = data[name]
        if not isinstance(data, dict):
            above = ".".join(sections[:depth])
            into = f"override {key}={shown(value)} goes into {above}={shown(data)}"
            return f"{into}, which is no section. Set {above} itself."
    data[leaf] = value
    return None
