"""Cut cross-entropy: the loss of a language model's head without its logits."""

from .filtered import FilterReport
from .linear_cross_entropy import linear_cross_entropy
from .token_statistics import TokenStatistics, token_statistics
from .vocab_parallel import VocabShard

__all__ = ["FilterReport", "TokenStatistics", "VocabShard", "linear_cross_entropy", "token_statistics"]
