"""Cut cross-entropy: the loss of a language model's head without its logits."""

from .linear_cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
