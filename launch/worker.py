"""One process of a run: joins the others, trains, and says in a line what went wrong."""

from __future__ import annotations

import logging
import time

import torch

from ..distributed.groups import ProcessGroups
from .config import RunConfig
from .nodes import check_nodes
from .processes import join, leave, set_up_logging
from .train import TrainingError, train

logger = logging.getLogger(__name__)

MAIN_SPEAKS_FIRST_S = 5.0
"""What stops one rank mostly stops all, and the launcher ends those that have not said so yet."""

MEMORY_ADVICE = """\
What frees most, roughly in this order: sequence.checkpoints=gpu, train.micro_batch_sequences=1, more GPUs
with a higher parallel.ulysses_degree, parallel.zero_stage=3, parallel.offload_optimizer=cpu, a smaller
sequence.loss_memory_mib or sequence.length. The newest checkpoint is whole: the same command goes on."""


def run_worker(config: RunConfig) -> int:
    """Train on this process, alone or as one of those that a launcher started.

    Returns:
        Exit status: 0 when done or stopped on request, 1 when the run stopped itself.
    """
    groups, device = join(config.parallel.ulysses_degree, use_deepspeed=config.parallel.zero_stage > 0)
    set_up_logging(groups.is_main)
    _say_where(config, groups, device)
    try:
        check_nodes(config, groups)
        train(config, groups, device)
        return 0
    except TrainingError as error:
        if groups.is_main:  # it is about sums over all ranks: each of them raises it
            logger.error("%s", error)
        return 1
    except torch.OutOfMemoryError as error:
        logger.error("out of memory: %s\n%s", str(error).splitlines()[0], MEMORY_ADVICE)
        return 1
    except Exception:
        if not groups.is_main:
            time.sleep(MAIN_SPEAKS_FIRST_S)
        raise
    finally:
        leave()


def _say_where(config: RunConfig, groups: ProcessGroups, device: torch.device) -> None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    engine = f"ZeRO {config.parallel.zero_stage}" if config.parallel.zero_stage else "no ZeRO"
    logger.info(
        "%d process%s on %s: %d for each sequence, %d at once; %s, %s",
        groups.world_size,
        "" if groups.world_size == 1 else "es",
        name,
        groups.sp_size,
        groups.dp_size,
        engine,
        config.train.precision,
    )
    if device.type == "cpu" and config.model.name is not None and groups.is_main:
        logger.warning("torch sees no GPU (python -c 'import torch; print(torch.cuda.is_available())').")
