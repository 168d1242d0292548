"""ZeRO 1 to 3 through DeepSpeed: the steps of plain PyTorch, and checkpoints that go on."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from gloo import run_cases
from numerics import assert_as_accurate_as
from torch import Tensor, nn
from training_samples import (
    MICRO_BATCHES,
    engine_step,
    engine_training,
    plain_training,
    prepared_llama,
    tiny_llama,
    weights_of,
)

from longseq.distributed import ProcessGroups
from longseq.distributed.engine import LocalEngine, NonFiniteGradientError
from longseq.distributed.state_files import SavedState

if TYPE_CHECKING:
    from longseq.distributed.zero import DeepSpeedEngine

# Processes are started that make an engine of DeepSpeed for every case.
pytestmark = pytest.mark.slow

STAGES = (1, 2, 3)
CLIP_NORM = 0.05
LAYOUTS = {
    f"{world_size} processes, ZeRO {stage}, sp {sp_size}, {'tied' if tie else 'untied'}": (
        world_size,
        {"stage": stage, "sp_size": sp_size, "tie": tie},
    )
    for world_size, stage, sp_size, tie in [
        *((2, stage, 2, True) for stage in STAGES),
        *((2, stage, 1, False) for stage in STAGES),
        (4, 3, 2, False),
    ]
}
# One rank's first row is shorter than a tile and the other's is longer: their gradients must arrive alike.
LAYOUTS |= {
    f"2 processes, ZeRO {stage}, a short row beside a long one": (
        2,
        {"stage": stage, "sp_size": 1, "tie": False, "tile_tokens": 25},
    )
    for stage in (2, 3)
}


def make_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, groups: ProcessGroups, stage: int, **options: Any
) -> DeepSpeedEngine:
    from longseq.distributed.zero import DeepSpeedEngine, ZeroOptions, init_deepspeed_communication

    init_deepspeed_communication()
    accumulation = MICRO_BATCHES // groups.dp_size
    return DeepSpeedEngine(model, optimizer, groups, ZeroOptions(stage, accumulation, **options))


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights by name, gathered where ZeRO 3 has spread them."""
    import deepspeed

    params = [param for param in model.parameters() if hasattr(param, "ds_id")]
    with deepspeed.zero.GatheredParameters(params, enabled=bool(params)):
        return weights_of(model)


def training_case(
    stage: int, sp_size: int, tie: bool, clip_norm: float | None = None, tile_tokens: int = 10
) -> dict:
    groups = ProcessGroups.create(sp_size)
    model = prepared_llama(groups, tile_tokens, tie_word_embeddings=tie)
    optimizer = torch.optim.SGD(model.parameters(), lr=9.0)
    engine = make_engine(model, optimizer, groups, stage, clip_norm=clip_norm)
    return {**engine_training(engine, groups), "weights": whole_weights(model)}


def checkpoint_case(stage: int, folder: str, frozen: bool) -> dict:
    """Train, save, train on; and the same from what was saved, in a model that began elsewhere."""
    groups = ProcessGroups.create(2)

    def fresh(seed: int):
        model = prepared_llama(groups, seed=seed)
        for name, param in model.named_parameters():
            if frozen and "mlp" in name:
                param.requires_grad_(False)
                param.data.fill_(0.01)
        trainable = [param for param in model.parameters() if param.requires_grad]
        return model, make_engine(model, torch.optim.AdamW(trainable), groups, stage)

    model, engine = fresh(seed=0)
    engine_step(engine, groups, 0, 1e-2)
    engine.save(Path(folder))
    groups.barrier()
    saved, consolidated = whole_weights(model), dict(SavedState(Path(folder)).weights())
    trainable = [name for name, param in model.named_parameters() if param.requires_grad]
    engine_step(engine, groups, 1, 1e-2)

    model_2, engine_2 = fresh(seed=1)
    engine_2.load(Path(folder))
    loaded = whole_weights(model_2)
    engine_step(engine_2, groups, 1, 1e-2)
    return {
        "trainable": trainable,
        "saved": saved,
        "consolidated": consolidated,
        "loaded": loaded,
        "went_on": whole_weights(model),
        "resumed": whole_weights(model_2),
    }


def non_finite_case(stage: int, bf16: bool) -> dict:
    groups = ProcessGroups.create()
    model = prepared_llama(groups, dtype=torch.bfloat16 if bf16 else torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = make_engine(model, optimizer, groups, stage, bf16=bf16)
    before = whole_weights(model)
    # One rank's gradient alone goes bad.
    bad = [param for name, param in model.named_parameters() if name.endswith("0.mlp.up_proj.weight")]
    if dist.get_rank() == 1:
        bad[0].register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(NonFiniteGradientError):
        engine_step(engine, groups, 0, 1.0)
    after = whole_weights(model)
    return {"changed": [name for name in before if not torch.equal(before[name], after[name])]}


def refused_case(folder: str) -> list[str]:
    """Loading what is not there, and what has lost the other rank's file."""
    groups = ProcessGroups.create()
    model = prepared_llama(groups)
    engine = make_engine(model, torch.optim.AdamW(model.parameters()), groups, 1)
    path = Path(folder)
    messages = [_message_of(engine, path)]
    groups.barrier()
    engine.save(path)
    groups.barrier()
    if groups.is_main:
        (path / "rank-00001.safetensors").rename(path / "aside")
    groups.barrier()
    return [*messages, _message_of(engine, path)]


def _message_of(engine: DeepSpeedEngine, path: Path) -> str:
    with pytest.raises(ValueError, match=path.name) as refused:
        engine.load(path)
    return str(refused.value)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    by_size: dict[int, dict] = {2: {}, 4: {}}
    for name, (world_size, kwargs) in LAYOUTS.items():
        by_size[world_size][name] = (training_case, kwargs)
    folder = tmp_path_factory.mktemp("zero")
    for stage in STAGES:
        clipped = {"stage": stage, "sp_size": 2, "tie": False, "clip_norm": CLIP_NORM}
        by_size[2][f"clipped {stage}"] = (training_case, clipped)
        for frozen in (False, True):
            checkpoint = {"stage": stage, "folder": str(folder / f"{stage}{frozen}"), "frozen": frozen}
            by_size[2][f"checkpoint {stage} {frozen}"] = (checkpoint_case, checkpoint)
        for bf16 in (False, True):
            by_size[2][f"non-finite {stage} {bf16}"] = (non_finite_case, {"stage": stage, "bf16": bf16})
    by_size[2]["refused"] = (refused_case, {"folder": str(folder / "refused")})
    results: dict[str, list] = {}
    for world_size, cases in by_size.items():
        results |= run_cases(world_size, cases)
    return results


@cache
def plain(dtype: torch.dtype, tie: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and changes of the weights."""
    model = tiny_llama(tie_word_embeddings=tie).to(dtype)
    start = weights_of(model)
    losses = plain_training(model, torch.optim.SGD(model.parameters(), lr=9.0))
    return losses, {name: weight - start[name] for name, weight in weights_of(model).items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_stage_takes_the_steps_of_plain_pytorch(outcomes: dict[str, list], name: str) -> None:
    tie = LAYOUTS[name][1]["tie"]
    (truth_losses, truth), (_, in_float32) = plain(torch.float64, tie), plain(torch.float32, tie)
    start = weights_of(tiny_llama(tie_word_embeddings=tie))
    for rank in outcomes[name]:
        assert rank["losses"] == pytest.approx(truth_losses, rel=2e-6)
        assert rank["weights"].keys() == truth.keys()
        for weight_name, weight in rank["weights"].items():
            moved = weight - start[weight_name]
            assert_as_accurate_as(
                moved, in_float32[weight_name], truth[weight_name], slack=2, name=weight_name
            )


@pytest.mark.parametrize("stage", STAGES)
def test_clipping_is_that_of_one_process(outcomes: dict[str, list], stage: int) -> None:
    groups = ProcessGroups()
    model = prepared_llama(groups)
    optimizer = torch.optim.SGD(model.parameters(), lr=9.0)
    engine = LocalEngine(model, optimizer, groups, accumulation_steps=MICRO_BATCHES, clip_norm=CLIP_NORM)
    norms = engine_training(engine, groups)["norms"]
    assert min(norms) > 2 * CLIP_NORM, "the gradients must be clipped for the comparison to mean something"
    wanted = weights_of(model)
    for rank in outcomes[f"clipped {stage}"]:
        assert rank["norms"] == pytest.approx(norms, rel=1e-5)
        for name, weight in rank["weights"].items():
            torch.testing.assert_close(weight, wanted[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_a_loaded_checkpoint_goes_on_bit_for_bit(outcomes: dict[str, list], stage: int, frozen: bool) -> None:
    for rank in outcomes[f"checkpoint {stage} {frozen}"]:
        for name in rank["saved"]:
            assert torch.equal(rank["loaded"][name], rank["saved"][name]), name
            assert torch.equal(rank["resumed"][name], rank["went_on"][name]), name
            assert torch.equal(rank["went_on"][name], rank["saved"][name]) == (
                name not in rank["trainable"]
            ), name


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_consolidated_weights_are_the_models(outcomes: dict[str, list], stage: int, frozen: bool) -> None:
    for rank in outcomes[f"checkpoint {stage} {frozen}"]:
        assert set(rank["trainable"]) == set(rank["consolidated"])
        for name, weight in rank["consolidated"].items():
            assert torch.equal(weight, rank["saved"][name]), name


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_a_nan_on_one_rank_stops_every_rank_before_the_update(
    outcomes: dict[str, list], stage: int, bf16: bool
) -> None:
    assert outcomes[f"non-finite {stage} {bf16}"] == [{"changed": []}] * 2


def test_what_cannot_be_loaded_is_refused_on_every_rank(outcomes: dict[str, list]) -> None:
    for nothing, fewer in outcomes["refused"]:
        assert "holds no engine's checkpoint" in nothing
        assert "is not whole: missing ['lm_head.weight', 'model.layers.1" in fewer
        assert "written as 2 files and 1 are there" in fewer
