"""A batch on its way to the ranks: labels shifted while the sequence is whole, then padded and cut."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from .groups import ProcessGroups

IGNORE_INDEX = -100
SHARDED_NAMES = frozenset({"input_ids", "labels", "position_ids", "document_offsets"})


def shift_labels(labels: Tensor, document_offsets: Tensor | None = None) -> Tensor:
    """What each token must predict: the next label of its own document, nothing at a document's end.

    Args:
        labels: Unshifted labels, `(B, L)`.
        document_offsets: Where documents begin and the last ends, `(documents + 1,)`, for B = 1; None
            takes each row as one document.

    Returns:
        Shifted labels, `(B, L)`; -100 where there is nothing to predict.
    """
    shifted = F.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)
    if document_offsets is not None:
        _require_one_row(labels)
        shifted[0, document_offsets[1:].to(labels.device, torch.long) - 1] = IGNORE_INDEX
    return shifted


def document_positions(document_offsets: Tensor) -> Tensor:
    """Position ids that restart at each document, `(1, L)`."""
    offsets = document_offsets.long()
    lengths = offsets.diff()
    starts = torch.repeat_interleave(offsets[:-1], lengths)
    return (torch.arange(int(offsets[-1]), device=offsets.device) - starts).unsqueeze(0)


def offsets_from_positions(position_ids: Tensor) -> Tensor:
    """Document offsets, on the CPU, from position ids `(1, L)` that restart; a GPU's are waited for."""
    _require_one_row(position_ids)
    ids = position_ids[0]
    breaks = (ids.diff() != 1).nonzero().squeeze(-1).to("cpu", torch.int32) + 1
    return torch.cat([breaks.new_zeros(1), breaks, breaks.new_full((1,), ids.numel())])


def has_restarts(position_ids: Tensor) -> bool:
    """Whether some row's position ids `(B, L)` do not go on one by one; a GPU's are waited for."""
    return bool((position_ids.diff(dim=1) != 1).any())


def pad_batch(batch: dict[str, Tensor], multiple: int, pad_token_id: int = 0) -> dict[str, Tensor]:
    """Pad a batch on the right to a multiple of tokens; the padding is a document of its own.

    Args:
        batch: `input_ids`, `shift_labels`, `position_ids`, each `(B, L)`, and perhaps `document_offsets`.
        multiple: The padded length is a multiple of this.
        pad_token_id: Any word; no label and no other document sees it.
    """
    length = batch["input_ids"].shape[1]
    missing = -length % multiple
    if not missing:
        return batch
    padded = dict(batch)
    padded["input_ids"] = F.pad(batch["input_ids"], (0, missing), value=pad_token_id)
    padded["shift_labels"] = F.pad(batch["shift_labels"], (0, missing), value=IGNORE_INDEX)
    ids = batch["position_ids"]
    tail = torch.arange(missing, device=ids.device, dtype=ids.dtype).expand(ids.shape[0], missing)
    offsets = batch.get("document_offsets")
    if offsets is None:
        tail = tail + length  # a row that is one document goes on: nothing before the padding sees it
    else:
        padded["document_offsets"] = torch.cat([offsets, offsets.new_tensor([length + missing])])
    padded["position_ids"] = torch.cat([ids, tail], dim=1)
    return padded


def shard_batch(
    batch: dict[str, Tensor], groups: ProcessGroups, pad_token_id: int = 0, multiple: int = 1
) -> dict[str, Tensor]:
    """This rank's part of a batch that every rank of its sequence holds whole.

    Labels are shifted before the cut, so that no label is lost where two shards meet.

    Args:
        batch: `input_ids` and unshifted `labels`, `(B, L)`; optionally `position_ids` `(B, L)` and
            `document_offsets` (int32, B = 1: several documents in one row). Position ids that restart tell
            documents too.
        groups: The process groups.
        pad_token_id: Word that fills a length that does not divide.
        multiple: S is a multiple of this many tokens.

    Returns:
        `input_ids`, `shift_labels`, `position_ids`, `(B, S)` with S = ceil(L / sp) or the next multiple, and
        `document_offsets` of the whole padded sequence where the batch has them or has one row: by them no
        layer need look at the positions again.

    Raises:
        ValueError: Tensors that do not fit together, or one that would be left out.
    """
    _check_batch(batch)
    ids, labels = batch["input_ids"], batch["labels"]
    offsets = _document_offsets(batch)
    position_ids = batch.get("position_ids")
    if position_ids is None:
        if offsets is not None:
            position_ids = document_positions(offsets).to(ids.device)
        else:
            position_ids = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    whole = {"input_ids": ids, "shift_labels": shift_labels(labels, offsets), "position_ids": position_ids}
    if offsets is not None:
        whole["document_offsets"] = offsets
    whole = pad_batch(whole, groups.sp_size * multiple, pad_token_id)
    if offsets is None and ids.shape[0] == 1:
        # The padding goes on with the one document: nothing before it sees it.
        whole["document_offsets"] = torch.tensor([0, whole["input_ids"].shape[1]], dtype=torch.int32)
    shard = whole["input_ids"].shape[1] // groups.sp_size
    mine = slice(groups.sp_rank * shard, (groups.sp_rank + 1) * shard)
    # Contiguous: transformers' own loss takes labels by a view.
    return {
        name: value if name == "document_offsets" else value[:, mine].contiguous()
        for name, value in whole.items()
    }


def unshard(shard: Tensor, groups: ProcessGroups, num_tokens: int | None = None) -> Tensor:
    """The whole sequence's tensor from every rank's part; the way back from `shard_batch`, one collective.

    Gradients reach this rank's own part alone. Where every rank computes the same loss from the whole, and
    gradients are then summed over the ranks, that is once for each token.

    Args:
        shard: This rank's part, `(B, S, ...)`, such as hidden states or log-probabilities.
        groups: The process groups.
        num_tokens: Length before padding; None keeps the padding.

    Returns:
        `(B, L, ...)`.
    """
    if groups.sp_size > 1:
        mine = shard.detach().contiguous()
        parts = [torch.empty_like(mine) for _ in range(groups.sp_size)]
        dist.all_gather(parts, mine, group=groups.sp)
        parts[groups.sp_rank] = shard
        shard = torch.cat(parts, dim=1)
    return shard if num_tokens is None else shard[:, :num_tokens]


def _check_batch(batch: dict[str, Tensor]) -> None:
    ids, labels = batch["input_ids"], batch["labels"]
    if ids.dim() != 2 or labels.shape != ids.shape:
        raise ValueError(
            f"input_ids {tuple(ids.shape)} and labels {tuple(labels.shape)} must both be (B, L) and alike."
        )
    positions = batch.get("position_ids")
    if positions is not None and positions.shape != ids.shape:
        raise ValueError(
            f"position_ids {tuple(positions.shape)} must have the shape of input_ids, {tuple(ids.shape)}."
        )
    unknown = sorted(set(batch) - SHARDED_NAMES)
    if unknown:
        raise ValueError(
            f"shard_batch does not know {', '.join(unknown)}; it takes {', '.join(sorted(SHARDED_NAMES))}. "
            "Pad on the right with label -100: that needs no attention_mask."
        )


def _document_offsets(batch: dict[str, Tensor]) -> Tensor | None:
    """The documents of a whole batch, told by offsets or by position ids that restart."""
    length, offsets = batch["input_ids"].shape[1], batch.get("document_offsets")
    if offsets is None:
        positions = batch.get("position_ids")
        if positions is None or not has_restarts(positions):
            return None
        return offsets_from_positions(positions)
    if offsets.dim() != 1 or offsets.numel() < 2 or offsets[0] != 0 or offsets[-1] != length:
        raise ValueError(
            f"document_offsets={offsets.tolist()[:8]} must run from 0 to the sequence's {length} tokens."
        )
    if (offsets.diff() < 0).any():
        first = int((offsets.diff() < 0).nonzero()[0])
        raise ValueError(
            f"document_offsets fall from {int(offsets[first])} to {int(offsets[first + 1])} at index "
            f"{first + 1}; they must rise."
        )
    return offsets


def _require_one_row(tensor: Tensor) -> None:
    if tensor.dim() != 2 or tensor.shape[0] != 1:
        raise ValueError(
            f"packed documents need one row, (1, L), not {tuple(tensor.shape)}; concatenate the rows and "
            "their offsets."
        )
