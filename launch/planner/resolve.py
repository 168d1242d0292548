"""Numbers for what a config leaves to the plan and processes must know before they begin.

`parallel.*: auto` says how processes are grouped and whether DeepSpeed runs them, `sequence.length: max` how
data is cut: all ranks must have the same before they build anything. So they go by facts that do not change
while a run starts, and by the least of what the ranks' machines have. In `processes.join`:

    if not launched:
        config = resolve_for_run(config, 1)
    ...  # the process group, if there is one
    if launched:
        config = resolve_for_run(config, dist.get_world_size())

What is chosen inside a GPU (where inputs wait, tiles, groups of heads, saved attention) waits until the
processes have joined (at_start.py).
"""

from __future__ import annotations

from pathlib import Path

from ..config import RunConfig
from ..config_changes import with_values
from ..config_errors import ConfigError
from ..config_rules import broken_rules
from .layouts import is_resolved, layouts, most_processes
from .machine import Machine

__all__ = ["is_resolved", "most_processes", "resolve", "resolve_for_run"]


def resolve_for_run(config: RunConfig, world_size: int) -> RunConfig:
    """The config of a run that begins, with numbers for all that a plan decides before.

    Where a process group is there, every rank calls it, and all get the same. A run that goes on keeps the
    length of its checkpoint where the config says `max`.

    Args:
        config: As it was given; one without such words comes back as it is, at once.
        world_size: Processes of the run.

    Raises:
        ConfigError: `max` where nothing fits or without a GPU, or what is fixed does not go together.
        ValueError: The model's config cannot be had.
    """
    if is_resolved(config):
        return config
    from ...distributed.groups import gathered
    from .at_start import least_of
    from .machine import this_machine

    # One collective whatever they find: nodes may not see the same files, which is looked at later.
    facts = gathered((this_machine(world_size), _length_of_checkpoint(config)))
    machines, lengths = [machine for machine, _ in facts], [length for _, length in facts]
    if config.sequence.length == "max" and lengths[0] is not None:
        config = with_values(config, {"sequence.length": lengths[0]})
    if is_resolved(config):
        return _checked(config, world_size)
    if None in machines:
        return resolve_on_cpu(config, world_size)
    return resolve(config, least_of(machines))


def resolve(config: RunConfig, machine: Machine) -> RunConfig:
    """Numbers for `parallel.*: auto` and `sequence.length: max`, as the plan for a machine has them.

    Raises:
        ConfigError: `max` where not even the shortest sequence fits, or rules that the numbers break.
        ValueError: The model's config cannot be had.
    """
    from .plan import choose, new_search

    if is_resolved(config):
        return config
    search, positions = new_search(config, machine)
    longest = search.longest() if config.sequence.length == "max" else None
    if config.sequence.length == "max" and longest is None:
        raise ConfigError(
            [
                f"sequence.length=max: not even {search.step_tokens():,} tokens fit {machine.num_gpus} x "
                f"{machine.gpu.name} with the other keys as they are; `longseq plan` shows what takes the "
                "memory."
            ]
        )
    choice, _ = choose(search, longest, positions)
    return _checked(choice.config, machine.num_gpus)


def resolve_on_cpu(config: RunConfig, world_size: int) -> RunConfig:
    """The simplest numbers that the rules allow: on a CPU nothing is planned.

    Raises:
        ConfigError: `max`, or what is fixed does not go together.
    """
    length = config.sequence.length
    if length == "max":
        raise ConfigError(
            [
                "sequence.length=max is found by a plan for GPUs, and torch sees none here; give a number of "
                "tokens, or ask `longseq plan` with --gpu."
            ]
        )
    return _checked(layouts(config, world_size, length)[0], world_size)


def _checked(config: RunConfig, num_gpus: int) -> RunConfig:
    errors = broken_rules(config, num_gpus)
    if errors:
        raise ConfigError(errors)
    return config


def _length_of_checkpoint(config: RunConfig) -> int | None:
    """Of the checkpoint that a run with `max` goes on from, if there is one.

    Its place in the data is counted in sequences of that length: another would make it void.
    """
    resume = config.checkpoint.resume
    if config.sequence.length != "max" or resume == "never":
        return None
    from ..checkpoint import newest_checkpoint
    from ..config_file import load_config
    from ..manifest import STATE_FILE

    folder = newest_checkpoint(Path(config.log.run_dir if resume == "auto" else resume))
    saved = folder / "config.yaml"
    if not (folder / STATE_FILE).is_file() or not saved.is_file():  # no checkpoint, but where one would be
        return None
    length = load_config(str(saved)).sequence.length
    return None if length == "max" else length
