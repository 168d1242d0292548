"""`apply_mini_sequence` under Hugging Face's Trainer: nothing else changes, no number comes out otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numerics import assert_as_accurate_as
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from training_samples import VOCAB, tiny_llama, weights_of
from transformers import DataCollatorWithFlattening, LlamaForCausalLM, Trainer, TrainingArguments

from longseq.mst import apply_mini_sequence
from longseq.mst.placement import Placement

LENGTHS = (37, 20, 50, 31, 9, 44, 2, 28, 33, 12, 47, 5, 26, 40, 18, 30, 11, 21)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def make_rows(lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, Tensor]]:
    """Rows of many lengths; the first third of each, and always its first token, carries no loss."""
    draw = torch.Generator().manual_seed(1)
    rows = []
    for length in lengths:
        ids = torch.randint(1, VOCAB, (length,), generator=draw)
        labels = ids.clone()
        labels[: length // 3 + 1] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def padded(side: str) -> Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]:
    """A collator with a mask."""

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)

        def stack(tensors: list[Tensor], value: int) -> Tensor:
            missing = [(width - len(one), 0) if side == "left" else (0, width - len(one)) for one in tensors]
            return torch.stack(
                [F.pad(one, pad, value=value) for one, pad in zip(tensors, missing, strict=True)]
            )

        ids = [row["input_ids"] for row in rows]
        return {
            "input_ids": stack(ids, 0),
            "labels": stack([row["labels"] for row in rows], -100),
            "attention_mask": stack([torch.ones_like(one) for one in ids], 0),
        }

    return collate


def flattened(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Several documents in one row, told by position ids, as transformers' own collator packs them."""
    lists = [{name: value.tolist() for name, value in row.items()} for row in rows]
    return DataCollatorWithFlattening()(lists)


def truth_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """transformers' loss without its rounding to float32."""
    logits, labels = outputs.logits[:, :-1].double(), labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch


def make_trainer(
    model: nn.Module, folder: Path, *, collate: Callable | None = None, **options: Any
) -> Trainer:
    """Three steps of two rows each, by plain SGD: weights then say what the gradients were."""
    of_trainer = {
        name: options.pop(name)
        for name in ("compute_loss_func", "compute_metrics", "callbacks")
        if name in options
    }
    arguments = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "optim": "sgd",
        "learning_rate": 3.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    return Trainer(
        model,
        TrainingArguments(str(folder), **arguments),
        train_dataset=make_rows(),
        eval_dataset=make_rows((23, 40, 11)),
        data_collator=collate or padded("right"),
        **of_trainer,
    )


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train(model: nn.Module, folder: Path, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and what every weight moved by."""
    start = weights_of(model)
    trainer = make_trainer(model, folder, **options)
    trainer.train()
    assert trainer.state.global_step == 3
    return losses_of(trainer), {name: now - start[name] for name, now in weights_of(model).items()}


def assert_same_training(ours: tuple, truth: tuple) -> None:
    """In float64; the Trainer's log of the losses is float32."""
    assert len(ours[0]) == 3
    assert ours[0] == pytest.approx(truth[0], rel=5e-7)
    assert ours[1].keys() == truth[1].keys()
    for name, moved in ours[1].items():
        torch.testing.assert_close(moved, truth[1][name], rtol=1e-9, atol=1e-12, msg=name)


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "padded on the right": ({"collate": padded("right")}, {}),
    "padded on the left": ({"collate": padded("left")}, {}),
    "without a mask": ({"per_device_train_batch_size": 1, "collate": lambda rows: flattened(rows)}, {}),
    "accumulation of uneven batches": ({"gradient_accumulation_steps": 3}, {}),
    "one row a batch": ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}, {}),
    "transformers' checkpoints": ({"gradient_checkpointing": True}, {}),
    "reentrant checkpoints": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {},
    ),
    "attention by groups of heads": ({}, {"head_groups": 2}),
    "attention saved": ({}, {"save_attention": True}),
    "MLPs alone": ({}, {"checkpoints": "none"}),
    "MLPs alone, transformers' checkpoints": ({"gradient_checkpointing": True}, {"checkpoints": "none"}),
    "the head by mini-sequences": ({}, {"loss": "mini_sequence", "loss_memory_mib": 1}),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_trainer_takes_the_same_steps(name: str, tmp_path: Path) -> None:
    run, options = RUNS[name]
    truth = train(tiny_llama(torch.float64), tmp_path, **run, compute_loss_func=truth_loss)
    assert all(float(moved.abs().max()) > 1e-5 for moved in truth[1].values())
    model = tiny_llama(torch.float64)
    apply_mini_sequence(model, tile_tokens=10, **options)
    # A head by mini-sequences takes its softmax in float32, as transformers does.
    assert_same_training(train(model, tmp_path, **run), truth)


def test_packed_documents_are_as_if_padded(tmp_path: Path) -> None:
    run = {"gradient_accumulation_steps": 2}
    truth = train(tiny_llama(torch.float64), tmp_path, **run, compute_loss_func=truth_loss)
    model = tiny_llama(torch.float64)
    apply_mini_sequence(model, tile_tokens=10, head_groups=2)
    assert_same_training(train(model, tmp_path, **run, collate=flattened), truth)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_low_precision_is_as_near_to_the_truth(precision: str, tmp_path: Path) -> None:
    run = {"bf16": precision == "bfloat16", "gradient_accumulation_steps": 2, "learning_rate": 0.3}
    _, truth = train(
        tiny_llama(torch.float64), tmp_path, **{**run, "bf16": False}, compute_loss_func=truth_loss
    )
    _, plain = train(tiny_llama(), tmp_path, **run)
    model = tiny_llama()
    apply_mini_sequence(model, tile_tokens=10, head_groups=2)
    _, ours = train(model, tmp_path, **run)
    for name, moved in ours.items():
        assert_as_accurate_as(moved, plain[name], truth[name], name=name)


def test_a_loss_of_ones_own_gets_the_logits(tmp_path: Path) -> None:
    """Label smoothing takes the labels out of the batch, as `compute_loss_func` does."""
    truth = train(tiny_llama(torch.float64), tmp_path, label_smoothing_factor=0.1)
    model = tiny_llama(torch.float64)
    apply_mini_sequence(model, tile_tokens=10)
    assert_same_training(train(model, tmp_path, label_smoothing_factor=0.1), truth)


@pytest.mark.parametrize("reentrant", [False, True])
def test_transformers_checkpoints_run_nothing_again(reentrant: bool, tmp_path: Path) -> None:
    def products(**options: Any) -> int:
        model = tiny_llama()
        apply_mini_sequence(model, tile_tokens=10)
        with FlopCounterMode(display=False) as counter:
            train(model, tmp_path, **options)
        return counter.get_total_flops()

    checkpoints = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    assert products(gradient_checkpointing=True, **checkpoints) == products() > 0


def test_adapters_train_as_without(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> nn.Module:
        targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
        model = peft.get_peft_model(
            tiny_llama(torch.float64), peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
        ).double()
        draw = torch.Generator().manual_seed(2)
        for name, param in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(param, std=0.1, generator=draw)
        return model

    run = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    truth = train(adapted(), tmp_path, **run, compute_loss_func=truth_loss)
    model = adapted()
    apply_mini_sequence(model, tile_tokens=10, head_groups=2)
    ours = train(model, tmp_path, **run)
    assert_same_training(ours, truth)
    moved = {name for name, change in ours[1].items() if change.any()}
    assert moved == {name for name in ours[1] if "lora_" in name}


def accuracy(predicted: Any) -> dict[str, float]:
    hits = predicted.predictions[:, :-1].argmax(-1) == predicted.label_ids[:, 1:]
    return {"accuracy": float(hits[predicted.label_ids[:, 1:] != -100].mean())}


def evaluated(model: nn.Module, folder: Path, **options: Any) -> tuple[list[float], list[float], Trainer]:
    """Evaluated in training and after it: losses and accuracies."""
    trainer = make_trainer(model, folder, eval_strategy="steps", eval_steps=1, **options)
    trainer.train()
    trainer.evaluate()
    evals = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evals) == 4
    return [one["eval_loss"] for one in evals], [one.get("eval_accuracy") for one in evals], trainer


def test_evaluation_losses_are_the_same(tmp_path: Path) -> None:
    losses, _, _ = evaluated(tiny_llama(torch.float64), tmp_path)
    model = tiny_llama(torch.float64)
    apply_mini_sequence(model, tile_tokens=10)
    got, _, _ = evaluated(model, tmp_path)
    assert got == pytest.approx(losses, rel=1e-6)
    assert len(set(got)) == 3


@pytest.mark.parametrize("options", [{"loss": "logits"}, {"eval_logits": True}], ids=repr)
def test_metrics_and_predictions_have_logits_where_they_are_asked_for(options: dict, tmp_path: Path) -> None:
    losses, accuracies, trainer = evaluated(tiny_llama(torch.float64), tmp_path, compute_metrics=accuracy)
    wanted = trainer.predict(make_rows((23, 40)))
    model = tiny_llama(torch.float64)
    apply_mini_sequence(model, tile_tokens=10, **options)
    got_losses, got_accuracies, trainer = evaluated(model, tmp_path, compute_metrics=accuracy)
    assert got_losses == pytest.approx(losses, rel=1e-6)
    assert got_accuracies == accuracies
    got = trainer.predict(make_rows((23, 40)))
    tokens = got.label_ids != -100  # padding sees other padding
    np.testing.assert_allclose(got.predictions[tokens], wanted.predictions[tokens], rtol=1e-5, atol=1e-6)


def test_generation_after_training_is_the_same(tmp_path: Path) -> None:
    prompts = padded("left")(make_rows((9, 17)))
    del prompts["labels"]

    def generated(model: nn.Module) -> Tensor:
        model.eval()
        return model.generate(**prompts, max_new_tokens=12, do_sample=False, pad_token_id=0)

    plain, model = tiny_llama(torch.float64), tiny_llama(torch.float64)
    apply_mini_sequence(model, tile_tokens=10)
    before = generated(model)
    assert torch.equal(before, generated(plain))
    for one in (plain, model):
        train(one, tmp_path, learning_rate=30.0)
    wanted = generated(plain)
    assert torch.equal(generated(model), wanted)
    assert not torch.equal(wanted, before)
    assert len(wanted[:, 17:].unique()) > 2
    train(model, tmp_path)  # and it goes on


@pytest.mark.parametrize("by", ["save_model", "save_pretrained"])
def test_what_is_saved_is_a_plain_model(by: str, tmp_path: Path) -> None:
    plain, model = tiny_llama(), tiny_llama()
    apply_mini_sequence(model, tile_tokens=10)
    for name, one in (("plain", plain), ("ours", model)):
        trainer = make_trainer(one, tmp_path)
        trainer.train()
        save = trainer.save_model if by == "save_model" else one.save_pretrained
        save(str(tmp_path / name))
    saved, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "plain"))
    assert {name: one.shape for name, one in saved.items()} == {
        name: one.shape for name, one in wanted.items()
    }
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "ours" / file).read_text() == (tmp_path / "plain" / file).read_text()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in loaded.state_dict().items())
    ids = make_rows()[0]["input_ids"][None]
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-5)
    assert model(ids).logits.dtype == torch.float32


def test_a_resumed_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def trainer_of(seed: int, folder: str) -> Trainer:
        model = tiny_llama(seed=seed)
        apply_mini_sequence(model, tile_tokens=10)
        options = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2, "dataloader_num_workers": 0}
        return make_trainer(model, tmp_path / folder, save_strategy="steps", save_steps=2, **options)

    through, resumed = trainer_of(0, "one"), trainer_of(1, "two")
    through.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    assert losses_of(resumed) == losses_of(through)
    wanted = weights_of(through.model)
    assert all(torch.equal(weight, wanted[name]) for name, weight in weights_of(resumed.model).items())


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = tiny_llama()
    apply_mini_sequence(model, tile_tokens=10)
    # The learning rate is so high that the first step is the best.
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "learning_rate": 300.0}
    trainer = make_trainer(model, tmp_path, save_strategy="steps", load_best_model_at_end=True, **options)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses.index(min(losses)) < 2, "the last must not be the best"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses))


def test_undone_after_training_it_is_the_plain_model(tmp_path: Path) -> None:
    model = tiny_llama()
    handle = apply_mini_sequence(model, tile_tokens=10)
    train(model, tmp_path, bf16=True, gradient_checkpointing=True)
    handle.undo()
    plain = tiny_llama()
    plain.load_state_dict(model.state_dict())
    batch = padded("right")(make_rows((23, 11)))
    out, wanted = model(**batch), plain(**batch)
    torch.testing.assert_close(out.loss, wanted.loss, rtol=1e-2, atol=0)  # accelerate's autocast stays
    assert out.logits is not None


@pytest.mark.parametrize("loss", ["cce", "mini_sequence"])
def test_a_step_whose_labels_do_not_count_does_not_spoil_the_weights(loss: str, tmp_path: Path) -> None:
    def masked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = padded("right")(rows)
        return {**batch, "labels": torch.full_like(batch["labels"], -100)}

    plain, model = tiny_llama(), tiny_llama()
    apply_mini_sequence(model, tile_tokens=10, loss=loss)
    for one in (plain, model):
        _, moved = train(one, tmp_path, collate=masked)
        assert [name for name, change in moved.items() if change.any()] == []


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_rebuilt_layers_are_what_they_were(precision: str, tmp_path: Path) -> None:
    trained = []
    for every in (1, 3):
        model = tiny_llama(num_hidden_layers=5)
        apply_mini_sequence(model, tile_tokens=10, checkpoints=Placement(every=every, host=False))
        trained.append(train(model, tmp_path, bf16=precision == "bfloat16"))
    assert trained[0][0] == trained[1][0]
    assert all(torch.equal(moved, trained[1][1][name]) for name, moved in trained[0][1].items())
