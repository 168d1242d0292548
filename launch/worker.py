"""One process of a run: joins the others, trains, and says in a line what went wrong."""

from __future__ import annotations

import logging
import time

from .config import RunConfig
from .processes import join, leave, set_up_logging
from .train import TrainingError, train

logger = logging.getLogger(__name__)

MAIN_SPEAKS_FIRST_S = 5.0
"""What stops one rank mostly stops all, and the launcher ends those that have not said so yet."""


def run_worker(config: RunConfig) -> int:
    """Train on this process, alone or as one of those that a launcher started.

    Returns:
        Exit status: 0 when done or stopped on request, 1 when the run stopped itself.
    """
    groups, device = join(config.parallel.ulysses_degree, use_deepspeed=config.parallel.zero_stage > 0)
    set_up_logging(groups.is_main)
    try:
        train(config, groups, device)
        return 0
    except TrainingError as error:
        if groups.is_main:  # it is about sums over all ranks: each of them raises it
            logger.error("%s", error)
        return 1
    except Exception:
        if not groups.is_main:
            time.sleep(MAIN_SPEAKS_FIRST_S)
        raise
    finally:
        leave()
