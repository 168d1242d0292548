"""Profiles of steps, side by side: what each kind of kernel takes, and every gap with a human's words for it.

longseq bench CONFIG --profile --json RUN.json
python benchmarks/profile_table.py RUN.json OTHER.json --notes notes.yaml --out benchmarks/results
python benchmarks/profile_table.py benchmarks/results/profile.json NEW.json --notes notes.yaml --out DIR

The notes say why. Names of kernels and runs may have wildcards, and the first that fits is taken:

    gaps:
      - {before: "_rms_norm*", after: "nccl*", run: "*", words: "what was found out"}
    runs:
      - {run: "8b-*", words: "why more than the aim is beside products and attention"}
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import report
import yaml

from longseq.launch.bench.profile import meanwhile

AIM_BESIDE = 0.08
"""Of a step; what is neither a product nor attention should stay under it."""
EXPLAIN_OVER = 0.02
"""Of a step; a longer gap needs words."""
UNEXPLAINED = "**not explained**"
NOTE_KEYS = {"gaps": {"before", "after", "run", "words"}, "runs": {"run", "words"}}
NOTE = """\
One step of each run, recorded after steps that warmed it up. A moment in which several kinds of kernels run
belongs to products, else to attention, else to other computing, else to NCCL, else to copies of the host, so
kinds and idle add up to the step; *hidden* is when a kind ran beside one that comes before it. *Loss* is its
own kernels; where cuBLAS computes its products, they are among the products. A gap is a stretch without a
computing kernel, summed over all that have the same kernels before and after."""
Note = dict[str, str]
Row = dict[str, Any]


def load(paths: Sequence[Path]) -> list[Row]:
    """Runs of files and of earlier tables, whose runs of the same name are replaced.

    Raises:
        SystemExit: Two files of one name, or one without a profile, or with one that was not made on a GPU.
    """
    runs: dict[str, Row] = {}
    named: list[str] = []
    for path in paths:
        found = json.loads(path.read_text())
        if "rows" in found:
            runs |= {row["run"]: row for row in found["rows"]}
            continue
        named.append(path.stem)
        runs[path.stem] = run_of(path, found)
    if len(set(named)) < len(named):
        raise SystemExit(f"A run is named as its file; {', '.join(named)} has a name twice, so rename one.")
    return list(runs.values())


def run_of(path: Path, found: Row) -> Row:
    """A run's name, tokens and profile."""
    if not found.get("profile", {}).get("on_gpu"):
        raise SystemExit(
            f"{path} has no profile of a GPU; `longseq bench CONFIG --profile --json FILE` writes one."
        )
    facts = {key: found[key] for key in ("tokens", "gpus", "seconds", "environment") if key in found}
    return {"run": path.stem, **facts, **found["profile"]}


def load_notes(path: Path | None) -> dict[str, list[Note]]:
    """What was found out about gaps and runs.

    Raises:
        SystemExit: A key that is none, or a note without words.
    """
    notes = (yaml.safe_load(path.read_text()) or {}) if path else {}
    for group, found in notes.items():
        if group not in NOTE_KEYS:
            raise SystemExit(f"{path}: {group} is none of {', '.join(NOTE_KEYS)}.")
        for note in found:
            if set(note) - NOTE_KEYS[group] or not note.get("words"):
                raise SystemExit(f"{path}: {note} needs words, and may have {', '.join(NOTE_KEYS[group])}.")
    return {group: notes.get(group) or [] for group in NOTE_KEYS}


def words(notes: Sequence[Note], **names: str) -> str | None:
    """Of the first note that fits; one that leaves a name out fits all."""
    for note in notes:
        if all(fnmatchcase(name, note.get(key, "*")) for key, name in names.items()):
            return note["words"]
    return None


def kind_rows(runs: Sequence[Row]) -> list[Row]:
    """A row a kind, a column a run; kinds of which no run has a thousandth are one row."""
    kinds = {kind: 0.0 for run in runs for kind in run["kinds"]}
    for run in runs:
        for kind, took in run["kinds"].items():
            kinds[kind] = max(kinds[kind], took["share"])
    shown = sorted((kind for kind, share in kinds.items() if share >= 1e-3), key=lambda kind: -kinds[kind])
    rows: list[Row] = [{"kind": "the step"} | {run["run"]: f"{run['wall_s']:.3f} s" for run in runs}]
    for kind in shown:
        took = {run["run"]: run["kinds"].get(kind) for run in runs}
        rows.append({"kind": kind} | {name: cell(found) for name, found in took.items()})
    others = {
        run["run"]: sum(took["exposed_s"] for kind, took in run["kinds"].items() if kind not in shown)
        for run in runs
    }
    for name, seconds in (
        ("all other kernels", others),
        ("idle", {run["run"]: run["idle_s"] for run in runs}),
    ):
        cells = {run["run"]: of_step(seconds[run["run"]], run) for run in runs}
        rows.append({"kind": name} | cells)
    beside = {run["run"]: f"**{run['beside_products_and_attention']:.1%}**" for run in runs}
    return [*rows, {"kind": "**beside products and attention**"} | beside]


def of_step(seconds: float, run: Row) -> str:
    """Seconds and their share."""
    return f"{seconds:.3f} s, {seconds / run['wall_s']:.1%}"


def cell(took: Row | None) -> str | None:
    """Exposed seconds and share; what is hidden where that is a twentieth or more."""
    if took is None:
        return None
    hidden = took["s"] - took["exposed_s"]
    text = f"{took['exposed_s']:.3f} s, {took['share']:.1%}"
    return f"{text} ({hidden:.3f} s hidden)" if hidden >= 0.05 * took["s"] and hidden >= 5e-4 else text


def gap_rows(runs: Sequence[Row], notes: Sequence[Note]) -> list[Row]:
    """The gaps of all runs; one over `EXPLAIN_OVER` has words or says that it has none."""
    rows = []
    for run in runs:
        for gap in run["gaps"]:
            said = words(notes, before=gap["before"], after=gap["after"], run=run["run"])
            rows.append(
                {
                    "run": run["run"],
                    "before": f"`{gap['before']}`",
                    "after": f"`{gap['after']}`",
                    "s": gap["s"],
                    "share": f"{gap['share']:.2%}",
                    "times": gap["count"],
                    "longest s": gap["longest_s"],
                    "meanwhile": meanwhile(gap),
                    "explained": said or (UNEXPLAINED if gap["share"] > EXPLAIN_OVER else None),
                }
            )
        small = run["small_gaps"]
        share = f"{small['s'] / run['wall_s']:.2%}"
        rows.append(
            {
                "run": run["run"],
                "before": "all others",
                "after": None,
                "s": small["s"],
                "share": share,
                "times": small["count"],
            }
        )
    return rows


def verdicts(runs: Sequence[Row], gaps: Sequence[Row], notes: Sequence[Note]) -> list[Row]:
    """Whether each run keeps to the aim, and why not."""
    rows = []
    for run in runs:
        beside = run["beside_products_and_attention"]
        missed = beside >= AIM_BESIDE
        said = words(notes, run=run["run"])
        unexplained = sum(row["run"] == run["run"] and row.get("explained") == UNEXPLAINED for row in gaps)
        rows.append(
            {
                "run": run["run"],
                "tokens": run.get("tokens"),
                "GPUs": run.get("gpus"),
                "device": run.get("environment", {}).get("device"),
                "measured": run.get("environment", {}).get("date"),
                "step s": run["wall_s"],
                "without the profiler s": run.get("seconds"),
                "beside": f"{beside:.1%}",
                f"under {AIM_BESIDE:.0%}": "no" if missed else "yes",
                f"gaps over {EXPLAIN_OVER:.0%} without words": unexplained,
                "why": said or (UNEXPLAINED if missed else None),
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = report.arguments(__doc__.splitlines()[0])
    parser.add_argument(
        "json",
        type=Path,
        nargs="+",
        help="`longseq bench --profile --json`, or an earlier table",
    )
    parser.add_argument("--notes", type=Path, help="YAML: a human's words for gaps and runs")
    args: argparse.Namespace = parser.parse_args(arguments)
    runs = load(args.json)
    notes = load_notes(args.notes)
    gaps = gap_rows(runs, notes["gaps"])
    judged = verdicts(runs, gaps, notes["runs"])
    report.write(
        "profile",
        "Where a step's time goes",
        runs,
        args.out,
        tables=[("The aim", judged), ("By kind", kind_rows(runs)), ("Gaps", gaps)],
        note=NOTE,
        measured_on=runs[0].get("environment"),
    )
    missing = sum(UNEXPLAINED in (row.get("explained"), row.get("why")) for row in (*gaps, *judged))
    if missing:
        print(f"{missing} cells lack words; --notes takes them.")


if __name__ == "__main__":
    main()
