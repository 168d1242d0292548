"""The papers' claims one by one, each beside what was measured here: a table made of the results' files.

python benchmarks/claims.py --results benchmarks/results --out benchmarks/results
python benchmarks/claims.py --longest ONE.json TWO.json FOUR.json --out benchmarks/results  # of longseq bench
python benchmarks/claims.py --longest benchmarks/results/longest.json FOUR.json --out benchmarks/results

No number of ours is typed: a claim whose file is missing, or lacks the row, says "not measured". The second
form puts what `longseq bench --json` wrote about longest sequences into `longest.json`, then makes the table;
the third adds to it.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import report
from bench_runs import conditions, read
from claims_list import CLAIMS, Claim
from claims_results import MissingError, Results

NOT_MEASURED = "not measured"
COLUMNS = {
    "claim": "the claim",
    "paper": "the paper's number, and on what",
    "ours": "ours",
    "where": "on what, when",
    "verdict": "verdict",
    "command": "had by",
}
NOTE = """What the papers claim, and what was measured with this library; both columns of numbers are of
different machines unless the verdict says otherwise. The papers' numbers are from their texts, tables and
repositories. Ours come out of the files beside this one, by `python benchmarks/claims.py`; none was typed.
"reached": the number is as good as the claim's. "short by a factor of": how far it is off. "other machine": a
number that depends on it, and is not compared. "not measured": there is no result of it."""
LONGEST_NOTE = """The longest sequence of a full-parameter training step that was tried with `longseq bench`
on so many GPUs, as its own files say it; longer ones may fit. "Memory-verified, not trained": attention was
stubbed, all memory was as it is. A sequence is shared by all GPUs of its row. "host_peak_gib" is of the
process that took most, "host_gib" what all of a machine were held to together."""
Row = dict[str, Any]


def row_of(claim: Claim, results: Results) -> Row:
    """A claim beside what there is, in results that no other claim has used."""
    row: Row = {"key": claim.key, "technique": claim.technique, "arXiv": claim.arxiv, "claim": claim.text}
    row["paper"] = f"{claim.number}; {claim.machine}" if claim.machine else claim.number
    try:
        found = claim.find(results)
    except MissingError as missing:
        return row | {"ours": None, "verdict": NOT_MEASURED, "why": str(missing), "command": claim.command}
    where = "; ".join(dict.fromkeys(results.used))
    return row | {
        "ours": found.text,
        "numbers": found.numbers,
        "where": where,
        "verdict": found.verdict,
        "command": found.command or claim.command,
    }


def shown(row: Row) -> Row:
    """A row of the table."""
    cells = {heading: row.get(name) for name, heading in COLUMNS.items()}
    cells[COLUMNS["command"]] = f"`{row['command']}`"
    if row["verdict"] not in (NOT_MEASURED, "reached"):
        cells[COLUMNS["verdict"]] = f"**{row['verdict']}**"
    return cells


def collect(paths: list[Path], out: Path) -> None:
    """Put the files of `longseq bench --json` together, as `longest.json` and `longest.md`.

    Raises:
        SystemExit: A run that has not ended, or a file of none.
    """
    rows = []
    for found in read(paths):
        name = found["file"]
        lacking = [key for key in ("gpus", "kind", "environment") if key not in found]
        if lacking:
            raise SystemExit(f"--longest: {name} is no run of `longseq bench --json`: no {lacking[0]}.")
        if found.get("note"):
            raise SystemExit(f"--longest: {name} did not end as it should: {found['note']}.")
        names = ("file", "gpus", "tokens", "kind", "seconds", "tokens_per_second", "peak_gib", "reserved_gib")
        names += ("host_peak_gib", "config", "overrides", "memory_only", "environment")
        kept = {name: found.get(name) for name in names}
        rows.append(kept | conditions(found))
    rows.sort(key=lambda row: (row["gpus"], row["tokens"]))
    shares = [row | {"tokens a GPU": row["tokens"] // row["gpus"]} for row in rows]
    columns = ("gpus", "tokens", "tokens a GPU", "kind", "seconds", "tokens_per_second", "peak_gib")
    columns += ("host_peak_gib", "host_gib", "config")
    table = [
        {name: row[name] for name in columns}
        | {"overrides": f"`{' '.join(row['overrides'])}`", "device": row["environment"]["device"]}
        for row in shares
    ]
    heading = [("On one, two and more GPUs", table)]
    first = rows[0]["environment"]
    options: Row = {"tables": heading, "note": LONGEST_NOTE, "show": False, "measured_on": first}
    report.write("longest", "The longest sequences", shares, out, **options)


def write(rows: list[Row], out: Path | None) -> str:
    """The table as Markdown; with `out`, it and the rows are kept there."""
    parts = ["# The papers' claims", NOTE]
    for technique in dict.fromkeys(row["technique"] for row in rows):
        some = [row for row in rows if row["technique"] == technique]
        parts += [f"## {technique} (arXiv {some[0]['arXiv']})", report.markdown([shown(row) for row in some])]
    text = "\n\n".join(parts) + "\n"
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        payload = json.dumps({"name": "claims", "rows": rows}, indent=2)
        for suffix, content in ((".json", payload), (".md", text)):
            draft = out / f".claims{suffix}.partial"
            draft.write_text(content)
            os.replace(draft, out / f"claims{suffix}")
    return text


def main(arguments: list[str] | None = None) -> None:
    options = report.arguments(__doc__.splitlines()[0])
    folder = Path(__file__).parent / "results"
    options.add_argument("--results", type=Path, default=folder, help="folder of what was measured")
    options.add_argument(
        "--longest", type=Path, nargs="+", metavar="FILE", help="what `longseq bench --json` wrote"
    )
    args: argparse.Namespace = options.parse_args(arguments)
    if args.longest:
        collect(args.longest, args.out or args.results)
    print(write([row_of(claim, Results(args.results)) for claim in CLAIMS], args.out))


if __name__ == "__main__":
    main()
