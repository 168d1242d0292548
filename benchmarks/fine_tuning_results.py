"""Tables and picture of `fine_tuning.py`, from what its stages left in their folder."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
import retrieval
from fine_tuning_shapes import BASE, PLANNED_GPU

MODELS = {
    "short": "before: trained at short length",
    "short-end": "before, shown only as many tokens as it was trained on",
    "long": "after: fine-tuned at full length",
}
COLORS = {"short": "tab:orange", "short-end": "tab:green", "long": "tab:blue"}
NOTE = """The base model was made here, from random weights, on short documents; there is nothing to download
where this runs. The text is source code and documentation of installed Python packages. **Notes with random
codes were planted in all of it**, and asked for later in the same document, in both stages: they are what
shows whether training at full length teaches a small model to look far back in a few hundred steps. A note
is a line of made-up words, drawn anew for each document, so that seeing a document twice tells nothing of
others. The base model is first trained on documents that are little else than notes and their questions,
from which copying and looking are learned, then on text. The fine-tuning's documents are conversations, in
which the user shows the text and asks for each note once, and the assistant answers, with the loss of the
answers; every third is text, with the loss of all of it. Its held-out loss is that of answers, its last loss
a mean over both. Held-out documents are of other packages; the probe asks what they noted so many tokens
before. A code of 4 words is found if each word is the likeliest token, given those before it. The control is
the same document without its notes; guessing among all the words costs the logarithm of their number (the
table says how many there are). The rotary base is that of models for long sequences from the start. Commands
were typed as shown, in the folder of the files."""
Row = dict[str, Any]


def write(story: Row, work: Path, out: Path, show: bool = True) -> None:
    """JSON, Markdown and picture of whatever is there so far; `fine_tuning`, or `fine_tuning_SHAPE`."""
    table = "fine_tuning" if story["shape"] == "full" else f"fine_tuning_{story['shape']}"
    probed = read_probes(work)
    retrieved = [
        {"model": name, **row} for name, rows in probed.items() for row in retrieval.by_distance(rows)
    ]
    positions = [
        {"model": name, **row} for name, rows in probed.items() for row in retrieval.by_position(rows)
    ]
    tables = [
        ("What was found, by distance", [_retrieval_row(row) for row in retrieved]),
        ("Loss by position in held-out documents, without notes", _position_rows(positions)),
        ("What was typed", [_command_row(row) for row in story["commands"]]),
        ("The runs", _run_rows(story)),
        ("The text", _corpus_rows(story)),
    ]
    report.write(
        table,
        "A model fine-tuned at full length, from its text to what it looks up",
        retrieved,
        out,
        tables=[(heading, rows) for heading, rows in tables if rows],
        note=NOTE,
        show=show,
        loss_by_position=positions,
        **story,
    )
    if retrieved:
        draw(retrieved, out / f"{table}.png")


def read_probes(work: Path) -> dict[str, list[Row]]:
    """The rows of each model that has been probed."""
    paths = {name: work / f"probe-{name}.jsonl" for name in MODELS}
    return {
        name: [json.loads(line) for line in path.read_text().splitlines()]
        for name, path in paths.items()
        if path.exists()
    }


def _retrieval_row(row: Row) -> Row:
    return {
        "model": MODELS[row["model"]],
        "tokens back": round(row["distance_tokens"]),
        "asks": row["asks"],
        "found %": 100 * row["found"],
        "loss a code token": row["loss"],
        "control: found %": 100 * row["control_found"],
        "control: loss": row["control_loss"],
    }


def _position_rows(positions: Sequence[Row]) -> list[Row]:
    rows: dict[str, Row] = {}
    for row in positions:
        table_row = rows.setdefault(row["model"], {"model": MODELS[row["model"]]})
        table_row[f"{row['from']:,} to {row['to']:,}"] = row["loss"]
    return list(rows.values())


def _command_row(row: Row) -> Row:
    return {"command": f"`{row['command']}`", "seconds": row["seconds"], "ended": row["ended"]}


def _run_rows(story: Row) -> list[Row]:
    rows = []
    for stage in (*BASE, "long"):
        if (run := story.get(stage)) is None:
            continue
        planned = run.get("planned", {})
        if planned.get("gpu") == PLANNED_GPU:  # and not the machine that it ran on
            planned = {}
        rows.append(
            {
                "run": stage,
                "parameters": run["parameters"],
                "tokens a sequence": run["length"],
                "steps": run["steps"],
                "tokens": run["tokens"],
                "highest rate": run["lr"],
                "s a step": run["step_s"],
                "planned s": planned.get("step_s"),
                "peak GiB": run["peak_gib"],
                "planned GiB": planned.get("peak_gib"),
                "last loss": run["last_loss"],
                "held-out loss": _evals(run),
                "same losses after the kill": run.get("kill", {}).get("equal"),
            }
        )
    return rows


def _evals(run: Row) -> str | None:
    return ", ".join(f"{row['eval_loss']:.4f} at {row['step']}" for row in run["evals"]) or None


def _corpus_rows(story: Row) -> list[Row]:
    corpus = story.get("corpus")
    if corpus is None:
        return []
    words = corpus["made_up_words"]
    return [
        {"documents of": part, **corpus[part], "words of notes": words, "guessing, nats": math.log(words)}
        for part in (*BASE, "long", "long-text", "heldout")
    ]


def draw(rows: Sequence[Row], path: Path) -> None:
    """What is found, and the loss of a code, over the distance; one line a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, (found, loss) = pyplot.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for name in dict.fromkeys(row["model"] for row in rows):
        some = [row for row in rows if row["model"] == name]
        distances = [row["distance_tokens"] for row in some]
        style = {"color": COLORS[name], "marker": "o", "label": MODELS[name]}
        found.plot(distances, [100 * row["found"] for row in some], **style)
        loss.plot(distances, [row["loss"] for row in some], **style)
        control = [row["control_loss"] for row in some]
        loss.plot(distances, control, color=COLORS[name], linestyle=":", linewidth=1)
    found.set_ylabel("codes found, %")
    found.set_ylim(-3, 103)
    loss.set_ylabel("loss a code token, nats (dotted: without the note)")
    for axis in (found, loss):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.set_xlabel("tokens from the note to the question")
        axis.grid(alpha=0.3)
    figure.legend(*found.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    report.save_figure(figure, path)
