"""From what pydantic found wrong to what a person should write instead: one line an error."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic.fields import FieldInfo

from .config import RunConfig
from .human_numbers import parse_tokens

# What other trainers call our keys: people arrive with their old files, and no spelling is near enough.
_NAMES_ELSEWHERE = {
    "base_model": "model.name",
    "batch_size": "train.global_batch_sequences",
    "bf16": "train.precision",
    "context_parallel_size": "parallel.ulysses_degree",
    "cutoff_len": "sequence.length",
    "dataset": "data.source",
    "datasets": "data.source",
    "dtype": "train.precision",
    "eval_steps": "train.eval_every",
    "gradient_accumulation_steps": "train.global_batch_sequences",
    "gradient_checkpointing": "sequence.checkpoints",
    "learning_rate": "optimizer.lr",
    "logging_steps": "log.every",
    "lora_r": "model.lora.rank",
    "lr_scheduler_type": "schedule.name",
    "max_grad_norm": "optimizer.clip_norm",
    "max_length": "sequence.length",
    "max_seq_len": "sequence.length",
    "max_seq_length": "sequence.length",
    "max_steps": "train.steps",
    "micro_batch_size": "train.micro_batch_sequences",
    "model_name_or_path": "model.name",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "output_dir": "log.run_dir",
    "per_device_train_batch_size": "train.micro_batch_sequences",
    "resume_from_checkpoint": "checkpoint.resume",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "seq_len": "sequence.length",
    "sequence_len": "sequence.length",
    "sequence_parallel_size": "parallel.ulysses_degree",
    "sp_degree": "parallel.ulysses_degree",
    "world_size": "parallel.num_gpus",
}


class ConfigError(ValueError):
    """A configuration that cannot run, with all that is wrong with it.

    Attributes:
        errors: One line for each thing that is wrong.
        source: The file or preset that was read; None where there is none.
    """

    def __init__(self, errors: Iterable[str], source: str | None = None) -> None:
        self.errors = tuple(errors)
        self.source = source
        super().__init__(self.errors, source)

    def __str__(self) -> str:
        if self.source is None:
            return "\n".join(self.errors)
        count = "1 error" if len(self.errors) == 1 else f"{len(self.errors)} errors"
        return "\n  ".join((f"{self.source}: {count}", *self.errors))


@dataclass(frozen=True)
class Complaint:
    """One thing wrong with the values as they were given.

    Attributes:
        path: Keys that lead to the value.
        message: The line for the person.
        doubtful: Dotted keys of the schema whose value is not known because of it.
    """

    path: tuple[Any, ...]
    message: str
    doubtful: tuple[str, ...]


@lru_cache(maxsize=1)
def schema_keys() -> dict[str, FieldInfo]:
    """Every dotted key of the schema, sections included, in the schema's order."""
    return dict(_walk(RunConfig, ""))


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a key holds; None for a key that holds a value."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def explain(error: ValidationError, data: Mapping[str, Any]) -> list[Complaint]:
    """Turn pydantic's report into complaints, one for each key whatever number of complaints it had.

    Args:
        error: What `RunConfig.model_validate(data)` raised.
        data: The values that it was given.
    """
    complaints: dict[tuple[Any, ...], Complaint] = {}
    for item in error.errors(include_url=False, include_context=False):
        path = _path_in_schema(item["loc"])
        if path in complaints:
            continue
        dotted = ".".join(str(key) for key in path)
        value = _value_at(data, path)
        field = schema_keys().get(dotted)
        if field is None or len(path) != len(dotted.split(".")):
            complaints[path] = _unknown_key(path, dotted, value)
        else:
            complaints[path] = Complaint(path, _wrong_value(dotted, value, field), (dotted,))
    return list(complaints.values())


def suggest(path: str) -> list[str]:
    """Up to three keys of the schema that a person may have meant by an unknown dotted one."""
    section, _, leaf = path.rpartition(".")
    keys = list(schema_keys())
    siblings = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == section}
    found = [siblings[name] for name in get_close_matches(leaf, siblings, n=2, cutoff=0.7)]
    found += [_NAMES_ELSEWHERE[leaf]] if leaf in _NAMES_ELSEWHERE else []
    found += [key for key in keys if key.rpartition(".")[2] == leaf]
    found += get_close_matches(path, keys, n=2, cutoff=0.75)
    if not found:
        leaves = {key.rpartition(".")[2]: key for key in keys}
        found = [leaves[name] for name in get_close_matches(leaf, leaves, n=2, cutoff=0.75)]
    # The section that it stands in already is no news.
    return list(dict.fromkeys(key for key in found if not f"{path}.".startswith(f"{key}.")))[:3]


def shown(value: Any) -> str:
    """A value as an error names it: as YAML has it, and never longer than half a line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def listed(items: Sequence[Any], last: str = "or") -> str:
    """`1, 2 or 4`."""
    texts = [str(item) for item in items]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} {last} {texts[-1]}"


def _walk(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        inner = section_of(field)
        if inner is not None:
            yield from _walk(inner, f"{prefix}{name}.")


def _path_in_schema(loc: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cut what pydantic adds behind a key (the union's branch, the list's index); keep an unknown key."""
    for length in range(1, len(loc) + 1):
        field = schema_keys().get(".".join(str(key) for key in loc[:length]))
        if field is None or section_of(field) is None:
            return loc[:length]
    return loc


def _value_at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


def _unknown_key(path: tuple[Any, ...], dotted: str, value: Any) -> Complaint:
    # Below an unknown section everything is unknown too: its keys are no news.
    text = dotted if isinstance(value, Mapping) else f"{dotted}={shown(value)}"
    nested = schema_keys().get(dotted)
    if nested is not None:
        way_out = f"write it as a section, `{dotted.split('.')[0]}:` with the key below it"
        return Complaint(path, f"{text} has a dot in its key; {way_out}.", (dotted,))
    names = suggest(dotted)
    section = dotted.rpartition(".")[0]
    if names:
        way_out = f"did you mean {listed(names)}?"
    else:
        known = [key for key in schema_keys() if key.rpartition(".")[0] == section]
        names_there = listed([k.rpartition(".")[2] for k in known], "and")
        way_out = f"{section or 'a config'} has {names_there}; use one of these."
    return Complaint(path, f"{text} is an unknown key; {way_out}", tuple(names))


def _wrong_value(dotted: str, value: Any, field: FieldInfo) -> str:
    rule = f"{dotted}={shown(value)} must be {describe(field.annotation, field.metadata)}"
    return f"{rule}; {hint}" if (hint := _hint(value, field.annotation)) else f"{rule}."


def _hint(value: Any, annotation: Any) -> str | None:
    choices = [str(choice) for choice in _choices(annotation)]
    takes_text = str in _kinds(annotation) or any(isinstance(choice, str) for choice in _choices(annotation))
    if value in ("", [], ()):
        return "it is empty."
    if isinstance(value, str):
        near = get_close_matches(value.lower(), choices, n=1, cutoff=0.5)
        return f"did you mean {near[0]}?" if near else None
    if isinstance(value, bool) and takes_text:
        return "YAML reads yes, no, on and off as true and false, so put a word in quotes."
    if isinstance(value, (int, float)) and str in _kinds(annotation):
        return "put it in quotes."
    return None


def describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Say in words what a key of this type takes, such as `a number of tokens (1 or above) or auto`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extra = get_args(annotation)
        return describe(inner, extra)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(kind) for kind in get_args(annotation))
    if origin is Literal:
        return listed([str(choice) for choice in get_args(annotation)])
    if origin is tuple:
        kinds = get_args(annotation)
        if kinds[-1] is Ellipsis:
            return f"a list of {describe(kinds[0])}"
        return f"a list of {len(kinds)}, each {describe(kinds[0])}"
    inner = section_of(FieldInfo(annotation=annotation))
    if inner is not None:
        return f"a section with the keys {listed(list(inner.model_fields), 'and')}"
    if annotation in (int, float):
        return _describe_number(annotation, metadata)
    plain = {bool: "true or false", str: "text", type(None): "null"}
    return plain.get(annotation, "a section of keys")


def _describe_number(annotation: Any, metadata: Sequence[Any]) -> str:
    rules = [rule for item in metadata for rule in (item.metadata if isinstance(item, FieldInfo) else [item])]
    words = {"ge": "{} or above", "gt": "above {}", "le": "{} or below", "lt": "below {}"}
    bounds = [
        text.format(getattr(r, name)) for r in rules for name, text in words.items() if hasattr(r, name)
    ]
    if annotation is float:
        return f"a number ({', '.join(bounds)})"
    parsers = [rule.func for rule in rules if isinstance(rule, BeforeValidator)]
    if parse_tokens in parsers:
        return f"a whole number of tokens ({', '.join(bounds)}; 64k is 65,536)"
    return f"a whole number ({', '.join(bounds)}; 2k is 2,000)"


def _kinds(annotation: Any) -> list[Any]:
    """The plain types that a union or an annotated type is made of."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for branch in get_args(annotation) for kind in _kinds(branch)]
    return [annotation]


def _choices(annotation: Any) -> list[Any]:
    return [choice for kind in _kinds(annotation) if get_origin(kind) is Literal for choice in get_args(kind)]
