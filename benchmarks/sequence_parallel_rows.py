"""The rows of `sequence_parallel.py`: kept, compared with each other, and made tables of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import report

LOSS_TOLERANCE = 2e-3
NORM_TOLERANCE = 0.02
FACTS = ("shape", "layers", "allocator", "device", "versions")
"""What must be the same for all rows of a file."""
NAMES = ("system", "key", "optimizer", "gpus", "sp", "tokens")
"""What a row is known by."""
FILE = "sequence_parallel.json"
Row = dict[str, Any]

NOTE = """One training step: forward, backward and fused AdamW under ZeRO-3, bfloat16, one sequence for each
`sp` GPUs, random weights and tokens, all learning rates zero (the work is the same, and each step's numbers
are the first one's). Seconds are the slowest rank's, the median of the repeats; peaks are the largest of all
ranks and have weights, gradients and optimizer in them. Without ZeRO ("none") one GPU holds all weights and
gradients and runs forward and backward alone; "at once" is how many such ran beside each other, whose mean
it is. "Model TFLOP/s" counts causal attention once and nothing that is recomputed. "Run" is when a launch
began: launches of one day may have had other machines. "KiB/token" is the slope of the peak from the
variant's next shorter length, by tokens of a rank. "All-to-all MiB a layer" is what a rank sends to others in
a step, counted, and "predicted" the formula.

A variant whose loss or gradient norm on a short sequence is not that of transformers' own layers, with the
whole sequence on each rank, or whose loss at a length is not that of the row that was there first, has no
numbers. Both systems have the same weights. Each has its own settings of ZeRO-3: ALST the sizes that Hugging
Face's "auto" gives (it gathers weight by weight), ours those of `distributed/zero_config.py` (layers whole,
the next one under this one's computing)."""


class Rows:
    """All rows of a file."""

    def __init__(self, facts: Row, out: Path | None) -> None:
        self.facts, self.out = facts, out
        self.rows: list[Row] = []
        self.left_out: dict[str, str] = {}

    @classmethod
    def of_file(cls, facts: Row, out: Path | None) -> Rows:
        """With the rows of an earlier launch in `out`.

        Raises:
            SystemExit: They are of another model, device or version.
        """
        rows = cls(facts, out)
        path = None if out is None else out / FILE
        if path is None or not path.exists():
            return rows
        earlier = json.loads(path.read_text())
        here, there = {**facts, **report.environment()}, {**earlier, **earlier["environment"]}
        for name in FACTS:
            if here[name] != there[name]:
                raise SystemExit(f"--add: {path} has {name}={there[name]!r}, here it is {here[name]!r}.")
        rows.rows = [
            {name: value for name, value in row.items() if name != "KiB/token"} for row in earlier["rows"]
        ]
        rows.left_out = earlier["left_out"]
        return rows

    def keep(self, row: Row) -> None:
        """Put a row in the place of the one of the same case."""
        self.drop(row)
        self.rows.append(row)
        self.left_out.pop(str(case_of(row)), None)

    def note_in_file(self, row: Row) -> str | None:
        """What the file says of a case, which another rank may have written."""
        if self.out is None:
            return None
        rows = json.loads((self.out / FILE).read_text())["rows"]
        return next((other.get("note") for other in rows if case_of(other) == case_of(row)), None)

    def leave_out(self, row: Row, why: str) -> None:
        """Say why a case has no row; one that is there stays."""
        self.left_out[str(case_of(row))] = why

    def drop(self, row: Row) -> None:
        """Take out the row of the same case."""
        self.rows = [other for other in self.rows if case_of(other) != case_of(row)]

    def find(self, row: Row) -> Row | None:
        """The row of the same case."""
        return next((other for other in self.rows if case_of(other) == case_of(row)), None)

    def disagreement(self, row: Row) -> str | None:
        """What is not as in the first other row of the same sequences."""
        for other in self.rows:
            same_data = row["tokens"] == other["tokens"] and sequences_of(row) == sequences_of(other)
            if "loss" in other and same_data and case_of(other) != case_of(row):
                return disagreement(row, other, f"{other['system']} {other['key']}, {other['gpus']} GPUs,")
        return None

    def with_slopes(self) -> list[Row]:
        """Copies in order, with the slopes of each variant's peaks and what is kept of one GPU's speed."""
        order = sorted(self.rows, key=lambda row: (row["tokens"], row["gpus"], row["sp"]))
        found = []
        for row in order:
            row = dict(row)
            shorter = [
                other
                for other in order
                if case_of(other)[:-1] == case_of(row)[:-1] and other["tokens"] < row["tokens"]
            ]
            if row.get("peak GiB") and shorter and shorter[-1].get("peak GiB"):
                tokens = (row["tokens"] - shorter[-1]["tokens"]) / row["sp"]
                row["KiB/token"] = (row["peak GiB"] - shorter[-1]["peak GiB"]) * 2**20 / tokens
            found.append(row)
        return found

    def write(self, *, show: bool = False) -> None:
        """Keep what there is so far."""
        rows = self.with_slopes()
        report.write(
            "sequence_parallel",
            f"A training step, sequences over GPUs ({self.facts['shape']}, {self.facts['layers']} layers)",
            rows,
            self.out,
            tables=tables(rows),
            note=NOTE,
            show=show,
            **self.facts,
            left_out=self.left_out,
        )


def case_of(row: Row) -> tuple:
    """By which two rows are one measurement."""
    return tuple(row[name] for name in NAMES)


def sequences_of(row: Row) -> int:
    """Sequences in a step."""
    return row["gpus"] // row["sp"]


def disagreement(row: Row, truth: Row, whose: str) -> str | None:
    """What differs by more than roundings; a NaN does."""
    if not abs(row["loss"] - truth["loss"]) <= LOSS_TOLERANCE:
        return f"the loss is {row['loss']:.5f}, that of {whose} {truth['loss']:.5f}"
    if not abs(row["norm"] - truth["norm"]) <= NORM_TOLERANCE * truth["norm"]:
        return f"the gradients' norm is {row['norm']:.5g}, that of {whose} {truth['norm']:.5g}"
    return None


def tables(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """A table a length, one of scaling, and one of where the time goes."""
    columns = ["system", "key", "optimizer", "gpus", "sp", "at once", "s"]
    columns += ["tokens/s", "model TFLOP/s a GPU"]
    columns += ["peak GiB", "reserved GiB", "KiB/token", "host GiB", "all-to-all MiB a layer", "predicted"]
    columns += ["loss", "norm", "run", "note"]
    found = []
    for tokens in sorted({row["tokens"] for row in rows}):
        of_length = [row for row in rows if row["tokens"] == tokens]
        found.append((f"{tokens:,} tokens", _with_columns(of_length, columns)))
    for heading, table in (
        ("Scaling", scaling(rows)),
        ("Seconds of the first rank's GPU", profiles(rows)),
        ("Collectives of a step", collectives(rows)),
    ):
        if table:
            found.append((heading, table))
    return found


def _with_columns(rows: list[Row], columns: list[str]) -> list[Row]:
    shown = [name for name in columns if any(row.get(name) is not None for row in rows)]
    return [{name: row.get(name) for name in shown} for row in rows]


def scaling(rows: list[Row]) -> list[Row]:
    """Of each row on P GPUs: what its speed is of P times one GPU's.

    At the same length by tokens ("strong"), and at 1/sp of it, where a GPU has as many tokens, by the rate of
    operations ("weak": attention's share grows with the length, and tokens would say nothing). One GPU is the
    same system's same variant, or its fastest.
    """
    found = []
    for row in rows:
        if row["gpus"] == 1 or "s" not in row:
            continue
        strong, weak = one_gpu(rows, row, row["tokens"]), one_gpu(rows, row, row["tokens"] // row["sp"])
        if strong is None and weak is None:
            continue
        line = {name: row[name] for name in ("system", "key", "gpus", "sp", "tokens", "tokens/s")}
        if strong is not None:
            line["strong"] = row["tokens/s"] / (row["gpus"] * strong["tokens/s"])
            line["of one GPU's"] = (
                f"{strong['key']}, {strong['optimizer']}, {strong['tokens/s']:.0f} tokens/s"
            )
        if weak is not None:
            rate = "model TFLOP/s a GPU"
            line["weak"] = row[rate] / weak[rate]
            line["of its"] = f"{weak['key']}, {weak['optimizer']}, {weak[rate]:.0f} TFLOP/s"
        found.append(line)
    return _with_columns(found, list(dict.fromkeys(name for line in found for name in line)))


def one_gpu(rows: list[Row], row: Row, tokens: int) -> Row | None:
    """The row of one GPU that another one of the same system is held against at a length."""
    there = [
        other
        for other in rows
        if (other["system"], other["gpus"], other["tokens"]) == (row["system"], 1, tokens) and "s" in other
    ]
    alike = [other for other in there if other["key"] == row["key"]]
    return max(alike or there, key=lambda other: other["tokens/s"], default=None)


def profiles(rows: list[Row]) -> list[Row]:
    """Where a step's time went, of rows that were profiled."""
    return _with_columns(
        found := [
            {name: row[name] for name in ("system", "key", "gpus", "sp", "tokens")}
            | {name: value for name, value in row["profile"].items() if name != "top"}
            for row in rows
            if row.get("profile")
        ],
        list(dict.fromkeys(name for line in found for name in line)),
    )


def collectives(rows: list[Row]) -> list[Row]:
    """Calls by kind."""
    found = [
        {name: row[name] for name in ("system", "key", "gpus", "sp", "tokens")} | row["collectives"]
        for row in rows
        if row.get("collectives")
    ]
    return _with_columns(found, list(dict.fromkeys(name for line in found for name in line)))
