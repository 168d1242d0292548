"""Checkpoints that go from one number of processes and one ZeRO stage to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import run_cases
from torch import Tensor
from training_samples import MICRO_BATCHES, engine_step, prepared_llama, weights_of

from longseq.distributed import ProcessGroups
from longseq.distributed.engine import Engine, LocalEngine
from longseq.distributed.state_files import WEIGHT, SavedState

# Processes are started four times, and DeepSpeed in them: a layout's checkpoint is the next one's beginning.
pytestmark = pytest.mark.slow

LAYOUTS = {
    "4 processes, ZeRO 3": {"world_size": 4, "stage": 3},
    "2 processes, ZeRO 3, sp 2": {"world_size": 2, "stage": 3, "sp_size": 2},
    "1 process, ZeRO 1": {"world_size": 1, "stage": 1},
    "2 processes, ZeRO 2": {"world_size": 2, "stage": 2},
    "alone": {"world_size": 0, "stage": 0},
}
"""In the order in which they take over; each takes one step. World size 0 is this process."""

CHAINS: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": "AdamW"},
    "SGD": {"optimizer": "SGD", "tie": False},
    "bf16": {"optimizer": "AdamW", "bf16": True},
    "offloaded": {"optimizer": "AdamW", "bf16": True, "offload": True},
    # DeepSpeed's masters are float32, so that float64 is for the engine that needs no ZeRO.
    "float64 AdamW": {"optimizer": "AdamW", "dtype": torch.float64},
    "float64 SGD": {"optimizer": "SGD", "dtype": torch.float64},
}


def rate(chain: str) -> float:
    """With which the chain's weights move."""
    return 1.0 if "SGD" in chain else 1e-2


def make_engine(
    groups: ProcessGroups,
    *,
    stage: int,
    optimizer: str,
    seed: int = 0,
    tie: bool = True,
    dtype: torch.dtype = torch.float32,
    bf16: bool = False,
    offload: bool = False,
) -> Engine:
    """A model whose weights and buffers come from the seed; `bf16` and `offload` are ZeRO's alone."""
    in_bf16 = bf16 and stage > 0
    model = prepared_llama(
        groups, dtype=torch.bfloat16 if in_bf16 else dtype, seed=seed, tie_word_embeddings=tie
    )
    model.register_buffer("marks", torch.full((3,), float(seed)))
    model.register_buffer("scratch", torch.full((3,), float(seed)), persistent=False)
    momentum = {"momentum": 0.9} if optimizer == "SGD" else {}
    made = getattr(torch.optim, optimizer)(model.parameters(), lr=1.0, **momentum)
    accumulation = MICRO_BATCHES // groups.dp_size
    if stage == 0 or dtype == torch.float64:
        return LocalEngine(model, made, groups, accumulation_steps=accumulation)
    from longseq.distributed.zero import DeepSpeedEngine, ZeroOptions, init_deepspeed_communication

    init_deepspeed_communication()
    places = {"offload_optimizer": offload, "offload_parameters": offload and stage == 3}
    return DeepSpeedEngine(model, made, groups, ZeroOptions(stage, accumulation, bf16=bf16, **places))


def take_over(
    *, index: int, before: str | None, arrived: str, left: str, sp_size: int = 1, **options: Any
) -> dict[str, Any]:
    """Load what the layout before this one saved, save it again, take a step, and save that."""
    groups = ProcessGroups.create(sp_size) if torch.distributed.is_initialized() else ProcessGroups()
    engine = make_engine(groups, seed=index, **options)
    if before is not None:
        engine.load(Path(before))
    engine.save(Path(arrived))
    groups.barrier()
    weights = {} if options["stage"] == 3 else dict(engine.module.named_parameters())
    computed_with = {name: param.detach().clone() for name, param in weights.items()}
    buffers = {name: buffer.tolist() for name, buffer in engine.module.named_buffers(recurse=False)}
    loss, _ = engine_step(engine, groups, index, rate(options["optimizer"]))
    engine.save(Path(left))
    groups.barrier()
    return {"loss": loss, "computed_with": computed_with, "buffers": buffers}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chains")


@pytest.fixture(scope="module")
def walks(folder: Path) -> dict[str, list[list[dict[str, Any]]]]:
    """By chain: what each layout's ranks returned."""
    found: dict[str, list] = {chain: [] for chain in CHAINS}
    for index, kwargs in enumerate(LAYOUTS.values()):
        cases = {}
        world_size, more = kwargs["world_size"], {k: v for k, v in kwargs.items() if k != "world_size"}
        for chain, options in CHAINS.items():
            before = str(folder / chain / f"left-{index - 1}") if index else None
            paths = {key: str(folder / chain / f"{key}-{index}") for key in ("arrived", "left")}
            cases[chain] = (take_over, {"index": index, "before": before, **paths, **more, **options})
        if world_size:
            returned = run_cases(world_size, cases)
        else:
            returned = {chain: [function(**kwargs)] for chain, (function, kwargs) in cases.items()}
        for chain in CHAINS:
            found[chain].append(returned[chain])
    return found


def everything(folder: Path) -> tuple[dict[tuple[str, str], Tensor], dict[str, dict]]:
    """All tensors of a checkpoint, whole, and all numbers."""
    saved = SavedState(folder)
    keys = [(name, key) for name in saved.shapes for key in (WEIGHT, *saved.states(name))]
    tensors = {(name, key): saved.whole(name, key, torch.float64) for name, key in keys}
    return tensors, {name: saved.scalars(name) for name in saved.shapes}


@pytest.mark.parametrize("index", range(1, len(LAYOUTS)))
@pytest.mark.parametrize("chain", CHAINS)
def test_every_bit_arrives(walks: dict, folder: Path, chain: str, index: int) -> None:
    left, numbers = everything(folder / chain / f"left-{index - 1}")
    arrived, numbers_there = everything(folder / chain / f"arrived-{index}")
    assert left.keys() == arrived.keys()
    states = {key for _, key in left} - {WEIGHT}
    assert states == ({"momentum_buffer"} if "SGD" in chain else {"exp_avg", "exp_avg_sq"})
    assert [key for key in left if not torch.equal(left[key], arrived[key])] == []
    assert numbers == numbers_there
    if "SGD" not in chain:
        steps = {number["step"]["value"] for number in numbers.values()}
        assert steps == {float(index)}


@pytest.mark.parametrize("index", range(1, len(LAYOUTS)))
@pytest.mark.parametrize("chain", CHAINS)
def test_every_rank_computes_with_the_masters(walks: dict, folder: Path, chain: str, index: int) -> None:
    saved = SavedState(folder / chain / f"left-{index - 1}")
    for rank in walks[chain][index]:
        for name, weight in rank["computed_with"].items():
            assert torch.equal(weight, saved.whole(name, dtype=torch.float64).to(weight.dtype)), name
        # The buffer that is part of the model's state is the first model's, the other this one's own.
        assert rank["buffers"] == {"marks": [0.0] * 3, "scratch": [float(index)] * 3}


@pytest.mark.parametrize("chain", CHAINS)
def test_the_steps_are_those_of_a_run_that_stayed(walks: dict, folder: Path, chain: str) -> None:
    """Relative to what the weights have moved; where it is computed in float64, to its rounding."""
    groups = ProcessGroups()
    engine = make_engine(groups, stage=0, **CHAINS[chain])
    start = weights_of(engine.module)
    losses = [engine_step(engine, groups, step, rate(chain))[0] for step in range(len(LAYOUTS))]
    in_bf16 = CHAINS[chain].get("bf16", False)
    assert [ranks[0]["loss"] for ranks in walks[chain]] == pytest.approx(
        losses, rel=1e-2 if in_bf16 else 1e-6
    )
    if in_bf16:  # whose rounding AdamW's first steps make as large as the steps: the bits must do
        return
    bound = 1e-10 if "float64" in chain else 5e-5
    saved = SavedState(folder / chain / f"left-{len(LAYOUTS) - 1}")
    for name, weight in weights_of(engine.module).items():
        moved = float((weight - start[name]).norm())
        assert float((saved.whole(name, dtype=weight.dtype) - weight).norm()) <= bound * moved, name
