"""Which documents are held out for evaluation."""

from __future__ import annotations

import numpy as np


def held_out(digests: np.ndarray, fraction: float) -> np.ndarray:
    """Chooses about `fraction` of the documents, by their content.

    The choice depends on nothing but the documents and the fraction. Exact copies of a document are all
    on one side, so that nothing that is evaluated was trained on, and a document that is held out mostly
    stays so when others are added.

    Args:
        digests: A hash of each document, uint64 (documents,).
        fraction: Share of the documents, below 1. Above 0 at least one is chosen, and one left.

    Returns:
        Whether each document is held out, bool (documents,).
    """
    num_documents = len(digests)
    chosen = np.zeros(num_documents, bool)
    if fraction == 0 or num_documents < 2:
        return chosen
    wanted = min(max(round(fraction * num_documents), 1), num_documents - 1)
    # Sorted by hash, which is as good as at random.
    values, counts = np.unique(digests, return_counts=True)
    if len(values) == 1:
        # All are copies of one document; there is no clean split, but a run can still be tried out.
        chosen[-wanted:] = True
        return chosen
    # A document with so many copies that they would not fit stays in training.
    fits = counts <= wanted
    taken = np.zeros(len(values), bool)
    taken[np.flatnonzero(fits)[np.cumsum(counts[fits]) <= wanted]] = True
    if not taken.any():
        taken[np.argmin(counts)] = True
    return taken[np.searchsorted(values, digests)]
