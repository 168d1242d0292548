"""`LocalEngine` on one device: accumulation, clipping, precision, checkpoints, and no step on a NaN."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training_samples import LEARNING_RATES, engine_step, prepared_llama, tiny_llama, weights_of

from longseq.distributed import ProcessGroups
from longseq.distributed.engine import LocalEngine, NonFiniteGradientError

ALONE = ProcessGroups()


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def loss_of(module: nn.Module, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return module(torch.randn(4, 6, generator=draw, dtype=torch.float64)).square().sum()


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
