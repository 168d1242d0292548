"""Row-wise operations of a decoder layer with gradients by hand: one pass over memory, one rounding."""

from .gated_activation import activation_name, gated_activation, gated_activation_backward_
from .rms_norm import rms_norm, rms_norm_backward
from .rope import rotate_

__all__ = [
    "activation_name",
    "gated_activation",
    "gated_activation_backward_",
    "rms_norm",
    "rms_norm_backward",
    "rotate_",
]
