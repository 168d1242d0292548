"""One trajectory on any number of processes: every weight's every step, against plain PyTorch on one.

Each engine takes steps with lengths that the ranks can share evenly and not, packed and not, labels of all
tokens, of none in one rank's part, of the last token alone. Under plain SGD without clipping a weight's
change is its gradient, so that no scale hides. The processes compute in float64 throughout, DeepSpeed too:
to them float32 is float64 (below).
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if __name__.endswith("_in_gloo"):
    # In a process of its own, before it computes: DeepSpeed keeps masters in float32 and transformers
    # computes rotary embeddings in it, which would hide what this looks for.
    torch.float = torch.float32 = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)

from gloo import run_cases
from torch import Tensor, nn
from torch.nn import functional as F
from training_samples import tiny_llama, weights_of

from longseq.distributed import ProcessGroups, apply_ulysses, global_token_loss, shard_batch
from longseq.distributed.engine import Engine, LocalEngine
from longseq.distributed.loss import count_tokens
from longseq.distributed.zero_config import ZeroOptions
from longseq.mst import apply_mini_sequence

# Eleven processes are started, each of which makes many engines.
pytestmark = pytest.mark.slow

HEADS = ((4, 4), (4, 2), (8, 1), (6, 3), (7, 7))
REDUCERS = ("none", "DDP", "ZeRO 1", "ZeRO 2", "ZeRO 3")
LAYOUTS = {1: (1,), 2: (2, 1), 3: (3,), 4: (4, 2)}
"""Processes, and how many of them share a sequence."""
ACCUMULATIONS = (1, 3)
LENGTHS = (24, 23)
MASKS = ("none", "one rank's", "all but the last")
SCENARIOS = list(itertools.product(LENGTHS, (False, True), MASKS))
VOCAB = 31
EVERYTHING = "LONGSEQ_TEST_WHOLE_GRID"
"""Set in the environment, it runs every combination through all twelve scenarios, for ten minutes; otherwise
every pair of heads and reducer, of layout and heads and of layout and reducer is there, with one accumulation
or the other, and four scenarios."""
LR = 2.0**-5  # small, or twelve steps would make a difference of rounding a large one
TOLERANCE = 1e-10
Combination = tuple[int, int, tuple[int, int], str, int]


def combinations() -> Iterator[Combination]:
    """Processes, Ulysses degree, heads, reducer, accumulation."""
    whole = bool(os.environ.get(EVERYTHING))
    layouts = [(world_size, sp_size) for world_size, sp_sizes in LAYOUTS.items() for sp_size in sp_sizes]
    for (index, (world_size, sp_size)), (h, heads), (r, reducer) in itertools.product(
        enumerate(layouts), enumerate(HEADS), enumerate(REDUCERS)
    ):
        if world_size == 1 and reducer == "DDP":
            continue
        for a, accumulation in enumerate(ACCUMULATIONS):
            if whole or (2 * index + h + r) % 6 == 3 * a:
                yield world_size, sp_size, heads, reducer, accumulation


def scenarios_of(combination: Combination) -> list[int]:
    """Which scenarios a combination's steps have: all, or four that differ in everything."""
    if os.environ.get(EVERYTHING):
        return list(range(len(SCENARIOS)))
    _, sp_size, (heads, kv_heads), reducer, _ = combination
    first = (sp_size + heads + kv_heads + REDUCERS.index(reducer)) % 3
    return [(first + 5 * step) % len(SCENARIOS) for step in range(4)]


def name_of(combination: Combination) -> str:
    world_size, sp_size, heads, reducer, accumulation = combination
    shape = f"{world_size} processes, sp {sp_size}, {heads[0]}/{heads[1]} heads"
    return f"{shape}, {reducer}, accumulation {accumulation}"


def make_model(heads: tuple[int, int]) -> nn.Module:
    return tiny_llama(
        torch.float64,
        hidden_size=4 * heads[0],
        intermediate_size=20,
        vocab_size=VOCAB,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        max_position_embeddings=32,
    )


def rows_of(scenario: int, num_rows: int) -> list[dict[str, Tensor]]:
    """The rows of a scenario's step; each has other documents."""
    length, packed, mask = SCENARIOS[scenario]
    rows = []
    for index in range(num_rows):
        draw = torch.Generator().manual_seed(100 * scenario + index)
        ids = torch.randint(0, VOCAB, (1, length), generator=draw)
        labels = ids.clone()
        if mask == "one rank's" and index % 2 == 0:
            labels[0, length // 4 : length // 2 + 2] = -100
        elif mask == "all but the last":
            labels[0, :-1] = -100
        row = {"input_ids": ids, "labels": labels}
        if packed:
            row["document_offsets"] = torch.tensor([0, 5 + index, 6 + index, length], dtype=torch.int32)
        rows.append(row)
    return rows


def plain_nll(model: nn.Module, row: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Every document of a row alone through the plain model."""
    ids, labels = row["input_ids"], row["labels"][0]
    nll, count = torch.zeros((), dtype=torch.float64), 0
    offsets = row.get("document_offsets", torch.tensor([0, ids.shape[1]])).tolist()
    for start, stop in pairwise(offsets):
        logits = model(input_ids=ids[:, start:stop], use_cache=False).logits[0, :-1]
        nll = nll + F.cross_entropy(logits, labels[start + 1 : stop], reduction="sum")
        count += int((labels[start + 1 : stop] != -100).sum())
    return nll, count


def reference_case(heads: tuple[int, int], num_rows: int, scenarios: list[int], path: str) -> int:
    """Plain PyTorch: the losses, and the weights at start and after each step, into a file."""
    model = make_model(heads)
    walk: list[Any] = [(0.0, weights_of(model))]
    for scenario in scenarios:
        found = [plain_nll(model, row) for row in rows_of(scenario, num_rows)]
        loss = sum(nll for nll, _ in found) / max(1, sum(count for _, count in found))
        loss.backward()
        with torch.no_grad():
            for param in model.parameters():
                param -= LR * param.grad
        model.zero_grad()
        walk.append((float(loss.detach()), weights_of(model)))
    arrays = {
        f"{step}/{name}": weight.numpy()
        for step, (_, weights) in enumerate(walk)
        for name, weight in weights.items()
    }
    # numpy's file: torch's and safetensors' take one float for the other here.
    np.savez(path, loss=[loss for loss, _ in walk], **arrays)
    return len(walk)


def read_reference(path: str) -> list[tuple[float, dict[str, Tensor]]]:
    with np.load(path) as arrays:
        losses = arrays["loss"].tolist()
        walk: list[tuple[float, dict[str, Tensor]]] = [(loss, {}) for loss in losses]
        for key in set(arrays.files) - {"loss"}:
            step, _, name = key.partition("/")
            walk[int(step)][1][name] = torch.from_numpy(arrays[key])
    return walk


class DataParallel(Engine):
    """PyTorch's DDP, as a person's own loop has it: the mean of all ranks' gradients."""

    def __init__(self, model: nn.Module, groups: ProcessGroups, accumulation_steps: int) -> None:
        self.module, self.accumulation_steps = model, accumulation_steps
        self.reducer_divisor = float(groups.world_size)
        self._ddp = nn.parallel.DistributedDataParallel(model)
        self._calls = 0

    def __call__(self, **batch: Any) -> Any:
        self._calls += 1
        with nullcontext() if self._is_last else self._ddp.no_sync():
            return self._ddp(**batch)

    @property
    def _is_last(self) -> bool:
        return self._calls % self.accumulation_steps == 0

    def backward(self, loss: Tensor) -> None:
        with nullcontext() if self._is_last else self._ddp.no_sync():
            loss.backward()

    def step(self, lr: float) -> float | None:
        if self._is_last:
            with torch.no_grad():
                for param in self.module.parameters():
                    param -= lr * param.grad
            self.module.zero_grad()
        return None

    def reduced_grad(self, param: nn.Parameter) -> Tensor | None:
        return param.grad

    def reset_optimizer(self) -> None:
        pass

    def state_files(self) -> list[Any]:
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        raise NotImplementedError


def make_engine(model: nn.Module, groups: ProcessGroups, reducer: str, accumulation: int) -> Engine:
    if reducer == "DDP":
        return DataParallel(model, groups, accumulation)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    if reducer == "none":
        return LocalEngine(model, optimizer, groups, accumulation_steps=accumulation)
    from longseq.distributed.zero import DeepSpeedEngine, init_deepspeed_communication

    init_deepspeed_communication()
    options = ZeroOptions(int(reducer[-1]), accumulation)
    return DeepSpeedEngine(model, optimizer, groups, options)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    params = [param for param in model.parameters() if hasattr(param, "ds_id")]
    if not params:
        return weights_of(model)
    import deepspeed

    with deepspeed.zero.GatheredParameters(params):
        return weights_of(model)


def walk_case(combination: Combination, scenarios: list[int], path: str) -> dict:
    """Every step of an engine: the largest difference from plain PyTorch in loss and in a weight's change."""
    _, sp_size, heads, reducer, accumulation = combination
    groups = ProcessGroups.create(sp_size)
    model = make_model(heads)
    apply_ulysses(model, groups)
    apply_mini_sequence(model, tile_tokens=5, head_groups=1, checkpoints="gpu")
    engine = make_engine(model, groups, reducer, accumulation)
    num_rows = accumulation * groups.dp_size
    (_, before), *walk = read_reference(path)
    in_loss, in_change, still, earlier = 0.0, 0.0, [], whole_weights(engine.module)
    for scenario, (wanted, after) in zip(scenarios, walk, strict=True):
        shards = [
            shard_batch(row, groups) for row in rows_of(scenario, num_rows)[groups.dp_rank :: groups.dp_size]
        ]
        num_tokens = count_tokens([one["shift_labels"] for one in shards], groups, torch.device("cpu"))
        total = torch.zeros((), dtype=torch.float64)
        for shard in shards:
            nll = engine(**shard, num_items_in_batch=1, use_cache=False).loss
            total += nll.detach()
            engine.backward(global_token_loss(nll, num_tokens, reducer_divisor=engine.reducer_divisor))
            engine.step(LR)
        loss = float(groups.all_sum(total) / max(1.0, float(num_tokens)))
        in_loss = max(in_loss, abs(loss - wanted))
        now = whole_weights(engine.module)
        for name, weight in now.items():
            moved = after[name] - before[name]
            in_change = max(in_change, float((weight - earlier[name] - moved).abs().max()) / LR)
            if not moved.any():
                still.append(f"{name} in scenario {scenario}")
        before, earlier = after, now
    return {
        "loss": in_loss,
        "change": in_change,
        "still": still,
        "dtype": str(next(iter(now.values())).dtype),
    }


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[str, list]]:
    walks: dict[int, dict] = {size: {} for size in LAYOUTS}
    references: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for combination in combinations():
            world_size, sp_size, heads, _, accumulation = combination
            num_rows, scenarios = accumulation * world_size // sp_size, scenarios_of(combination)
            name = f"{heads[0]}-{heads[1]}-{num_rows}-{scenarios[0]}"
            path = f"{folder}/{name}.npz"
            references[name] = (
                reference_case,
                {"heads": heads, "num_rows": num_rows, "scenarios": scenarios, "path": path},
            )
            walks[world_size][name_of(combination)] = (
                walk_case,
                {"combination": combination, "scenarios": scenarios, "path": path},
            )
        run_cases(1, references)
        results: dict[str, list] = {}
        for world_size, cases in walks.items():
            results |= run_cases(world_size, cases)
        yield results


@pytest.mark.parametrize("name", [name_of(combination) for combination in combinations()])
def test_every_weight_moves_as_on_one_process(outcomes: dict[str, list], name: str) -> None:
    for rank in outcomes[name]:
        assert rank["dtype"] == "torch.float64"
        assert rank["still"] == [], "a weight that does not move shows nothing"
        assert rank["loss"] < TOLERANCE
        assert rank["change"] < TOLERANCE
