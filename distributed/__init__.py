"""Who holds what, and who sends it: sequence parallelism, the exact global loss, and the engines."""

from .apollo_state import lay_out_apollo
from .apply_ulysses import apply_ulysses
from .groups import ProcessGroups
from .loss import global_token_loss
from .probe import measure_reducer_divisor
from .sequence import shard_batch, unshard

__all__ = [
    "ProcessGroups",
    "apply_ulysses",
    "global_token_loss",
    "lay_out_apollo",
    "measure_reducer_divisor",
    "shard_batch",
    "unshard",
]
