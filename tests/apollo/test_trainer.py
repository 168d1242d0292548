"""`Apollo` under Hugging Face's Trainer: an own loop's steps, on one process and on several, and resumed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import run_cases
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from training_samples import VOCAB, tiny_llama, weights_of
from transformers import Trainer, TrainingArguments

from longseq.apollo import Apollo, parameter_groups
from longseq.apollo.trainer import trainer_optimizer
from longseq.distributed import ProcessGroups, apply_ulysses
from longseq.distributed.apollo_trainer import LayOutApollo
from longseq.distributed.trainer import SequenceParallelMixin
from longseq.mst import apply_mini_sequence

STEPS, ROWS_OF_A_STEP, STOP = 5, 4, 3
# An epsilon this large keeps AdamW, which norms get, from blowing a gradient's rounding up to a whole step.
OPTIONS = {"rank": 6, "update_gap": 2, "eps": 1e-4, "embeddings": "low_rank"}
MINI = {"scale_type": "tensor", "update_gap": 2, "eps": 1e-4, "embeddings": "low_rank"}


def rows() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB, (STEPS * ROWS_OF_A_STEP, 33), generator=draw)
    return [{"input_ids": one, "labels": one} for one in ids]


def arguments(folder: Any, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": ROWS_OF_A_STEP,
            "train_sampling_strategy": "sequential",
            "learning_rate": 0.02,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.1,
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        },
    )


def train(
    folder: Any,
    *,
    options: dict[str, Any] = OPTIONS,
    model: nn.Module | None = None,
    resume: Any = None,
    **of_args: Any,
) -> Trainer:
    """A run of the Trainer on this process."""
    args = arguments(folder, **of_args)
    trainer = Trainer(
        tiny_llama() if model is None else model,
        args,
        train_dataset=rows(),
        optimizer_cls_and_kwargs=trainer_optimizer(args, **options),
        callbacks=[LayOutApollo()],  # which has nothing to do here
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_near(ours: dict[str, Tensor], truth: dict[str, Tensor], absolute: float) -> None:
    off = {name: float((ours[name].double() - truth[name].double()).abs().max()) for name in truth}
    assert max(off.values()) <= absolute, off


def own_loop() -> dict[str, Tensor]:
    """The same steps without the Trainer."""
    model = tiny_llama()
    groups = parameter_groups(model, embeddings="low_rank", weight_decay=0.1)
    optimizer = Apollo(groups, 0.02, rank=6, update_gap=2, eps=1e-4, seed=42)
    data = rows()
    for start in range(0, len(data), ROWS_OF_A_STEP):
        ids = torch.stack([row["input_ids"] for row in data[start : start + ROWS_OF_A_STEP]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """The run that others are compared with."""
    return train(tmp_path_factory.mktemp("plain"))


def test_it_takes_the_steps_of_an_own_loop(plain: Trainer) -> None:
    assert_near(weights_of(plain.model), own_loop(), 1e-6)
    assert losses(plain)[-1] < losses(plain)[0]


def test_an_optimizer_that_was_made_before_is_the_same(plain: Trainer, tmp_path: Path) -> None:
    model = tiny_llama()
    groups = parameter_groups(model, embeddings="low_rank", weight_decay=0.1)
    optimizer = Apollo(groups, 0.02, rank=6, update_gap=2, eps=1e-4, seed=42)
    Trainer(model, arguments(tmp_path), train_dataset=rows(), optimizers=(optimizer, None)).train()
    assert_near(weights_of(model), weights_of(plain.model), 0.0)


def test_the_arguments_reach_it_and_options_come_before_them(tmp_path: Path) -> None:
    args = arguments(tmp_path, learning_rate=0.25, adam_beta1=0.5, adam_beta2=0.75, seed=9)
    make, options = trainer_optimizer(args, rank=3, overrides={"q_proj": "adamw"}, weight_decay=0.5)
    optimizer = make()(tiny_llama(), **options)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["seed"], group["rank"]) == (0.25, (0.5, 0.75), 9, 3)
        assert group["eps"] == 1e-6
        are_matrices = {param.dim() >= 2 for param in group["params"]}
        assert are_matrices == {group["weight_decay"] == 0.5}
        assert all(group["rule"] == "adamw" for name in group["names"] if "q_proj" in name)


@pytest.mark.parametrize("options", [OPTIONS, MINI], ids=["apollo", "apollo-mini"])
def test_it_goes_on_from_a_checkpoint_bit_for_bit(tmp_path: Path, options: dict) -> None:
    """`optimizer.pt` is loaded with weights_only; the projection is one that began before the stop."""
    saving = {"save_strategy": "steps", "save_steps": STOP, "options": options}
    whole = train(tmp_path, **saving)
    other = tiny_llama(seed=7)
    resumed = train(tmp_path, model=other, resume=tmp_path / f"checkpoint-{STOP}", **saving)
    assert losses(resumed)[STOP:] == losses(whole)[STOP:]
    assert_near(weights_of(resumed.model), weights_of(whole.model), 0.0)
    states = resumed.optimizer.optimizer.state.values()
    assert {int(state["step"]) for state in states} == {STEPS}


def test_accumulation_adds_up_to_the_same_step(plain: Trainer, tmp_path: Path) -> None:
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": ROWS_OF_A_STEP}
    assert_near(weights_of(train(tmp_path, **split).model), weights_of(plain.model), 2e-6)


def test_bf16_is_autocast_over_float32_weights(plain: Trainer, tmp_path: Path) -> None:
    trainer = train(tmp_path, bf16=True)
    assert losses(trainer) != losses(plain)
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-2)
    assert {param.dtype for param in trainer.model.parameters()} == {torch.float32}
    for state in trainer.optimizer.optimizer.state.values():
        assert {value.dtype for value in state.values()} == {torch.float32}


@pytest.mark.parametrize("is_finite", [True, False])
def test_loss_scaling_gives_the_same_step_or_none(is_finite: bool) -> None:
    """What the Trainer does with fp16, on a GPU alone."""
    scaled, plain = (nn.Parameter(torch.linspace(-1, 1, 77).view(7, 11)) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for weight in (scaled, plain):
        optimizer = Apollo([("w", weight)], 0.1, rank=3)
        loss = weight.square().sum() * (1.0 if is_finite else torch.inf)
        if weight is scaled:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        elif is_finite:
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=0)


# On two processes.


class Ranks(SequenceParallelMixin, Trainer):
    """Where ranks share a sequence."""


def forget_accelerate() -> None:
    """accelerate keeps what the last Trainer of this process asked for."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    # It looks for these even where the process group is there.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", LOCAL_WORLD_SIZE=os.environ["WORLD_SIZE"])


def fsdp2_case() -> dict[str, Any]:
    """What the Trainer does with FSDP2: accelerate puts shards in the place of an optimizer's parameters.

    Only on GPUs does it let itself be asked, so it is told afterwards.
    """
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

    forget_accelerate()
    make, options = trainer_optimizer(arguments(tempfile.gettempdir()), **OPTIONS)
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    model = tiny_llama()
    model, optimizer = accelerator.prepare(model, make()(model, **options))
    held = [param for group in optimizer.param_groups for param in group["params"]]
    assert all(isinstance(param, DTensor) for param in held)
    ids = torch.stack([row["input_ids"] for row in rows()]).view(STEPS, 2, ROWS_OF_A_STEP // 2, -1)
    for batch in ids[:, accelerator.process_index]:
        accelerator.backward(model(input_ids=batch, labels=batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": {name: param.full_tensor().detach() for name, param in model.named_parameters()}}


def case(
    stage: int | None = None,
    sp_size: int | None = None,
    folder: str | None = None,
    resumes: bool = False,
    given: bool = False,
    laid_out: bool = True,
    refused: str = "",
    options: dict[str, Any] = OPTIONS,
    **of_args: Any,
) -> dict[str, Any]:
    """The same run on this rank's share."""
    forget_accelerate()
    if stage is not None:
        from longseq.distributed.zero import init_deepspeed_communication

        init_deepspeed_communication()
        of_args["deepspeed"] = {
            "zero_optimization": {"stage": stage},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    rows_of_a_rank = ROWS_OF_A_STEP if sp_size else ROWS_OF_A_STEP // 2
    with tempfile.TemporaryDirectory() as temporary:
        args = arguments(folder or temporary, per_device_train_batch_size=rows_of_a_rank, **of_args)
        model = tiny_llama(seed=7 if resumes else 0)
        of_trainer: dict[str, Any] = {"callbacks": [LayOutApollo()] if laid_out else []}
        if given:
            of_trainer["optimizers"] = (Apollo(parameter_groups(model)), None)
        else:
            of_trainer["optimizer_cls_and_kwargs"] = trainer_optimizer(args, **options)
        if sp_size:
            groups = ProcessGroups.create(sp_size)
            apply_ulysses(model, groups)
            apply_mini_sequence(model, tile_tokens=10)
            trainer = Ranks(model, args, groups=groups, train_dataset=rows(), **of_trainer)
        else:
            trainer = Trainer(model, args, train_dataset=rows(), **of_trainer)
        if refused:
            with pytest.raises((ValueError, RuntimeError), match=refused):
                trainer.train()
            return {}
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{STOP}" if resumes else None)
        return {"losses": losses(trainer), "weights": whole_weights(trainer.model)}


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    if not any(hasattr(param, "ds_id") for param in model.parameters()):
        return weights_of(model)
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return weights_of(model)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    saving = {"save_strategy": "steps", "save_steps": STOP}
    cases: dict[str, Any] = {"fsdp2": (fsdp2_case, {}), "ddp": (case, {})}
    for stage in (1, 2, 3):
        folder = str(tmp_path_factory.mktemp(f"zero{stage}"))
        run = {"stage": stage, "folder": folder, **saving}
        cases |= {f"zero{stage}": (case, run), f"zero{stage} resumed": (case, {**run, "resumes": True})}
    cases["zero3, ulysses"] = (case, {"stage": 3, "sp_size": 2})
    cases["zero2, mini"] = (case, {"stage": 2, "options": MINI})
    cases["not laid out"] = (case, {"stage": 2, "laid_out": False, "refused": "lay_out_apollo"})
    cases["dropped"] = (
        case,
        {"stage": 1, "given": True, "refused": r"not Apollo: .*optimizer_cls_and_kwargs"},
    )
    return run_cases(2, cases)


@pytest.mark.slow  # two processes import transformers and DeepSpeed, once for all of these
@pytest.mark.parametrize("name", ["ddp", "zero1", "zero2", "zero3", "zero3, ulysses"])
def test_two_processes_train_as_one(two: dict, plain: Trainer, name: str) -> None:
    """To float32's rounding."""
    for rank in two[name]:
        assert rank["losses"] == pytest.approx(losses(plain), rel=1e-6)
        assert_near(rank["weights"], weights_of(plain.model), 2e-6)


@pytest.mark.slow  # as above
def test_fsdp2_takes_the_steps_of_one_process(two: dict, plain: Trainer) -> None:
    for rank in two["fsdp2"]:
        assert_near(rank["weights"], weights_of(plain.model), 2e-6)


@pytest.mark.slow  # as above
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_goes_on_from_a_checkpoint_bit_for_bit(two: dict, stage: int) -> None:
    for resumed, whole in zip(two[f"zero{stage} resumed"], two[f"zero{stage}"], strict=True):
        assert resumed["losses"] == whole["losses"]
        assert_near(resumed["weights"], whole["weights"], 0.0)


@pytest.mark.slow  # as above
def test_two_processes_train_as_one_with_mini(two: dict, tmp_path: Path) -> None:
    alone = train(tmp_path, options=MINI)
    for rank in two["zero2, mini"]:
        # Twice the bound of the others: the rounding of a tensor's one scale is in each of its weights.
        assert_near(rank["weights"], weights_of(alone.model), 4e-6)
