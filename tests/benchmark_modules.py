"""Modules of `benchmarks/`, which is a folder of scripts and no package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def imported(monkeypatch: pytest.MonkeyPatch, names: Sequence[str]) -> Iterator[dict[str, ModuleType]]:
    """For a fixture: the modules as a script of the folder imports them, and gone afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name)
