"""`LocalEngine` on one device: accumulation, clipping, precision, checkpoints, and no step on a NaN."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training_samples import LEARNING_RATES, engine_step, prepared_llama, tiny_llama, weights_of

from longseq.apollo import Apollo, parameter_groups
from longseq.distributed import ProcessGroups
from longseq.distributed.engine import LocalEngine, NonFiniteGradientError

ALONE = ProcessGroups()


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def loss_of(module: nn.Module, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4, 6, generator=draw, dtype=torch.float64)
    return module(inputs.to(module[0].weight.dtype)).square().sum()


def copies() -> tuple[nn.Module, nn.Module]:
    model = small_model()
    return model, copy.deepcopy(model)


def test_micro_batches_add_up_and_the_last_one_steps() -> None:
    model, plain = copies()
    engine = LocalEngine(model, torch.optim.SGD(model.parameters(), lr=9.0), ALONE, accumulation_steps=3)
    before = weights_of(model)
    for seed in range(3):
        assert all(torch.equal(before[name], weight) for name, weight in weights_of(model).items())
        engine.backward(loss_of(model, seed))
        norm = engine.step(0.1)
        assert (norm is None) == (seed < 2)
    sum(loss_of(plain, seed) for seed in range(3)).backward()
    grads = [param.grad for param in plain.parameters()]
    assert norm == pytest.approx(torch.stack([grad.square().sum() for grad in grads]).sum().sqrt().item())
    for param, ours in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, param - 0.1 * param.grad, rtol=1e-14, atol=1e-14)
        assert ours.grad is None


def test_the_norm_of_bf16_gradients_is_not_rounded_to_bf16() -> None:
    model = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 5)).bfloat16()
    engine = LocalEngine(model, torch.optim.SGD(model.parameters(), lr=0.0), ALONE)
    engine.backward(loss_of(model, 0))
    wanted = torch.cat([param.grad.double().view(-1) for param in model.parameters()]).norm().item()
    assert engine.step(0.0) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("clip_norm", [0.01, 1e6])
def test_clipping_is_torchs(clip_norm: float) -> None:
    model, plain = copies()
    engine = LocalEngine(model, torch.optim.SGD(model.parameters(), lr=1.0), ALONE, clip_norm=clip_norm)
    optimizer = torch.optim.SGD(plain.parameters(), lr=1.0)
    engine.backward(loss_of(model, 0))
    norm = engine.step(1.0)
    loss_of(plain, 0).backward()
    wanted = nn.utils.clip_grad_norm_(plain.parameters(), clip_norm)
    optimizer.step()
    assert norm == wanted.item(), "the norm before clipping"
    for ours, param in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, param)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(bad: float, clip_norm: float | None) -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    engine = LocalEngine(model, optimizer, ALONE, clip_norm=clip_norm)
    engine.backward(loss_of(model, 0))
    engine.step(0.1)
    before, state = weights_of(model), copy.deepcopy(optimizer.state_dict()["state"])
    engine.backward(loss_of(model, 1))
    model[0].weight.grad[2, 3] = bad
    with pytest.raises(NonFiniteGradientError, match="gradient norm is"):
        engine.step(0.1)
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(model).items())
    for index, moments in optimizer.state_dict()["state"].items():
        assert all(torch.equal(moments[name], state[index][name]) for name in moments)
    engine.backward(loss_of(model, 2))
    assert engine.step(0.1) < torch.inf, "the bad gradient is gone"


def test_bf16_is_autocast_over_float32_weights() -> None:
    model = tiny_llama()
    seen = {}
    model.lm_head.register_forward_hook(lambda module, args, out: seen.update(logits=out.dtype))
    engine = LocalEngine(model, torch.optim.SGD(model.parameters()), ALONE, bf16=True)
    ids = torch.randint(0, 131, (1, 9))
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    assert seen["logits"] == torch.bfloat16
    assert {param.grad.dtype for param in model.parameters()} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")
    engine.step(0.1)
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    plain = LocalEngine(model, torch.optim.SGD(model.parameters()), ALONE)
    plain(input_ids=ids)
    assert seen["logits"] == torch.float32


def trained_engine(tie: bool, frozen: bool, seed: int) -> LocalEngine:
    model = prepared_llama(ALONE, tie_word_embeddings=tie, seed=seed)
    if frozen:
        # Frozen weights come from where the model came from, so they are those of seed 0 in every model.
        source = dict(tiny_llama(tie_word_embeddings=tie, seed=0).named_parameters())
        for name, param in model.named_parameters():
            if "mlp" in name:
                param.data.copy_(source[name].data)
                param.requires_grad_(False)
    trainable = [param for param in model.parameters() if param.requires_grad]
    return LocalEngine(model, torch.optim.AdamW(trainable), ALONE, accumulation_steps=4)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_a_loaded_checkpoint_goes_on_bit_for_bit(tmp_path: Path, tie: bool, frozen: bool) -> None:
    first = trained_engine(tie, frozen, seed=0)
    engine_step(first, ALONE, 0, 1e-2)
    first.save(tmp_path / "here")
    second = trained_engine(tie, frozen, seed=1)
    second.load(tmp_path / "here")
    for engine in (first, second):
        engine_step(engine, ALONE, 1, LEARNING_RATES[1])
    wanted = weights_of(first.module)
    for name, weight in weights_of(second.module).items():
        assert torch.equal(weight, wanted[name]), name
    assert second.module.lm_head.weight is second.module.model.embed_tokens.weight or not tie


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    engine = trained_engine(tie=False, frozen=False, seed=0)
    engine.save(tmp_path)
    deeper = prepared_llama(ALONE, num_hidden_layers=3)
    other = LocalEngine(deeper, torch.optim.AdamW(deeper.parameters()), ALONE)
    with pytest.raises(ValueError, match=r"of another model: missing \['model\.layers\.2"):
        other.load(tmp_path)


def in_backward_engine(dtype: torch.dtype = torch.float64, clip_norm: float | None = None) -> LocalEngine:
    model = small_model().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    return LocalEngine(model, optimizer, ALONE, clip_norm=clip_norm, in_backward=True)


def in_backward_step(engine: LocalEngine, seed: int, lr: float) -> float | None:
    engine.begin_step(lr)
    engine.backward(loss_of(engine.module, seed))
    return engine.step(lr)


def test_weights_stepped_in_backward_are_those_of_a_step_after_it() -> None:
    engine, plain = in_backward_engine(), small_model()
    after = LocalEngine(plain, torch.optim.AdamW(plain.parameters()), ALONE)
    for step, lr in enumerate((0.1, 0.02, 0.3)):
        before = weights_of(engine.module)
        engine.begin_step(lr)
        engine.backward(loss_of(engine.module, step))
        assert all(param.grad is None for param in engine.module.parameters())
        assert not torch.equal(before["0.weight"], engine.module[0].weight)
        norm = engine.step(lr)
        after.backward(loss_of(plain, step))
        assert norm == pytest.approx(after.step(lr), rel=1e-12)
        for ours, param in zip(engine.module.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours, param)


def test_a_step_in_backward_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """What it clips by, the norm of the step before, is in the checkpoint."""
    first = in_backward_engine(torch.float32, clip_norm=0.5)
    assert in_backward_step(first, 0, 0.1) > 0.5
    first.save(tmp_path)
    second = in_backward_engine(torch.float32, clip_norm=0.5)
    with torch.no_grad():
        for param in second.module.parameters():
            param.add_(1.0)
    second.load(tmp_path)
    norms = [in_backward_step(engine, 1, 0.2) for engine in (first, second)]
    assert norms[0] == norms[1]
    for ours, param in zip(second.module.parameters(), first.module.parameters(), strict=True):
        assert torch.equal(ours, param)


def test_what_is_clipped_by_is_forgotten_with_the_states() -> None:
    engine = in_backward_engine()
    in_backward_step(engine, 0, 0.1)
    engine.reset_optimizer()
    assert not engine._optimizer.state
    assert engine._in_backward.previous_norm is None


def test_a_gradient_that_is_not_finite_stops_after_a_step_in_backward() -> None:
    engine = in_backward_engine()
    in_backward_step(engine, 0, 0.1)
    engine.begin_step(0.1)
    engine.backward(loss_of(engine.module, 1) * torch.inf)
    with pytest.raises(NonFiniteGradientError, match="gradient norm is"):
        engine.step(0.1)
    assert all(param.isfinite().all() for param in engine.module.parameters())


@pytest.mark.parametrize(
    "of_engine",
    [{"accumulation_steps": 2}, {"groups": ProcessGroups(0, 2)}],
    ids=["accumulates", "two ranks"],
)
def test_what_a_step_in_backward_cannot_wait_for_is_refused(of_engine: dict) -> None:
    model = small_model()
    given = {"groups": ALONE, **of_engine}
    with pytest.raises(ValueError, match=r"in_backward=True with .* before its gradient is whole"):
        LocalEngine(model, torch.optim.AdamW(model.parameters()), in_backward=True, **given)


def apollo_engine(
    seed: int, *, dtype: torch.dtype = torch.float32, in_backward: bool = False, **options: object
) -> LocalEngine:
    model = prepared_llama(ALONE, seed=seed, dtype=dtype)
    groups = parameter_groups(model, embeddings=options.pop("embeddings", "adamw"), weight_decay=0.1)
    optimizer = Apollo(groups, **{"lr": 1e-2, "rank": 5, "update_gap": 2, **options})
    steps = 1 if in_backward else 4
    bf16 = dtype == torch.bfloat16
    return LocalEngine(model, optimizer, ALONE, accumulation_steps=steps, bf16=bf16, in_backward=in_backward)


def apollo_step(engine: LocalEngine, step: int) -> None:
    if engine.accumulation_steps > 1:
        engine_step(engine, ALONE, step, 1e-2)
        return
    ids = torch.randint(0, 131, (1, 37), generator=torch.Generator().manual_seed(step))
    engine.begin_step(1e-2)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step(1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale_type": "tensor", "rank": 1, "embeddings": "low_rank"},
        {"embeddings": "adamw_8bit"},
        {"embeddings": "factored"},
        {"dtype": torch.bfloat16, "embeddings": "low_rank"},
        {"dtype": torch.bfloat16, "rounding": "master"},
        {"dtype": torch.bfloat16, "in_backward": True, "embeddings": "low_rank"},
    ],
    ids=["channel", "mini", "8-bit", "factored", "bf16", "bf16 with masters", "bf16 in backward"],
)
def test_apollo_goes_on_bit_for_bit(tmp_path: Path, options: dict) -> None:
    """From the middle of a projection's steps; moments stay float32, whatever the weights are."""
    first = apollo_engine(0, **options)
    for step in range(3):
        apollo_step(first, step)
    first.save(tmp_path)
    second = apollo_engine(1, **options)
    second.load(tmp_path)
    for step in (3, 4):
        for engine in (first, second):
            apollo_step(engine, step)
    wanted, moved = weights_of(first.module), weights_of(apollo_engine(0, **options).module)
    for name, weight in weights_of(second.module).items():
        assert weight.dtype == options.get("dtype", torch.float32)
        assert torch.equal(weight, wanted[name]), name
        assert not torch.equal(weight, moved[name]) or "norm" in name
    states = second._optimizer.state.values()
    assert {value.dtype for state in states for value in state.values()} <= {torch.float32, torch.uint8}


def test_apollos_states_of_another_rank_are_refused(tmp_path: Path) -> None:
    engine = apollo_engine(0)
    apollo_step(engine, 0)
    engine.save(tmp_path)
    with pytest.raises(ValueError, match=r"of rank 4 .* another rank"):
        apollo_engine(0, rank=4).load(tmp_path)
