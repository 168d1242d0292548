"""Pieces of weights and states in safetensors: put together bit for bit, missed where they are not there."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from longseq.distributed import ProcessGroups
from longseq.distributed.checked_file import write_file
from longseq.distributed.engine import LocalEngine
from longseq.distributed.state_files import (
    WEIGHT,
    Piece,
    SavedState,
    piece_file,
    split_state,
)

SHAPES = {"a": (7, 5), "b.weight": (3, 4, 5), "bias": (11,), "gain": ()}


def write_pieces(path: Path, pieces: list[Piece], **options: Any) -> None:
    write_file(path, piece_file(path.name, pieces, **options))


def tensors_of(dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(3)
    return {
        name: {
            key: torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
            for key in (WEIGHT, "exp_avg")
        }
        for name, shape in SHAPES.items()
    }


def write_cut(folder: Path, tensors: dict[str, dict[str, Tensor]], num_files: int, **scalars: Any) -> None:
    """Each parameter cut at random into as many pieces as there are files; some are empty, some all of it."""
    draw = random.Random(num_files)
    files: list[list[Piece]] = [[] for _ in range(num_files)]
    for name, states in tensors.items():
        numel = math.prod(SHAPES[name])
        cuts = sorted(draw.randint(0, numel) for _ in range(num_files - 1))
        for file, start, stop in zip(files, [0, *cuts], [*cuts, numel], strict=True):
            cut = {key: tensor.reshape(-1)[start:stop] for key, tensor in states.items()}
            whole = stop - start == numel
            if stop > start:
                file.append(Piece(name, SHAPES[name], start, dict(states) if whole else cut, scalars))
    folder.mkdir(exist_ok=True)
    for rank, pieces in enumerate(files):
        write_pieces(folder / f"rank-{rank}.safetensors", pieces, num_files=num_files)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_files", [1, 2, 5])
def test_any_cut_is_read_in_any_other(tmp_path: Path, num_files: int, dtype: torch.dtype) -> None:
    tensors = tensors_of(dtype)
    write_cut(tmp_path, tensors, num_files)
    saved = SavedState(tmp_path)
    saved.check(SHAPES, ())
    draw = random.Random(0)
    for name, states in tensors.items():
        assert saved.states(name) == ["exp_avg"]
        for key, tensor in states.items():
            assert torch.equal(saved.whole(name, key, dtype), tensor)
            for _ in range(20):
                start = draw.randint(0, tensor.numel())
                out = torch.full((draw.randint(0, tensor.numel() - start),), torch.nan, dtype=dtype)
                saved.read_into(out, name, key, start)
                assert torch.equal(out, tensor.reshape(-1)[start : start + out.numel()])
    consolidated = dict(SavedState(tmp_path).weights())
    assert {name: weight.dtype for name, weight in consolidated.items()} == dict.fromkeys(
        SHAPES, torch.float32
    )
    assert all(torch.equal(consolidated[name], tensors[name][WEIGHT].float()) for name in SHAPES)


def test_numbers_are_kept_to_the_last_bit(tmp_path: Path) -> None:
    numbers = {
        "step": torch.tensor(16777215.0),
        "scale": torch.tensor(0.1, dtype=torch.float64),
        "count": torch.tensor(2**53 + 1),
        "plain": 1 / 3,
        "flag": True,
        "none": None,
    }
    write_cut(tmp_path, tensors_of(torch.float32), 2, **numbers)
    found = SavedState(tmp_path).scalars("a")
    for key, value in numbers.items():
        if isinstance(value, Tensor):
            assert found[key] == {"dtype": str(value.dtype).removeprefix("torch."), "value": value.item()}
        else:
            assert found[key] == value


def test_anybody_can_open_the_files(tmp_path: Path) -> None:
    tensors = tensors_of(torch.bfloat16)
    tensors["a"]["exp_avg"] = tensors["a"]["exp_avg"].double()  # dtypes of several sizes, one file
    write_cut(tmp_path, tensors, 1)
    loaded = load_file(tmp_path / "rank-0.safetensors")
    wanted = {
        name if key == WEIGHT else f"{key}/{name}": t for name, d in tensors.items() for key, t in d.items()
    }
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[key], wanted[key]) for key in wanted)


def lose_a_file(folder: Path) -> None:
    (folder / "rank-1.safetensors").unlink()


def lose_an_empty_file(folder: Path) -> None:
    write_pieces(folder / "rank-0.safetensors", whole_pieces(), num_files=2)
    (folder / "rank-1.safetensors").unlink()


def mix_in_another(folder: Path) -> None:
    write_pieces(folder / "rank-9.safetensors", whole_pieces(), num_files=2)


def whole_pieces() -> list[Piece]:
    return [Piece(name, SHAPES[name], 0, states) for name, states in tensors_of(torch.float32).items()]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_file, r"to 34 of a\. It was written as 2 files and 1 are there; bring the others back"),
        (lose_an_empty_file, "is not whole. It was written as 2 files and 1 are there"),
        (mix_in_another, r"on of a twice: .* as 2 files and 3 are there; remove those that are not of it"),
    ],
)
def test_what_is_not_whole_is_refused(tmp_path: Path, damage: Any, message: str) -> None:
    write_cut(tmp_path, tensors_of(torch.float32), 2)
    SavedState(tmp_path).check(SHAPES, ())
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        SavedState(tmp_path).check(SHAPES, ())
    if damage is not lose_an_empty_file:
        with pytest.raises(ValueError, match=message):
            dict(SavedState(tmp_path).weights())


@pytest.mark.parametrize(
    ("shapes", "buffers", "message"),
    [
        ({**SHAPES, "new": (2,)}, (), r"of another model: missing \['new'\], unexpected \[\]"),
        ({k: v for k, v in SHAPES.items() if k != "bias"}, (), r"missing \[\], unexpected \['bias'\]"),
        ({**SHAPES, "a": (5, 7)}, (), r"a has shape \(7, 5\) there and \(5, 7\) here.*log\.run_dir"),
        (SHAPES, ("table",), r"missing \['table'\].* its own config .*another log\.run_dir"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, shapes: dict, buffers: tuple, message: str) -> None:
    write_cut(tmp_path, tensors_of(torch.float32), 2)
    with pytest.raises(ValueError, match=message):
        SavedState(tmp_path).check(shapes, buffers)


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no engine's checkpoint.*another log\.run_dir"):
        SavedState(tmp_path)


def test_buffers_in_eight_bits_are_kept(tmp_path: Path) -> None:
    values = torch.tensor([0.5, -2.0, 96.0])
    buffers = {str(dtype): values.to(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)}
    write_pieces(tmp_path / "model.safetensors", [], num_files=1, buffers=buffers)
    saved = SavedState(tmp_path)
    for name, buffer in buffers.items():
        assert saved.buffer(name).dtype == buffer.dtype
        assert torch.equal(saved.buffer(name).float(), values)


def test_a_dtype_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    buffers = {"rotary.phases": torch.zeros(2, dtype=torch.complex64)}
    with pytest.raises(ValueError, match=r"rotary\.phases is torch\.complex64"):
        write_pieces(tmp_path / "model.safetensors", [], num_files=1, buffers=buffers)
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match=r"state 'projected' is a tensor of shape \(2, 5\)"):
        split_state({"projected": torch.zeros(2, 5)}, torch.zeros(7, 5))


def engine_of(seed: int, lr: float = 0.1, **options: Any) -> LocalEngine:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    trainable = [param for param in model.parameters() if param.requires_grad]
    return LocalEngine(model, torch.optim.AdamW(trainable, lr=lr, **options), ProcessGroups())


def step(engine: LocalEngine) -> None:
    engine.backward(engine.module(torch.arange(15.0).view(5, 3)).square().sum())
    engine.step(0.1)


def test_a_checkpoint_brings_states_and_buffers_but_no_settings(tmp_path: Path) -> None:
    first = engine_of(0)
    step(first)
    first.save(tmp_path)
    second = engine_of(1, betas=(0.5, 0.6), weight_decay=0.5)
    second.load(tmp_path)
    [group] = second._optimizer.param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.6), 0.5)
    assert torch.equal(second.module[1].running_mean, first.module[1].running_mean)
    assert second.module[1].num_batches_tracked == 1
    assert not torch.equal(second.module[2].weight, first.module[2].weight)  # frozen: not in a checkpoint
    for param, other in zip(first._params, second._params, strict=True):
        mine, theirs = first._optimizer.state[param], second._optimizer.state[other]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
        assert torch.equal(param, other)


def test_an_engine_that_has_stepped_takes_the_state_before_any_step(tmp_path: Path) -> None:
    first, second = engine_of(0), engine_of(1)
    first.save(tmp_path)
    step(second)
    second.load(tmp_path)
    second.module[2].weight.copy_(first.module[2].weight)
    for engine in (first, second):
        step(engine)
    assert all(torch.equal(a, b) for a, b in zip(first._params, second._params, strict=True))


def test_a_lost_optimizer_is_noticed(tmp_path: Path) -> None:
    engine = engine_of(0)
    step(engine)
    engine.save(tmp_path)
    (tmp_path / "optimizer.safetensors").unlink()
    with pytest.raises(ValueError, match="is not whole"):
        engine.load(tmp_path)
