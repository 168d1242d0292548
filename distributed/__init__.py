"""Who holds what, and who sends it: sequence parallelism, the exact global loss, and the engines."""

from .groups import ProcessGroups
from .loss import global_token_loss
from .sequence import shard_batch
from .ulysses import apply_ulysses

__all__ = ["ProcessGroups", "apply_ulysses", "global_token_loss", "shard_batch"]
