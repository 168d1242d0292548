"""The installed packages against the ranges that longseq's own metadata asks for."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from importlib import metadata

from .findings import Finding, error, ok, warning

SHOWN = ("torch", "triton", "transformers", "deepspeed", "safetensors", "datasets", "peft")
"""Named with their version where all is well; the others are named where they are not."""
USED_EXTRAS = ("peft", "wandb", "fa4", "flash-attn")
"""Extras whose packages a run may use; those of tests and benchmarks are their own affair."""


@dataclass(frozen=True)
class Versions:
    """Facts.

    Attributes:
        python: Of the interpreter.
        requires_python: Range that it must be in.
        requirements: As the metadata has them; None where longseq is not installed.
        installed: Version of each package that they name; None where it is not there.
    """

    python: str
    requires_python: str
    requirements: tuple[str, ...] | None
    installed: dict[str, str | None]


def read_versions() -> Versions:
    """The facts of this interpreter."""
    from packaging.requirements import Requirement

    try:
        described = metadata.metadata("longseq")
        requirements = tuple(metadata.requires("longseq") or ())
        requires_python = described["Requires-Python"] or ""
    except metadata.PackageNotFoundError:
        return Versions(platform.python_version(), "", None, {})
    names = {Requirement(text).name for text in requirements}
    return Versions(
        platform.python_version(), requires_python, requirements, {name: _version(name) for name in names}
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_versions(facts: Versions) -> list[Finding]:
    """One line for what fits, one for each package that does not."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    if facts.requirements is None:
        return [
            warning(
                "longseq itself is not installed, so that the versions it needs are not known",
                f"Install it: {sys.executable} -m pip install -e . (in its folder), or pip install longseq.",
            )
        ]
    findings = []
    if not SpecifierSet(facts.requires_python).contains(facts.python, prereleases=True):
        findings.append(
            error(
                f"Python {facts.python} is outside {facts.requires_python}",
                "Make a new environment with such a Python.",
            )
        )
    for text in facts.requirements:
        finding = _check_one(Requirement(text), facts.installed)
        if finding is not None and finding not in findings:
            findings.append(finding)
    shown = [f"{name} {version}" for name in SHOWN if (version := facts.installed.get(name)) is not None]
    if not findings:
        findings = [ok(f"Python {facts.python}, {', '.join(shown)}: all within the ranges of longseq")]
    return findings


def _check_one(requirement, installed: dict[str, str | None]) -> Finding | None:
    """What is wrong with one package; an extra's may be absent, but not of the wrong version."""
    is_extra = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
    if is_extra and not any(requirement.marker.evaluate({"extra": extra}) for extra in USED_EXTRAS):
        return None
    found = installed.get(requirement.name)
    wanted = f"{requirement.name}{requirement.specifier}"
    # In quotes, because a shell takes `>` for a redirection.
    install = f"pip install '{wanted}'"
    if found is None:
        return None if is_extra else error(f"{requirement.name} is not installed", f"Run {install}.")
    # A nightly or a local build of a version counts as that version.
    if requirement.specifier.contains(found.partition("+")[0], prereleases=True):
        return None
    line = f"{requirement.name} {found} is outside {requirement.specifier}"
    if is_extra:
        return warning(line, f"Run {install}, or uninstall it.")
    return error(line, f"Run {install}.")
