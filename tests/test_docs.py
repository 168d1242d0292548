"""The documentation hangs together: links lead somewhere, commands are ones that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from longseq.launch import cli
from longseq.launch.bench.settings import read_config
from longseq.launch.config_file import list_presets, load_config

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    text = BLOCK.sub("", page.read_text("utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(BLOCK.sub("", page.read_text("utf-8"))):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_every_page_is_linked_to() -> None:
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in PAGES
        for link in LINK.findall(page.read_text("utf-8"))
        if link.partition("#")[0] not in ("", page.name)
    }
    assert [page.name for page in DOCS.glob("*.md") if page.resolve() not in linked] == []


def commands() -> list[tuple[str, str]]:
    """Every `longseq ...` line of a code block, with its page."""
    found = []
    for page in PAGES:
        for _, block in BLOCK.findall(page.read_text("utf-8")):
            for line in block.splitlines():
                words = line.strip().removeprefix("$ ").partition("  #")[0].partition("     #")[0].strip()
                if words.startswith("longseq "):
                    found.append((page.name, words))
    return found


SLIPS = ("sequence.lenght", "parallel.deepspeed_config=ds.json")
"""Of what shows an error, or names a file of the reader's own."""


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_are_ones_that_there_are(page: str, command: str) -> None:
    words = shlex.split(re.sub(r"\s*[>|].*$", "", command))[1:]
    words = words[: words.index("--")] if "--" in words else words
    given = cli._parser().parse_known_args(words)[0]
    is_preset = getattr(given, "config", None) in dict(list_presets())
    if is_preset and not any(slip in command for slip in SLIPS):
        # A bench gives the model as many positions as the length asks for.
        read = read_config if words[0] == "bench" else load_config
        read(given.config, [word for word in words[2:] if "=" in word and not word.startswith("-")])
