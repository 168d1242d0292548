"""What a model's inputs say about who sees whom, told to streamed layers by document bounds, not by masks."""

from __future__ import annotations

import torch
from torch import Tensor


def document_offsets(
    batch: int, length: int, position_ids: Tensor | None, attention_mask: Tensor | None
) -> Tensor | None:
    """Bounds of documents over all `B x L` tokens, on the CPU; None where each row is one document.

    A document begins with each row, where position ids do not go on by one (packed documents, as
    transformers' flattening collator writes them), and behind padding on the left. Padding on the right
    needs nothing: no token that counts sees it. The bounds are read once a step, which waits for the device.

    Args:
        batch: Rows B.
        length: Tokens L of a row.
        position_ids: `(1 or B, L)`.
        attention_mask: `(B, L)`, nonzero where a token counts.

    Raises:
        ValueError: A mask of another shape, or with padding between tokens that count.
    """
    starts = None
    if position_ids is not None and length > 1:
        jumps = (position_ids.diff(dim=-1) != 1).expand(batch, -1).cpu()
        starts = jumps if jumps.any() else None
    if attention_mask is not None and length > 1:
        rises = _left_padding(batch, length, attention_mask)
        if rises is not None:
            starts = rises if starts is None else starts | rises
    if starts is None:
        return None
    first = torch.ones(batch, 1, dtype=torch.bool)
    begins = torch.cat([first, starts], dim=1).flatten().nonzero().flatten()
    return torch.cat([begins, torch.tensor([batch * length])])


def _left_padding(batch: int, length: int, attention_mask: Tensor) -> Tensor | None:
    """Where tokens begin behind padding, `(B, L - 1)`; None if all rows begin with a token."""
    if attention_mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} must be {(batch, length)}, 1 for each token that "
            "counts."
        )
    counts = attention_mask.cpu() != 0
    rises = counts[:, 1:] & ~counts[:, :-1]
    if not rises.any():
        return None
    split = (rises.sum(dim=1) + counts[:, 0]) > 1
    if split.any():
        raise ValueError(
            f"attention_mask of row {int(split.nonzero()[0])} has padding between tokens; pad on one side, "
            "or pass packed documents by position_ids that restart."
        )
    return rises


def no_mask(device: torch.device) -> Tensor:
    """A mask of one element: transformers hands a 4-d mask on as it is, and builds no L x L one."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
