"""How often a step runs the MLPs forward: counted by their matrix products, whoever calls them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...distributed.engine import LocalEngine
from ...distributed.groups import ProcessGroups
from .bench import Bench, trained_model
from .compare import Row, tried
from .steps import engine_step

FORWARDS = "MLP forwards a step"
ROOM = 0.01
"""Above the number that is right, for what is not a whole number of tokens."""
ONE = ProcessGroups()


class ProductCount(TorchDispatchMode):
    """Counts rows of products from width D to width F, those of a map to F and F at once twice."""

    def __init__(self, width: int, intermediate: int) -> None:
        super().__init__()
        self._width, self._intermediate = width, intermediate
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """See the operation, and do it."""
        matrices = [arg for arg in args if isinstance(arg, Tensor) and arg.dim() == 2]
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = matrices[-2:]
            times = {self._intermediate: 1, 2 * self._intermediate: 2}.get(right.shape[1], 0)
            if right.shape[0] == self._width:
                self.rows += times * left.shape[0]
        return func(*args, **(kwargs or {}))


def mlp_forwards(bench: Bench) -> Iterator[Row]:
    """Two where tiles are rebuilt in backward, one where they are not; rebuilt layers add their own."""
    sequence = bench.config.sequence
    if not (bench.streams or sequence.mini_sequence) or bench.config.model.lora is not None:
        return
    every = sequence.checkpoint_every if bench.streams else 1
    allowed = 2 + (every - 1) / every
    case = f"{allowed:g} at most"

    def run() -> Row:
        found = count_forwards(bench)
        excess = max(0.0, found - allowed)
        return Row(FORWARDS, case, excess, f"{found:.3g}, {allowed:g} at most", ROOM)

    yield tried(FORWARDS, case, run)


def count_forwards(bench: Bench) -> float:
    """Of every MLP, over one step of the model as training builds it."""
    model = trained_model(bench.clone_config, ONE, torch.float64)
    engine = LocalEngine(model, torch.optim.SGD(model.parameters(), lr=1.0), ONE)
    sample = bench.samples[0]
    fields = bench.architecture
    with ProductCount(fields.hidden_size, fields.intermediate_size) as count:
        engine_step(engine, ONE, [sample.batch], lr=1.0)
    of_each = count.rows / sample.batch["input_ids"].numel() / fields.num_hidden_layers
    # Each forward has two such products, gate and up; backward has one, of the down projection's gradient.
    return (of_each - 1) / 2
