"""An optimizer with next to no states: APOLLO (arXiv 2412.05270), on any layout of the weights."""

from .in_backward import step_in_backward
from .optimizer import Apollo
from .quantized import dequantize_linears, quantize_linears
from .report import MemoryReport
from .selection import parameter_groups
from .trainer import trainer_optimizer

__all__ = [
    "Apollo",
    "MemoryReport",
    "dequantize_linears",
    "parameter_groups",
    "quantize_linears",
    "step_in_backward",
    "trainer_optimizer",
]
