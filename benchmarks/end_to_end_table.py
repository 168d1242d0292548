"""The tables and the picture of what `end_to_end.py` measured. Needs no GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import report
from bench_runs import conditions, in_gib, read
from end_to_end_plot import draw
from end_to_end_rungs import SETTINGS, Setting

LONG_TOKENS = 65536
KEPT = (
    *("file", "config", "overrides", "gpus", "tokens", "kind", "memory_only", "note", "environment"),
    *("seconds", "tokens_per_second", "model_tflops_per_gpu", "losses", "norms"),
    *("peak_gib", "reserved_gib", "device_used_gib", "host_pinned_gib"),
)
"""Of a row of `longseq bench`, which holds the whole config too."""
SEQUENCE_PARALLEL = Path(__file__).with_name("results") / "sequence_parallel.json"
NO_PLACEMENT = "ValueError: The checkpoints of"
"""How `longseq.mst` begins to say that it found no place for layers' inputs."""
ANCHORS = ("liger", "alst", "alst-host", "mini-s")
Row = dict[str, Any]

NOTE = """\
Full training of the shape of Llama-3-8B: bf16 weights, gradients and optimizer states, batch 1, random
weights and tokens. A step is forward, backward, clipping to norm 1 and the optimizer: fused AdamW, or where a
row says so APOLLO-Mini as each gradient comes. Each row of the ladder has what the row above has and one
thing more, from "8 groups, APOLLO-Mini" on with that optimizer in AdamW's place. Attention is cuDNN's kernel
for all, but where flash-attn-4 is named. While speeds are measured the learning rate is 0, so that the losses
of all rows are of the same weights; a step at a rate of 1e-6 afterwards moves the loss. Speeds are of the
median of two steps at 16,384 tokens and of one step beyond, behind a step through one layer at the same
length (a whole step, of an anchor that pins host memory as it goes).

"peak" is what PyTorch's allocator gave out at most in the step, "host" what was pinned, "KiB/token" the slope
of the peak between the two longest that were measured. "loss" is the difference to the first row that has a
loss at that length, "norm" that of the gradients' norm, relative.

"longest" is the longest sequence whose whole step, optimizer included, has room, and "not" the shortest tried
that has none. "trained": that step was also run for real. "memory-verified": it was run with attention and
the products of matrices replaced by stubs that take the same memory and give zeros; everything else ran, host
copies included. "probe's error" is how far the peak of such a step is from a real one's. Where inputs wait in
host memory, a process may pin so many GiB as the heading says; beyond that they are rebuilt in backward."""


def collect(folders: list[Path], bench_files: list[Path], out: Path | None) -> list[Row]:
    """Print what folders hold; with `out`, keep it there as `end_to_end.json`, `.md` and `.png`.

    Args:
        folders: What `end_to_end.py --out` was given; of a setting that is in several, the last counts.
        bench_files: What `longseq bench --json` wrote.
        out: For the files; None prints.

    Raises:
        SystemExit: There is no measured setting.
    """
    rows = [row for setting in SETTINGS if (row := found_of(folders, setting)) is not None]
    if not rows:
        raise SystemExit(f"{', '.join(map(str, folders))}: no measured setting.")
    refuse_others(rows)
    with_differences(rows)
    runs = bench_rows(bench_files)
    several = sequence_parallel_rows(SEQUENCE_PARALLEL)
    tables = one_card_tables(rows)
    if runs:
        tables.append(("Runs of `longseq bench`", [shown_run(run) for run in runs]))
    if several:
        tables.append(("Several GPUs (sequence_parallel.json)", several))
    left_out = what_is_missing(rows)
    if left_out:
        tables.append(("Not measured", [{"setting": name, "why": why} for name, why in left_out.items()]))
    report.write(
        "end_to_end",
        f"Whole training steps of the shape {rows[0]['shape']}, technique by technique",
        rows,
        out,
        tables=tables,
        note=NOTE,
        measured_on=rows[0]["environment"] | {"date": dates_of(rows)},
        bench=runs,
        left_out=left_out,
    )
    if out is not None:
        draw(rows, out / "end_to_end.png")
    return rows


def dates_of(rows: list[Row]) -> str:
    """When all of them were measured: a row that went on later has several dates."""
    return ", ".join(sorted({date for row in rows for date in row["environment"]["date"].split(", ")}))


def found_of(folders: list[Path], setting: Setting) -> Row | None:
    """A setting's row, with all phases' numbers of the last folder that has it."""
    found = None
    for folder in folders:
        path = folder / f"{setting.name}.json"
        if path.exists():
            found = json.loads(path.read_text())
    if found is not None and setting.rung.longest_as is None and "as" in found.get("longest", {}):
        del found["longest"]  # of a file from when this rung had another's
    return found


def refuse_others(rows: list[Row]) -> None:
    """One table is of one model and one kind of machine, with one set of packages.

    Raises:
        SystemExit: Which row is of another.
    """
    for row in rows[1:]:
        for name, one, other in differences(rows[0], row):
            raise SystemExit(
                f"{row['name']} has {name}={other}, and {rows[0]['name']} {name}={one}: they are no rows of "
                "one table; leave one folder out, or measure it --again."
            )


def differences(one: Row, other: Row) -> list[tuple[str, Any, Any]]:
    """What two rows differ in that their numbers depend on."""
    pairs = [(name, one.get(name), other.get(name)) for name in ("shape", "layers", "host_gib", "allocator")]
    for name in ("device", "versions"):
        pairs.append((name, one["environment"].get(name), other["environment"].get(name)))
    return [pair for pair in pairs if pair[1] != pair[2]]


def what_is_missing(rows: list[Row]) -> dict[str, str]:
    """Settings that there is nothing of, and what others could not do in their time, by name."""
    there = {row["name"]: row for row in rows}
    found = {}
    for setting in SETTINGS:
        row = there.get(setting.name)
        notes = ["no file"] if row is None else [row[key] for key in ("note",) if key in row]
        notes += [] if row is None else row["left_out"]
        if notes:
            found[setting.name] = "; ".join(notes)
    return found


def with_differences(rows: list[Row]) -> None:
    """Say in each timed length how far loss and norm are from those of the first row that has them."""
    first: dict[int, tuple[str, Row]] = {}
    for row in rows:
        for time in row.get("times", ()):
            if "loss" not in time:
                continue
            name, truth = first.setdefault(time["tokens"], (row["name"], time))
            time["compared_to"] = name
            time["loss_difference"] = time["loss"] - truth["loss"]
            time["norm_difference"] = time["norm"] / truth["norm"] - 1


def one_card_tables(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """Speed and memory, lengths, and losses, of the whole card; lengths of each smaller one."""
    tables: list[tuple[str, list[Row]]] = []
    cards = sorted({row.get("card_gib") for row in rows}, key=lambda gib: (gib is not None, gib))
    for gib in cards:
        of_card = [row for row in rows if row.get("card_gib") == gib and "times" in row]
        if not of_card:
            continue
        device = of_card[0]["environment"]["device"]
        card = f"one {device}" if gib is None else f"a card of {gib} GiB, emulated on one {device}"
        if any(row["times"] for row in of_card):
            lengths = sorted({time["tokens"] for row in of_card for time in row["times"]})
            tables.append((f"{card}: speed and memory", [speeds(row, lengths) for row in of_card]))
        host = f"{of_card[0]['host_gib']:.0f} GiB of host memory"
        ends = [shown for row in of_card if (shown := longest(row, of_card)) is not None]
        if ends:
            tables.append((f"{card}, {host}: the longest sequence", ends))
        losses = [loss for row in of_card for loss in losses_of(row)]
        if losses:
            tables.append((f"{card}: losses and gradient norms", losses))
    return tables


def label(row: Row) -> str:
    """An anchor is told apart from the ladder."""
    return f"*{row['label']}*" if base_name(row) in ANCHORS else row["label"]


def base_name(row: Row) -> str:
    """Of the rung."""
    return next(one.rung.name for one in SETTINGS if one.name == row["name"])


def speeds(row: Row, lengths: list[int]) -> Row:
    """One row: tokens a second, and what the longer ones take."""
    times = {time["tokens"]: time for time in row["times"]}
    shown: Row = {"": label(row), "optimizer": row["optimizer"]}
    for tokens in lengths:
        time = times.get(tokens, {})
        speed = time.get("tokens_per_second")
        shown[f"{tokens:,}: tokens/s"] = round(speed) if speed else why_not(row, time, tokens)
    time = times.get(LONG_TOKENS, {})
    shown[f"{LONG_TOKENS:,}: TFLOP/s"] = time.get("model_tflops")
    for name, key in (("peak", "peak_bytes"), ("reserved", "reserved_bytes"), ("host", "host_pinned_bytes")):
        shown[f"{name} GiB"] = in_gib(time.get(key))
    shown["attention saved"] = time.get("saved")
    return shown


def why_not(row: Row, time: Row, tokens: int) -> str | None:
    """Why a length has no speed."""
    if "note" in time:
        return time["note"]
    shorter = [one for one in row["times"] if one["tokens"] < tokens and "note" in one]
    return shorter[0]["note"] if shorter else None


def longest(row: Row, others: list[Row]) -> Row | None:
    """The longest sequence of a row, or of the row that it has it from."""
    found = row.get("longest")
    if found is None:
        return None
    note = None
    if "as" in found:
        source = next((other for other in others if base_name(other) == found["as"]), {})
        note, found = f"that of {source.get('label', found['as'])}", source.get("longest", {})
    if "tokens" not in found:
        return None
    probes = {probe["tokens"]: probe for probe in found.get("probes", ())}
    times = {time["tokens"]: time for time in row["times"]}
    at = probes.get(found["tokens"]) or times.get(found["tokens"]) or {}
    check = found.get("check", {})
    off = None
    if check.get("probe_peak_bytes"):
        off = f"{(check['probe_peak_bytes'] - check['real_peak_bytes']) / 2**20:+,.0f} MiB"
    slope = found.get("slope_bytes")
    return {
        "": label(row),
        "optimizer": row["optimizer"],
        "longest": found["tokens"],
        "not": above(row if note is None else source, found),
        "state": note or found.get("state", "the search did not end"),
        "KiB/token": None if slope is None else slope / 1024,
        "peak GiB": in_gib(at.get("peak_bytes")),
        "reserved GiB": in_gib(at.get("reserved_bytes")),
        "host GiB": in_gib(at.get("host_pinned_bytes")),
        "inputs": None
        if not at.get("inputs")
        else ", ".join(f"{count} {where}" for where, count in at["inputs"].items() if count),
        "probe's error": off,
        "step s, trained": row.get("trained", {}).get("seconds") if note is None else None,
    }


def above(row: Row, found: Row) -> str | None:
    """What is known of longer ones."""
    fails, why = found.get("fails_tokens"), found.get("why")
    if fails is None:
        return why or "longer ones not tried"
    if why is not None and why.startswith(NO_PLACEMENT):
        why = "inputs have no room on the GPU and the host together"
    text = f"{fails:,}" if why in (None, "out of memory") else f"{fails:,} ({why})"
    return text if "longest" in row.get("done", ("longest",)) else f"{text}, none tried between"


def losses_of(row: Row) -> list[Row]:
    """At each length that was run."""
    return [
        {
            "": label(row),
            "tokens": time["tokens"],
            "loss": f"{time['loss']:.6f}",
            "difference": f"{time['loss_difference']:+.1e}",
            "norm": f"{time['norm']:.5f}",
            "relative": f"{time['norm_difference']:+.1e}",
            "to": time["compared_to"],
        }
        for time in row["times"]
        if "loss" in time
    ]


def bench_rows(files: list[Path]) -> list[Row]:
    """Runs of `longseq bench`, without the whole of their configs."""
    return [{name: row[name] for name in KEPT if name in row} | conditions(row) for row in read(files)]


def shown_run(row: Row) -> Row:
    """A run of the library's own command."""
    speed = row.get("tokens_per_second")
    state = "memory-verified" if row.get("memory_only") else "trained"
    return {
        "run": " ".join([row.get("config", row["file"]), *row.get("overrides", ())]),
        "GPUs": row.get("gpus"),
        "device": row.get("environment", {}).get("device"),
        "held to GiB": row.get("card_gib"),
        "of host memory": row.get("host_gib"),
        "optimizer": row.get("optimizer"),
        "tokens": row["tokens"],
        "state": row.get("note") or state,
        "s": row.get("seconds"),
        "planned s": row.get("planned_s"),
        "tokens/s": round(speed) if speed and not row.get("memory_only") else None,
        "peak GiB": row.get("peak_gib"),
        "planned GiB": row.get("planned_gib"),
        "host GiB": row.get("host_pinned_gib"),
        "loss": (row.get("losses") or [None])[-1],
        "gradient norm": (row.get("norms") or [None])[-1],
    }


def sequence_parallel_rows(path: Path) -> list[Row]:
    """What `sequence_parallel.py` measured of AdamW under ZeRO-3, the fastest of a kind and length."""
    if not path.exists():
        return []
    best: dict[tuple, Row] = {}
    for row in json.loads(path.read_text())["rows"]:
        if row.get("optimizer") != "adamw" or "tokens/s" not in row:
            continue
        kind = (row["tokens"], row["gpus"], row["system"], row["key"])
        if kind not in best or row["tokens/s"] > best[kind]["tokens/s"]:
            best[kind] = row
    return [
        {
            "system": {"ours": "longseq", "alst": "*ALST*"}.get(row["system"], row["system"]),
            "settings": row["key"],
            "GPUs": row["gpus"],
            "sp": row["sp"],
            "tokens": row["tokens"],
            "tokens/s": round(row["tokens/s"]),
            "TFLOP/s a GPU": row.get("model TFLOP/s a GPU"),
            "peak GiB": row.get("peak GiB"),
            "host GiB a GPU": row.get("host GiB"),
        }
        for _, row in sorted(best.items())
    ]
