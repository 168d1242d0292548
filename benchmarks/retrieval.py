"""How well a model looks up what stood far back: codes that a document notes early and asks at its end.

python benchmarks/retrieval.py --model FOLDER --probes probes.jsonl --out rows.jsonl

Probes are those of `fine_tuning_corpus.py`. The model is run by transformers' own forward (sdpa), a document
at a time, and its head only where something is read. A code counts as found if each of its words, a token
each, is the likeliest one, given those before it. The control is the same document without its notes, in
which nobody can know more of a code than which words there are; the loss by position is that of the control.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK_TOKENS = 8192  # whose logits exist at once
Row = dict[str, Any]


def load(folder: Path) -> nn.Module:
    """The model as a user of transformers loads it."""
    from transformers import AutoModelForCausalLM

    on_gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        attn_implementation="sdpa",
    )
    return model.eval().to("cuda" if on_gpu else "cpu")


def run(model: Any, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Hidden states `(tokens, width)` of a document, and its tokens on their device."""
    on_device = torch.tensor(ids, device=next(model.lm_head.parameters()).device)
    return model.model(input_ids=on_device[None], use_cache=False).last_hidden_state[0], on_device


def scores(model: Any, hidden: Tensor, ids: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """NLL of the tokens at `places`, each by the position before it, and whether it is the likeliest."""
    losses, found = [], []
    for some in places.split(CHUNK_TOKENS):
        logits = model.lm_head(hidden[some - 1]).float()
        losses.append(F.cross_entropy(logits, ids[some], reduction="none"))
        found.append(logits.argmax(1) == ids[some])
    return torch.cat(losses), torch.cat(found)


def code_scores(
    model: Any, hidden: Tensor, ids: Tensor, asks: Sequence[Row], from_end: str = "from_end"
) -> list[tuple[float, bool]]:
    """Mean NLL of each asked code's tokens, and whether all of them are found."""
    starts = torch.tensor([len(ids) - ask[from_end] for ask in asks], device=ids.device)
    places = starts[:, None] + torch.arange(len(asks[0]["code"]), device=ids.device)
    loss, found = scores(model, hidden, ids, places.flatten())
    losses = loss.reshape(places.shape).mean(1).tolist()
    return list(zip(losses, found.reshape(places.shape).all(1).tolist(), strict=True))


def position_losses(model: Any, hidden: Tensor, ids: Tensor, ends: Sequence[int]) -> list[tuple[float, int]]:
    """NLL summed over the positions up to each end, from the one before it on, and how many they are."""
    loss, _ = scores(model, hidden, ids, torch.arange(1, len(ids), device=ids.device))
    sums, begin = [], 0
    for end in ends:
        some = loss[begin : end - 1]  # the first token has no loss
        sums.append((float(some.double().sum()), len(some)))
        begin = end - 1
    return sums


@torch.no_grad()
def score(model: Any, probes: Sequence[Row], ends: Sequence[int]) -> Iterator[Row]:
    """A row a document: its asks with and without the note, and its loss by position."""
    for probe in probes:
        noted = code_scores(model, *run(model, probe["ids"]), probe["asks"])
        hidden, ids = run(model, probe["control"])
        control = code_scores(model, hidden, ids, probe["asks"], "control_from_end")
        sums = position_losses(model, hidden, ids, ends)
        yield {
            "asks": [
                {
                    "wished_tokens": ask["wished_tokens"],
                    "distance_tokens": ask["distance_tokens"],
                    "loss": with_note[0],
                    "found": with_note[1],
                    "control_loss": without[0],
                    "control_found": without[1],
                }
                for ask, with_note, without in zip(probe["asks"], noted, control, strict=True)
            ],
            "positions": [
                {"end": end, "nll": nll, "tokens": count}
                for end, (nll, count) in zip(ends, sums, strict=True)
            ],
        }


def by_distance(rows: Sequence[Row]) -> list[Row]:
    """The asks of all documents, a row a distance."""
    asks = [ask for row in rows for ask in row["asks"]]
    found = []
    for wished in sorted({ask["wished_tokens"] for ask in asks}):
        some = [ask for ask in asks if ask["wished_tokens"] == wished]
        mean = {
            key: statistics.fmean(ask[key] for ask in some)
            for key in ("distance_tokens", "loss", "found", "control_loss", "control_found")
        }
        found.append({"wished_tokens": wished, "asks": len(some), **mean})
    return found


def by_position(rows: Sequence[Row]) -> list[Row]:
    """Mean loss in each range of positions, over all documents."""
    found, begin = [], 0
    for places in zip(*(row["positions"] for row in rows), strict=True):
        tokens = sum(place["tokens"] for place in places)
        end = places[0]["end"]
        if tokens:
            loss = sum(place["nll"] for place in places) / tokens
            found.append({"from": begin, "to": end, "tokens": tokens, "loss": loss})
        begin = end
    return found


def end_of(probe: Row, tokens: int) -> Row:
    """The last so many tokens of a document, behind its first: asks that are farther have no note in it."""
    return {**probe, **{part: [probe[part][0], *probe[part][1 - tokens :]] for part in ("ids", "control")}}


def measure(
    folder: Path,
    probes: Path,
    out: Path,
    ends: Sequence[int],
    last_tokens: int | None = None,
) -> list[Row]:
    """Score a model; each document's row is written as soon as it is there.

    Args:
        folder: Of the model.
        probes: File of the documents.
        out: File of the rows.
        ends: Of the ranges of positions whose loss is told.
        last_tokens: The model is shown these alone of each document.
    """
    read = [json.loads(line) for line in probes.read_text().splitlines()]
    if last_tokens is not None:
        read = [end_of(probe, last_tokens) for probe in read]
    if out.exists() and out.read_text().count("\n") == len(read):
        print(f"{out.name}: kept", flush=True)
        return [json.loads(line) for line in out.read_text().splitlines()]
    started = time.perf_counter()
    model = load(folder)
    rows: list[Row] = []
    for row in score(model, read, ends):
        rows.append(row)
        draft = out.with_name(f".{out.name}.partial")
        draft.write_text("".join(json.dumps(one) + "\n" for one in rows))
        os.replace(draft, out)
    seconds = time.perf_counter() - started
    said = "; ".join(f"{row['wished_tokens']}: {100 * row['found']:.0f} %" for row in by_distance(rows))
    print(f"{out.name}: found at {said} ({seconds:.0f} s)", flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", type=Path, required=True, help="folder of Hugging Face's layout")
    options.add_argument("--probes", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True, help="JSONL, a row a document")
    options.add_argument("--ends", type=int, nargs="+", default=[4096, 16384, 65536, 131072])
    options.add_argument("--last-tokens", type=int, help="show the model these alone of each document")
    args = options.parse_args(arguments)
    rows = measure(args.model, args.probes, args.out, args.ends, args.last_tokens)
    for row in (*by_distance(rows), *by_position(rows)):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
