"""The key tables of docs/configuration.md, written from the schema.

`python -m longseq.launch.config_docs docs/configuration.md` writes them anew between their two markers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from .config_errors import schema_keys, section_of

BEGIN = "<!-- The schema's keys, from here on written by `python -m longseq.launch.config_docs FILE`. -->"
END = "<!-- The schema's keys end here. -->"


def key_tables() -> str:
    """A heading, a sentence and a table for each section of a config, in the schema's order."""
    keys = schema_keys()
    sections = {key: section_of(field) for key, field in keys.items() if "." not in key}
    parts = []
    for name, section in sections.items():
        assert section is not None, name  # a config's own keys are sections
        rows = [
            f"| `{key}` | `{_default(field)}` | {_one_line(field.description)} |"
            for key, field in keys.items()
            # A section that is always there is its keys.
            if key.startswith(f"{name}.") and not (section_of(field) and field.default_factory)
        ]
        head = [
            f"### {name}",
            "",
            _one_line(section.__doc__),
            "",
            "| key | default | what |",
            "|---|---|---|",
        ]
        parts.append("\n".join([*head, *rows]))
    return "\n\n".join(parts)


def with_key_tables(page: str) -> str:
    """A page with what stands between its markers replaced by the tables of today's schema.

    Raises:
        ValueError: The page does not have each marker once, in their order.
    """
    if (page.count(BEGIN), page.count(END)) != (1, 1) or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page needs these two lines, once each and in this order:\n{BEGIN}\n{END}")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{key_tables()}\n\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the tables of one page; its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if len(words) != 1:
        print("usage: python -m longseq.launch.config_docs docs/configuration.md", file=sys.stderr)
        return 2
    path = Path(words[0])
    try:
        text = with_key_tables(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 2
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(text, "utf-8")
    os.replace(draft, path)
    return 0


def _default(field: FieldInfo) -> str:
    value: Any = field.get_default(call_default_factory=True)
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value).replace("None", "null")


def _one_line(text: str | None) -> str:
    # A bar would end the table's cell.
    return " ".join((text or "").split()).replace("|", r"\|")


if __name__ == "__main__":
    sys.exit(main())
