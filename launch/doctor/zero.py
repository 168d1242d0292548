"""Whether DeepSpeed works here, where a config shards by it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from .findings import Finding, error, ok

if TYPE_CHECKING:
    from ..config import RunConfig

IMPORT_S = 120.0
_ITS_OWN_ADAM = "zero_force_ds_cpu_optimizer"


@dataclass(frozen=True)
class DeepSpeed:
    """Facts.

    Attributes:
        failure: What importing it said last; empty where it went well.
        compiles: Whether it will compile an operator of its own: its CPU Adam, which a JSON asks for.
        has_compiler: Whether a C++ compiler and ninja are there.
    """

    failure: str
    compiles: bool
    has_compiler: bool


class DeepSpeedTrial:
    """Imports DeepSpeed in a process of its own: it takes seconds and says much."""

    def __init__(self, config: RunConfig) -> None:
        self._compiles = _asks_for_its_adam(config)
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import deepspeed"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def result(self) -> DeepSpeed:
        """Wait for it."""
        try:
            _, said = self._process.communicate(timeout=IMPORT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return DeepSpeed(f"it was not imported within {IMPORT_S:.0f} s", self._compiles, True)
        lines = said.strip().splitlines()
        failure = (lines[-1] if lines else "it said nothing") if self._process.returncode else ""
        compiler = shutil.which("g++") or shutil.which("c++")
        has_ninja = shutil.which("ninja") is not None or find_spec("ninja") is not None
        return DeepSpeed(failure, self._compiles, compiler is not None and has_ninja)


def _asks_for_its_adam(config: RunConfig) -> bool:
    from ..deepspeed_json import read_json

    given = config.parallel.deepspeed_config
    return given is not None and read_json(given).get(_ITS_OWN_ADAM) is True


def check_deepspeed(facts: DeepSpeed) -> list[Finding]:
    """One line."""
    if facts.failure:
        return [
            error(
                f"DeepSpeed cannot be imported: {facts.failure}",
                "parallel.zero_stage >= 1 needs it: pip install --force-reinstall --no-deps deepspeed.",
            )
        ]
    if facts.compiles and not facts.has_compiler:
        return [
            error(
                f"parallel.deepspeed_config sets {_ITS_OWN_ADAM}, which compiles DeepSpeed's CPU Adam, and "
                "there is no C++ compiler with ninja",
                "Install them (apt-get install g++ ninja-build), or leave that key out for torch's own.",
            )
        ]
    if facts.compiles:
        return [ok("DeepSpeed can be imported, and its CPU Adam compiled")]
    return [ok("DeepSpeed can be imported; none of its operators has to be compiled")]
