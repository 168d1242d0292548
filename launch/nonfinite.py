"""Which text a step had whose loss or gradient was not finite: a line of `nonfinite.jsonl`, for a person."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed.groups import ProcessGroups
from .config import TrainConfig
from .data.dataset import SequenceDataset, step_sequences
from .run_state import RunState
from .setup import RunParts

NONFINITE_FILE = "nonfinite.jsonl"
MAX_SEQUENCES = 64
MAX_DOCUMENTS = 32
"""Of a sequence; there may be thousands of short ones."""
FIRST_TOKENS = 32


def culprits(
    nll_sums: list[Tensor], train: TrainConfig, groups: ProcessGroups, device: torch.device
) -> dict[tuple[int, int], float]:
    """The summed NLL of each micro batch of a step; every rank calls it, as all know of the step.

    Args:
        nll_sums: Of this rank's micro batches, on the device.
        train: The batch's sizes.
        groups: This rank's process groups.
        device: Where this rank computes.

    Returns:
        By (data-parallel rank, micro batch).
    """
    sums = torch.zeros(groups.dp_size, len(nll_sums), dtype=torch.float64, device=device)
    for index, nll in enumerate(nll_sums):
        sums[groups.dp_rank, index] = nll
    sums = groups.all_sum(sums).tolist()
    return {(rank, index): nll for rank, row in enumerate(sums) for index, nll in enumerate(row)}


def write_step(
    run_dir: Path,
    state: RunState,
    what: str,
    action: str,
    nll_sums: dict[tuple[int, int], float],
    parts: RunParts,
    train: TrainConfig,
    dp_size: int,
) -> Path:
    """Append a step's sequences to the file; on one rank.

    Where the loss of some micro batches is not finite, theirs are written; else, the gradient alone not being
    finite, all of the step.

    Args:
        run_dir: The run's folder.
        state: Before the step.
        what: What was not finite.
        action: What became of the step: `skipped` or `stopped`.
        nll_sums: From `culprits`.
        parts: Data and tokenizer.
        train: Batch and seed.
        dp_size: Sequences that were worked on at once, over all ranks.

    Returns:
        The file.
    """
    bad = {key for key, nll in nll_sums.items() if not math.isfinite(nll)} or set(nll_sums)
    sequences = []
    for rank in range(dp_size):
        taken = step_sequences(
            len(parts.train_set),
            seed=train.seed,
            first_sequence=state.sequences_seen,
            global_batch=train.global_batch_sequences,
            micro_batch=train.micro_batch_sequences,
            dp_rank=rank,
            dp_size=dp_size,
        )
        for index, micro_batch in enumerate(taken):
            if (rank, index) in bad:
                place = {"dp_rank": rank, "micro_batch": index}
                sequences += [{"sequence": i, **place} for i in micro_batch]
    record = {
        "step": state.step + 1,
        "what": what,
        "action": action,
        "time_unix_s": round(time.time(), 3),
        "num_sequences": len(sequences),
        "sequences": [
            {**one, **_described(parts.train_set, one["sequence"], parts.tokenizer)}
            for one in sequences[:MAX_SEQUENCES]
        ],
    }
    path = run_dir / NONFINITE_FILE
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path


def _described(dataset: SequenceDataset, i: int, tokenizer: Any) -> dict[str, Any]:
    pieces = dataset.pieces(i)
    sequence = dataset[i]
    begins = sequence["document_offsets"].tolist()
    documents = []
    for begin, piece in zip(begins, pieces[:MAX_DOCUMENTS], strict=False):
        tokens = piece.stop - piece.start
        ids = sequence["input_ids"][begin : begin + min(tokens, FIRST_TOKENS)].tolist()
        # Where it was read, and which of its tokens: a long document is in several sequences.
        documents.append(
            {
                "document": piece.name,
                "tokens": [piece.start, piece.stop],
                "begins": tokenizer.decode(ids),
                "first_token_ids": ids,
            }
        )
    return {"num_documents": len(pieces), "documents": documents}


def weights_are_finite(parts: RunParts, groups: ProcessGroups, device: torch.device) -> bool:
    """Whether all weights are, on all ranks; every rank calls it.

    Asked where a save is due behind a step that was skipped: what broke it may be a weight.
    """
    broken = torch.zeros((), dtype=torch.float64, device=device)
    for param in parts.engine.module.parameters():
        mine = getattr(param, "ds_tensor", param).detach()  # of ZeRO-3, what this rank holds
        broken += (~mine.isfinite()).any().to(device)
    return groups.all_sum(broken).item() == 0
