"""How a config's processes may share its work: what is fixed is kept, and the config's rules say the rest.

Nothing here imports torch: a launcher asks before any process has started.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from ..config import RunConfig
from ..config_changes import with_values
from ..config_errors import ConfigError
from ..config_rules import DECIDED_KEYS, broken_rules, undecided

STAGES = (0, 1, 2, 3)
PLACES = ("none", "cpu")


def is_resolved(config: RunConfig) -> bool:
    """Whether nothing is left that a plan must decide before processes join."""
    return not undecided(config)


def layouts(config: RunConfig, num_gpus: int, length: int, num_heads: int | None = None) -> list[RunConfig]:
    """The config with numbers for each way to share its work over so many GPUs, the simplest first.

    Args:
        config: Its `parallel` keys may be `auto`.
        num_gpus: Processes in all.
        length: Tokens of a sequence, in the place of the config's own.
        num_heads: Query heads of the model, of which each rank of a sequence needs one; None where the config
            alone says it.

    Raises:
        ConfigError: There is none, for what is fixed does not go together.
    """
    config = with_values(config, {"sequence.length": length})
    keys = [f"parallel.{name}" for name in DECIDED_KEYS]
    ways = [with_values(config, dict(zip(keys, way, strict=True))) for way in _ways(config, num_gpus)]
    # A length above the model's positions is for the caller to judge, who may be looking for the longest.
    known_elsewhere = () if num_heads is None else ("model.config",)
    fitting = [
        way
        for way in ways
        if (num_heads is None or way.parallel.ulysses_degree <= num_heads)
        and not broken_rules(way, num_gpus, known_elsewhere)
    ]
    if not fitting:
        lines = min((broken_rules(way, num_gpus) for way in ways), key=len)
        raise ConfigError(lines or [_too_few_heads(config, num_heads)])
    return fitting


def most_processes(config: RunConfig, available: int) -> int:
    """Of so many GPUs, the most that some layout can use; at least one.

    For `parallel.num_gpus: auto` where the Ulysses degree is the plan's to choose.
    """
    length = 2 * max(available, 1) if config.sequence.length == "max" else config.sequence.length
    for count in range(available, 1, -1):
        try:
            layouts(config, count, length)
        except ConfigError:
            continue
        return count
    return 1


def _ways(config: RunConfig, num_gpus: int) -> Iterator[tuple[int, int, str, str]]:
    parallel = config.parallel
    degrees = [n for n in range(1, num_gpus + 1) if num_gpus % n == 0]
    given = {key: getattr(parallel, key) for key in DECIDED_KEYS}
    options = zip(DECIDED_KEYS, (degrees, STAGES, PLACES, PLACES), strict=True)
    chosen = [values if given[key] == "auto" else [given[key]] for key, values in options]
    # On one GPU too: ZeRO computes with weights in bf16 beside float32 ones, and moves things to the host.
    return product(*chosen)


def _too_few_heads(config: RunConfig, num_heads: int | None) -> str:
    return (
        f"parallel.ulysses_degree={config.parallel.ulysses_degree} is above the model's {num_heads} query "
        f"heads: each process attends with one at least; use {num_heads} or less."
    )
