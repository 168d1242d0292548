"""Mini-Sequence Transformer: one intermediate at a time."""

from .apply import MiniSequenceHandle, apply_mini_sequence
from .mini_sequence import mini_sequence

__all__ = ["MiniSequenceHandle", "apply_mini_sequence", "mini_sequence"]
