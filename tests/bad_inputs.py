"""What a bad input must come to: a message with the way out, the right status, and nothing lost."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_run import Workshop

from longseq.launch.cli import main

VERBS = (
    "add allow ask bring check choose convert correct delete export free give indent install keep leave let "
    "lower make mark move name pick point plot put quote raise remove rename run save set shorten start take "
    "train try use wait write"
)
WAY_OUT = re.compile(
    rf"""did\ you\ mean\ \S
    | \bmust\ (?:be|divide|have|name)\ \S   # the rule says which values there are
    | (?:^|[;:.,)]\s+|\(|\b(?:and|or|so)\s+)(?:{VERBS.replace(" ", "|")})\s+\S""",
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
"""Something to do: an imperative at the start of a clause, the right spelling, or the values that fit."""

OUR_BUG = re.compile(
    r"Traceback|pydantic|<class |object at 0x|(?:Key|Attribute|Type|Index|Name|Unicode\w*)Error"
)
"""A message for us, not for the person."""


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        name: What is wrong, in a word or three.
        make: Writes the input below the place it is given; returns the words of the command.
        says: What the message has: the key or file, the value or line, the way out.
        status: How the command ends.
    """

    name: str
    make: Callable[[Place], Sequence[str | Path]]
    says: tuple[str, ...]
    status: int = 2


@dataclass(frozen=True)
class Place:
    """Where a case makes its input.

    Attributes:
        folder: An empty folder of its own.
        shop: Documents and configs that are good.
        runs: Finished runs, by name; they are shared, so a case that damages one copies it.
    """

    folder: Path
    shop: Workshop
    runs: dict[str, Path]

    def write(self, name: str, content: str | bytes) -> Path:
        """A file of that content."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def yaml(self, *overrides: str) -> Path:
        """A good config, whose run goes into `run` of the folder, with overrides over it."""
        path = self.shop.yaml("good", f"log.run_dir={self.folder / 'run'}", *overrides)
        return self.write("good.yaml", path.read_text())


def parametrized(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """A test for each case, by its name."""
    names = [case.name.replace(" ", "-") for case in cases]
    assert len(set(names)) == len(names), "two cases have one name"
    return pytest.mark.parametrize("case", cases, ids=names)


def check(case: Case, place: Place, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a case's command and hold it to all that is promised; what it printed as its error."""
    words = [str(word) for word in case.make(place)]
    capsys.readouterr()
    before = digests(place.folder)
    assert before or case.make.__name__ == "<lambda>"
    try:
        status = main(words)
    except SystemExit as ended:  # argparse's own
        status = ended.code
    out, err = capsys.readouterr()
    # A run that stops itself says so in its log.
    message = err if case.status == 2 else out + err
    assert status == case.status, out + err
    for part in case.says:
        assert part in " ".join(message.split()), message
    assert_says_the_way_out(message)
    after = digests(place.folder)
    lost = [name for name, digest in before.items() if after.get(name) != digest]
    assert lost == [], f"changed or gone: {lost}"
    drafts = [name for name in after.keys() - before.keys() if ".partial" in name or name.endswith(".tmp")]
    assert drafts == [], f"left behind: {drafts}"
    return message


def assert_says_the_way_out(message: str) -> None:
    """It names something to do, and is no accident of ours."""
    assert WAY_OUT.search(message), f"no way out: {message}"
    assert not OUR_BUG.search(message), message


def digests(folder: Path) -> dict[str, str]:
    """What is below a folder: a digest of each file's bytes, a link's target."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
