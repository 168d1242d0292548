"""The plan of a run whose processes have joined: by the least of what its ranks have, at this moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import torch

from ...distributed.groups import ProcessGroups
from ...mst.placement import free_host_bytes
from ..config import RunConfig
from .machine import HOST_SHARE, Gpu, Machine, this_machine
from .memory import COMMUNICATOR_BYTES
from .plan import Plan, make_plan


def plan_for_run(config: RunConfig, groups: ProcessGroups, device: torch.device) -> Plan:
    """The plan by which every rank runs. Every rank calls it, before the model is there.

    Args:
        config: With numbers for all that a plan decides before processes join (see resolve.py).
        groups: This rank's process groups.
        device: Its GPU.

    Raises:
        ValueError: The model is none that can be counted.
    """
    return make_plan(config, least_of(groups.gathered(machine_now(groups.world_size, device))))


def machine_now(world_size: int, device: torch.device) -> Machine:
    """This rank's machine, without what other programs hold of it now."""
    machine = this_machine(world_size)
    assert machine is not None, device
    free, total = torch.cuda.mem_get_info(device)
    # Our own part of what is taken: the context, as the catalogue has it, what torch holds, and the buffers
    # of the group that ranks have met in, which the plan counts as well.
    own = machine.gpu.context_bytes + torch.cuda.memory_reserved(device)
    own += COMMUNICATOR_BYTES if world_size > 1 else 0
    # Of a card that is taken to be smaller, others have as much.
    size = min(total, machine.gpu.memory_bytes)
    gpu = replace(machine.gpu, memory_bytes=size - max(0, total - free - own))
    host = min(machine.host_bytes, int(free_host_bytes() * HOST_SHARE))
    return replace(machine, gpu=gpu, host_bytes=host)


def least_of(machines: Sequence[Machine]) -> Machine:
    """What every rank has: of each figure the least, of what is taken the most.

    Ranks may differ: in what else runs on their nodes, in rates that were measured on each, even in GPUs.
    """
    gpus = [asdict(machine.gpu) for machine in machines]
    least = {
        name: (max if name == "context_bytes" else min)(gpu[name] for gpu in gpus)
        for name, value in gpus[0].items()
        if not isinstance(value, str)
    }
    return Machine(
        gpu=Gpu(**{**gpus[0], **least}),
        num_gpus=machines[0].num_gpus,
        # Nodes may hold unequal numbers of processes: the fullest one decides.
        gpus_per_node=max(machine.gpus_per_node for machine in machines),
        host_bytes=min(machine.host_bytes for machine in machines),
    )
