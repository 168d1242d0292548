"""Models with mini-sequences in data-parallel training: DDP by hand, by accelerate and by the Trainer."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo import run_cases
from torch import Tensor, nn
from training_samples import VOCAB, tiny_llama, weights_of

from longseq.mst import apply_mini_sequence
from longseq.mst.placement import Placement

# Two processes are started, which import accelerate.
pytestmark = pytest.mark.slow

WORLD = 2
LENGTHS = (37, 50, 9, 26, 44, 12)
"""Of the rows; one rank's is of another length, and so of another number of tiles, than the other's."""


def make_rows() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(1, VOCAB, (length,), generator=draw)
        labels = ids.clone()
        labels[: length // 3] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def make_model(adapters: bool = False, tie: bool = False) -> nn.Module:
    model = tiny_llama(torch.float64, num_hidden_layers=4, tie_word_embeddings=tie)
    if not adapters:
        return model
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "up_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def num_items(rows: list[dict[str, Tensor]]) -> int:
    return sum(int((row["labels"][1:] != -100).sum()) for row in rows)


def nll_over(model: nn.Module, row: dict[str, Tensor], items: float) -> Tensor:
    return model(**{name: value[None] for name, value in row.items()}, num_items_in_batch=items).loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


def ddp_case(
    options: dict[str, Any] | None = None,
    wrapping: dict[str, Any] | None = None,
    model_options: dict[str, Any] | None = None,
    rounds: int = 1,
    wrap_first: bool = False,
) -> dict:
    """Gradients after an accumulation of `rounds` batches, twice, and how often each was handed out."""
    model = make_model(**(model_options or {}))
    if not wrap_first:
        apply_mini_sequence(model, tile_tokens=10, **(options or {}))
    ddp = nn.parallel.DistributedDataParallel(model, **(wrapping or {}))
    if wrap_first:
        apply_mini_sequence(model, tile_tokens=10, **(options or {}))
    handed_out: Counter = Counter()
    for name, param in model.named_parameters():
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(lambda _, name=name: handed_out.update([name]))
    rows = make_rows()[: rounds * WORLD]
    for _ in range(2):
        model.zero_grad()
        for number in range(rounds):
            last = number == rounds - 1
            with nullcontext() if last else ddp.no_sync():
                # DDP divides by the ranks.
                nll_over(ddp, rows[number * WORLD + dist.get_rank()], num_items(rows) / WORLD).backward()
    return {"grads": gradients(model), "counts": dict(handed_out), "passes": 2 * rounds}


def fresh_accelerate() -> None:
    """Forget what an earlier case asked accelerate for, and name what it looks for beside the group."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    if dist.is_initialized():
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def accelerate_case(precision: str = "no") -> dict:
    """Two steps of two batches each, by accelerate's own loop."""
    from accelerate import Accelerator

    fresh_accelerate()
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model = make_model() if precision == "no" else make_model().float()
    apply_mini_sequence(model, tile_tokens=10)
    rows = make_rows()[:4]
    loader = torch.utils.data.DataLoader(rows, batch_size=1, collate_fn=lambda batch: batch[0])
    wrapped, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=3.0), loader
    )
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    for _ in range(2):
        for row in loader:
            with accelerator.accumulate(wrapped):
                # Divided by the ranks and, by accelerate, by the batches of a step.
                accelerator.backward(nll_over(wrapped, row, num_items(rows) / WORLD / 2))
                optimizer.step()
                optimizer.zero_grad()
    assert accelerator.unwrap_model(wrapped) is model
    state = accelerator.get_state_dict(wrapped)
    assert state.keys() == make_model().state_dict().keys()
    row = {name: value[None] for name, value in rows[0].items()}
    return {"weights": weights_of(model), "loss": accelerator.unwrap_model(wrapped)(**row).loss.detach()}


def trainer_case(apply: bool, **options: Any) -> dict:
    """Three steps of two rows each, however many processes share them."""
    from transformers import Trainer, TrainingArguments

    fresh_accelerate()
    model = make_model()
    if apply:
        apply_mini_sequence(model, tile_tokens=10)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=3,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=WORLD // world_size,
            optim="sgd",
            learning_rate=3.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **options,
        )
        trainer = Trainer(model, arguments, train_dataset=make_rows())
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"weights": weights_of(model), "losses": losses}


BY_DDP: dict[str, dict[str, Any]] = {
    "as it is": {},
    "find_unused_parameters": {"wrapping": {"find_unused_parameters": True}},
    "static_graph": {"wrapping": {"static_graph": True}},
    "views of buckets": {"wrapping": {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.01}},
    "accumulated by no_sync": {"rounds": 3},
    "attention by groups, saved": {"options": {"head_groups": 2, "save_attention": True}},
    "layers rebuilt": {"options": {"checkpoints": Placement(every=2, host=False)}},
    "layers rebuilt, find_unused_parameters": {
        "options": {"checkpoints": Placement(every=3, host=False)},
        "wrapping": {"find_unused_parameters": True},
    },
    "tied embeddings": {"model_options": {"tie": True}},
    "adapters": {"model_options": {"adapters": True}},
    "adapters, find_unused_parameters": {
        "model_options": {"adapters": True},
        "wrapping": {"find_unused_parameters": True},
    },
    "applied to a wrapped model": {"wrap_first": True},
}
BY_TRAINER: dict[str, dict[str, Any]] = {
    "as it is": {},
    "checkpoints": {"gradient_checkpointing": True},
    "find_unused_parameters": {"ddp_find_unused_parameters": True},
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list]:
    cases: dict[str, Any] = {name: (ddp_case, kwargs) for name, kwargs in BY_DDP.items()}
    cases |= {f"Trainer, {name}": (trainer_case, {"apply": True, **run}) for name, run in BY_TRAINER.items()}
    cases["accelerate"] = (accelerate_case, {})
    cases["accelerate in bf16"] = (accelerate_case, {"precision": "bf16"})
    return run_cases(WORLD, cases)


def close(got: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float = 1e-5) -> None:
    """transformers' own loss, which the truth is made with, is float32."""
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=rtol * scale, msg=name)


@pytest.mark.parametrize("name", BY_DDP)
def test_ranks_get_the_gradients_of_one_process(outcomes: dict[str, list], name: str) -> None:
    case = BY_DDP[name]
    model, rows = make_model(**case.get("model_options", {})), make_rows()[: WORLD * case.get("rounds", 1)]
    for row in rows:
        nll_over(model, row, num_items(rows)).backward()
    wanted = gradients(model)
    assert wanted
    for rank in outcomes[name]:
        close(rank["grads"], wanted)
        assert all(torch.equal(grad, outcomes[name][0]["grads"][key]) for key, grad in rank["grads"].items())


@pytest.mark.parametrize("name", BY_DDP)
def test_each_gradient_is_handed_out_once_a_backward(outcomes: dict[str, list], name: str) -> None:
    for rank in outcomes[name]:
        assert set(rank["counts"]) == set(rank["grads"])
        assert set(rank["counts"].values()) == {rank["passes"]}


def test_accelerate_takes_the_steps_of_one_process(outcomes: dict[str, list]) -> None:
    model, rows = make_model(), make_rows()[:4]
    start, optimizer = weights_of(model), torch.optim.SGD(model.parameters(), lr=3.0)
    for _ in range(2):
        for row in rows:
            nll_over(model, row, num_items(rows)).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name: weight - start[name] for name, weight in weights_of(model).items()}
    for case, rtol in (("accelerate", 1e-5), ("accelerate in bf16", 0.1)):
        for rank in outcomes[case]:
            got = {name: weight.double() - start[name] for name, weight in rank["weights"].items()}
            close(got, moved, rtol)
    assert outcomes["accelerate"][0]["loss"] == outcomes["accelerate"][1]["loss"]


@pytest.mark.parametrize("name", BY_TRAINER)
def test_the_trainer_takes_the_steps_of_one_process(outcomes: dict[str, list], name: str) -> None:
    start, wanted = weights_of(make_model()), trainer_case(apply=False)
    moved = {key: weight - start[key] for key, weight in wanted["weights"].items()}
    for rank in outcomes[f"Trainer, {name}"]:
        assert rank["losses"] == pytest.approx(wanted["losses"], rel=1e-6)
        close({key: weight - start[key] for key, weight in rank["weights"].items()}, moved)


@pytest.mark.parametrize("keep", [True, False])
def test_unwrapped_from_autocast_it_still_runs(keep: bool) -> None:
    from accelerate import Accelerator

    fresh_accelerate()
    model, row = make_model().float(), make_rows()[0]
    wanted = nll_over(model, row, 10)
    apply_mini_sequence(model, tile_tokens=10)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    unwrapped = accelerator.unwrap_model(accelerator.prepare(model), keep_fp32_wrapper=keep)
    torch.testing.assert_close(nll_over(unwrapped, row, 10), wanted, rtol=1e-2 if keep else 1e-6, atol=0)
    output = unwrapped(**{name: value[None] for name, value in row.items()})
    assert output.logits is None  # by mini-sequences as before
