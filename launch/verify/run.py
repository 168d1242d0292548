"""All cases of a config, in the order of the report."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .bench import Bench
from .combined import adapters, on_one_process, on_several_processes
from .compare import Row
from .few_bits import in_bf16
from .forwards import mlp_forwards
from .optimizers import optimizer_steps
from .techniques import techniques

PARTS = (
    techniques,
    adapters,
    optimizer_steps,
    in_bf16,
    mlp_forwards,
    on_one_process,
    on_several_processes,
)
"""Each technique alone, then those together, then what needs several processes."""


def all_rows(bench: Bench) -> Iterator[Row]:
    """Rows of every part."""
    for rows in PARTS:
        yield from rows(bench)


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads, which wait for each other by spinning."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def quiet() -> Iterator[None]:
    """No word of what is decided for the clone, nor bars of loading it: it is not the user's model."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    level, showed = logging.root.manager.disable, is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        if showed:
            enable_progress_bar()
