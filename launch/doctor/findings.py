"""What one check says, and how it is printed."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "error"]
_COLOURS = {"ok": "green", "warning": "yellow", "error": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        verdict: `error` stops a run or makes it wrong, `warning` makes it slow or may stop it later.
        what: What was found.
        advice: What to do about it; nothing where all is well.
    """

    verdict: Verdict
    what: str
    advice: str = ""

    @property
    def text(self) -> str:
        """Finding and advice in one line."""
        return f"{self.what}. {self.advice}" if self.advice else self.what


def ok(what: str, advice: str = "") -> Finding:
    """All is well; `advice` is what could be had beside it."""
    return Finding("ok", what, advice)


def warning(what: str, advice: str) -> Finding:
    """A run would be slower, or might stop later."""
    return Finding("warning", what, advice)


def error(what: str, advice: str) -> Finding:
    """A run would stop, or be wrong."""
    return Finding("error", what, advice)


def has_errors(findings: Iterable[Finding]) -> bool:
    """Whether any of them is an error."""
    return any(finding.verdict == "error" for finding in findings)


def show(findings: Iterable[Finding], where: str = "") -> None:
    """Print findings, a line each, in colour on a terminal.

    Args:
        findings: What is printed.
        where: Name of the machine, where there are several.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True, emoji=False)
    prefix = f"{where}: " if where else ""
    for finding in findings:
        head = Text(f"{finding.verdict}: ", style=_COLOURS[finding.verdict])
        console.print(head + Text(prefix + finding.text))
