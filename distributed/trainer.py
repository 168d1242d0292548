"""Sequence parallelism under Hugging Face's Trainer: the numbers of one process, whatever the degree.

The Trainer takes every process for a data-parallel one. Where ranks share a sequence, four things must be
told otherwise: which samples a rank reads (those of its sequence), what it computes on (its shard, with
labels shifted before the cut), what its loss is divided by, and what counts as one sample. Nothing else is
changed: optimizer, schedule, clipping, checkpoints, logging, DDP and DeepSpeed are the Trainer's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .groups import ProcessGroups
from .loss import count_tokens, global_token_loss
from .sequence import IGNORE_INDEX, shard_batch


class SequenceParallelMixin:
    """Makes a Trainer of causal language models right where ranks share a sequence.

    It stands before the Trainer: `class UlyssesTrainer(SequenceParallelMixin, Trainer): ...`. The model has
    `apply_ulysses(model, groups)` behind it. Batch sizes count sequences: a step takes
    `per_device_train_batch_size * gradient_accumulation_steps * groups.dp_size` of them. The loss is the mean
    over all valid tokens of the step; `eval_loss` is what one process with the same
    `per_device_eval_batch_size` reports.

    A batch has `input_ids` and unshifted `labels`, perhaps `position_ids`, `document_offsets` (with
    `remove_unused_columns=False`), and an `attention_mask` whose padding is on the right.

    Args:
        *args: The Trainer's.
        groups: The process groups, made after `TrainingArguments`, which starts the processes' group.
        **kwargs: The Trainer's.

    Raises:
        ValueError: Something that would make other numbers, or that needs a sequence's whole logits.
    """

    def __init__(self, *args: Any, groups: ProcessGroups, **kwargs: Any) -> None:
        self.sequence_groups = groups
        self._train_samples = 0  # of an epoch; 0 where that is not known
        super().__init__(*args, **kwargs)
        self._check_settings()
        # The loss that `compute_loss` returns is divided by the tokens of the whole step already.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def _check_settings(self) -> None:
        groups, args = self.sequence_groups, self.args
        if args.world_size != groups.world_size or args.n_gpu > 1:
            raise ValueError(
                f"groups are of {groups.world_size} processes and the Trainer runs {args.world_size}, with "
                f"{args.n_gpu} GPUs each; start one process a GPU (torchrun), and make the groups after "
                "TrainingArguments."
            )
        refused = {
            "compute_loss_func": self.compute_loss_func is not None,
            "label_smoothing_factor": bool(args.label_smoothing_factor),
            "compute_metrics": self.compute_metrics is not None,
            "parallelism_config": getattr(args, "parallelism_config", None) is not None,
            "split_batches": args.accelerator_config.split_batches,
            "train_sampling_strategy='batch_rebalance'": getattr(args, "train_sampling_strategy", "")
            == "batch_rebalance",
            "output_router_logits": getattr(self.model.config, "output_router_logits", False),
        }
        asked = [name for name, is_set in refused.items() if is_set]
        if asked:
            raise ValueError(
                f"{', '.join(asked)}: not offered where ranks share a sequence; the loss is the mean "
                "cross-entropy over all tokens of a step, and no rank has a sequence's logits. Leave it out."
            )
        sizes = {
            layer.longseq_attention.sp_size
            for layer in self.model.modules()
            if hasattr(layer, "longseq_attention")
        }
        if groups.sp_size > 1 and sizes != {groups.sp_size}:
            raise ValueError(
                f"{groups.sp_size} ranks share a sequence, but the model's attention sees one rank's shard "
                "alone; call apply_ulysses(model, groups) before the Trainer is made."
            )

    # Which samples a rank reads.

    def get_train_dataloader(self) -> Any:
        """The Trainer's, dealt out to sequences instead of ranks; so are the next two."""
        loader = super().get_train_dataloader()
        self._train_samples = self._samples_of_an_epoch(loader)
        return self._dealt_to_sequences(loader)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        return self._dealt_to_sequences(super().get_eval_dataloader(*args, **kwargs))

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        return self._dealt_to_sequences(super().get_test_dataloader(*args, **kwargs))

    def _dealt_to_sequences(self, loader: Any) -> Any:
        groups = self.sequence_groups
        if groups.world_size == 1:
            return loader
        # accelerate wraps one of the two in a class that picks a process's share.
        for share in (getattr(loader, "batch_sampler", None), getattr(loader, "dataset", None)):
            if hasattr(share, "num_processes") and hasattr(share, "process_index"):
                _seed_workers_by(groups.dp_rank, loader)
                share.num_processes, share.process_index = groups.dp_size, groups.dp_rank
                if groups.dp_size == 1:
                    share.even_batches = False  # one process would not fill its last batch up either
                return loader
        raise ValueError(
            f"{type(loader).__name__} cannot be dealt out to sequences; take a dataset with a length, or an "
            "iterable one of torch's with accelerator_config={'dispatch_batches': False}."
        )

    def _samples_of_an_epoch(self, loader: Any) -> int:
        """What is drawn of a dataset is for its sampler to say: it may take some rows, or some twice."""
        of_all_ranks = getattr(loader.batch_sampler, "batch_sampler", None)
        try:
            return len(getattr(of_all_ranks, "sampler", self.train_dataset))
        except TypeError:  # a sampler or a dataset without a length
            return 0

    def get_total_train_batch_size(self, args: Any) -> int:
        """Sequences of an optimizer step."""
        return self._train_batch_size * args.gradient_accumulation_steps * self.sequence_groups.dp_size

    # What its loss is.

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """The micro batches of a step, whole, and the valid labels of the step over all ranks."""
        left_over = self._rows_left_over()
        batches = [
            self._without_repeats(batch, self._train_batch_size, left_over)
            for batch in islice(epoch_iterator, num_batches)
        ]
        self._require_same_samples(batches, device)
        shifted = (self._shard(batch)["shift_labels"] for batch in batches)
        return batches, count_tokens(shifted, self.sequence_groups, device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | float | None = None,
    ) -> Any:
        """This rank's part of the step's mean loss, for a reducer that averages over all ranks.

        DDP does, and so does DeepSpeed in every ZeRO stage: it is told nothing of sequence parallelism.
        """
        if num_items_in_batch is None:
            raise ValueError("num_items_in_batch is needed: the valid labels of the step, over all ranks.")
        nll_sum, _, outputs = self._summed_nll(model, inputs)
        world = float(self.sequence_groups.world_size)
        loss = global_token_loss(nll_sum, num_items_in_batch, reducer_divisor=world)
        return (loss, outputs) if return_outputs else loss

    def _summed_nll(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Any]:
        """Summed loss and number of labels of this rank's shard, and the model's output."""
        shard = self._shard(inputs)
        # transformers' own loss is made for `labels` alone, and then of `shift_labels` where they are given.
        outputs = model(**shard, labels=shard["shift_labels"], num_items_in_batch=1)
        nll_sum = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
        return nll_sum, (shard["shift_labels"] != IGNORE_INDEX).sum(), outputs

    def _shard(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        batch = dict(inputs)
        mask = batch.pop("attention_mask", None)
        if mask is not None:
            if mask.dim() != 2 or (mask.long().diff(dim=1) > 0).any():
                raise ValueError(
                    f"attention_mask {tuple(mask.shape)} must be (B, L) with its padding on the right; set "
                    "padding_side='right', or leave the mask out."
                )
            batch["labels"] = batch["labels"].masked_fill(mask == 0, IGNORE_INDEX)
        return shard_batch(batch, self.sequence_groups)

    # What counts as one sample.

    def _rows_left_over(self) -> int:
        """Rows of an epoch that do not fill a batch of every sequence; 0 where that is not known."""
        if self.args.dataloader_drop_last:
            return 0
        return self._train_samples % (self._train_batch_size * self.sequence_groups.dp_size)

    def _without_repeats(self, batch: Mapping[str, Any], batch_size: int, left_over: int) -> dict[str, Any]:
        """Take the labels from rows that accelerate put in twice, to fill the ranks' last batches up."""
        batch = dict(batch)
        missing = [name for name in ("input_ids", "labels") if name not in batch]
        if missing:
            raise ValueError(
                f"a batch has no {' and no '.join(missing)}, only {sorted(batch)}: the loss is made of both. "
                "Take a collator that makes labels: data_collator=DataCollatorForLanguageModeling(tokenizer, "
                "mlm=False)."
            )
        groups, rows = self.sequence_groups, batch["labels"].shape[0]
        is_last = self.accelerator.gradient_state.end_of_dataloader
        if groups.dp_size > 1 and is_last and left_over > 0 and rows == batch_size:
            real = max(0, left_over - groups.dp_rank * batch_size)
            batch["labels"] = batch["labels"].clone()
            batch["labels"][real:] = IGNORE_INDEX
        return batch

    def _require_same_samples(self, batches: Iterable[Mapping[str, Any]], device: torch.device) -> None:
        groups = self.sequence_groups
        if groups.sp is None:
            return
        mine = _fingerprint(batches).to(device)
        both = torch.stack([mine, -mine])
        dist.all_reduce(both, dist.ReduceOp.MAX, group=groups.sp)
        largest, smallest = both[0], -both[1]
        if largest != smallest:
            first = groups.rank - groups.sp_rank
            raise ValueError(
                f"ranks {first} to {first + groups.sp_size - 1} share a sequence but have read different "
                "samples; seed whatever the dataset or the collator draws by groups.dp_rank, not by the rank."
            )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, with each sequence's loss counted once."""
        self.gather_function = self._gather_once
        return super().evaluation_loop(*args, **kwargs)

    def _gather_once(self, losses: Tensor) -> Tensor:
        groups, state = self.sequence_groups, self.accelerator.gradient_state
        by_rank = self.accelerator.gather(losses).unflatten(0, (groups.dp_size, groups.sp_size, -1))
        losses = by_rank[:, 0].flatten()
        return losses[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else losses

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The mean loss over the tokens of a batch, the same on all ranks that share it."""
        if not prediction_loss_only:
            raise ValueError(
                "predictions are not gathered where ranks share a sequence; evaluate with the loss alone "
                "(prediction_loss_only=True), or predict on one process."
            )
        left_over = self.accelerator.gradient_state.remainder
        inputs = self._without_repeats(self._prepare_inputs(inputs), self.args.eval_batch_size, left_over)
        self._require_same_samples([inputs], self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            nll_sum, count, _ = self._summed_nll(model, inputs)
        totals = torch.stack([nll_sum.double(), count.double()])
        if self.sequence_groups.sp is not None:
            dist.all_reduce(totals, group=self.sequence_groups.sp)
        return totals[0] / totals[1].clamp(min=1), None, None

    def _track_num_input_tokens(self, inputs: Mapping[str, Any]) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)  # sums over ranks what those of a sequence all have
        counted = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + counted // self.sequence_groups.sp_size

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> float:
        """This rank's share of a sequence's."""
        return super().floating_point_ops(inputs) / self.sequence_groups.sp_size


def _seed_workers_by(dp_rank: int, loader: Any) -> None:
    """Let the workers of all ranks of a sequence draw alike: transformers seeds each rank's differently."""
    loader = getattr(loader, "base_dataloader", loader)  # accelerate's own only hands its attributes on
    seed = loader.worker_init_fn
    if isinstance(seed, partial) and "rank" in seed.keywords:
        loader.worker_init_fn = partial(seed.func, *seed.args, **{**seed.keywords, "rank": dp_rank})


def _fingerprint(batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """An int64 that differs, but for chance, where ids or labels of any batch do."""
    total = torch.zeros((), dtype=torch.long)
    for batch in batches:
        for name in ("input_ids", "labels"):
            words = batch[name].flatten().long()
            places = torch.arange(1, 2 * words.numel(), 2, device=words.device)
            total = total.to(words.device) * 1_000_003 + (words * places).sum() + words.numel()
    return total
