"""Mini-Sequence Transformer: one intermediate at a time."""

from .apply import apply_mini_sequence
from .handle import MiniSequenceHandle
from .mini_sequence import mini_sequence

__all__ = ["MiniSequenceHandle", "apply_mini_sequence", "mini_sequence"]
