"""A config with other values for some of its keys."""

from __future__ import annotations

from collections.abc import Mapping

from .config import RunConfig


def with_values(config: RunConfig, values: Mapping[str, object]) -> RunConfig:
    """A copy with other values; neither types nor rules are asked.

    Args:
        config: Stays as it is.
        values: By dotted key of two parts, such as `sequence.length`.
    """
    changed: dict[str, dict[str, object]] = {}
    for key, value in values.items():
        section, name = key.split(".")
        changed.setdefault(section, {})[name] = value
    sections = {name: getattr(config, name).model_copy(update=update) for name, update in changed.items()}
    return config.model_copy(update=sections)
