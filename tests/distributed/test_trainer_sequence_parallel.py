"""Hugging Face's Trainer where ranks share a sequence: weights, losses and counts are one process's."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import run_cases
from torch import Tensor, nn
from torch.nn import functional as F
from training_samples import VOCAB, tiny_llama, weights_of

from longseq.distributed import ProcessGroups, apply_ulysses
from longseq.distributed.trainer import SequenceParallelMixin

# Slow: eight processes are started, which import the Trainer.
pytestmark = pytest.mark.slow

LENGTHS = (37, 20, 50, 31, 9, 44, 2, 28, 33, 12, 47, 5, 26)
EVAL_LENGTHS = (23, 40, 11, 30, 7)
COUNTS = ("epoch", "global_step", "num_input_tokens_seen", "max_steps", "total_flos")
# The last batch of an epoch and of the evaluation has one row of two; the fifth step is of a second epoch.
SHARED = {"per_device_train_batch_size": 2}
# A fourth step with one row, which accelerate doubles so that both groups of ranks have one.
SPREAD = {"max_steps": 4, "gradient_accumulation_steps": 2}
# Rows that fill three steps.
STREAMED = {"max_steps": 3, "per_device_train_batch_size": 2, "streamed": True}
# All rows but one, as many as there are steps for: none is left over, though one of the dataset would be.
SAMPLED = {"max_steps": 3, "gradient_accumulation_steps": 2, "sampled": 12}
SAMPLED_ALONE = {**SAMPLED, "gradient_accumulation_steps": 4}
SPREAD_ALONE = {"max_steps": 4, "gradient_accumulation_steps": 4}


# Forked: a function of this module has no name that a new process could find it by.
WORKERS = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "fork"}
DIFFERENT = r"ranks 0 to 1 .* different samples; .* groups\.dp_rank"


def make_rows(lengths: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """Odd lengths; the first third of a row carries no loss, of some rows nothing but the end does."""
    draw = torch.Generator().manual_seed(1)
    rows = []
    for index, length in enumerate(lengths):
        ids = torch.randint(1, VOCAB, (length,), generator=draw)
        labels = ids.clone()
        labels[: length - 1 if index % 4 == 3 else length // 3] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Padded on the right, with a mask."""
    width = max(len(row["input_ids"]) for row in rows)

    def stack(tensors: list[Tensor], value: int) -> Tensor:
        return torch.stack([F.pad(one, (0, width - len(one)), value=value) for one in tensors])

    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": stack(ids, 0),
        "labels": stack([row["labels"] for row in rows], -100),
        "attention_mask": stack([torch.ones_like(one) for one in ids], 0),
    }


def flattened(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All rows in one, told by position ids, as transformers' own collator packs them."""
    from transformers import DataCollatorWithFlattening

    return DataCollatorWithFlattening()([{k: v.tolist() for k, v in row.items()} for row in rows])


def noisy(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Ids that are drawn anew whenever a row is read."""
    batch = collate(rows)
    return {**batch, "input_ids": torch.randint_like(batch["input_ids"], 1, VOCAB)}


def truth_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """transformers' loss without its rounding to float32."""
    logits, labels = outputs.logits[:, :-1].double(), labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch


def results(trainer: Any, model: nn.Module, resume_from: str | None = None) -> dict[str, Any]:
    """Train, evaluate, and say what came of it."""
    trainer.train(resume_from_checkpoint=resume_from)
    logs = trainer.state.log_history
    return {
        "losses": [entry["loss"] for entry in logs if "loss" in entry],
        "rates": [entry["learning_rate"] for entry in logs if "loss" in entry],
        "norms": [float(entry["grad_norm"]) for entry in logs if "loss" in entry],
        "eval": [entry["eval_loss"] for entry in logs if "eval_loss" in entry],
        "again": trainer.evaluate()["eval_loss"],
        **{name: float(getattr(trainer.state, name)) for name in COUNTS},
        "weights": weights_of(model),
    }


def arguments(folder: str, **options: Any) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        folder,
        **{
            "max_steps": 5,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 2,
            "optim": "sgd",
            "learning_rate": 0.5,
            "max_grad_norm": 1e9,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "no",
            "include_num_input_tokens_seen": "all",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        },
    )


def parts() -> dict[str, Any]:
    return {
        "train_dataset": make_rows(LENGTHS),
        "eval_dataset": make_rows(EVAL_LENGTHS),
        "data_collator": collate,
    }


class Stream(torch.utils.data.IterableDataset):
    """Rows without a length."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(make_rows(LENGTHS))


class FirstRows:
    """A Trainer that takes the first rows of its dataset alone."""

    sampled: int

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(range(self.sampled))


def truth(folder: Path, streamed: bool = False, sampled: int | None = None, **options: Any) -> dict:
    """The plain Trainer on a plain model in this process."""
    from transformers import Trainer

    if sampled is not None:
        Trainer = type("SampledTrainer", (FirstRows, Trainer), {"sampled": sampled})
    model = tiny_llama(torch.float64)
    args = arguments(str(folder), **options)
    of_trainer = {**parts(), "train_dataset": Stream()} if streamed else parts()
    return results(Trainer(model, args, compute_loss_func=truth_loss, **of_trainer), model)


def trainer_case(
    sp_size: int,
    dtype: str = "float64",
    deepspeed: int | None = None,
    packed: bool = False,
    noise: bool = False,
    differing: str = "",
    sampled: int | None = None,
    streamed: bool = False,
    refused: str = "",
    stopped_in: str | None = None,
    **options: Any,
) -> dict:
    """The same on this rank's shards."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers import Trainer

    from longseq.mst import apply_mini_sequence

    # accelerate keeps what the last Trainer of this process asked for.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    # It looks for these even where the process group is there.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", LOCAL_WORLD_SIZE=os.environ["WORLD_SIZE"])

    class UlyssesTrainer(SequenceParallelMixin, Trainer):
        pass

    if sampled is not None:
        UlyssesTrainer = type("SampledTrainer", (FirstRows, UlyssesTrainer), {"sampled": sampled})
    if deepspeed is not None:
        from longseq.distributed.zero import init_deepspeed_communication

        init_deepspeed_communication()
        options["deepspeed"] = {
            "zero_optimization": {"stage": deepspeed},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(stopped_in or folder, **options)
        groups = ProcessGroups.create(sp_size)
        model = tiny_llama(getattr(torch, dtype))
        apply_ulysses(model, groups)
        apply_mini_sequence(model, tile_tokens=10)
        of_trainer = parts()
        if packed:
            of_trainer["data_collator"] = flattened
        if noise:
            of_trainer["data_collator"] = noisy
        if streamed:
            of_trainer["train_dataset"] = Stream()
        if differing:
            of_trainer[differing][0]["labels"][20 + groups.rank] = 1
        trainer = UlyssesTrainer(model, args, groups=groups, **of_trainer)
        if refused:
            with pytest.raises(ValueError, match=refused):
                trainer.train()
            return {"state": float(trainer.state.global_step)}
        if stopped_in is not None:  # another run goes on from its second step
            trainer.train()
            model = tiny_llama(getattr(torch, dtype), seed=7)
            apply_ulysses(model, groups)
            trainer = UlyssesTrainer(model, args, groups=groups, **of_trainer)
            return results(trainer, model, f"{stopped_in}/checkpoint-2")
        found = results(trainer, model)
        return {**found, "weights": whole_weights(model)} if deepspeed == 3 else found


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return weights_of(model)


def assert_same(ours: dict, true: dict, *, relative: float, absolute: float, counts: tuple = COUNTS) -> None:
    for name in (*counts, "rates"):
        assert ours[name] == true[name], name
    # The Trainer adds its losses up in float32.
    assert ours["losses"] == pytest.approx(true["losses"], rel=max(relative, 5e-7))
    assert ours["norms"] == pytest.approx(true["norms"], rel=max(relative, 5e-7))
    for name in ("eval", "again"):
        assert ours[name] == pytest.approx(true[name], rel=relative), name
    for name, weight in true["weights"].items():
        torch.testing.assert_close(ours["weights"][name].double(), weight, rtol=0, atol=absolute, msg=name)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    saving = {"save_strategy": "steps", "save_steps": 2}
    stopped = {sp: {"stopped_in": str(tmp_path_factory.mktemp(f"sp{sp}")), **saving} for sp in (1, 2)}
    cases = {
        "sp2 resumed": (trainer_case, {"sp_size": 2, **SHARED, **stopped[2]}),
        "dp2 resumed": (trainer_case, {"sp_size": 1, **SPREAD, **stopped[1]}),
        "sp2": (trainer_case, {"sp_size": 2, **SHARED}),
        "packed": (trainer_case, {"sp_size": 2, "packed": True, **SHARED}),
        "differing": (
            trainer_case,
            {
                "sp_size": 2,
                "differing": "train_dataset",
                "train_sampling_strategy": "sequential",
                "refused": DIFFERENT,
            },
        ),
        "differing eval": (
            trainer_case,
            {"sp_size": 2, "differing": "eval_dataset", "refused": DIFFERENT, **SHARED},
        ),
        "noisy": (trainer_case, {"sp_size": 2, "noise": True, **WORKERS, **SHARED}),
        "sampled": (trainer_case, {"sp_size": 1, **SAMPLED}),
        "dp2": (trainer_case, {"sp_size": 1, **SPREAD}),
        "streamed": (
            trainer_case,
            {"sp_size": 2, "accelerator_config": {"dispatch_batches": False}, **STREAMED},
        ),
        "dispatched": (trainer_case, {"sp_size": 2, "refused": "cannot be dealt out", **STREAMED}),
    }
    for stage in (1, 2, 3):
        kwargs = {"sp_size": 2, "dtype": "float32", "deepspeed": stage, **SHARED}
        cases[f"zero{stage}"] = (trainer_case, kwargs)
    return run_cases(2, cases)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return truth(tmp_path_factory.mktemp("shared"), **SHARED)


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return truth(tmp_path_factory.mktemp("spread"), **SPREAD_ALONE)


def test_two_ranks_of_a_sequence_are_one_process(two: dict, shared: dict) -> None:
    for rank in two["sp2"]:
        assert_same(rank, shared, relative=1e-12, absolute=1e-10)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_under_zero(two: dict, shared: dict, stage: int) -> None:
    """In float32: losses to a few of its roundings, weights to 1e-6 after five steps of 0.5."""
    # Under ZeRO 3 the Trainer counts the floating point operations of the weights that a rank holds.
    counts = COUNTS if stage < 3 else COUNTS[:-1]
    for rank in two[f"zero{stage}"]:
        assert_same(rank, shared, relative=1e-6, absolute=1e-6, counts=counts)


def test_documents_packed_into_one_row(two: dict, shared: dict) -> None:
    for rank in two["packed"]:
        assert_same(rank, shared, relative=1e-12, absolute=1e-10, counts=("epoch", "global_step"))


def test_a_dataset_without_a_length(two: dict, tmp_path: Path) -> None:
    true = truth(tmp_path, **STREAMED)
    for rank in two["streamed"]:
        assert_same(rank, true, relative=1e-12, absolute=1e-10)
    assert two["dispatched"] == [{"state": 0.0}] * 2


def test_ranks_of_a_sequence_that_read_different_samples_stop(two: dict) -> None:
    assert two["differing"] == [{"state": 0.0}] * 2
    assert two["differing eval"] == [{"state": 2.0}] * 2


def test_workers_of_a_sequence_draw_alike(two: dict) -> None:
    first, second = two["noisy"]
    assert_same(first, second, relative=0, absolute=0)


def test_a_sampler_of_another_length_than_the_dataset(two: dict, tmp_path: Path) -> None:
    true = truth(tmp_path, **SAMPLED_ALONE)
    for rank in two["sampled"]:
        assert_same(rank, true, relative=1e-12, absolute=1e-10, counts=("epoch", "max_steps"))


@pytest.mark.parametrize("deal", ["train", "evaluate"])
def test_a_batch_without_labels_is_refused(tmp_path: Path, deal: str) -> None:
    from transformers import Trainer

    class UlyssesTrainer(SequenceParallelMixin, Trainer):
        pass

    unlabelled = {**parts(), "data_collator": lambda rows: {"input_ids": collate(rows)["input_ids"]}}
    trainer = UlyssesTrainer(tiny_llama(), arguments(str(tmp_path)), groups=ProcessGroups(), **unlabelled)
    with pytest.raises(ValueError, match=r"has no labels.*DataCollatorForLanguageModeling\(.*mlm=False\)"):
        getattr(trainer, deal)()


def test_rows_that_fill_up_a_last_batch_count_once(two: dict, spread: dict) -> None:
    for rank in two["dp2"]:
        assert_same(rank, spread, relative=1e-12, absolute=1e-10, counts=("epoch", "max_steps"))


def test_it_goes_on_from_a_checkpoint(two: dict, shared: dict, spread: dict) -> None:
    """With a model that has no mini-sequences: transformers' loss is float32 inside."""
    for rank in two["sp2 resumed"]:
        assert_same(rank, shared, relative=1e-6, absolute=1e-6)
    for rank in two["dp2 resumed"]:
        assert_same(rank, spread, relative=1e-6, absolute=1e-6, counts=("epoch", "max_steps"))


def test_two_sequences_on_two_ranks_each(spread: dict) -> None:
    found = run_cases(4, {"sp2 dp2": (trainer_case, {"sp_size": 2, **SPREAD})})
    for rank in found["sp2 dp2"]:
        assert_same(rank, spread, relative=1e-12, absolute=1e-10, counts=("epoch", "max_steps"))


@pytest.mark.parametrize(
    ("asked", "of_trainer"),
    [
        ({"label_smoothing_factor": 0.1}, {}),
        ({}, {"compute_loss_func": truth_loss}),
        ({}, {"compute_metrics": lambda prediction: {}}),
        ({"accelerator_config": {"split_batches": True}}, {}),
        ({"train_sampling_strategy": "batch_rebalance"}, {}),
    ],
)
def test_what_would_make_other_numbers_is_refused(tmp_path: Path, asked: dict, of_trainer: dict) -> None:
    from transformers import Trainer

    class UlyssesTrainer(SequenceParallelMixin, Trainer):
        pass

    args, model = arguments(str(tmp_path), **asked), tiny_llama()
    word = next(iter({**asked, **of_trainer})).replace("accelerator_config", "split_batches")
    with pytest.raises(ValueError, match=f"{word}.*: not offered"):
        UlyssesTrainer(model, args, groups=ProcessGroups(), **of_trainer, **parts())


def test_groups_of_other_processes_are_refused(tmp_path: Path) -> None:
    from transformers import Trainer

    class UlyssesTrainer(SequenceParallelMixin, Trainer):
        pass

    args = arguments(str(tmp_path))
    with pytest.raises(ValueError, match=r"groups are of 2 processes and the Trainer runs 1"):
        UlyssesTrainer(tiny_llama(), args, groups=ProcessGroups(0, 2), **parts())
