"""How often ranks talk in a step: each collective is a wait for the slowest of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo import run_cases
from training_samples import MICRO_BATCHES, engine_step, tiny_llama

from longseq.distributed import ProcessGroups, apply_ulysses
from longseq.distributed.engine import LocalEngine
from longseq.mst import apply_mini_sequence

# Two processes are started, and gloo in them.
pytestmark = pytest.mark.slow

LAYERS = 3
NAMES = ("all_reduce", "all_to_all_single", "all_gather", "broadcast", "barrier", "reduce_scatter")
CASES: dict[str, tuple[dict[str, Any], int]] = {
    # There and back: in forward, in backward's own forward, and for the gradients.
    "rebuilt": ({"checkpoints": "gpu"}, 6),
    "rebuilt, two groups": ({"checkpoints": "gpu", "head_groups": 2}, 12),
    "output saved": ({"checkpoints": "gpu", "save_attention": "gpu"}, 4),
    # What is saved goes ahead of the gradient.
    "everything saved": ({"checkpoints": "gpu", "save_attention": "all"}, 5),
    "layers not streamed": ({"checkpoints": "none"}, 4),
}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    calls: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in NAMES}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in NAMES:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def step_case(options: dict[str, Any]) -> dict[str, int]:
    groups = ProcessGroups.create(2)
    model = tiny_llama(num_hidden_layers=LAYERS)
    apply_ulysses(model, groups)
    apply_mini_sequence(model, tile_tokens=10, **options)
    optimizer = torch.optim.AdamW(model.parameters())
    engine = LocalEngine(model, optimizer, groups, accumulation_steps=MICRO_BATCHES, clip_norm=1.0)
    engine_step(engine, groups, 0, 1e-3)
    with counted() as calls:
        engine_step(engine, groups, 1, 1e-3)
    return dict(calls)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list]:
    return run_cases(2, {name: (step_case, {"options": options}) for name, (options, _) in CASES.items()})


@pytest.mark.parametrize("name", CASES)
def test_a_step_talks_no_more_than_it_must(outcomes: dict[str, list], name: str) -> None:
    exchanges = CASES[name][1] * LAYERS * MICRO_BATCHES
    # Valid tokens of the step, all gradients in one bucket, and the loss that the test itself sums.
    assert outcomes[name] == [{"all_to_all_single": exchanges, "all_reduce": 3}] * 2
