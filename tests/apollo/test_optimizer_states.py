"""What `Apollo` keeps: how much, that it resumes bit for bit, and what is reported of it."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from apollo_samples import elements, gradients, net, net_steps, walk, weight_of
from torch import nn

from longseq.apollo import Apollo, quantize_linears
from longseq.apollo.eight_bit import dequantized
from longseq.apollo.layout import Layout, Range
from longseq.apollo.placement import FlatPart


@pytest.mark.parametrize(("kind", "rank"), [("channel", 1), ("channel", 4), ("tensor", 1)])
@pytest.mark.parametrize("shape", [(33, 7), (7, 33), (9, 9)], ids=str)
def test_a_matrix_keeps_2_max_r_plus_2_numbers(shape: tuple[int, int], kind: str, rank: int) -> None:
    param = weight_of(shape, torch.bfloat16)
    optimizer = Apollo([param], rank=rank, scale_type=kind)
    assert elements(optimizer) == 0
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert elements(optimizer) == 2 * max(shape) * rank + 2
    tensors = optimizer.state[param]
    assert {value.dtype for value in tensors.values()} == {torch.float32}


def test_a_batch_keeps_as_much_as_its_matrices() -> None:
    param = weight_of((3, 6, 8))
    optimizer = Apollo([param], rank=2)
    walk(optimizer, param, gradients((3, 6, 8), 1))
    assert elements(optimizer) == 3 * (2 * 8 * 2 + 1) + 1  # one count of steps


RESUMES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "mini": (torch.float32, {"scale_type": "tensor"}),
    "float64": (torch.float64, {}),
    "stochastic": (torch.bfloat16, {"rounding": "stochastic"}),
    "nearest": (torch.bfloat16, {"rounding": "nearest"}),
    "master": (torch.bfloat16, {"rounding": "master"}),
}


@pytest.mark.parametrize("name", RESUMES)
@pytest.mark.parametrize("at", [1, 3, 4])  # the gap is 3: within it, at its end, after it
def test_states_resume_bit_for_bit_through_a_file(name: str, at: int) -> None:
    dtype, options = RESUMES[name]
    more = {"rank": 2 if name != "mini" else 1, "lr": 0.01, "update_gap": 3, "weight_decay": 0.1, **options}
    plain, model = net(dtype), net(dtype)
    optimizer = Apollo(plain.named_parameters(), **more)
    net_steps(plain, optimizer, range(7))
    first = Apollo(model.named_parameters(), **more)
    net_steps(model, first, range(at))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = net(dtype)
    with torch.no_grad():
        for param in other.parameters():
            param.zero_()
    other.load_state_dict(saved["model"])
    second = Apollo(other.named_parameters(), **{**more, "lr": 7.0})  # the saved one counts
    second.load_state_dict(saved["optimizer"])
    dtypes = {
        (key, value.dtype) for state in second.state.values() for key, value in state.items() if key != "step"
    }
    kept = torch.promote_types(dtype, torch.float32)
    assert {one for _, one in dtypes} == {kept}, "moments of bf16 weights stay float32"
    assert all(state["step"].dtype == torch.float32 for state in second.state.values())
    net_steps(other, second, range(at, 7))
    for wanted, found in zip(plain.parameters(), other.parameters(), strict=True):
        assert found.equal(wanted)
    for one, two in zip(optimizer.state.values(), second.state.values(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_loaded_states_are_copies() -> None:
    model = net()
    one, two = (Apollo(model.named_parameters(), rank=2) for _ in range(2))
    net_steps(model, one, range(1))
    saved = one.state_dict()
    before = copy.deepcopy(saved["state"])
    two.load_state_dict(saved)
    net_steps(model, two, range(2))
    torch.testing.assert_close(saved["state"], before, rtol=0, atol=0)


def test_states_are_as_wide_as_the_weights_that_they_are_loaded_for() -> None:
    """Kernels read them at an address, whatever is there."""
    wide = weight_of((9, 7))
    first = Apollo([("w", wide)], rank=2)
    walk(first, wide, gradients((9, 7), 2))
    narrow = nn.Parameter(wide.detach().float())
    second = Apollo([("w", narrow)], rank=2)
    second.load_state_dict(first.state_dict())
    assert {value.dtype for value in second.state[narrow].values()} == {torch.float32}
    walk(second, narrow, gradients((9, 7), 1, torch.float32))


def test_moments_of_8_bits_that_shards_were_gathered_to_are_loaded() -> None:
    """They are float32 in what DTensors save."""
    model, other = (weight_of((9, 40), torch.float32) for _ in range(2))
    first, second = (Apollo([{"params": [("w", w)], "rule": "adamw_8bit"}], lr=0.1) for w in (model, other))
    walk(first, model, gradients((9, 40), 2, torch.float32))
    saved = copy.deepcopy(first.state_dict())
    state = saved["state"][0]
    for key in ("exp_avg", "exp_avg_sq"):
        codes, scale = state[key], state.pop(f"{key}_scale")
        state[key] = dequantized(codes, scale, signed=key == "exp_avg").view(9, 40)
    second.load_state_dict(saved)
    with torch.no_grad():
        other.copy_(model)
    for optimizer, param in ((first, model), (second, other)):
        walk(optimizer, param, gradients((9, 40), 1, torch.float32))
    assert other.equal(model)


def test_weights_in_8_bits_have_no_master() -> None:
    """Theirs would be made of what stands for the weight, which is NaN."""
    model = nn.Sequential(nn.Linear(32, 48)).bfloat16()
    quantize_linears(model, group_size=16)
    for rank in (4, 64):
        optimizer = Apollo(model.named_parameters(), rank=rank, rounding="master")
        foreseen = optimizer.memory_report()
        optimizer.zero_grad()
        model(torch.ones(2, 32, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        assert "master" not in optimizer.state[model[0].weight]
        assert "master" in optimizer.state[model[0].bias]
        assert optimizer.memory_report() == foreseen


def test_states_of_other_parameters_are_refused() -> None:
    optimizer = Apollo(net().named_parameters(), rank=2)
    for names in (("a", "b"), ("b", "a", "c")):
        other = Apollo([(name, weight_of((4, 3))) for name in names], rank=2)
        with pytest.raises(ValueError, match=r"the states are of other parameters: .* there \(.*\), 7 here"):
            optimizer.load_state_dict(other.state_dict())
    turned = dict(reversed(list(net().named_parameters())))
    with pytest.raises(ValueError, match="in another order"):
        optimizer.load_state_dict(Apollo(turned.items(), rank=2).state_dict())
    plain = torch.optim.AdamW(net().parameters())
    with pytest.raises(ValueError, match="the states are of other parameters"):
        optimizer.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_go_on_alike(copied: Any) -> None:
    model = net()
    optimizer = Apollo(model.named_parameters(), rank=2, lr=0.01, update_gap=2)
    net_steps(model, optimizer, range(3))
    other_model, other = copied((model, optimizer))
    for one, two in ((model, optimizer), (other_model, other)):
        net_steps(one, two, range(3, 5))
    for wanted, found in zip(model.parameters(), other_model.parameters(), strict=True):
        assert found.equal(wanted)


def test_reset_forgets_every_step() -> None:
    param = weight_of((7, 5))
    optimizer = Apollo([("w", param)], rank=2, lr=0.1)
    moved = []
    for _ in range(2):
        before = param.detach().clone()
        moved.append(walk(optimizer, param, gradients((7, 5), 2)) - before)
        optimizer.reset()
        assert not optimizer.state
    torch.testing.assert_close(*moved)


# -- flat parameters -----------------------------------------------------------------------------------------


def test_flat_parameters_need_a_layout() -> None:
    optimizer = Apollo([("a", weight_of((4, 3))), ("b", weight_of((3,)))], rank=2)
    flat = nn.Parameter(torch.zeros(15))
    flat.grad = torch.ones(15)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match=r"2 parameters of a group have become 1,.*lay_out_apollo"):
        optimizer.step()


def flat_optimizer() -> Apollo:
    param = weight_of((4, 3))
    optimizer = Apollo([("a", param)], rank=2, lr=0.1)
    flat = nn.Parameter(param.detach().flatten().clone())
    optimizer.param_groups[0]["params"] = [flat]
    part = FlatPart("a", Layout((4, 3), (Range(0, 12),)), 0)
    optimizer.lay_out({flat: (optimizer.param_groups[0], [part])}, None)
    return optimizer


def test_a_flat_layout_follows_the_groups_that_are_loaded() -> None:
    """torch makes the groups anew when states are loaded, and schedules write into the new ones."""
    optimizer = flat_optimizer()
    [flat] = optimizer.param_groups[0]["params"]
    flat.grad = torch.ones_like(flat)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0
    before = flat.detach().clone()
    optimizer.step()
    assert flat.equal(before)
    assert int(optimizer.state["a"]["step"]) == 2


def test_a_flat_layouts_loaded_states_are_copies() -> None:
    one, two = (flat_optimizer() for _ in range(2))
    for optimizer in (one, two):
        for flat in optimizer.param_groups[0]["params"]:
            flat.grad = torch.ones_like(flat)
    one.step()
    saved = one.state_dict()
    before = copy.deepcopy(saved["state"])
    two.load_state_dict(saved)
    two.step()
    torch.testing.assert_close(saved["state"], before, rtol=0, atol=0)


# -- the report ---------------------------------------------------------------------------------------------


def test_memory_report() -> None:
    params = {"up": (12, 5), "down": (5, 12), "norm": (9,), "table": (16, 4)}
    weights = {name: nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for name, shape in params.items()}
    table = {"params": [("table", weights.pop("table"))], "rule": "adamw_8bit"}
    optimizer = Apollo([{"params": list(weights.items())}, table], rank=2)
    foreseen = optimizer.memory_report()
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()
    report = optimizer.memory_report()
    assert foreseen == report, "of states that are not there yet, what they will be"
    by_rule = {one.rule: one for one in report.rules}
    assert [one.rule for one in report.rules] == ["low_rank", "adamw_8bit", "adamw"], "the largest first"
    low_rank, adamw, eight = by_rule["low_rank"], by_rule["adamw"], by_rule["adamw_8bit"]
    assert (low_rank.names, low_rank.elements) == (("up", "down"), 120)
    assert low_rank.state_elements == 2 * (2 * 12 * 2 + 2)
    assert low_rank.state_bytes == 4 * low_rank.state_elements
    assert (adamw.names, adamw.elements, adamw.state_bytes) == (("norm",), 9, 4 * (2 * 9 + 1))
    assert (eight.names, eight.elements) == (("table",), 64)
    assert eight.state_bytes == 2 * 64 + 2 * 4 + 4
    assert report.state_bytes == sum(one.state_bytes for one in report.rules)
    header, *lines = str(report).splitlines()
    assert header.split() == ["rule", "weights", "elements", "state", "MiB", "bytes/element"]
    assert lines[0].split() == ["low_rank", "2", "120", "0.0", f"{low_rank.state_bytes / 120:.4f}"]
    assert len({len(line) for line in (header, *lines)}) == 1
