"""YAML as people mean it: `2e-5` is a number, a date is text, and no key may stand twice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

# YAML 1.1, which PyYAML reads, takes 2e-5 for text: it wants 2.0e-5.
_FLOAT = re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")
_FLOAT_STARTS = list("-+0123456789")


class _Loader(yaml.SafeLoader):
    """Reads `2e-5` as a number everywhere, inside `model.config` too, and a date as text."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (the name and the kind are PyYAML's)
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read as text, and keeps a list on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.Node:
        return super().represent_sequence(tag, sequence, flow_style=True)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, _FLOAT_STARTS)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, _FLOAT_STARTS)


def read_yaml(text: str, source: str) -> tuple[Any, list[str]]:
    """Read one YAML document.

    Args:
        text: The document; without one the value is None.
        source: What it was read from, for the errors.

    Returns:
        The value, and a line for each thing wrong with the text. Where there are lines, the value is not to
        be used.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, []
            errors = list(_duplicates(node, source, "", set()))
            return loader.construct_document(node), errors
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        return None, [f"{where}: not valid YAML: {problem}; {_way_out(problem)}"]
    except (yaml.YAMLError, ValueError) as error:
        # A character that YAML forbids, or a value that does not suit its explicit !!tag: neither has a mark.
        reason = " ".join(str(error).split())
        return None, [f"{source}: not valid YAML: {reason}; correct that value, or remove the character."]


def write_yaml(data: Any) -> str:
    """Write plain values as YAML that `read_yaml` reads back to the same; tuples become lists."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _way_out(problem: str) -> str:
    if r"\t" in problem:
        return "indent with spaces, not with tabs."
    return "check the indentation and the `key: value` here, and quote text with special characters."


def _duplicates(node: yaml.Node, source: str, prefix: str, seen: set[int]) -> Iterator[str]:
    """Yield a line for each key that stands again in its mapping; YAML would silently take the last."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _duplicates(item, source, prefix, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    first_line: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        dotted, line, name = f"{prefix}{key.value}", key.start_mark.line + 1, (key.tag, key.value)
        if name in first_line:
            yield f"{source}:{line}: {dotted} stands on line {first_line[name]} already; keep one."
        first_line.setdefault(name, line)
        yield from _duplicates(value, source, f"{dotted}.", seen)
